"""Validation and the evaluation of checkpoints, on small random models."""

import json
import math
import shutil
import sys
import types

import pytest
import torch

from apps.main.eval import EvalArgs, find_checkpoints, launch_eval
from apps.main.generate import GeneratorArgs, load_consolidated_model_and_tokenizer
from apps.main.validation import ValidationArgs, rows_of
from lingua.checkpoint import consolidate_checkpoints
from lingua.metrics import drop_metrics_after
from lingua.transformer import cross_entropy
from tests.helpers.evaluation import TEXTS, write_run
from tests.helpers.training import run_command, start_ranks, torchrun


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run", steps=(7, 14, 21))


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoints" / "0000000007"


def arguments(checkpoint, folder, **validation):
    generator = GeneratorArgs(dtype="fp32", device="cpu")
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(folder / "evals"), generator=generator)
    args.metric_log_dir = str(folder)
    args.validation = ValidationArgs(**validation)
    return args


def validate(checkpoint, folder, **validation):
    return launch_eval(arguments(checkpoint, folder, **validation))["validation"]


def plain_loss(model, tokenizer, texts=TEXTS):
    """Summed loss and counts, a row at a time, nothing packed or filled up."""
    nll, n_tokens = 0.0, 0
    for text in texts:
        tokens = torch.tensor(tokenizer.encode(text, True, True))
        for start in range(0, len(tokens) - 1, model.max_seqlen):
            piece = tokens[start : start + model.max_seqlen + 1]
            with torch.no_grad():
                nll += cross_entropy(model(piece[None, :-1]), piece[None, 1:], reduction="sum").item()
            n_tokens += len(piece) - 1
    return nll, n_tokens, sum(len(text.encode()) for text in texts)


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_validation_is_the_plain_loss(checkpoint, tmp_path):
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    nll, n_tokens, n_bytes = plain_loss(model, tokenizer)
    results = validate(checkpoint, tmp_path)
    assert results["words"]["loss"] == pytest.approx(nll / n_tokens, rel=1e-5)
    assert results["words"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-5)
    assert (results["words"]["n_tokens"], results["words"]["n_bytes"]) == (n_tokens, n_bytes)
    assert results["words"]["n_documents"] == 4
    assert json.loads((tmp_path / "evals" / "validation.json").read_text()) == results
    (line,) = read_lines(tmp_path / "metrics.validation.jsonl")
    assert line["global_step"] == 7  # from the folder's name
    assert line["words"] == results["words"]
    assert (tmp_path / "evals" / "config.yaml").exists()
    assert not (tmp_path / "evals" / "results.json").exists()


def test_every_token_is_predicted_once():
    tokens = list(range(23))
    rows = rows_of(tokens, 5)
    assert [token for row in rows for token in row[1:]] == tokens[1:]
    assert all(len(row) <= 6 for row in rows)
    assert rows_of([1], 5) == rows_of([], 5) == []


def test_slots_read_are_counted(checkpoint, tmp_path):
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    read = {0: set(), 1: set()}
    for number, memory in model.memories().items():
        memory.query_proj.register_forward_hook(
            lambda _, __, query, memory=memory, mine=read[number]: mine.update(
                memory.get_indices(query, memory.knn)[1].flatten().tolist()
            )
        )
    plain_loss(model, tokenizer)
    slots = validate(checkpoint, tmp_path)["memory_slots"]
    assert slots == {
        "total": 64,
        "read_by_layer_0": len(read[0]),
        "read_by_layer_1": len(read[1]),
        "read": len(read[0] | read[1]),
    }


