"""Panels drawn on one sheet, the first one large."""

from __future__ import annotations

import math
import re

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from apps.plots.curves import smooth, thin
from apps.plots.panels import TRAINING_LOSS, Line, Panel, in_order
from apps.plots.read import Run
from apps.plots.style import (
    COLOURS,
    DASHES,
    STYLE,
    TICKS,
    ShortNumbers,
    colours,
    label_ends,
    short,
    use_log_ticks,
    use_plain_ticks,
)

# A loss is drawn on a log axis where it falls by more than this factor.
LOG_FROM = 2.5
# Width in points that a smoothed line keeps of a noisy one.
SMOOTHED_TO = 50
# Inches: of a cell, and of what lies around the axes in it.
CELL = (3.7, 2.35)
LEFT, RIGHT, TOP, BOTTOM = 0.62, 1.0, 0.28, 0.45
TITLE, LEGEND_LINE = 0.4, 0.23
ALARM = "#B00020"
ALL_LAYERS = "#444444"
SIGNS = {"x": "×", "^": "▲"}  # of matplotlib's markers


def draw_sheet(
    panels: list[Panel], runs: list[Run], x_label: str, width: int | None = None, log_loss: bool | None = None
) -> Figure:
    """The first panel is four times as large as the others. `width`: points that a smoothed line is the mean of, a
    50th of all where None; `log_loss`: the training loss's axis, as the numbers are where None.
    """
    n_rows, n_columns = grid(len(panels))
    # One run's colours tell things apart, those of several the runs.
    run_colours = colours(len(runs)) if len(runs) > 1 else []
    series_colours = colours_of_series(panels)
    end = max((line.x[-1] for panel in panels for line in panel.lines), default=1)
    with plt.rc_context(STYLE):
        title = TITLE + LEGEND_LINE * ((len(runs) - 1) // 2)
        figure = plt.figure(figsize=(CELL[0] * n_columns, CELL[1] * n_rows + title))
        # Row, counted from below, column, and size.
        places = [(n_rows - 2, 0, 2)]
        places += [(n_rows - 1 - r, c, 1) for r in range(n_rows) for c in range(n_columns) if r > 1 or c > 1]
        for panel, place in zip(panels, places, strict=False):
            ax = add_axes(figure, *place)
            log = log_loss if panel.title == TRAINING_LOSS else None
            ends = draw_panel(ax, panel, run_colours, series_colours, width, log)
            ax.set_xlim(-0.02 * end, 1.02 * end)
            ax.set_xlabel(x_label)
            label_ends(ax, ends)
        set_titles(figure, runs, run_colours)
    return figure


def add_axes(figure: Figure, row: int, column: int, size: int) -> Axes:
    """In `size` x `size` cells, the lower left one of which is named; its texts have their place in them, too."""
    width, height = figure.get_size_inches()
    left, bottom = column * CELL[0] + LEFT, row * CELL[1] + BOTTOM
    inside = size * CELL[0] - LEFT - RIGHT, size * CELL[1] - TOP - BOTTOM
    return figure.add_axes((left / width, bottom / height, inside[0] / width, inside[1] / height))


def grid(n_panels: int) -> tuple[int, int]:
    """(rows, columns) of cells, for one panel of 2 x 2 cells and all others: few are empty, the whole like a screen."""
    n_cells = n_panels + 3

    def cost(n_columns: int) -> float:
        n_rows = max(math.ceil(n_cells / n_columns), 2)
        ratio = n_columns * CELL[0] / (n_rows * CELL[1] + TITLE)
        return n_rows * n_columns / n_cells - 1 + abs(math.log(ratio / 1.7))

    n_columns = min(range(2, 9), key=cost)
    return max(math.ceil(n_cells / n_columns), 2), n_columns


def colours_of_series(panels: list[Panel]) -> dict[str, str]:
    """A layer, a source and a task have the same colour in all panels, as far as there are colours."""
    groups: dict[str, dict[str, None]] = {}
    for panel in panels:
        for line in panel.lines:
            is_layer = re.fullmatch(r"layer \d+", line.series)
            kind = "layer" if is_layer else panel.title.partition(":")[0] if ":" in panel.title else ""
            if kind in ("layer", "evaluation", "validation"):
                groups.setdefault(kind, {})[line.series] = None
    found = {"all layers": ALL_LAYERS}
    for names in groups.values():
        if len(names) <= len(COLOURS):
            found |= dict(zip(in_order(names), COLOURS, strict=False))
    return found


def draw_panel(
    ax: Axes,
    panel: Panel,
    run_colours: list[str],
    series_colours: dict[str, str],
    width: int | None = None,
    log: bool | None = None,
) -> list[tuple[float, str, str]]:
    """Returns what to write at the ends of its lines: (value, text, colour). Without `run_colours` there is one run."""
    series = list(dict.fromkeys(line.series for line in panel.lines))
    log = is_log(panel, log)
    ends = []
    for line in panel.lines:
        place = series.index(line.series)
        colour = series_colours.get(line.series, COLOURS[place % len(COLOURS)])
        dash = DASHES[place // len(COLOURS)]
        if run_colours:
            colour, dash = run_colours[line.run], DASHES[place % len(DASHES)]
        y = draw_line(ax, line, panel, colour, dash, width or math.ceil(len(line.x) / SMOOTHED_TO), log)
        last = y[~np.isnan(y)][-1:].tolist()  # none where a log axis has no place for any
        ends += [(value, f"{shortened(line.series, 16)} {short(value)}".strip(), colour) for value in last]
    if log:
        ax.set_yscale("log")
        use_log_ticks(ax)
        ends = [end for end in ends if end[0] > 0]
    else:
        highest = max(np.nanmax(line.y) for line in panel.lines)
        use_plain_ticks(ax, from_zero=highest if panel.from_zero else None)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=TICKS))
    ax.xaxis.set_major_formatter(ShortNumbers())
    ax.set_title(shortened(panel.title, 42))
    ax.set_ylabel(panel.unit)
    draw_marks(ax, panel, run_colours)
    return ends


