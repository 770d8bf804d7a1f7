"""Generation: batches against one sequence at a time, endings, sampling, the command."""

import io
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.main import generate
from apps.main.generate import (
    Continuation,
    GeneratorArgs,
    PackedCausalTransformerGenerator,
    batches_by_length,
    load_consolidated_model_and_tokenizer,
    sample,
)
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.checkpoint import consolidate_checkpoints
from lingua.errors import UserError
from lingua.product_key.memory import ProductKeyArgs
from lingua.tokenizer import build_tokenizer
from tests.helpers.evaluation import small_model, write_run

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = ["ab", "a longer prompt, much more", "", "mid dle", "xyz" * 5, "ab"]
MODELS = {
    "memory": {},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "window": {"sliding_window": 7},
    "dense": {"memory": {"is_enabled": False}},
    "PEER": {"memory": {"peer_variant": True}},
    "own tables, gated": {"memory": {"mem_share_values": False, "mem_gated": True}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run", max_seqlen=64)


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoints" / "0000000007"


def plainly(model, tokens, n_tokens, n_words=258, eos=257):
    """What follows, computing the whole sequence for each token; and its first tokens' scores."""
    tokens = list(tokens)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]))[0]
        targets = torch.tensor(tokens[1:])
        likelihoods = logits[:-1].log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        greedy = logits[:-1].argmax(-1) == targets
        follow = []
        for _ in range(n_tokens):
            token = int(model(torch.tensor([tokens]))[0, -1, :n_words].argmax())
            if token == eos:
                break
            tokens.append(token)
            follow.append(token)
    return follow, likelihoods, greedy


def make(model, **arguments):
    defaults = {"max_gen_len": 20, "max_tokens": 150, "dtype": "fp32", "device": "cpu"}
    return PackedCausalTransformerGenerator(GeneratorArgs(**(defaults | arguments)), model, build_tokenizer("bytes"))


@pytest.mark.parametrize("max_tokens", [1, 150, 10_000])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_any_batching_is_the_plain_computation(changes, max_tokens):
    model, tokenizer = small_model(max_seqlen=64, **changes), build_tokenizer("bytes")
    texts, likelihoods, greedy = make(model, max_tokens=max_tokens).generate(PROMPTS)
    for prompt, text, likelihood, is_likeliest in zip(PROMPTS, texts, likelihoods, greedy, strict=True):
        expected, scores, likeliest = plainly(model, tokenizer.encode(prompt, True, False), 20)
        assert text == tokenizer.decode(expected)
        assert torch.allclose(likelihood, scores, atol=1e-5)
        assert torch.equal(is_likeliest, likeliest)


@pytest.mark.parametrize("name", ["train_dense", "train_memory"])
def test_golden_models(name):
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    case = next(case for case in manifest if case.get("file") == f"{name}.npz")
    file = np.load(GOLDEN / case["file"])
    model = LMTransformer(LMTransformerArgs(**case["model"], productkey_args=ProductKeyArgs(**case["productkey_args"])))
    model.load_state_dict({k.removeprefix("init."): torch.from_numpy(file[k]) for k in file if k.startswith("init.")})
    model.eval()
    limit, n_words = min(model.max_seqlen, 32), model.tok_embeddings.num_embeddings
    # Of the model's own few ids.
    sizes = (1, 3, limit - 9, 7)
    prompts = [
        torch.randint(min(n_words, 256), (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in sizes
    ]
    generator = make(model, max_gen_len=8)
    generator.tokenizer.n_words = n_words
    generator.tokenizer.token_bytes = [b"x"] * n_words
    generator.tokenizer.eos_id = -1
    seen = []
    for batch, batch_run in generator.runs(prompts, score="prompts"):
        for number, continuation, (likelihoods, greedy) in zip(
            batch, batch_run.continuations, batch_run.scores, strict=True
        ):
            expected, scores, likeliest = plainly(model, prompts[number], 8, n_words, eos=None)
            assert continuation.tokens == expected
            assert torch.allclose(likelihoods, scores, atol=1e-4)
            assert torch.equal(greedy, likeliest)
            seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3]


def test_scores_do_not_hold_all_logits(monkeypatch):
    monkeypatch.setattr(generate, "LOGITS_AT_ONCE", 3 * 258)
    model = small_model(max_seqlen=64)
    sequences = [build_tokenizer("bytes").encode(prompt, True, True) for prompt in PROMPTS]
    for sequence, (likelihoods, greedy) in zip(sequences, make(model).score_batch(sequences), strict=True):
        _, scores, likeliest = plainly(model, sequence, 0)
        assert torch.allclose(likelihoods, scores, atol=1e-5)
        assert torch.equal(greedy, likeliest)


def test_a_sequence_may_be_one_token_longer_than_the_model():
    """Its last token is predicted and not read."""
    model = small_model(max_seqlen=16)
    sequence = torch.arange(17).tolist()
    ((likelihoods, _),) = make(model, max_gen_len=2).score_batch([sequence])
    with torch.no_grad():
        logits = model(torch.tensor([sequence[:-1]]))[0].log_softmax(-1)
    assert torch.allclose(likelihoods, logits.gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1), atol=1e-5)


