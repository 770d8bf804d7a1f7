"""Panels drawn on one sheet, the first one large."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from apps.plots.curves import smooth, thin
from apps.plots.panels import Line, Panel
from apps.plots.read import Run
from apps.plots.style import COLOURS, DASHES, GREY, STYLE, colours, label_ends, short, use_log_ticks

# A loss is drawn on a log axis where it falls by more than this factor.
LOG_FROM = 2.5
# Width in points that a smoothed line keeps of a noisy one.
SMOOTHED_TO = 50
PANEL_SIZE = (3.6, 2.3)  # inches
NOT_FINITE = "#B00020"


def draw_sheet(
    panels: list[Panel], runs: list[Run], x_label: str, width: int | None = None, log_loss: bool | None = None
) -> Figure:
    """The first panel is four times as large as the others. `width`: points that a smoothed line is the mean of, a
    50th of all where None; `log_loss`: the first panel's axis, as the numbers are where None.
    """
    n_rows, n_columns = grid(len(panels))
    with plt.rc_context(STYLE):
        size = (PANEL_SIZE[0] * n_columns, PANEL_SIZE[1] * n_rows + 0.7)
        figure = plt.figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
        cells = figure.add_gridspec(n_rows, n_columns)
        places = [cells[:2, :2]] + [cells[r, c] for r in range(n_rows) for c in range(n_columns) if r > 1 or c > 1]
        run_colours = colours(len(runs))
        labels = []
        for number, (panel, place) in enumerate(zip(panels, places, strict=False)):
            ax = figure.add_subplot(place)
            labels.append(draw_panel(ax, panel, run_colours, width, log_loss if number == 0 else None))
            ax.set_xlabel(x_label)
        set_titles(figure, panels, runs, run_colours)
        figure.draw_without_rendering()  # which gives the axes their places
        for ax, ends in zip(figure.axes, labels, strict=True):
            label_ends(ax, ends)
    return figure


def grid(n_panels: int) -> tuple[int, int]:
    """(rows, columns) of cells for one panel of 2 x 2 cells and all others: few empty cells, about as wide as a screen."""
    n_cells = n_panels + 3

    def cost(n_columns: int) -> float:
        n_rows = max(math.ceil(n_cells / n_columns), 2)
        ratio = n_columns * PANEL_SIZE[0] / (n_rows * PANEL_SIZE[1] + 0.7)
        return n_rows * n_columns / n_cells - 1 + abs(math.log(ratio / 1.7))

    n_columns = min(range(2, 9), key=cost)
    return max(math.ceil(n_cells / n_columns), 2), n_columns


def draw_panel(
    ax: Axes, panel: Panel, run_colours: list[str], width: int | None = None, log: bool | None = None
) -> list[tuple[float, str, str]]:
    """Returns what to write at the ends of its lines: (value, text, colour)."""
    series = list(dict.fromkeys(line.series for line in panel.lines))
    several = len(run_colours) > 1
    log = is_log(panel) if log is None else log
    ends = []
    for line in panel.lines:
        place = series.index(line.series)
        colour = run_colours[line.run] if several else COLOURS[place % len(COLOURS)]
        dash = DASHES[place % len(DASHES)] if several or place >= len(COLOURS) else "-"
        y = draw_line(ax, line, panel, colour, dash, width or math.ceil(len(line.x) / SMOOTHED_TO), log)
        last = y[~np.isnan(y)][-1]
        ends.append((last, f"{line.series} {short(last)}".strip(), colour))
    if log:
        ax.set_yscale("log")
        use_log_ticks(ax)
        ends = [(value, text, colour) for value, text, colour in ends if value > 0]
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.yaxis.set_major_formatter(FuncFormatter(short))
        if panel.from_zero:
            ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(short))
    ax.set_title(panel.title)
    ax.set_ylabel(panel.unit)
    mark_gaps(ax, panel)
    return ends


def draw_line(ax: Axes, line: Line, panel: Panel, colour: str, dash: str | tuple, width: int, log: bool) -> np.ndarray:
    """Draws it, and behind a smoothed one what it is made of; returns the values of the line drawn on top."""
    y = line.y
    if panel.noisy:
        y = smooth(line.y, width, in_logs=log)
        if y is not line.y:
            ax.plot(*thin(line.x, line.y), color=colour, linewidth=0.6, alpha=0.35)
    marker = "o" if panel.sparse or len(line.x) <= 3 else ""
    ax.plot(*thin(line.x, y), color=colour, linestyle=dash, marker=marker, markersize=3, label=line.series)
    return y


def is_log(panel: Panel) -> bool:
    """As the panel says; where the numbers decide, for all positive ones that differ by more than LOG_FROM times."""
    values = np.concatenate([line.y for line in panel.lines])
    values = values[~np.isnan(values)]
    if panel.log is None:
        return bool(values.min() > 0 and values.max() > LOG_FROM * values.min())
    return bool(panel.log and (values > 0).any())


def mark_gaps(ax: Axes, panel: Panel) -> None:
    """Where a number was not finite, on the lower edge, and how often above the panel."""
    gaps = np.unique(np.concatenate([line.x[np.isnan(line.y)] for line in panel.lines]))
    if len(gaps):
        edge = ax.get_xaxis_transform()
        ax.plot(gaps, np.full(len(gaps), 0.02), "x", color=NOT_FINITE, markersize=4, transform=edge, clip_on=False)
        ax.set_title(f"× {len(gaps)} not finite", loc="right", color=NOT_FINITE, fontweight="normal", fontsize=7.5)


def set_titles(figure: Figure, panels: list[Panel], runs: list[Run], run_colours: list[str]) -> None:
    """One run's name and where it stands; or the names of several with their colours."""
    if len(runs) == 1:
        figure.suptitle(f"{runs[0].name}   {where_it_stands(runs[0])}", x=0.008, ha="left", fontsize=11)
        return
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=f"{run.name}   {where_it_stands(run)}")
        for run, colour in zip(runs, run_colours, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=9)


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
    return ", ".join([f"step {max(steps):,}", *parts])