def test_other_sources_and_max_steps(checkpoint, tmp_path):
    other = tmp_path / "more" / "words"
    other.mkdir(parents=True)
    texts = ["text " * 20] * 50  # of 102 tokens, and so 5 rows of at most 24
    (other / "x.val.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
    results = validate(checkpoint, tmp_path, root_dir=str(tmp_path / "more"), sources=["words"], max_steps=4)
    assert results[str(other)]["n_documents"] == 3  # with which 4 batches of 3 rows are reached
    assert results["words"]["n_documents"] == 4
    only = {"root_dir": str(tmp_path / "more"), "sources": ["words"], "use_val_from_train_src": False}
    alone = validate(checkpoint, tmp_path / "alone", **only)
    assert alone["words"]["n_documents"] == 50
    assert alone["words"]["loss"] == pytest.approx(results[str(other)]["loss"], rel=1e-6)


@pytest.mark.parametrize(("max_steps", "how"), [(None, "torchrun"), (2, "forked")])
def test_ranks_share_the_work(checkpoint, tmp_path, max_steps, how):
    """To the last digit: 2 ranks, each document once, the same batches."""
    one = validate(checkpoint, tmp_path, max_steps=max_steps)
    argv = [f"ckpt_dir={checkpoint}", f"dump_dir={tmp_path}/two", f"metric_log_dir={tmp_path}/two"]
    argv += ["generator.dtype=fp32", "generator.device=cpu"]
    argv += [f"validation.max_steps={'null' if max_steps is None else max_steps}"]
    if how == "torchrun":
        two = run_command(torchrun(2, argv, "apps.main.eval")).ok()
    else:
        ranks = start_ranks(2, argv, tmp_path, module="apps.main.eval")
        two, *_ = [rank.finish().ok() for rank in ranks]
    assert json.loads((tmp_path / "two" / "validation.json").read_text()) == one
    assert len(read_lines(tmp_path / "two" / "metrics.validation.jsonl")) == 1
    assert two.out.count("words: loss") == 1


# --- which checkpoints -----------------------------------------------------------------------------------------------


def test_the_latest_checkpoint_of_a_run(run, tmp_path):
    args = EvalArgs(ckpt_dir="latest", dump_dir=str(run), generator=GeneratorArgs(dtype="fp32", device="cpu"))
    (found,) = find_checkpoints(args)
    assert found.ckpt_dir == str(run / "checkpoints" / "0000000021")
    assert found.dump_dir == str(run / "evals" / "0000000021")
    assert (found.metric_log_dir, found.global_step) == (str(run), 21)


def test_all_checkpoints_make_a_curve(tmp_path, capsys):
    run = write_run(tmp_path / "run", steps=(3, 6, 9))
    damaged = run / "checkpoints" / "0000000009"
    (damaged / ".metadata").unlink()
    args = EvalArgs(ckpt_dir="all", dump_dir=str(run), generator=GeneratorArgs(dtype="fp32", device="cpu"))
    launch_eval(args)
    lines = read_lines(run / "metrics.validation.jsonl")
    assert [line["global_step"] for line in lines] == [3, 6]
    assert lines[0]["words"]["loss"] != lines[1]["words"]["loss"]
    for step, line in zip((3, 6), lines, strict=True):
        alone = validate(run / "checkpoints" / f"{step:010d}", tmp_path / str(step))
        assert alone["words"] == line["words"]
        assert json.loads((run / "evals" / f"{step:010d}" / "validation.json").read_text()) == alone
    table = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["6", f"{lines[1]['words']['loss']:.4f}"] for line in table)

    # What is there is not worked out again; other arguments are other results.
    launch_eval(args)
    assert len(read_lines(run / "metrics.validation.jsonl")) == 2
    args.validation.max_steps = 1
    launch_eval(args)
    assert len(read_lines(run / "metrics.validation.jsonl")) == 4


def test_a_run_without_a_checkpoint(tmp_path):
    for name in ("latest", "all"):
        with pytest.raises(
            ValueError, match=f"ckpt_dir: '{name}', but there is no whole checkpoint in '.*checkpoints'"
        ):
            launch_eval(EvalArgs(ckpt_dir=name, dump_dir=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_cut_off(checkpoint, tmp_path):
    copy = tmp_path / "0000000007"
    shutil.copytree(checkpoint, copy)
    (data,) = copy.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"not a whole checkpoint; the file .* has 1000 bytes, and \d+ by"):
        validate(copy, tmp_path)
    assert not (tmp_path / "evals").exists()


@pytest.mark.parametrize(
    "name", ["distcp", "params.json", ".metadata", "checksums.json", "train_state", "consolidated"]
)
@pytest.mark.parametrize("damage", ["flipped", "emptied"])
def test_a_damaged_checkpoint_is_named(checkpoint, tmp_path, name, damage):
    """In one line, before anything is made of what is in it."""
    copy = shutil.copytree(checkpoint, tmp_path / "0000000007", ignore=shutil.ignore_patterns("consolidated"))
    if name == "consolidated":
        consolidate_checkpoints(copy)
    (file,) = [path for path in copy.rglob("*") if path.is_file() and name in path.name]
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content if damage == "flipped" else b"")
    with pytest.raises(ValueError, match=".") as caught:
        validate(copy, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(copy) in message
    assert file.name in message
    assert not (tmp_path / "evals").exists()


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt_dir": ""}, "ckpt_dir: not set"),
        ({"dump_dir": None}, "dump_dir: not set"),
        ({"ckpt_dir": "/nowhere"}, "ckpt_dir: no folder '/nowhere'"),
        ({"harness": ["x"]}, "harness: .* where a section"),
        ({"harness": {"tasks": []}}, "harness.tasks: wanted a list of tasks"),
        ({"harness": {"tasks": ["x"], "limt": 3}}, "harness.limt: unknown key; did you mean limit"),
        ({"harness": {"tasks": [{"num_fewshot": 3}]}}, "harness.tasks: .* is neither a name nor a mapping"),
        ({"harness": {"tasks": ["x"], "include_path": "/nowhere"}}, "harness.include_path: no folder '/nowhere'"),
        ({"harness": {"tasks": ["x"], "limit": 0}}, "harness.limit: '0' is no number above 0"),
        ({"harness": {"tasks": ["x"], "num_fewshot": "abc"}}, "harness.num_fewshot: 'abc' is no whole number"),
        ({"dump_dir": "/proc/nowhere/x"}, "dump_dir: '/proc' has 0.0 MiB free"),
        ({"metric_log_dir": "/dev/null/x"}, "metric_log_dir: '/dev/null' is a file"),
        ({"harness": {"tasks": ["hellaswagg"]}}, "lm-eval knows no task 'hellaswagg'; did you mean hellaswag"),
        ({"harness": {"tasks": ["hellaswag"], "apply_chat_template": True}}, "harness.apply_chat_template: "),
        ({"wandb": {"projct": "x"}}, "wandb.projct: wandb.init has no such argument"),
        ({"wandb": "x"}, "wandb: 'x' where a section"),
        ({"validation": None}, "validation: null, and no harness"),
        ({"validation": ValidationArgs(max_steps=0)}, "validation.max_steps: 0"),
        ({"validation": ValidationArgs(sources=["a"])}, "validation.root_dir: not set"),
        ({"validation": ValidationArgs(use_val_from_train_src=False)}, "validation.sources: nothing"),
        ({"validation": ValidationArgs(sources=["a"], root_dir="/nowhere")}, "sources.a: no folder"),
        ({"generator": GeneratorArgs(dtype="bf15")}, "generator.dtype: 'bf15'"),
        ({"generator": GeneratorArgs(values_device="gpu")}, "generator.values_device: 'gpu' is neither null nor cpu"),
        (
            {"generator": GeneratorArgs(values_device="cpu", reduce_generation_overhead=True)},
            "generator.reduce_generation_overhead: true cannot be combined with values_device=cpu",
        ),
    ],
)
def test_bad_arguments_end_in_one_line(checkpoint, tmp_path, changes, message):
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(tmp_path / "evals"))
    args.generator.device = "cpu"
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        launch_eval(args)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evals").exists()


