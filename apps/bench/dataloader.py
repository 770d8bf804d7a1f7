"""Tokens per second of the loader, with bytes and with a sentencepiece model trained on the same text.

    python -m apps.bench.dataloader [data.root_dir=data/sample] [data.sources.stdlib=1] [seconds=10] [out=result.json]

The floor beside them: the same lines read and parsed as JSON, with no tokens made of them.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import sentencepiece

from apps.bench.report import report
from lingua.args import parse_args
from lingua.data import DataArgs, build_dataloader_from_args, init_dataloader_state_from_args
from lingua.launch import run_main
from lingua.sources import TRAIN_FILES, find_files, read_documents
from lingua.tokenizer import TokenizerArgs, build_tokenizer


def sample_data() -> DataArgs:
    return DataArgs(root_dir="data/sample", sources={"stdlib": 1.0}, batch_size=8, seq_len=4096)


@dataclass
class BenchArgs:
    """`seconds`: for each measurement; `vocab_size`: of the sentencepiece model."""

    data: DataArgs = field(default_factory=sample_data)
    seconds: float = 10.0
    vocab_size: int = 8000
    out: str | None = None


def texts(args: DataArgs) -> Iterator[str]:
    for source in itertools.cycle(args.sources):
        for file in find_files(args.root_dir, source, TRAIN_FILES):
            yield from (text for text, _ in read_documents(file))


def train_sentencepiece(args: DataArgs, vocab_size: int, file: Path) -> None:
    """A BPE model of the first 5 MB of the text."""
    model, size = io.BytesIO(), 0
    sample = []
    for text in texts(args):
        sample += text.splitlines()
        size += len(text)
        if size > 5e6:
            break
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())


def measure_floor(args: DataArgs, seconds: float) -> float:
    """MB of text a second, read and parsed only."""
    start, size = time.perf_counter(), 0
    for text in texts(args):
        size += len(text.encode(errors="replace"))
        if time.perf_counter() - start > seconds:
            break
    return size / (time.perf_counter() - start) / 1e6


def measure(args: DataArgs, seconds: float) -> float:
    """Tokens a second, after the shuffle buffer is full."""
    tokens = 0
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as batches:
        next(batches)
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch, _ = next(batches)
            tokens += batch.shape[0] * batch.shape[1]
        return tokens / (time.perf_counter() - start)


def main() -> None:
    args = parse_args(BenchArgs)
    rows = [{"what": "read and parse", "worker": "-", "tokens/s": "-", "MB/s": measure_floor(args.data, args.seconds)}]
    with tempfile.TemporaryDirectory() as folder:
        model_file = Path(folder) / "sp.model"
        train_sentencepiece(args.data, args.vocab_size, model_file)
        sample = "".join(itertools.islice(texts(args.data), 200))
        for name, path in (("bytes", None), ("sp", str(model_file))):
            tokens = len(build_tokenizer(name, path).encode(sample, False, False))
            bytes_per_token = len(sample.encode(errors="replace")) / tokens
            for load_async in (False, True):
                data = replace(args.data, tokenizer=TokenizerArgs(name, path), load_async=load_async)
                speed = measure(data, args.seconds)
                row = {"what": name, "worker": "process" if load_async else "same"}
                rows.append({**row, "tokens/s": speed, "MB/s": speed * bytes_per_token / 1e6})
    report(f"data loader, rows of {args.data.seq_len} tokens", rows, args.out)


if __name__ == "__main__":
    run_main(main)