def test_compiled_reading_gives_the_same():
    model = small_model(max_seqlen=64)
    plain, compiled = make(model).generate(PROMPTS), make(model, compile_prefilling=True).generate(PROMPTS)
    assert plain[0] == compiled[0]
    for here, there in zip(plain[1], compiled[1], strict=True):
        assert torch.allclose(here, there, atol=1e-5)


def test_half_precision_computes_as_training_does(checkpoint):
    """Matrices of bf16 weights and inputs, all else in fp32: what autocast makes of an fp32 model."""
    whole, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    half, _, _ = load_consolidated_model_and_tokenizer(checkpoint, dtype="bf16")
    assert half.layers[0].attention.wq.weight.dtype == torch.bfloat16
    assert half.layers[0].feed_forward.values.weight.dtype == torch.bfloat16
    assert half.tok_embeddings.weight.dtype == torch.float32
    generator = PackedCausalTransformerGenerator(GeneratorArgs(max_gen_len=4, device="cpu"), half, tokenizer)
    sequence = tokenizer.encode("a text of some length", True, False)
    ((likelihoods, _),) = generator.score_batch([sequence])
    whole.layers[0].feed_forward.values.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = whole(torch.tensor([sequence[:-1]]))[0].float().log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(sequence[1:])[:, None]).squeeze(-1)
    assert torch.allclose(likelihoods, expected, atol=2e-2)
    assert (likelihoods - expected).abs().mean() < 5e-3
    texts, _, _ = generator.generate(["a", "longer"])
    assert len(texts) == 2


# --- batches and limits ----------------------------------------------------------------------------------------------


def test_batches_are_of_like_lengths_and_within_the_limit():
    lengths = [5, 100, 7, 6, 30, 31, 1]
    batches = batches_by_length(lengths, 64)
    assert sorted(number for batch in batches for number in batch) == list(range(7))
    assert batches[0] == [1]  # by itself, since it is longer than the limit
    assert batches[1] == [5, 4]
    for batch in batches[1:]:
        assert len(batch) * max(lengths[number] for number in batch) <= 64
    assert batches_by_length([], 64) == []


def test_prompts_that_are_too_long_lose_their_beginning(caplog):
    model, tokenizer = small_model(max_seqlen=32), build_tokenizer("bytes")
    prompt = "abcdefghijklmnopqrstuvwxyz" * 2
    expected, _, _ = plainly(model, tokenizer.encode(prompt)[-12:], 20)
    with caplog.at_level(logging.WARNING):
        assert make(model).generate([prompt, "short"])[0][0] == tokenizer.decode(expected)
    assert "1 of 2 prompts are cut on the left to 12 tokens, the longest from 53" in caplog.text
    expected, _, _ = plainly(model, tokenizer.encode(prompt)[-5:], 20)
    assert make(model, max_prompt_len=5).generate([prompt])[0][0] == tokenizer.decode(expected)


def test_no_room_for_a_prompt():
    with pytest.raises(ValueError, match="max_gen_len: 32 tokens leave no room .* max_seqlen=32; set it to 31 or less"):
        make(small_model(max_seqlen=32), max_gen_len=32).generate(["a"])


def test_a_prompt_begins_with_bos_as_documents_did():
    model, tokenizer = small_model(max_seqlen=32), build_tokenizer("bytes")
    args = GeneratorArgs(max_gen_len=5, dtype="fp32", device="cpu")
    without = PackedCausalTransformerGenerator(args, model, tokenizer, add_bos=False)
    assert without.generate(["abc"])[1][0].shape == (2,)
    assert PackedCausalTransformerGenerator(args, model, tokenizer).generate(["abc"])[1][0].shape == (3,)
    with pytest.raises(ValueError, match="prompt: empty"):
        without.generate([""])


# --- endings ---------------------------------------------------------------------------------------------------------