def shortened(text: str, most: int) -> str:
    """With the end of a long text, which tells more than its beginning."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def draw_line(ax: Axes, line: Line, panel: Panel, colour: str, dash: str | tuple, width: int, log: bool) -> np.ndarray:
    """Draws it, and behind a smoothed one what it is made of; returns the values of the line drawn on top."""
    y = line.y
    if panel.noisy:
        y = smooth(line.y, width, in_logs=log)
        if y is not line.y:
            ax.plot(*thin(line.x, line.y), color=colour, linewidth=0.6, alpha=0.35, zorder=1.5)
    marker = "o" if panel.sparse or len(line.x) <= 3 else ""
    ax.plot(*thin(line.x, y), color=colour, linestyle=dash, marker=marker, markersize=3, label=line.series)
    return y


def is_log(panel: Panel, wanted: bool | None = None) -> bool:
    """As wanted, or as the panel says, or else where the highest is more than LOG_FROM times the lowest; never without
    a positive number.
    """
    values = np.concatenate([line.y for line in panel.lines])
    values = values[~np.isnan(values)]
    wanted = panel.log if wanted is None else wanted
    if wanted is None:
        return bool(values.min() > 0 and values.max() > LOG_FROM * values.min())
    return bool(wanted and (values > 0).any())


def draw_marks(ax: Axes, panel: Panel, run_colours: list[str]) -> None:
    """On the lower edge; what they are, and how many, beside the upper end of the axes."""
    look = {"transform": ax.get_xaxis_transform(), "markersize": 4, "clip_on": False}
    for mark in panel.marks:
        colour = run_colours[mark.run] if run_colours else ALARM
        ax.plot(mark.x, np.full(len(mark.x), 0.02), mark.symbol, color=colour, **look)
    counted = []
    for symbol, what in dict.fromkeys((mark.symbol, mark.what) for mark in panel.marks):
        count = sum(mark.count for mark in panel.marks if mark.what == what)
        counted.append(f"{SIGNS[symbol]} {count} {what}")
    if counted:
        text = "\n".join(counted)
        ax.text(1.015, 0.98, text, transform=ax.transAxes, va="top", color=ALARM, fontsize=7.5)


def set_titles(figure: Figure, runs: list[Run], run_colours: list[str]) -> None:
    """Runs' names and where they stand; of several each with its colour."""
    top = 1 - 0.06 / figure.get_figheight()
    texts = [f"{run.name}   {where_it_stands(run)}" for run in runs]
    if not run_colours:
        figure.text(0.008, top, texts[0], va="top", fontsize=11, fontweight="bold")
        return
    handles = [
        Line2D([], [], color=colour, linewidth=4, label=text) for colour, text in zip(run_colours, texts, strict=True)
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, top), ncols=2, frameon=False, fontsize=10)


def where_it_stands(run: Run) -> str:
    """Such as: step 600, 1.2M tokens, loss 1.67, 11.6k tokens/s."""
    parts = []
    for name, text in (
        ("loss/out", "loss {}"),
        ("optim/total_tokens", "{} tokens"),
        ("speed/wps", "{} tokens/s"),
    ):
        column = run.metrics.get(name)
        if column is not None:
            typical = np.nanmedian(column.values) if name == "speed/wps" else column.values[-1]
            parts.append(text.format(short(typical)))
    steps = [column.steps[-1] for found in (run.metrics, run.validation, run.evals) for column in found.values()]
    return ", ".join([f"step {max(steps, default=0):,}", *parts])
