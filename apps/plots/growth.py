"""Draws what `apps.bench.growth` has measured: parameters grow much faster with the table than the time for a token.

python -m apps.plots.growth growth.json [out=growth.svg]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from apps.plots.style import COLOURS, FORMATS, GREY, STYLE, label_ends, save, short, use_log_ticks
from lingua.args import parse_args
from lingua.errors import UserError
from lingua.launch import run_main

# Columns of the table: how a line is called, and its colour.
LAYER = {
    "layer, backward too": ("with backward", COLOURS[0]),
    "layer": ("forward", COLOURS[1]),
    "search": ("of it search", COLOURS[2]),
    "lookup": ("of it lookup", COLOURS[3]),
}
STEP = {"step, dense": ("dense update", COLOURS[1]), "step, sparse": ("sparse update", COLOURS[0])}
PEAK = {"peak GiB, dense": STEP["step, dense"], "peak GiB, sparse": STEP["step, sparse"]}
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
PARAMETERS = {"parameters": ("parameters", COLOURS[2])}
PANELS = (
    ("parameters of the model", "", PARAMETERS, "parameters"),
    ("time of the layer", "µs a token", LAYER, "layer, backward too"),
    ("time of a training step", "µs a token", STEP, "step, dense"),
    ("memory in a training step", "GiB", PEAK, "peak GiB, dense"),
)


@dataclass
class GrowthArgs:
    """`out`: .png or .svg; beside the measurements where null."""

    out: str | None = None


def read_measured(file: Path) -> dict[str, Any]:
    """Raises UserError, one line, for another file than the bench's."""
    try:
        measured = json.loads(file.read_text(encoding="utf-8"))
        rows = measured["rows"]
        if not all(name in row for row in rows for name in ("slots", *PARAMETERS, *LAYER, *STEP, *PEAK)):
            raise KeyError
        if not tables_of(rows):
            raise KeyError
        return {"title": measured["title"], "machine": measured["machine"], "rows": rows}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not what python -m apps.bench.growth out={file.name} writes") from None


def tables_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if is_number(row["slots"]) and is_number(row["parameters"])]


def draw_growth(measured: dict[str, Any]) -> Figure:
    """Over the table's slots; dotted: the model with a feed-forward in the memory's place."""
    tables = tables_of(measured["rows"])
    reference = next((row for row in measured["rows"] if not is_number(row["slots"])), {})
    panels = []
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(14, 3.5))
        for number, (title, unit, columns, of_reference) in enumerate(PANELS):
            ax = figure.add_axes((0.045 + number * 0.247, 0.14, 0.125, 0.6))
            ends = _draw_lines(ax, tables, columns, reference.get(of_reference))
            ax.set_title(title)
            ax.set_ylabel(unit)
            ax.set_xlabel("slots of the table")
            panels.append((ax, ends))
        # As many decades in each, so that slopes can be compared.
        span = max((high / low) ** 1.05 for low, high in (ax.get_ylim() for ax, _ in panels))
        for ax, ends in panels:
            low, high = ax.get_ylim()
            middle = (low * high) ** 0.5
            ax.set_ylim(middle / span**0.5, middle * span**0.5)
            use_log_ticks(ax)
            label_ends(ax, ends)
        figure.text(0.008, 0.97, headline(tables), va="top", fontsize=11, fontweight="bold")
        of_reference = "dotted: a feed-forward in its place, of the layer's time with backward"
        text = f"{measured['machine']}; {measured['title']}; {of_reference}"
        figure.text(0.008, 0.895, text, va="top", color=GREY)
    return figure


def headline(tables: list[dict[str, Any]]) -> str:
    """How much the largest table takes of what the smallest one does."""

    def growth(column: str) -> str:
        found = [row[column] for row in tables if is_number(row[column])]
        return f"× {found[-1] / found[0]:,.3g}" if found else "× ?"

    return (
        f"slots {growth('slots')}:   parameters {growth('parameters')},   "
        f"training step, sparse {growth('step, sparse')},   layer, backward too {growth('layer, backward too')}   "
        f"(search {growth('search')}, lookup {growth('lookup')})"
    )


def _draw_lines(
    ax: Axes, tables: list[dict[str, Any]], columns: dict[str, tuple[str, str]], level: Any
) -> list[tuple[float, str, str]]:
    """Returns what to write at their ends."""
    ends = []
    for column, (name, colour) in columns.items():
        points = [(row["slots"], row[column]) for row in tables if is_number(row[column])]
        if points:
            ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=name)
            ends.append((points[-1][1], f"{name} {short(points[-1][1])}", colour))
    if is_number(level):
        ax.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
        ends.append((level, f"feed-forward {short(level)}", GREY))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(FixedLocator([row["slots"] for row in tables]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(power_of_two))
    return ends


def power_of_two(slots: float, _: object = None) -> str:
    """With the exponent above, other numbers short."""
    exponent = int(slots).bit_length() - 1
    return f"2{str(exponent).translate(RAISED)}" if slots == 2**exponent else short(slots)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def check_picture(key: str, name: str) -> Path:
    """Raises UserError where no picture is written so."""
    file = Path(name)
    if file.suffix not in FORMATS:
        raise UserError(f"{key}: '{name}' ends in neither {' nor '.join(FORMATS)}")
    return file


def main() -> None:
    files = [word for word in sys.argv[1:] if "=" not in word]
    args = parse_args(GrowthArgs, [word for word in sys.argv[1:] if "=" in word])
    if len(files) != 1:
        raise UserError(f"{len(files)} files of measurements named; wanted one, such as growth.json")
    measured = Path(files[0])
    if not measured.is_file():
        raise UserError(f"no file '{measured}'")
    out = check_picture("out", args.out) if args.out is not None else measured.with_suffix(".svg")
    save(draw_growth(read_measured(measured)), [out])
    print(out)  # noqa: T201


if __name__ == "__main__":
    run_main(main)
