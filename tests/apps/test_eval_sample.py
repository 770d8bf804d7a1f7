"""What validation covers: the bytes that it counts, and the sample that `max_steps` takes."""

import json
import math

import numpy as np
import pytest
import torch

from apps.main import validation
from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator, Progress
from apps.main.validation import spread_evenly, validate_source
from lingua.tokenizer import build_tokenizer
from tests.helpers.evaluation import small_model
from tests.helpers.ranks import run_ranks
from tests.lingua.test_tokenizer import prose, rank_lines, train_ranks, train_sentencepiece

SEQ_LEN = 24
DATA = {"batch_size": 3, "seq_len": SEQ_LEN, "add_bos": True, "add_eos": True}


def make_generator(tokenizer, is_uniform=False):
    model = small_model(max_seqlen=SEQ_LEN, vocab_size=tokenizer.n_words)
    if is_uniform:
        with torch.no_grad():
            model.output.weight.zero_()
    return PackedCausalTransformerGenerator(GeneratorArgs(dtype="fp32", device="cpu"), model, tokenizer)


def write_documents(file, texts, ends=""):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + ends)
    return file


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp").write_bytes(train_sentencepiece())
    (folder / "tiktoken").write_bytes(rank_lines(train_ranks(prose(2, 300), 60)))
    return {name: build_tokenizer(name, str(folder / name)) for name in ("bytes", "sp", "tiktoken")}


def test_a_uniform_byte_model_takes_eight_bits_for_each_byte(tmp_path, tokenizers):
    """However short documents are: of those without BOS the first byte is not scored, and does not count."""
    generator = make_generator(tokenizers["bytes"], is_uniform=True)
    file = write_documents(tmp_path / "a.val.jsonl", ["abcd", "efgh", "x"])
    data = DATA | {"add_bos": False, "add_eos": False}
    found = validate_source(generator, [file], data, None)
    assert found["bits_per_byte"] == pytest.approx(math.log2(258), abs=1e-4)  # 8.011
    assert (found["n_documents"], found["n_tokens"], found["n_bytes"]) == (3, 6, 6)
    write_documents(file, ["x", "y", ""])
    with pytest.raises(ValueError, match="no text in its validation files that can be scored"):
        validate_source(generator, [file], data, None)


