"""Runs on data with faults: with `data.on_error=skip` they are left out, counted, and a resume is exact."""

import json
import logging
import shutil

import pytest

from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator
from apps.main.validation import validate_source
from lingua.tokenizer import ByteTokenizer, build_tokenizer
from tests.helpers.evaluation import TEXTS, small_model, write_run
from tests.helpers.training import read_losses, read_metrics


@pytest.fixture
def bad_corpus(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    for file in (tmp_path / "data").rglob("*.jsonl"):
        lines = file.read_bytes().splitlines()
        lines[3::7] = [b'{"text": "\xff"}'] * len(lines[3::7])
        file.write_bytes(b"\n".join(lines))
    return tmp_path / "data"


def test_run_that_skips(run_here, bad_corpus, tmp_path):
    keys = [f"data.root_dir={bad_corpus}", "data.on_error=skip", "optim.scheduler=constant"]
    run_here(tmp_path / "whole", *keys, "steps=30").ok()
    run_here(tmp_path / "parts", *keys, "steps=17").ok()
    run_here(tmp_path / "parts", *keys, "steps=30").ok()
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    skipped = [line["data/skipped"] for line in read_metrics(tmp_path / "whole")]
    assert skipped == [line["data/skipped"] for line in read_metrics(tmp_path / "parts")]
    assert skipped == sorted(skipped)
    assert skipped[-1] > 0
    log = (tmp_path / "whole" / "train.log").read_text()
    assert "alpha.chunk.00.jsonl:4: not a line of JSON ('utf-8' codec can't decode byte 0xff" in log
    assert "; the line begins at byte " in log


class NoShortTexts(ByteTokenizer):
    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        if text == "short":
            raise RuntimeError("too short")
        return super().encode(text, add_bos, add_eos)


def test_validation_skips_and_counts_too(tmp_path, caplog):
    file = write_run(tmp_path) / "data" / "words" / "words.val.jsonl"
    alone = tmp_path / "alone.val.jsonl"
    alone.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[1:]))
    data = {"batch_size": 3, "seq_len": 24, "add_bos": True, "add_eos": True}
    plain = PackedCausalTransformerGenerator(GeneratorArgs(dtype="fp32"), small_model(), build_tokenizer("bytes"))
    expected = validate_source(plain, [alone], data, None)
    file.write_text(f"no JSON\n{file.read_text()}")
    failing = PackedCausalTransformerGenerator(GeneratorArgs(dtype="fp32"), small_model(), NoShortTexts())
    with pytest.raises(ValueError, match=f"^{file}:1: not a line of JSON .*; the line begins at byte 0"):
        validate_source(failing, [file], data, None)
    assert validate_source(failing, [file], data | {"on_error": "skip"}, None) == expected | {"n_skipped": 2}
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told[0].startswith(f"skipped, number 1: {file}:1: not a line of JSON")
    assert told[1].startswith(f"skipped, number 2: {file}:2: the tokenizer fails")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=rf"^{file}:1: the tokenizer fails on this document .RuntimeError: too short."):
        validate_source(failing, [file], data, None)
