"""The quickstart's last word: a table of a run, from the files that it left.

python setup/summarize_run.py <dump_dir> <evals folder of the checkpoint>
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


def main() -> None:
    dump_dir, results = Path(sys.argv[1]), Path(sys.argv[2])
    lines = [json.loads(line) for line in (dump_dir / "metrics.jsonl").read_text().splitlines()]
    metrics = [line for line in lines if line["acc_step"] == 0]
    validation = json.loads((results / "validation.json").read_text())
    dense, memory = read_parameters((dump_dir / "train.log").read_text())
    first, last = metrics[0], metrics[-1]
    source = next(name for name in validation if name != "memory_slots")
    # The median: a lap in which the machine was busy with something else says little.
    speed = statistics.median(line["speed/wps"] for line in metrics)
    rows = [
        ("parameters, dense", dense),
        ("parameters, memory", memory),
        (f"loss at step {first['global_step']}", f"{first['loss/out']:.3f}"),
        (f"loss at step {last['global_step']}", f"{last['loss/out']:.3f}"),
        ("validation bits per byte", f"{validation[source]['bits_per_byte']:.3f}"),
        ("training tokens per second", f"{speed:,.0f}"),
        ("memory slots used in validation", describe_slots(validation.get("memory_slots"))),
        ("checkpoints, metrics, log", f"{dump_dir}"),
        ("validation, continuation", f"{results}"),
        ("picture", f"{dump_dir / 'plots' / 'run.png'}"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    main()