def ending(text, until=(), max_gen_len=100):
    """What is heard of a model that says `text` and then EOS: (text, reason, as much as is settled at each step)."""
    continuation = Continuation(build_tokenizer("bytes"), GeneratorArgs(until=list(until), max_gen_len=max_gen_len))
    settled = []
    for token in [*text.encode(), 257]:
        ended = continuation.add(token)
        settled.append(continuation.settled_text())
        if ended:
            break
    return continuation.text, continuation.finish_reason, settled


@pytest.mark.parametrize(
    ("until", "text", "reason"),
    [
        ([], "one é two END three", "eos"),
        (["END"], "one é two ", "stop"),
        (["three", "END"], "one é two ", "stop"),
        (["ENDE"], "one é two END three", "eos"),
        (["one"], "", "stop"),
        (["é"], "one ", "stop"),
        (["o END", "END"], "one é tw", "stop"),
    ],
)
def test_stop_strings_end_the_text_where_they_begin(until, text, reason):
    assert ending("one é two END three", until)[:2] == (text, reason)


def test_a_stop_string_longer_than_what_came_before():
    long_stop = "x" * 50
    assert ending("a" * 300 + long_stop + "b", [long_stop], max_gen_len=1000)[:2] == ("a" * 300, "stop")


def test_the_longest_text():
    assert ending("abcdef", max_gen_len=3)[:2] == ("abc", "length")


def test_what_is_shown_is_never_taken_back():
    for until in ([], ["END", "é two E"]):
        text, _, settled = ending("one é two END three", until)
        for earlier, later in zip(settled, settled[1:], strict=False):
            assert later.startswith(earlier)
        assert settled[-1] == text
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(settled)


def test_ended_sequences_leave_the_batch(monkeypatch):
    """Texts end at different tokens; the others go on as if alone."""
    model, tokenizer = small_model(max_seqlen=64), build_tokenizer("bytes")
    prompts = ["ab", "cd", "ef", "gh", "ij", "kl"]
    texts = {prompt: tokenizer.decode(plainly(model, tokenizer.encode(prompt, True), 30)[0]) for prompt in prompts}
    stop = texts["ab"][2]
    got = make(model, max_gen_len=30, max_tokens=10_000, until=[stop]).generate(prompts)[0]
    assert got == [texts[prompt].split(stop)[0] for prompt in prompts]
    assert len({len(text) for text in got}) > 1


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    random = torch.Generator().manual_seed(0)

    def drawn(n=300, **arguments):
        return sample(logits.expand(n, -1), GeneratorArgs(**arguments), random)

    def kinds(**arguments):
        return set(drawn(**arguments).tolist())

    assert kinds() == {1}
    assert kinds(temperature=1.0) == {0, 1, 2, 3}
    assert kinds(temperature=1.0, top_k=2) == {1, 2}
    assert kinds(temperature=1.0, top_k=100) == {0, 1, 2, 3}
    assert kinds(temperature=1.0, top_p=0.6) == {1}
    assert kinds(temperature=1.0, top_p=0.7) == {1, 2}
    assert kinds(temperature=1.0, top_p=0.95, top_k=2) == {1, 2}
    assert kinds(temperature=1.0, top_p=0.7, top_k=2) == {1}  # 0.73 of what the two best have together
    assert kinds(temperature=1e-8) == {1}
    counts = torch.bincount(drawn(4000, temperature=1.0))
    assert torch.allclose(counts / 4000, torch.softmax(logits, 0), atol=0.03)
    counts = torch.bincount(drawn(4000, temperature=2.0, top_k=3), minlength=3)
    assert torch.allclose(counts / 4000, torch.softmax(logits[:3] / 2, 0), atol=0.03)


def test_rows_are_sampled_each_by_itself():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    for arguments in ({}, {"temperature": 0.1}, {"temperature": 0.1, "top_k": 1}, {"temperature": 0.1, "top_p": 0.5}):
        assert sample(logits, GeneratorArgs(**arguments), torch.Generator()).tolist() == [0, 2]


def test_a_seed_repeats_a_sample():
    model = small_model(max_seqlen=64)

    def draw(seed):
        generator = make(model, temperature=1.0, seed=seed)
        return generator.generate(["ab", "ab", "cd"])[0], generator.generate(["ab"])[0]

    first, again = draw(1)
    assert (first, again) == draw(1)
    assert (first, again) != draw(2)
    assert first[0] != first[1]  # the same prompt twice is sampled twice
    assert again[0] not in first[:2]


