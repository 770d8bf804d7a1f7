"""The table at the quickstart's end: of a run, or of two side by side, from the files that they left.

python setup/summarize_run.py DUMP_DIR EVALS [DUMP_DIR EVALS], where EVALS is the evals folder of the checkpoint
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path


def read_parameters(log: str) -> tuple[str, str]:
    """(dense, memory) parameters, as the training log tells them."""
    found = re.findall(r"parameters: ([\d,]+) dense, ([\d,]+) in memory values", log)
    return found[-1]


def describe_slots(slots: dict[str, int] | None) -> str:
    """How many slots were read, of all tables together where each memory has its own."""
    if slots is None:
        return "none: a dense model"
    per_layer = [count for name, count in slots.items() if name.startswith("read_by_layer_")]
    read, total = (
        (slots["read"], slots["total"]) if "read" in slots else (sum(per_layer), slots["total"] * len(per_layer))
    )
    return f"{read:,} of {total:,} ({read / total:.0%})"


def summarize(dump_dir: Path, results: Path) -> tuple[list[tuple[str, str]], float]:
    """Rows of (what, value), and the bits per byte of the only source that was validated on."""
    lines = [json.loads(line) for line in (dump_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if line["acc_step"] == 0]
    dense, memory = read_parameters((dump_dir / "train.log").read_text())
    first, last = metrics[0], metrics[-1]
    validation = json.loads((results / "validation.json").read_text())
    # The median: a stretch in which the machine was busy with something else says little.
    speed = statistics.median(line["speed/wps"] for line in metrics)
    bits_per_byte = next(
        found["bits_per_byte"] for found in validation.values() if isinstance(found, dict) and "bits_per_byte" in found
    )
    rows = [
        ("parameters, dense", dense),
        ("parameters, memory", memory),
        (f"loss at step {first['global_step']}", f"{first['loss/out']:.3f}"),
        (f"loss at step {last['global_step']}", f"{last['loss/out']:.3f}"),
        ("validation bits per byte", f"{bits_per_byte:.3f}"),
        ("training tokens per second", f"{speed:,.0f}"),
        ("memory slots used in validation", describe_slots(validation.get("memory_slots"))),
        ("checkpoints, metrics, log", f"{dump_dir}"),
        ("validation, continuation", f"{results}"),
        ("picture", f"{dump_dir / 'plots' / 'run.png'}"),
    ]
    return rows, bits_per_byte


def main() -> None:
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__.strip())
    paths = [Path(argument) for argument in sys.argv[1:]]
    rows, bits = summarize(*paths[:2])
    width = max(len(name) for name, _ in rows)
    if len(paths) == 2:
        print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
        return
    others, dense_bits = summarize(*paths[2:])
    others = others[:-3]  # without its paths
    column = max(len(value) for _, value in rows)
    for (name, value), (_, other) in zip(rows, others, strict=False):
        print(f"  {name:<{width}}  {value:<{column}}  {other}")
    gain = 1 - bits / dense_bits
    print(
        f"  {'memory (left) against dense':<{width}}  {abs(gain):.1%} {'fewer' if gain > 0 else 'more'} bits per byte"
    )
    print(f"  {'both in one picture':<{width}}  {paths[0] / 'plots' / 'compare.png'}")


if __name__ == "__main__":
    main()
