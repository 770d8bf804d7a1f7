"""Which tokens read which slots: the file against the memories themselves, asked a token at a time."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from apps.main.eval import EvalArgs, launch_eval
from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator, load_consolidated_model_and_tokenizer
from apps.main.slot_reads import write_slot_reads
from apps.main.transformer import LMTransformer
from apps.main.validation import EvaluationStopped, ValidationArgs
from tests.helpers.evaluation import TEXTS, write_run

# TEXTS as they are read: with BOS, and without the EOS that nothing is predicted from.
N_READ = [len(text.encode()) + 1 for text in TEXTS]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run")


def arguments(run, folder, slot_reads, **generator):
    args = EvalArgs(ckpt_dir=str(run / "checkpoints" / "0000000007"), dump_dir=str(folder))
    args.generator = GeneratorArgs(**{"dtype": "fp32", "device": "cpu", **generator})
    args.validation = ValidationArgs(slot_reads=slot_reads)
    return args


def evaluate(run, folder, slot_reads, **generator):
    found = launch_eval(arguments(run, folder, slot_reads, **generator))["validation"]
    return found, pq.read_table(folder / "slot_reads.parquet").to_pydict()


def expected_reads(run):
    """(source, document, position, token, layer, head) -> slot -> weight"""
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(run / "checkpoints" / "0000000007")
    reads = {}
    for document, text in enumerate(TEXTS):
        tokens = tokenizer.encode(text, True, True)
        for start in range(0, len(tokens) - 1, model.max_seqlen):
            piece = tokens[start : min(start + model.max_seqlen, len(tokens) - 1)]
            for layer, memory in model.memories().items():
                found = []
                hook = memory.query_proj.register_forward_hook(
                    lambda _module, _input, query, memory=memory, found=found: found.extend(
                        memory.get_indices(query, memory.knn)
                    )
                )
                with torch.no_grad():
                    model(torch.tensor([piece]))
                hook.remove()
                scores, slots = found
                weights = scores.softmax(-1)
                for place, token in enumerate(piece):
                    for head in range(memory.heads):
                        reads["words", document, start + place, token, layer, head] = dict(
                            zip(slots[place, head].tolist(), weights[place, head].tolist(), strict=True)
                        )
    return reads


def as_reads(table):
    reads = {}
    names = ("source", "document", "position", "token", "layer", "head")
    for *reader, slot, weight in zip(*(table[name] for name in (*names, "slot", "weight")), strict=True):
        assert reads.setdefault(tuple(reader), {}).setdefault(slot, weight) == weight
    return reads


@pytest.mark.parametrize("max_tokens", [16384, 24])
def test_the_file_says_what_the_memories_read(run, tmp_path, max_tokens):
    found, table = evaluate(run, tmp_path, 10**6, max_tokens=max_tokens)
    expected, reads = expected_reads(run), as_reads(table)
    assert reads.keys() == expected.keys()
    assert len(reads) == sum(N_READ) * 2 * 2
    for reader, of_slots in expected.items():
        assert reads[reader] == pytest.approx(of_slots, rel=1e-4)
    for layer in (0, 1):
        slots = {slot for slot, its in zip(table["slot"], table["layer"], strict=True) if its == layer}
        assert len(slots) == found["memory_slots"][f"read_by_layer_{layer}"]
    # As the documents are in the files; the largest weight first.
    assert list(dict.fromkeys(table["document"])) == [0, 1, 2, 3]
    assert (np.diff(np.reshape(table["weight"], (-1, 4)), axis=1) <= 0).all()
    texts = dict(zip(zip(table["document"], table["position"], strict=True), table["text"], strict=True))
    for document, text in enumerate(TEXTS):
        assert "".join(texts[document, position] for position in range(N_READ[document])) == text
    assert not list(tmp_path.glob("slot_reads.parquet.tmp"))


def test_so_many_tokens_of_each_source(run, tmp_path):
    whole = as_reads(evaluate(run, tmp_path / "whole", 10**6)[1])
    n_tokens = N_READ[0] + 30  # ends within the second row of the second document
    first = as_reads(evaluate(run, tmp_path / "first", n_tokens)[1])
    assert len({reader[1:3] for reader in first}) == n_tokens
    assert max(reader[1:3] for reader in first) == (1, 29)
    for reader, slots in first.items():
        assert slots == pytest.approx(whole[reader], rel=1e-4)


def write_reads(run, file, should_stop=None):
    model, tokenizer, config = load_consolidated_model_and_tokenizer(run / "checkpoints" / "0000000007")
    generator = PackedCausalTransformerGenerator(
        GeneratorArgs(dtype="fp32", device="cpu", max_gen_len=4, max_tokens=24), model, tokenizer
    )
    files = {"words": [run / "data" / "words" / "words.val.jsonl"]}
    write_slot_reads(file, generator, files, config["data"], 100, should_stop)


def test_other_ranks_leave_it_to_the_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr("apps.main.slot_reads.rank_and_size", lambda: (1, 2))
    write_reads(run, tmp_path / "reads")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_it_is_not_asked_for(run, tmp_path):
    launch_eval(arguments(run, tmp_path, None))
    assert not list(tmp_path.glob("slot_reads*"))


def test_a_stop_leaves_no_file(run, tmp_path):
    answers = iter([False, True, True])
    with pytest.raises(EvaluationStopped):
        write_reads(run, tmp_path / "reads", lambda: next(answers))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_told_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="validation.slot_reads: 0 is too small"):
        launch_eval(arguments(run, tmp_path / "evals", 0))
    monkeypatch.setattr(LMTransformer, "memories", lambda model: {})
    with pytest.raises(ValueError, match="validation.slot_reads: the model of .*0000000007 has no memories"):
        launch_eval(arguments(run, tmp_path / "evals", 10))
    assert not (tmp_path / "evals").exists()
