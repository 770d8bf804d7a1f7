"""The shuffle of lingua.shuffle beside `shuf` and beside copying the file once: MB/s and peak memory.

    python -m apps.bench.shuffle [sizes=[0.5,1,2]] [memory=0.25] [workers=2] [folder=/tmp] [out=result.json]

Sizes and memory are in GB. The documents are made for it and removed after it; `folder` needs 4 times the largest size.
All programs read a file that was just written, as far as it is in the page cache, and leave what they wrote on the disk
(fsync). `shuf` holds the whole file in memory, so it is run on the smallest size only. Peak memory is that of the
largest process, and of all together.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil

from apps.bench.report import report
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.launch import run_main

SCRIPT = Path(__file__).resolve().parents[2] / "setup" / "download_prepare_hf_data.py"


@dataclass
class BenchArgs:
    """`sizes` and `memory` in GB; `workers`: null as many as the script chooses; `folder`: on the disk to measure."""

    sizes: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    memory: float = 0.25
    workers: int | None = None
    folder: str | None = None
    out: str | None = None


def make_documents(file: Path, size: float) -> None:
    """JSON lines of about 4 kB, log-normal as web pages are, with line breaks and other characters to escape."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, length))) for length in rng.integers(2, 12, 5000)]
    lengths = rng.lognormal(5.8, 1.0, 4000).astype(int) + 1
    texts = [" ".join(words[word] for word in rng.integers(0, len(words), length)) for length in lengths]
    texts = [text.replace(" a", '\n"').replace(" q", "é ") for text in texts]
    with open(file, "wb") as stream:
        number = 0
        while stream.tell() < size:
            row = {"text": texts[number % len(texts)], "id": number, "url": f"https://example.org/{number}"}
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            number += 1
        os.fsync(stream.fileno())


def high_water_mark(process: psutil.Process) -> int:
    """The most resident memory, in bytes, that a process ever had."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


def measure(command: list[str], log: Path) -> dict[str, Any]:
    """Seconds, and MB of memory of the largest process and of all at once."""
    start = time.perf_counter()
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    largest = together = 0
    while process.poll() is None:
        try:
            processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            largest = max(largest, *map(high_water_mark, processes))
            together = max(together, sum(one.memory_info().rss for one in processes))
        except (psutil.Error, OSError):
            pass  # one of them has just ended
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{command[0]}: exit code {process.returncode}: {log.read_text()[-500:]}")
    return {"seconds": time.perf_counter() - start, "largest": largest / 1e6, "together": together / 1e6}


def copy_once(source: Path, target: Path) -> float:
    """Seconds to read and write a file once, through one buffer, onto the disk."""
    start = time.perf_counter()
    buffer = bytearray(1 << 20)
    with open(source, "rb", buffering=0) as reader, open(target, "wb", buffering=0) as writer:
        while n := reader.readinto(buffer):
            writer.write(memoryview(buffer)[:n])
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def row(what: str, size: int, measured: dict[str, Any], floor: float) -> dict[str, Any]:
    return {
        "what": what,
        "GB": size / 1e9,
        "s": measured["seconds"],
        "MB/s": size / 1e6 / measured["seconds"],
        "peak MB, largest process": measured["largest"],
        "peak MB, all": measured["together"],
        "times a copy": measured["seconds"] / floor,
    }


def main() -> None:
    args = parse_args(BenchArgs)
    shuf = shutil.which("shuf")
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-shuffle-", dir=args.folder) as name:
        folder = Path(name)
        source, log, target = folder / "documents.jsonl", folder / "log", folder / "shuffled"
        for size in sorted(args.sizes):
            make_documents(source, size * 1e9)
            n = source.stat().st_size
            floor = copy_once(source, target)
            copy = {"seconds": floor, "largest": "-", "together": "-"}
            rows.append(row("copy once", n, copy, floor))
            if shuf and size == min(args.sizes):
                command = f'{shuf} "$1" -o "$2" && sync "$2"'
                rows.append(row("shuf", n, measure(["sh", "-c", command, "sh", str(source), str(target)], log), floor))
                target.unlink()
            options = ["--files", str(source), "--data_dir", str(folder / "data")]
            options += ["--workers", str(args.workers)] if args.workers else []
            ours = measure([sys.executable, str(SCRIPT), "bench", str(args.memory), *options], log)
            rows.append(row(f"ours, {args.memory:g} GB", n, ours, floor))
            shutil.rmtree(folder / "data")
            source.unlink()
    report("shuffle of JSON lines, 32 chunks", rows, args.out)


if __name__ == "__main__":
    run_main(main)