def test_words_beyond_the_tokenizers_are_never_chosen():
    model = small_model(max_seqlen=64, vocab_size=400)
    with torch.no_grad():
        model.output.weight[258:] *= 100
    texts, _, _ = make(model, temperature=1.0, max_gen_len=30).generate(["ab", "cd"])
    assert len(texts) == 2  # decoding refuses ids that the tokenizer lacks


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loading_from_either_form(checkpoint):
    distributed, _, config = load_consolidated_model_and_tokenizer(checkpoint)
    folder = consolidate_checkpoints(checkpoint)
    from_folder, tokenizer, _ = load_consolidated_model_and_tokenizer(folder)
    assert config["model"]["dim"] == 32
    assert tokenizer.n_words == 258
    for name, parameter in distributed.state_dict().items():
        assert torch.equal(parameter, from_folder.state_dict()[name])
    tokens = torch.arange(24)[None]
    assert torch.equal(distributed(tokens), from_folder(tokens))


def test_published_naming_repeats_the_table(checkpoint, tmp_path):
    """A consolidated file in which every memory layer has the shared table loads as ours does."""
    model, _, _ = load_consolidated_model_and_tokenizer(checkpoint)
    state = model.state_dict()
    state["layers.1.feed_forward.values.weight"] = state["layers.0.feed_forward.values.weight"].clone()
    torch.save({"model": state}, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_bytes((checkpoint / "params.json").read_bytes())
    loaded, _, _ = load_consolidated_model_and_tokenizer(tmp_path)
    tokens = torch.arange(24)[None]
    assert torch.equal(loaded(tokens), model(tokens))


def edit_params(checkpoint, folder, edit):
    model, _, _ = load_consolidated_model_and_tokenizer(checkpoint)
    torch.save({"model": model.state_dict()}, folder / "consolidated.pth")
    params = json.loads((checkpoint / "params.json").read_text())
    edit(params)
    (folder / "params.json").write_text(json.dumps(params))


def test_another_tokenizer_than_the_models(checkpoint, tmp_path):
    edit_params(checkpoint, tmp_path, lambda params: params["model"].update(vocab_size=200))
    with pytest.raises(ValueError, match="data.tokenizer in .*params.json: has 258 words, and the model's vocab"):
        load_consolidated_model_and_tokenizer(tmp_path)


def test_a_tokenizer_file_that_is_gone(checkpoint, tmp_path):
    edit_params(checkpoint, tmp_path, lambda p: p["data"].update(tokenizer={"name": "sp", "path": "/gone.model"}))
    with pytest.raises(ValueError, match="data.tokenizer.path='/gone.model': no such file"):
        load_consolidated_model_and_tokenizer(tmp_path)


def test_not_a_checkpoint(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_consolidated_model_and_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="ckpt: no folder '/nowhere'"):
        load_consolidated_model_and_tokenizer("/nowhere")
    edit_params(checkpoint, tmp_path, lambda params: None)
    whole = (tmp_path / "consolidated.pth").read_bytes()
    (tmp_path / "consolidated.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="consolidated.pth: not a consolidated checkpoint"):
        load_consolidated_model_and_tokenizer(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(checkpoint, monkeypatch, capsys):
    """`command(*key_values, stdin="")`: what `python -m apps.main.generate` prints."""

    def call(*arguments, stdin=""):
        fixed = [f"ckpt={checkpoint}", "dtype=fp32", "device=cpu", "max_gen_len=8"]
        monkeypatch.setattr(sys, "argv", ["generate", *fixed, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape")), "utf-8"))
        generate.main()
        return capsys.readouterr().out

    return call


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_from_the_terminal(command, tmp_path):
    """A line each; the same seed gives the same text."""
    arguments = ("temperature=1.0", f"out={tmp_path}/o.jsonl")
    outputs = [command(*arguments, stdin="first\nsecond\n") for _ in range(2)]
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("first")
    assert "\nsecond" in outputs[0]
    assert command("temperature=1.0", "seed=1", stdin="first\nsecond\n") != outputs[0]
    lines = read_lines(tmp_path / "o.jsonl")
    assert [line["prompt"] for line in lines] == ["first", "second"]
    assert outputs[0] == "".join(f"{line['prompt']}{line['text']}\n" for line in lines)


def test_prompts_from_arguments_and_files_get_the_same_text(command, tmp_path):
    prompts = ["one", "the second prompt", "three\nlines\n"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt, "id": 3}) + "\n" for prompt in prompts) + "\n")
    command(f"prompt_file={file}", f"out={tmp_path}/file")
    command(f"prompts={json.dumps(prompts)}", f"out={tmp_path}/list", "max_tokens=1")

    def read(name):
        """The lines without their log-likelihoods, which batches round differently."""
        return [{k: v for k, v in line.items() if k != "log_likelihoods"} for line in read_lines(tmp_path / name)]

    for prompt in prompts:
        command(f"prompt={prompt}", f"out={tmp_path}/one")
        (line,) = read("one")
        assert line in read("file")
    assert read("file") == read("list")
    first = read_lines(tmp_path / "file")[0]
    assert first["n_prompt_tokens"] == 4
    assert first["n_tokens"] == 8
    assert first["finish_reason"] == "length"
    assert set(first) == {"prompt", "text", "finish_reason", "n_prompt_tokens", "n_tokens", "log_likelihoods"}
    (tmp_path / "plain.txt").write_text("one\r\n\nthe second prompt\n")
    command(f"prompt_file={tmp_path}/plain.txt", f"out={tmp_path}/plain")
    assert read("plain") == read("file")[:2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("temperature=-1", "temperature: -1"),
        ("temperature=nan", "temperature: nan"),
        ("top_p=0", "top_p: 0"),
        ("top_k=0", "top_k: 0"),
        ("max_gen_len=0", "max_gen_len: 0"),
        ("max_gen_len=64", "max_gen_len: 64 tokens leave no room"),
        ("device=tpu", "device: 'tpu'"),
        ("seed=-1", "seed: -1"),
        ("until=['']", "until: holds an empty string"),
        ("temprature=1", "temprature: unknown key; did you mean temperature"),
        ("ckpt=/nowhere", "ckpt: no folder '/nowhere'"),
        ("ckpt=''", "ckpt: not set"),
        ("prompt_file=/nowhere.txt", "prompt_file: no file '/nowhere.txt'"),
        ("prompt_file={empty}", "prompt_file: .*empty.txt holds no prompt"),
        ("prompt_file={broken}", r"broken.jsonl:2: not JSON"),
        ("prompt_file={other}", r'other.jsonl:1: wanted an object with "prompt"'),
        ("out=/nowhere/o.jsonl", "out: no folder '/nowhere'"),
        ("out={folder}", "out: .* is a folder"),
    ],
)
def test_bad_arguments_end_in_one_line(command, tmp_path, argument, message):
    files = {"empty": "empty.txt", "broken": "broken.jsonl", "other": "other.jsonl", "folder": "."}
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
    before = set(tmp_path.iterdir())
    argument = argument.format(**{name: tmp_path / file for name, file in files.items()})
    with pytest.raises(ValueError, match=message) as caught:
        command(argument)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "prompt", ["Question: what", "1e3", "x ", "null", "", "- a\nb\n", "${HOME}", '"quoted" x', "a=b"]
)
def test_a_prompt_is_text_as_it_is(command, tmp_path, prompt):
    command(f"prompt={prompt}", f"out={tmp_path}/out")
    assert [line["prompt"] for line in read_lines(tmp_path / "out")] == [prompt]


