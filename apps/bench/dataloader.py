"""Tokens per second of the loader, with bytes and with a sentencepiece model trained on the same text.

    python -m apps.bench.dataloader [data.root_dir=data/sample] [data.sources.stdlib=1] [seconds=10] [out=result.json]

Measured on the data's documents and on short ones, biographies of 260 characters. Beside the loader stand its floor,
the same lines read and parsed as JSON with no tokens made of them, and one thread that tokenizes a document at a time.

`one thread ns`: nanoseconds a token of the thread that reads and packs, in which the tokenizer's threads have no part.
However many cores there are, the loader is no faster than this. `taskset -c 0,1` gives it two cores.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from apps.bench.report import report
from apps.capacity.people import People, write_exposures
from lingua.args import parse_args
from lingua.data import DataArgs, build_dataloader_from_args, count_threads, init_dataloader_state_from_args
from lingua.launch import run_main
from lingua.sources import TRAIN_FILES, encode_document, find_files, read_documents
from lingua.tokenizer import TokenizerArgs, build_tokenizer


def sample_data() -> DataArgs:
    return DataArgs(root_dir="data/sample", sources={"stdlib": 1.0}, batch_size=8, seq_len=4096)


@dataclass
class BenchArgs:
    """`seconds`: for each measurement; `vocab_size`: of the sentencepiece model; `rounds`: how often all is measured,
    of which the fastest counts.
    """

    data: DataArgs = field(default_factory=sample_data)
    seconds: float = 10.0
    rounds: int = 1
    vocab_size: int = 8000
    out: str | None = None


def texts(args: DataArgs) -> Iterator[str]:
    for source in itertools.cycle(name for name, weight in args.sources.items() if weight > 0):
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


def measure_documents(args: DataArgs, seconds: float) -> float:
    """Tokens a second, one document at a time, without rows."""
    tokenizer = build_tokenizer(args.tokenizer.name, args.tokenizer.path)
    start, tokens = time.perf_counter(), 0
    for text in texts(args):
        tokens += len(np.array(encode_document(tokenizer, text, args.add_bos, args.add_eos), dtype=np.int32))
        if time.perf_counter() - start > seconds:
            break
    return tokens / (time.perf_counter() - start)


def measure_loader(args: DataArgs, seconds: float) -> tuple[float, float]:
    """Tokens a second, after the shuffle buffer is full, and seconds a token of this thread."""
    tokens = 0
    with build_dataloader_from_args(args, init_dataloader_state_from_args(args, 0, 1)) as batches:
        next(batches)
        start, start_of_thread = time.perf_counter(), time.thread_time()
        while time.perf_counter() - start < seconds:
            batch, _ = next(batches)
            tokens += batch.shape[0] * batch.shape[1]
        return tokens / (time.perf_counter() - start), (time.thread_time() - start_of_thread) / tokens


def measure(name: str, args: DataArgs, bench: BenchArgs, model_file: Path) -> list[dict[str, Any]]:
    train_sentencepiece(args, bench.vocab_size, model_file)
    sample = list(itertools.islice(texts(args), 200))
    rows = []
    for tokenizer in (TokenizerArgs("bytes"), TokenizerArgs("sp", str(model_file))):
        args = replace(args, tokenizer=tokenizer)
        n_tokens = sum(map(len, build_tokenizer(tokenizer.name, tokenizer.path).encode_batch(sample)))
        mb_per_token = sum(len(text.encode(errors="replace")) for text in sample) / n_tokens / 1e6
        one, same, process, floor, thread = 0.0, 0.0, 0.0, 0.0, 1.0
        for _ in range(bench.rounds):
            floor = max(floor, measure_floor(args, bench.seconds))
            one = max(one, measure_documents(args, bench.seconds))
            speed, seconds = measure_loader(replace(args, load_async=False), bench.seconds)
            same, thread = max(same, speed), min(thread, seconds)
            process = max(process, measure_loader(replace(args, load_async=True), bench.seconds)[0])
        rows.append(
            {
                "documents": name,
                "tokenizer": tokenizer.name,
                "floor": floor / mb_per_token,
                "one at a time": one,
                "loader": same,
                "in a process": process,
                "its MB/s": process * mb_per_token,
                "one thread ns": thread * 1e9,
            }
        )
    return rows


def main() -> None:
    args = parse_args(BenchArgs)
    with tempfile.TemporaryDirectory() as folder:
        write_exposures(People(2000), 20, Path(folder) / "bios", 1)
        short = replace(args.data, root_dir=folder, sources={"bios": 1.0})
        rows = [
            *measure("data", args.data, args, Path(folder) / "data.model"),
            *measure("short", short, args, Path(folder) / "short.model"),
        ]
    title = f"data loader, tokens/s, rows of {args.data.seq_len} tokens, {count_threads()} threads"
    report(title, rows, args.out)


if __name__ == "__main__":
    run_main(main)
