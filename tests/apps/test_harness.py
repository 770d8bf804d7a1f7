"""lm-eval's tasks: every request against a plain forward pass, several ranks against one, and during training.

lm-eval takes seconds to import: functions do, so that the collection of the tests does not.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from apps.main import train_eval
from apps.main.eval import EvalArgs, launch_eval
from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator, load_consolidated_model_and_tokenizer
from apps.main.hf import export_hf
from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import from_dict
from lingua.tokenizer import build_tokenizer
from tests.helpers.evaluation import NAMES, facts_config, small_model, write_facts
from tests.helpers.training import (
    Training,
    list_steps,
    read_losses,
    run_command,
    run_in_process,
    start_ranks,
    torchrun,
    write_config,
)

TASKS = ["facts_gen", "facts_choice", "facts_text"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, tasks' folder, a run that has learned the facts and evaluated itself at steps 60 and 120)."""
    folder = tmp_path_factory.mktemp("facts")
    data, tasks = write_facts(folder)
    config = facts_config(data, folder / "run")
    config["eval"] = {"generator": {"max_tokens": 300}, "harness": {"tasks": TASKS, "include_path": str(tasks)}}
    file = write_config(folder / "train.yaml", config)
    result = run_in_process([f"config={file}"], folder).ok()
    return folder, tasks, folder / "run", result


def evaluate(checkpoint, folder, tasks, names=TASKS, max_tokens=300, **arguments):
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(folder), validation=None)
    args.generator = GeneratorArgs(dtype="fp32", device="cpu", max_tokens=max_tokens)
    args.harness = {"tasks": names, "include_path": str(tasks), "bootstrap_iters": 100, **arguments}
    return launch_eval(args)["results"]


def numbers(results):
    """Task -> its metrics, without their deviations."""
    return {
        task: {k: v for k, v in metrics.items() if isinstance(v, float) and "stderr" not in k}
        for task, metrics in results["results"].items()
    }


# --- requests --------------------------------------------------------------------------------------------------------


def make_lm(model, add_bos=True, **arguments):
    from apps.main.harness import LinguaLM, SharedGenerator

    args = GeneratorArgs(**({"dtype": "fp32", "device": "cpu", "max_gen_len": 8} | arguments))
    generator = PackedCausalTransformerGenerator(args, model, build_tokenizer("bytes"), add_bos)
    return LinguaLM(SharedGenerator(generator))


def ask(method, *arguments):
    from lm_eval.api.instance import Instance

    return method([Instance("loglikelihood", {}, a, i) for i, a in enumerate(arguments)])