def test_prompts_that_are_no_utf8(command, tmp_path):
    """Python makes half a surrogate pair of such a byte in an argument; the tokenizer reads that as a question mark."""
    assert command("prompt=caf\udcff", f"out={tmp_path}/out").startswith("caf?")
    assert [line["prompt"] for line in read_lines(tmp_path / "out")] == ["caf?"]
    with pytest.raises(UserError, match="prompts on stdin: not UTF-8 text"):
        command(stdin="caf\udcff\n")


def test_what_is_done_when_it_ends_early_is_not_lost(command, tmp_path, monkeypatch):
    prompts, steps, n_runs = ["one", "two and more", "three"], generate.BatchRun.steps, []

    def stopping(run):
        n_runs.append(run)
        if len(n_runs) == 3:
            raise KeyboardInterrupt
        yield from steps(run)

    monkeypatch.setattr(generate.BatchRun, "steps", stopping)
    arguments = (f"prompts={json.dumps(prompts)}", f"out={tmp_path}/out", "max_tokens=1")
    with pytest.raises(KeyboardInterrupt):
        command(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]
    done = read_lines(tmp_path / "out.part")
    assert len(done) == 2
    command(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    whole = read_lines(tmp_path / "out")
    assert [line["prompt"] for line in whole] == prompts
    assert all(line in whole for line in done)


def test_two_kinds_of_prompts(command):
    with pytest.raises(ValueError, match="prompts: given together with prompt; leave one of them out"):
        command("prompt=a", 'prompts=["b"]')
