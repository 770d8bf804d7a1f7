"""Validation and generation from checkpoints, on a small random model."""

import io
import json
import math
import sys

import pytest
import torch

from apps.main import generate
from apps.main.eval import EvalArgs, ValidationArgs, launch_eval
from apps.main.generate import GeneratorArgs, continue_text, load_consolidated_model_and_tokenizer, sample
from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import to_dict
from lingua.checkpoint import CheckpointArgs, CheckpointManager, consolidate_checkpoints
from lingua.data import DataArgs
from lingua.optim import OptimArgs, build_optimizer
from lingua.product_key.memory import ProductKeyArgs
from lingua.tokenizer import build_tokenizer
from lingua.transformer import cross_entropy

TEXTS = ["short", "a longer document, of more than one row, " * 4, "", "naïve 日本"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with data and a checkpoint of a model that was never trained."""
    folder = tmp_path_factory.mktemp("run")
    source = folder / "data" / "words"
    source.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (source / "words.chunk.00.jsonl").write_text(lines)
    (source / "words.val.jsonl").write_text(lines)
    memory = ProductKeyArgs(is_enabled=True, layers="0,1", mem_n_keys=8, mem_knn=4, mem_k_dim=8, mem_heads=2)
    model_args = LMTransformerArgs(dim=32, n_layers=2, n_heads=2, vocab_size=258, max_seqlen=24, productkey_args=memory)
    data = DataArgs(root_dir=str(folder / "data"), sources={"words": 1.0}, batch_size=3, seq_len=24)
    args = TrainArgs(dump_dir=str(folder), model=model_args, data=data)
    model = LMTransformer(model_args)
    optimizer, _ = build_optimizer(model, OptimArgs(), 10)
    manager = CheckpointManager(CheckpointArgs(), folder / "checkpoints")
    manager.save(7, model, optimizer, {"step": 7}, to_dict(args))
    return folder


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoints" / "0000000007"


def evaluate(checkpoint, folder, **validation):
    generator = GeneratorArgs(dtype="fp32", device="cpu")
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(folder / "evals"), generator=generator, global_step=7)
    args.metric_log_dir = str(folder)
    args.validation = ValidationArgs(**validation)
    return launch_eval(args)


def plain_loss(model, tokenizer):
    """Summed loss and counts, a row at a time, nothing packed or filled up."""
    nll, n_tokens = 0.0, 0
    for text in TEXTS:
        tokens = torch.tensor(tokenizer.encode(text, True, True))
        for start in range(0, len(tokens) - 1, model.max_seqlen):
            piece = tokens[start : start + model.max_seqlen + 1]
            with torch.no_grad():
                nll += cross_entropy(model(piece[None, :-1]), piece[None, 1:], reduction="sum").item()
            n_tokens += len(piece) - 1
    return nll, n_tokens, sum(len(text.encode()) for text in TEXTS)


def test_validation_is_the_plain_loss(run, checkpoint, tmp_path):
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    nll, n_tokens, n_bytes = plain_loss(model, tokenizer)
    results = evaluate(checkpoint, tmp_path)
    assert results["words"]["loss"] == pytest.approx(nll / n_tokens, rel=1e-5)
    assert results["words"]["bits_per_byte"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-5)
    assert (results["words"]["n_tokens"], results["words"]["n_bytes"]) == (n_tokens, n_bytes)
    assert json.loads((tmp_path / "evals" / "validation.json").read_text()) == results
    line = json.loads((tmp_path / "metrics.validation.jsonl").read_text())
    assert line["global_step"] == 7
    assert line["words"] == results["words"]


def test_slots_read_are_counted(run, checkpoint, tmp_path):
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    read = {0: set(), 1: set()}
    for number, memory in model.memories().items():
        memory.query_proj.register_forward_hook(
            lambda _, __, query, memory=memory, mine=read[number]: mine.update(
                memory.get_indices(query, memory.knn)[1].flatten().tolist()
            )
        )
    plain_loss(model, tokenizer)
    slots = evaluate(checkpoint, tmp_path)["memory_slots"]
    assert slots["total"] == 64
    # Rows are filled up behind their ends in evaluation, and those tokens read slots too.
    for number, mine in read.items():
        assert len(mine) <= slots[f"read_by_layer_{number}"] <= 64
    assert slots["read"] >= len(read[0] | read[1])


def test_other_sources_and_max_steps(run, checkpoint, tmp_path):
    other = tmp_path / "more" / "words"
    other.mkdir(parents=True)
    (other / "x.val.jsonl").write_text("".join(json.dumps({"content": "text " * 20}) + "\n" for _ in range(50)))
    results = evaluate(checkpoint, tmp_path, root_dir=str(tmp_path / "more"), sources=["words"], max_steps=2)
    assert results[str(other)]["n_documents"] < 50
    assert results["words"]["n_documents"] >= 1
    alone = evaluate(
        checkpoint, tmp_path, root_dir=str(tmp_path / "more"), sources=["words"], use_val_from_train_src=False
    )
    assert alone["words"]["n_documents"] == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ckpt_dir": ""}, "ckpt_dir: not set"),
        ({"dump_dir": None}, "dump_dir: not set"),
        ({"ckpt_dir": "/nowhere"}, "ckpt: no folder '/nowhere'"),
        ({"harness": {"tasks": ["x"]}}, "harness: not available yet"),
        ({"validation": None}, "validation: null"),
        ({"validation": ValidationArgs(max_steps=0)}, "validation.max_steps: 0"),
        ({"validation": ValidationArgs(sources=["a"])}, "validation.root_dir: not set"),
        ({"validation": ValidationArgs(use_val_from_train_src=False)}, "validation.sources: nothing"),
        ({"validation": ValidationArgs(sources=["a"], root_dir="/nowhere")}, "sources.a: no folder"),
        ({"generator": GeneratorArgs(dtype="bf15")}, "generator.dtype: 'bf15'"),
    ],
)
def test_bad_evaluation_arguments(run, checkpoint, tmp_path, changes, message):
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(tmp_path / "evals"))
    for name, value in changes.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        launch_eval(args)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evals").exists()


def test_loading_from_either_form(run, checkpoint):
    distributed, _, config = load_consolidated_model_and_tokenizer(checkpoint)
    folder = consolidate_checkpoints(checkpoint)
    from_folder, tokenizer, _ = load_consolidated_model_and_tokenizer(folder)
    assert config["model"]["dim"] == 32
    assert tokenizer.n_words == 258
    for name, parameter in distributed.state_dict().items():
        assert torch.equal(parameter, from_folder.state_dict()[name])
    tokens = torch.arange(24)[None]
    assert torch.equal(distributed(tokens), from_folder(tokens))


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_consolidated_model_and_tokenizer(tmp_path)


def test_greedy_generation_recomputes_the_sequence(run, checkpoint):
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    tokens = tokenizer.encode("ab", True, False)
    with torch.no_grad():
        for _ in range(40):  # past max_seqlen, where the model sees the last 24 tokens
            tokens.append(int(model(torch.tensor([tokens[-24:]]))[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_id:
                tokens.pop()
                break
    args = GeneratorArgs(max_gen_len=40, dtype="fp32")
    assert "".join(continue_text(model, tokenizer, "ab", args, torch.Generator())) == tokenizer.decode(tokens)[2:]


class Spelling:
    """Stands for a model that says a given text, whatever it is asked."""

    max_seqlen = 100

    def __init__(self, text, prompt):
        self.tokens = list(text.encode()) + [257]
        self.start = len(prompt.encode()) + 1
        self.parameter = torch.zeros(1)

    def parameters(self):
        return iter([self.parameter])

    def __call__(self, tokens):
        logits = torch.zeros(1, tokens.shape[1], 258)
        logits[0, -1, self.tokens[tokens.shape[1] - self.start]] = 1
        return logits


@pytest.mark.parametrize(
    ("until", "pieces"),
    [
        ([], "one é two END three"),
        (["END"], "one é two "),
        (["three", "END"], "one é two "),
        (["ENDE"], "one é two END three"),
        (["one"], ""),
    ],
)
def test_stop_strings_end_the_text_where_they_begin(until, pieces):
    tokenizer = build_tokenizer("bytes")
    args = GeneratorArgs(until=until, dtype="fp32")
    model = Spelling("one é two END three", "p")
    assert "".join(continue_text(model, tokenizer, "p", args, torch.Generator())) == pieces


def test_sampling():
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    random = torch.Generator().manual_seed(0)

    def drawn(**arguments):
        return {sample(logits, GeneratorArgs(**arguments), random) for _ in range(300)}

    assert drawn() == {1}
    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {1, 2}
    assert drawn(temperature=1.0, top_p=0.6) == {1}
    assert drawn(temperature=1.0, top_p=0.7) == {1, 2}
    assert drawn(temperature=1.0, top_p=0.95, top_k=2) == {1, 2}
    counts = torch.bincount(torch.tensor([sample(logits, GeneratorArgs(temperature=1.0), random) for _ in range(4000)]))
    assert torch.allclose(counts / 4000, torch.softmax(logits, 0), atol=0.03)


def test_command(run, checkpoint, monkeypatch, capsys, tmp_path):
    """Prompts from the terminal, a line each; the same seed gives the same text."""
    arguments = [
        "generate",
        f"ckpt={checkpoint}",
        "max_gen_len=8",
        "temperature=1.0",
        "dtype=fp32",
        f"out={tmp_path}/o",
    ]
    outputs = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
        generate.main()
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("first")
    assert "\nsecond" in outputs[0]
    assert (tmp_path / "o").read_text() == outputs[0]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("temperature=-1", "temperature: -1"),
        ("top_p=0", "top_p: 0"),
        ("top_k=0", "top_k: 0"),
        ("max_gen_len=0", "max_gen_len: 0"),
        ("device=tpu", "device: 'tpu'"),
        ("compile_prefilling=true", "compile_prefilling: not available yet"),
        ("temprature=1", "temprature: unknown key; did you mean temperature"),
    ],
)
def test_bad_generation_arguments(checkpoint, monkeypatch, argument, message):
    monkeypatch.setattr(sys, "argv", ["generate", f"ckpt={checkpoint}", argument])
    with pytest.raises(ValueError, match=message):
        generate.main()