@pytest.mark.parametrize("framing", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("name", ["bytes", "sp", "tiktoken"])
def test_only_bytes_of_scored_tokens_count(tmp_path, tokenizers, name, framing):
    tokenizer, (add_bos, add_eos) = tokenizers[name], framing
    texts = ["the quick", "brown fox jumps over lazy dogs " * 4, "x", ""]  # one of several windows
    file = write_documents(tmp_path / "a.val.jsonl", texts)
    generator = make_generator(tokenizer, is_uniform=True)
    found = validate_source(generator, [file], DATA | {"add_bos": add_bos, "add_eos": add_eos}, None)
    n_tokens = n_bytes = 0
    for text in texts:
        tokens = tokenizer.encode(text, add_bos, add_eos)
        n_tokens += max(len(tokens) - 1, 0)
        # Of the text as it is, the space at its end too.
        n_bytes += len(text) - len(tokenizer.decode(tokens[:1])) if tokens else 0
    assert (found["n_tokens"], found["n_bytes"]) == (n_tokens, n_bytes)
    assert found["bits_per_byte"] == pytest.approx(n_tokens * math.log2(tokenizer.n_words) / n_bytes, abs=1e-4)


# --- the sample ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """150 documents in two files, by turns of three kinds, of which the longest take several rows."""
    folder = tmp_path_factory.mktemp("source")
    texts = [f"{number:03d} " + "abcdefgh" * (1, 2, 9)[number % 3] for number in range(150)]
    first = write_documents(folder / "a.val.jsonl", texts[:100], ends="\n  \n")
    return [first, write_documents(folder / "b.val.jsonl", texts[100:])]


def sample(files, max_steps, **changes):
    """What `validate_source` returns, and the numbers of the documents that were scored, in order."""
    generator = make_generator(build_tokenizer("bytes"))
    seen = []
    score = generator.score_batch
    generator.score_batch = lambda rows: seen.extend(rows) or score(rows)
    found = validate_source(generator, files, DATA | changes, max_steps)
    return found, sorted({int(bytes(row[1:4])) for row in seen if row[0] == 256 and row[1] < ord("a")})


def sample_on_rank(paths, max_steps):
    return validate_source(make_generator(build_tokenizer("bytes")), paths, DATA, max_steps)


def test_any_beginning_of_the_order_is_spread_evenly():
    for n in (1, 2, 7, 100, 4096, 10_000):
        order = spread_evenly(n)
        assert sorted(order.tolist()) == list(range(n))
    for n_first in (10, 100, 1000):
        chosen = np.sort(order[:n_first])
        gaps = np.diff(np.append(chosen, n))
        assert gaps.max() <= 3 * n / n_first
        # Also where kinds of documents come by turns.
        for period in (2, 3, 8, 32):
            if n_first >= 10 * period:
                counts = np.bincount(chosen % period, minlength=period)
                assert counts.max() <= 1.3 * n_first / period + 1
    assert spread_evenly(0).tolist() == []


def test_max_steps_takes_documents_from_all_over_the_files(files):
    found, numbers = sample(files, 20)  # 60 rows of 3 a batch
    assert len(numbers) == found["n_documents"]
    assert found["n_bytes"] == sum(4 + 8 * (1, 2, 9)[number % 3] for number in numbers)
    n_rows = [-(-(4 + 8 * (1, 2, 9)[number % 3] + 1) // SEQ_LEN) for number in spread_evenly(150).tolist()]
    assert sum(n_rows[: len(numbers) - 1]) < 60 <= sum(n_rows[: len(numbers)])
    assert numbers[0] < 10
    assert numbers[-1] > 140
    assert np.diff(numbers).max() <= 3 * 150 / len(numbers)
    kinds = np.bincount(np.array(numbers) % 3)
    assert kinds.min() > len(numbers) / 5
    assert sample(files, 20) == (found, numbers)
    assert set(numbers) <= set(sample(files, 30)[1])


def test_a_sample_that_covers_everything_is_the_full_validation(files, monkeypatch):
    """To the last digit; in several chunks, too."""
    monkeypatch.setattr(validation, "DOCUMENTS_AT_ONCE", 40)
    full = sample(files, None)
    assert full[0]["n_documents"] == 150
    assert sample(files, 10**6) == full


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_any_number_of_ranks_takes_the_same_sample(files, n_ranks):
    found = sample_on_rank(files, 7)
    assert found["n_documents"] < 150
    assert run_ranks(n_ranks, sample_on_rank, files, 7) == [found] * n_ranks


def test_faults_in_a_sample(files, tmp_path):
    lines = files[0].read_text().splitlines(keepends=True)
    lines[10] = "no JSON\n"
    file = tmp_path / "a.val.jsonl"
    file.write_text("".join(lines))
    with pytest.raises(
        ValueError, match=rf"^{file}:11: not a line of JSON .*; the line begins at byte \d+ .data.on_err"
    ):
        sample([file], 10**6)
    found, numbers = sample([file], 10**6, on_error="skip")
    assert (found["n_documents"], found["n_skipped"]) == (99, 1)
    assert found == sample([file], None, on_error="skip")[0]
    # One that the sample does not take is no matter.
    n_before = spread_evenly(100).tolist().index(10)
    assert n_before > 5
    assert sample([file], 1)[0]["n_documents"] <= n_before


def test_the_time_left_is_that_of_what_there_is_to_do(files, tmp_path, monkeypatch):
    """`max_steps` may ask for more than the files hold; of all of them it is bytes of the files."""
    shown = []

    class Watched(Progress):
        def show(self, more=""):
            shown.append((self.done, self.total))
            assert self.done <= self.total

    monkeypatch.setattr(validation, "Progress", Watched)
    n_rows = sum(-(-(4 + 8 * (1, 2, 9)[number % 3] + 1) // SEQ_LEN) for number in range(150))
    monkeypatch.setattr(validation, "DOCUMENTS_AT_ONCE", 40)
    sample(files, 10**6)
    assert {total for _, total in shown} == {n_rows}
    assert shown[-1][0] > 0.9 * n_rows
    shown.clear()
    sample(files, 20)
    assert {total for _, total in shown} <= set(range(60, 64))
    shown.clear()
    sample(files, None)
    assert {total for _, total in shown} == {sum(file.stat().st_size for file in files)}
    assert shown[-1][0] > 0.9 * shown[-1][1]
    # Of the last document nothing is left when it is scored, though it is where the file begins.
    alone = write_documents(tmp_path / "alone.val.jsonl", ["abcdefgh" * 9])
    shown.clear()
    sample([alone], None)
    assert shown[-1][0] > 0
