"""What benchmarks share: a small table on the terminal, the same as JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def report(title: str, rows: list[dict[str, Any]], out: str | None) -> None:
    """Prints `rows` (same keys in each) under `title`; writes them to the file `out` where one is named."""
    print(f"{title} ({machine()})\n{table(rows)}")  # noqa: T201
    if out is not None:
        Path(out).write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """A line of names, and one for each of `rows`."""
    cells = [list(rows[0]), *[[_format(value) for value in row.values()] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = []
    for line in cells:
        first, rest = line[0].ljust(widths[0]), zip(line[1:], widths[1:], strict=True)
        lines.append("  ".join([first, *(cell.rjust(width) for cell, width in rest)]))
    return "\n".join(lines)


def _format(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