def plain_score(model, given, scored):
    """Sum of log-likelihoods of `scored` tokens behind `given` ones, and whether each is the likeliest."""
    tokens = (given + scored)[-(model.max_seqlen + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)[-len(scored) :]
    targets = torch.tensor(scored)
    return logits.gather(-1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_loglikelihoods_are_those_of_a_plain_forward_pass(max_tokens, add_bos):
    model = small_model(max_seqlen=40)
    lm = make_lm(model, add_bos, max_tokens=max_tokens)
    bos = [256] if add_bos else []
    cases = [
        (("ab", "cd"), bos + list(b"ab"), list(b"cd")),
        (("a context of some length", " and more"), bos + list(b"a context of some length"), list(b" and more")),
        (("trailing space ", "word"), bos + list(b"trailing space"), list(b" word")),
        # Without a context: behind BOS, or EOS where documents begin without BOS.
        (("", "alone"), [256 if add_bos else 257], list(b"alone")),
        (("far too long for the model " * 3, "end"), list(b"far too long for the model " * 3)[:-1], list(b" end")),
        (("x", ""), bos, []),
    ]
    answers = ask(lm.loglikelihood, *[case[0] for case in cases])
    for (_, given, scored), (likelihood, greedy) in zip(cases[:-1], answers[:-1], strict=True):
        expected, is_likeliest = plain_score(model, given, scored)
        assert likelihood == pytest.approx(expected, abs=1e-4)
        assert greedy == is_likeliest
    assert answers[-1] == (0.0, True)


def test_the_likeliest_continuation_is_known_as_such():
    model = small_model(max_seqlen=40)
    with torch.no_grad():
        model.output.weight[128:] = 0  # what it says is text
    lm = make_lm(model)
    (text,) = ask(lm.generate_until, ("ab", {"until": [], "max_gen_toks": 5}))
    (right, wrong) = ask(lm.loglikelihood, ("ab", text), ("ab", text[:-1] + ("x" if text[-1] != "x" else "y")))
    assert right[1] is True
    assert wrong[1] is False


def test_rolling_scores_each_token_once():
    """Texts longer than the model in windows, as lm-eval's own backends cut them."""
    model = small_model(max_seqlen=16)
    lm = make_lm(model, add_bos=False)
    texts = ["short", "a text that is longer than the model can see at once"]
    for text, total in zip(texts, ask(lm.loglikelihood_rolling, *[(text,) for text in texts]), strict=True):
        tokens = list(text.encode())
        expected = plain_score(model, [257], tokens[:16])[0]
        for start in range(16, len(tokens), 16):
            scored = tokens[start : start + 16]
            expected += plain_score(model, tokens[: start + len(scored)][-17:][: 17 - len(scored)], scored)[0]
        assert total == pytest.approx(expected, abs=1e-4)


def test_a_continuation_longer_than_the_model():
    with pytest.raises(ValueError, match="a continuation of 20 tokens is longer than the model's max_seqlen=16"):
        ask(make_lm(small_model(max_seqlen=16)).loglikelihood, ("a", "b" * 20))


def test_requests_with_differing_arguments():
    model = small_model(max_seqlen=64)
    lm = make_lm(model)
    long, short, stopped = ask(
        lm.generate_until,
        ("ab", {"until": [], "max_gen_toks": 12}),
        ("ab", {"until": [], "max_gen_toks": 3}),
        ("cd", {"max_gen_toks": 12}),
    )
    assert long.startswith(short)
    assert len(long) > len(short)
    (again,) = ask(lm.generate_until, ("ab", {"until": [long[4]], "max_gen_toks": 12}))
    assert again == long.split(long[4])[0]
    (default,) = ask(lm.generate_until, ("cd", {}))
    assert stopped.startswith(default)  # the generator's 8 tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"temperature": 0.0, "top_p": None, "max_gen_len": 8, "until": []}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"max_new_tokens": 3, "until": "\n"}, {"max_gen_len": 3, "until": ["\n"]}),
        ({"max_gen_toks": 4, "max_tokens": 5, "num_beams": 1, "top_k": 0}, {"max_gen_len": 4, "top_k": None}),
    ],
)
def test_what_a_task_says_of_generation(given, expected):
    from apps.main.harness import generation_args

    args = generation_args(GeneratorArgs(max_gen_len=8, until=["U"], temperature=0.5, top_p=0.5), given)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(("given", "key"), [({"num_beams": 4}, "num_beams"), ({"temperature": -1}, "temperature")])
def test_generation_that_is_not_supported(given, key):
    from apps.main.harness import generation_args

    with pytest.raises(ValueError, match=f"generation_kwargs.{key}: "):
        generation_args(GeneratorArgs(), given)


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_trained_model_knows_the_facts_wherever_it_is_asked(world, tmp_path):
    """The same accuracy through eval.py, generate.py and evaluation in training; an untrained one knows nothing."""
    folder, tasks, run, _ = world
    (checkpoint,) = [path for path in (run / "checkpoints").iterdir() if path.name == "0000000120"]
    trained = numbers(evaluate(checkpoint, tmp_path / "trained", tasks))
    in_training = numbers(json.loads((run / "evals" / "0000000120" / "results.json").read_text()))
    assert trained == in_training
    assert trained["facts_gen"]["exact_match,none"] >= 0.9
    assert trained["facts_choice"]["acc,none"] >= 0.9

    questions = [json.loads(line) for line in (tasks / "facts.jsonl").read_text().splitlines()]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Q: {q['question']}\nA:"}) + "\n" for q in questions))
    arguments = [f"ckpt={checkpoint}", f"prompt_file={prompts}", f"out={out}"]
    arguments += ['until=["\\n"]', "max_gen_len=12", "dtype=fp32", "device=cpu"]
    run_command(["apps.main.generate", *arguments]).ok()
    answers = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    right = [answer == f" {q['answer']}" for answer, q in zip(answers, questions, strict=True)]
    assert sum(right) / len(NAMES) == trained["facts_gen"]["exact_match,none"]

    config = json.loads((checkpoint / "params.json").read_text())
    config["model"]["seed"] = 1
    model = load_consolidated_model_and_tokenizer(checkpoint)[0]
    model.requires_grad_(True).init_weights()
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    torch.save({"model": model.state_dict()}, untrained / "consolidated.pth")
    (untrained / "params.json").write_text(json.dumps(config))
    found = numbers(evaluate(untrained, tmp_path / "u", tasks))
    assert found["facts_gen"]["exact_match,none"] == 0
    assert found["facts_choice"]["acc,none"] <= 0.4
    assert found["facts_text"]["bits_per_byte,none"] > 4 * trained["facts_text"]["bits_per_byte,none"]