def test_a_task_file_that_is_no_yaml(checkpoint, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "bad.yaml").write_text("task: bad\nmetric_list: [a, b\ntest_split: x: y\n")
    args = arguments(checkpoint, tmp_path)
    args.harness = {"tasks": ["bad"], "include_path": str(tmp_path / "tasks")}
    with pytest.raises(ValueError, match=r"bad\.yaml:\d: not YAML"):
        launch_eval(args)


def test_a_line_that_is_no_document(checkpoint, tmp_path):
    source = tmp_path / "more" / "bad"
    source.mkdir(parents=True)
    (source / "x.val.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"x\.val\.jsonl"):
        validate(checkpoint, tmp_path, root_dir=str(tmp_path / "more"), sources=["bad"], use_val_from_train_src=False)
    assert not (tmp_path / "evals").exists()


def test_files_without_text(checkpoint, tmp_path):
    source = tmp_path / "more" / "empty"
    source.mkdir(parents=True)
    (source / "x.val.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(ValueError, match="empty: no text in its validation files"):
        validate(checkpoint, tmp_path, root_dir=str(tmp_path / "more"), sources=["empty"], use_val_from_train_src=False)


def test_numbers_of_no_step_stay_when_a_run_goes_on(checkpoint, tmp_path):
    """Of a checkpoint in a folder that is named by no step, evaluated into a run's own metrics."""
    shutil.copytree(checkpoint, tmp_path / "somewhere")
    validate(tmp_path / "somewhere", tmp_path)
    args = arguments(checkpoint, tmp_path)
    args.dump_dir = str(tmp_path / "other evals")
    launch_eval(args)
    file = tmp_path / "metrics.validation.jsonl"
    assert [line["global_step"] for line in read_lines(file)] == [None, 7]
    assert drop_metrics_after(file, 6) == 1
    assert [line["global_step"] for line in read_lines(file)] == [None]


def test_what_was_not_asked_for_is_not_told(tmp_path):
    """Tasks' results of an earlier evaluation are no part of one without tasks."""
    run = write_run(tmp_path / "run")
    args = EvalArgs(ckpt_dir="all", dump_dir=str(run), generator=GeneratorArgs(dtype="fp32", device="cpu"))
    launch_eval(args)
    (run / "evals" / "0000000007" / "results.json").write_text('{"results": {"old": {"acc,none": 1.0}}}')
    assert set(launch_eval(args)) == {"validation"}


def test_wandb_gets_the_numbers(checkpoint, tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, metrics, step):
            logged.append((step, metrics))

        def finish(self, exit_code):
            logged.append(("finished", exit_code))

    def init(project=None, name=None, config=None, dir=None, id=None, resume=None):
        logged.append((project, name))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    args = arguments(checkpoint, tmp_path)
    args.wandb = {"project": "p"}
    found = launch_eval(args)["validation"]
    assert logged[0] == ("p", "evals")
    step, metrics = logged[1]
    assert step == 7
    assert metrics["validation/words/loss"] == found["words"]["loss"]
    assert metrics["validation/memory_slots/read"] == found["memory_slots"]["read"]
    assert logged[2] == ("finished", 0)