def test_ranks_share_the_work(world, tmp_path):
    """2 ranks under torchrun write the numbers of one process, to the last digit."""
    from apps.main.harness import to_json

    _, tasks, run, _ = world
    checkpoint = run / "checkpoints" / "0000000060"
    one = evaluate(checkpoint, tmp_path / "one", tasks)
    harness_args = json.dumps({"tasks": TASKS, "include_path": str(tasks), "bootstrap_iters": 100})
    argv = [f"ckpt_dir={checkpoint}", f"dump_dir={tmp_path}/two", f"metric_log_dir={tmp_path}/two"]
    argv += ["generator.dtype=fp32", "generator.device=cpu", "generator.max_tokens=300"]
    argv += ["validation=null", f"harness={harness_args}"]
    result = run_command(torchrun(2, argv, "apps.main.eval")).ok()
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["results"] == one["results"]
    assert two["samples"] == json.loads(to_json(one["samples"]))
    assert result.out.count("|facts_gen") == 1
    line = json.loads((tmp_path / "two" / "metrics.eval.jsonl").read_text())
    assert line["global_step"] == 60
    assert line["facts_choice"]["acc,none"] == one["results"]["facts_choice"]["acc,none"]


def test_a_batch_is_sampled_alike_on_any_rank(monkeypatch):
    """Its random numbers depend on the batch, and on no number of ranks."""
    from apps.main import harness

    args = GeneratorArgs(max_gen_len=4, max_tokens=10, temperature=1.0)
    generator = SimpleNamespace(
        args=args, continue_batch=lambda prompts, args, seed, progress: [SimpleNamespace(text=seed) for _ in prompts]
    )
    monkeypatch.setattr(harness, "gather_objects", lambda value: value)

    def seeds(rank, size):
        shared = harness.SharedGenerator(generator)
        shared.rank, shared.size = rank, size
        return shared._work(harness._Generating([[1] * length for length in range(1, 7)], args, 1))

    alone = seeds(0, 1)
    assert len(set(alone.values())) > 2
    assert seeds(0, 2) | seeds(1, 2) == alone


def errors_of_two_ranks(checkpoint, folder, harness_args):
    """Of an evaluation that fails on all ranks: all lines on stderr, from which a library's warnings are left out."""
    argv = [f"ckpt_dir={checkpoint}", f"dump_dir={folder}/two", "validation=null"]
    argv += ["generator.dtype=fp32", "generator.device=cpu", f"harness={harness_args}"]
    results = [rank.finish() for rank in start_ranks(2, argv, folder, module="apps.main.eval")]
    assert all(result.code != 0 for result in results)
    return [line for result in results for line in result.err.splitlines() if line.startswith("error: ")]


def test_an_error_of_one_rank_ends_all(world, tmp_path):
    """A task whose generation does not fit the model, on 2 ranks: one line, nobody waits."""
    _, tasks, run, _ = world
    (tmp_path / "tasks").mkdir()
    text = (tasks / "facts_gen.yaml").read_text().replace("max_gen_toks: 12", "max_gen_toks: 1200")
    (tmp_path / "tasks" / "long.yaml").write_text(text.replace("task: facts_gen", "task: long"))
    harness_args = json.dumps({"tasks": ["long"], "include_path": str(tmp_path / "tasks")})
    errors = errors_of_two_ranks(run / "checkpoints" / "0000000060", tmp_path, harness_args)
    assert len(errors) == 1
    assert "max_gen_len: 1200 tokens leave no room for a prompt in the model's max_seqlen=96" in errors[0]
    assert not (tmp_path / "two").exists()


def test_limit_and_few_shots(world, tmp_path):
    _, tasks, run, _ = world
    checkpoint = run / "checkpoints" / "0000000120"
    names = [{"task": "facts_gen", "num_fewshot": 1}, "facts_choice"]
    results = evaluate(checkpoint, tmp_path, tasks, names, limit=3)
    assert results["n-shot"] == {"facts_gen": 1, "facts_choice": 0}
    assert len(results["samples"]["facts_gen"]) == 3
    prompt = results["samples"]["facts_gen"][0]["arguments"][0][0]
    assert prompt.count("Q: ") == 2
    assert prompt.endswith("Q: Where does Ada live?\nA:")


def test_batches_make_no_difference(world, tmp_path):
    _, tasks, run, _ = world
    checkpoint = run / "checkpoints" / "0000000060"
    one, many = (evaluate(checkpoint, tmp_path / str(n), tasks, max_tokens=n) for n in (1, 100_000))
    for task, metrics in numbers(one).items():
        assert metrics == pytest.approx(numbers(many)[task], abs=1e-5)


def test_a_task_that_fails_ends_in_one_line(world, tmp_path):
    _, tasks, run, _ = world
    (tmp_path / "tasks").mkdir()
    text = (tasks / "facts_gen.yaml").read_text().replace("facts.jsonl", "gone.jsonl")
    (tmp_path / "tasks" / "gone.yaml").write_text(text.replace("task: facts_gen", "task: gone"))
    with pytest.raises(ValueError, match="harness.tasks: lm-eval failed .*FileNotFoundError.*gone.jsonl") as caught:
        evaluate(run / "checkpoints" / "0000000060", tmp_path / "out", tmp_path / "tasks", ["gone"])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["memory", "dense"])
def test_lm_evals_own_backend_says_the_same_of_the_exported_model(world, tmp_path, monkeypatch, kind):
    """Multiple choice, generation with stop strings, rolling perplexity; nothing is asked of a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    _, tasks, run, _ = world
    checkpoint = run / "checkpoints" / "0000000060"
    if kind == "dense":
        params = json.loads((checkpoint / "params.json").read_text())
        params["model"]["productkey_args"]["is_enabled"] = False
        checkpoint = tmp_path / "dense"
        checkpoint.mkdir()
        model = LMTransformer(from_dict(LMTransformerArgs, params["model"], "test"))
        torch.save({"model": model.state_dict()}, checkpoint / "consolidated.pth")
        (checkpoint / "params.json").write_text(json.dumps(params))
    ours = evaluate(checkpoint, tmp_path / "ours", tasks)
    backend = HFLM(
        pretrained=str(export_hf(checkpoint, tmp_path / "hf")),
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        batch_size=4,
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model=backend, tasks=TASKS, task_manager=manager, bootstrap_iters=100)
    assert set(numbers(ours)) == set(TASKS)
    for task, metrics in numbers(ours).items():
        assert metrics == pytest.approx(numbers(theirs)[task], rel=1e-4)
    for one, other in zip(ours["samples"]["facts_gen"], theirs["samples"]["facts_gen"], strict=True):
        assert one["resps"] == other["resps"]
    for one, other in zip(ours["samples"]["facts_choice"], theirs["samples"]["facts_choice"], strict=True):
        for mine, its in zip(one["resps"], other["resps"], strict=True):
            assert float(mine[0][0]) == pytest.approx(float(its[0][0]), abs=1e-3)
            assert str(mine[0][1]) == str(its[0][1])


def write_task(folder, name, tasks, old, new, extra=""):
    """A folder with one task: facts_choice or facts_gen with something replaced, and Python code beside it."""
    folder.mkdir()
    base = "facts_gen" if name.startswith("gen") else "facts_choice"
    text = (tasks / f"{base}.yaml").read_text().replace(f"task: {base}", f"task: {name}")
    assert old in text
    (folder / f"{name}.yaml").write_text(text.replace(old, new))
    (folder / "code.py").write_text(extra)
    return folder


def test_metrics_of_numpys_types(world, tmp_path):
    _, tasks, run, _ = world
    code = "import numpy\n\ndef mean(items):\n    return numpy.float32(sum(items) / len(items))\n"
    mine = write_task(tmp_path / "t", "choice_np", tasks, "aggregation: mean", "aggregation: !function code.mean", code)
    args = EvalArgs(ckpt_dir=str(run / "checkpoints" / "0000000120"), dump_dir=str(tmp_path / "e"), validation=None)
    args.generator = GeneratorArgs(dtype="fp32", device="cpu")
    args.metric_log_dir = str(tmp_path)
    args.harness = {"tasks": ["choice_np"], "include_path": str(mine), "bootstrap_iters": 0}
    launch_eval(args)
    line = json.loads((tmp_path / "metrics.eval.jsonl").read_text())
    assert line["choice_np"]["acc,none"] == 1.0


def test_a_task_that_exits_ends_in_one_line_on_all_ranks(world, tmp_path):
    _, tasks, run, _ = world
    code = "import sys\n\ndef mean(items):\n    sys.exit(3)\n"
    mine = write_task(
        tmp_path / "t", "choice_exit", tasks, "aggregation: mean", "aggregation: !function code.mean", code
    )
    harness_args = json.dumps({"tasks": ["choice_exit"], "include_path": str(mine)})
    errors = errors_of_two_ranks(run / "checkpoints" / "0000000060", tmp_path, harness_args)
    assert errors == ["error: harness.tasks: lm-eval failed (SystemExit: 3)"]


def test_memory_that_is_short_is_told_in_words(world, tmp_path, monkeypatch):
    _, tasks, run, _ = world
    checkpoint = run / "checkpoints" / "0000000060"

    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LMTransformer, "hidden_states", no_memory)
        with pytest.raises(ValueError, match="generator.max_tokens: 300 tokens at once do not fit"):
            evaluate(checkpoint, tmp_path / "a", tasks)
    with monkeypatch.context() as patch:
        patch.setattr(LMTransformer, "to_empty", no_memory)
        with pytest.raises(ValueError, match="the whole model does not fit this GPU's memory"):
            evaluate(checkpoint, tmp_path / "b", tasks)


# --- during training -------------------------------------------------------------------------------------------------


def test_training_is_not_disturbed(world, tmp_path):
    """The same losses, to the last bit, with evaluation and without."""
    folder, _, run, result = world
    config = facts_config(folder / "data", tmp_path / "run")
    run_in_process([f"config={write_config(tmp_path / 'c.yaml', config)}"], tmp_path).ok()
    assert read_losses(tmp_path / "run") == read_losses(run)
    assert list_steps(run) == [60, 120]
    assert sorted(path.name for path in (run / "evals").iterdir()) == ["0000000060", "0000000120"]
    for kind in ("eval", "validation"):
        lines = [json.loads(line) for line in (run / f"metrics.{kind}.jsonl").read_text().splitlines()]
        assert [line["global_step"] for line in lines] == [60, 120]
    assert "|facts_choice" in result.out
    assert "evaluating step 120" in (run / "train.log").read_text()


@pytest.mark.parametrize(
    "layout", [{"memory_parallel_size": 2}, {"tp_size": 2}, {"fsdp_type": "full_shard", "dp_shard": 2}], ids=str
)
def test_on_all_ranks_of_any_layout(world, tmp_path, layout):
    """2 ranks, however the model is split over them, evaluate what one process evaluates of the same checkpoint."""
    folder, tasks, _, _ = world
    config = facts_config(folder / "data", tmp_path / "run")
    config |= {"steps": 20, "checkpoint": {"dump": {"every": 0}, "eval": {"every": 20}}}
    config["distributed"] |= layout
    config["eval"] = {"generator": {"max_tokens": 300}, "harness": {"tasks": TASKS, "include_path": str(tasks)}}
    for rank in start_ranks(2, [f"config={write_config(tmp_path / 'c.yaml', config)}"], tmp_path):
        rank.finish().ok()
    evals = tmp_path / "run" / "evals" / "0000000020"
    alone = evaluate(tmp_path / "run" / "checkpoints" / "0000000020", tmp_path / "alone", tasks)
    assert numbers(json.loads((evals / "results.json").read_text())) == numbers(alone)
    validation = json.loads((evals / "validation.json").read_text())
    assert validation["facts"]["n_documents"] == 30
    assert len((tmp_path / "run" / "metrics.eval.jsonl").read_text().splitlines()) == 1


def test_an_evaluation_that_fails_does_not_end_training(world, tmp_path):
    folder, tasks, run, _ = world
    broken = tmp_path / "tasks"
    broken.mkdir()
    text = (tasks / "facts_gen.yaml").read_text().replace("facts.jsonl", "gone.jsonl")
    (broken / "gone.yaml").write_text(text.replace("task: facts_gen", "task: gone"))
    config = facts_config(folder / "data", tmp_path / "run")
    config["eval"] = {"harness": {"tasks": ["gone"], "include_path": str(broken)}}
    result = run_in_process([f"config={write_config(tmp_path / 'c.yaml', config)}"], tmp_path).ok()
    assert result.err.count("could not be evaluated: ") == 2
    assert "done: 120 steps" in result.out
    assert read_losses(tmp_path / "run") == read_losses(run)


def test_an_evaluation_that_was_cut_off_is_made_up_for(world, tmp_path):
    """TERM within the last evaluation: the run ends well, and started again does what is missing, and only that."""
    folder, tasks, _, _ = world
    config = facts_config(folder / "data", tmp_path / "run")
    config |= {"steps": 20, "checkpoint": {"dump": {"every": 0}, "eval": {"every": 20}}}
    slow = tmp_path / "tasks"
    slow.mkdir()
    many = "".join((tasks / "facts.jsonl").read_text() for _ in range(300))
    (slow / "facts.jsonl").write_text(many)
    text = (tasks / "facts_choice.yaml").read_text().replace(str(tasks), str(slow))
    (slow / "facts_choice.yaml").write_text(text)
    config["eval"] = {
        "generator": {"max_tokens": 50},
        "harness": {"tasks": ["facts_choice"], "include_path": str(slow)},
    }
    arguments = [f"config={write_config(tmp_path / 'c.yaml', config)}"]
    first = Training(arguments, tmp_path)
    assert first.wait_for(lambda: "evaluating step 20" in first.out())
    first.kill(15)
    out = first.finish().ok().out
    assert "evaluation of step 20 ended by SIGTERM" in out
    assert not (tmp_path / "run" / "evals").exists()
    (slow / "facts.jsonl").write_text((tasks / "facts.jsonl").read_text())
    again = run_in_process(arguments, tmp_path).ok().out
    assert "all 20 steps are done" in again
    assert "evaluating step 20" in again
    assert (tmp_path / "run" / "evals" / "0000000020" / "results.json").exists()
    third = run_in_process(arguments, tmp_path).ok().out
    assert "nothing to do" in third
    assert "evaluating" not in third


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"harness": {"tasks": ["nowhere"], "include_path": "TASKS"}}, "eval.harness.tasks: lm-eval knows no task"),
        ({"generatr": {}}, "eval.generatr: unknown key; did you mean generator"),
        ({"ckpt_dir": "x"}, "eval.ckpt_dir: follows from the run"),
        ({"validation": {"max_steps": 0}}, "eval.validation.max_steps: 0"),
        ({"generator": {"top_p": 2}}, "eval.generator.top_p: 2"),
        ("yes", "eval: 'yes' where a section"),
    ],
)
def test_a_section_eval_that_cannot_work_ends_before_anything_is_written(world, tmp_path, section, message):
    folder, tasks, _, _ = world
    config = facts_config(folder / "data", tmp_path / "run")
    config["eval"] = json.loads(json.dumps(section).replace("TASKS", str(tasks)))
    line = run_in_process([f"config={write_config(tmp_path / 'c.yaml', config)}"], tmp_path).the_error()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_evaluation_in_jobs_of_their_own(world, tmp_path, monkeypatch):
    """What is submitted, caught before it reaches SLURM (see test_slurm.py), is what evaluates the checkpoint."""
    folder, tasks, run, _ = world
    submitted = []
    monkeypatch.setattr(train_eval, "launch_job", submitted.append)
    monkeypatch.setenv("SLURM_JOB_PARTITION", "night")
    config = facts_config(folder / "data", run)
    config["eval"] = {"harness": {"tasks": ["facts_gen"], "include_path": str(tasks)}}
    args = from_dict(TrainArgs, config | {"async_eval_gpus": 20}, "test")
    train_eval.submit_evaluation(train_eval.evaluation_args(args, 60), 20)
    (job,) = submitted
    assert (job.script, job.nodes, job.ngpu, job.copy_code) == ("apps.main.eval", 3, 7, False)
    assert (job.partition, job.account, job.ncpu) == ("night", "", 16)
    wanted = job.config
    wanted.generator.device = "cpu"
    wanted.dump_dir = str(tmp_path / "evals")
    wanted.metric_log_dir = str(tmp_path)
    assert wanted.ckpt_dir == str(run / "checkpoints" / "0000000060")
    in_training = json.loads((run / "evals" / "0000000060" / "results.json").read_text())
    assert numbers(launch_eval(wanted)["results"])["facts_gen"] == numbers(in_training)["facts_gen"]


def test_jobs_of_their_own_need_slurm(world, tmp_path):
    folder, _, _, _ = world
    config = facts_config(folder / "data", tmp_path / "run") | {"async_eval_gpus": 8, "eval": {}}
    config_file = write_config(tmp_path / "c.yaml", config)
    line = run_in_process([f"config={config_file}"], tmp_path, PATH="/nonexistent").the_error()
    assert "async_eval_gpus: set, but there is no sbatch on this machine" in line
