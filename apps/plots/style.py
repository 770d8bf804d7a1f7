"""What all pictures share: colours, the look of axes, numbers as people write them, labels at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, on any machine

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# Okabe and Ito's, which all kinds of colour vision tell apart, without the yellow that is too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
DASHES: tuple[str | tuple, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
GREY = "#666666"
TICKS = [1, 2, 2.5, 5, 10]  # steps between ticks, times a power of ten
FORMATS = (".png", ".svg")

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on any machine
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.direction": "out",
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # a run's name may hold dollars
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lingua",  # the same bytes for the same picture
    "figure.dpi": 110,
}


def colours(n: int) -> list[str]:
    """As many that can be told apart; beyond those of the palette, in order from dark to light."""
    if n <= len(COLOURS):
        return list(COLOURS[:n])
    return [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](place)) for place in np.linspace(0, 0.92, n)]


def short(value: float, digits: int = 3) -> str:
    """Such as 12, 1.5k, 3.2M, 40B, 0.0012, 4e-05."""
    size = abs(value)
    if not math.isfinite(value):
        return "-"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:
            return f"{value / unit:.{digits}g}{name}"
    return f"{value:.{digits if size >= 1e-3 or size == 0 else digits - 1}g}"


class ShortNumbers(Formatter):
    """Of ticks, with as many digits as tell them apart."""

    def __call__(self, value: float, pos: int | None = None) -> str:
        return short(value)

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        labels: list[str] = []
        for digits in range(3, 9):
            labels = [short(value, digits) for value in values]
            if len(set(labels)) == len(labels):
                break
        return labels


def use_log_ticks(ax: Axes) -> None:
    """A log axis with a few plain numbers, also where it spans less than a decade."""
    low, high = ax.get_ylim()
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(ShortNumbers())
    if high / low < 12:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.yaxis.set_major_locator(LogLocator(numticks=6))


def use_plain_ticks(ax: Axes, from_zero: float | None = None) -> None:
    """Linear; `from_zero`: the highest value, of one that begins at 0. What hardly varies is drawn as constant."""
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    ax.yaxis.set_major_formatter(ShortNumbers())
    low, high = ax.get_ylim()
    middle = (low + high) / 2
    if from_zero is not None:
        ax.set_ylim(0, 1.06 * from_zero if from_zero > 0 else None)
    elif high - low < 1e-6 * abs(middle):
        ax.set_ylim(middle - 0.05 * abs(middle), middle + 0.05 * abs(middle))


def label_ends(ax: Axes, labels: list[tuple[float, str, str]]) -> None:
    """Texts right of the axes, each (value on the y axis, text, colour) beside its value, moved apart where they would
    overlap. Limits of the axes must be set.
    """
    if not labels:
        return
    height = ax.get_position().height * ax.figure.get_figheight() * 72
    gap = 9.5 / height
    to_axes = ax.transData + ax.transAxes.inverted()
    places = [min(max(to_axes.transform((1.0, value))[1], 0.0), 1.0) for value, _, _ in labels]
    order = sorted(range(len(labels)), key=places.__getitem__)
    spread = _move_apart([places[i] for i in order], gap)
    for i, place in zip(order, spread, strict=True):
        _, text, colour = labels[i]
        ax.text(1.015, place, text, color=colour, transform=ax.transAxes, va="center", ha="left", fontsize=7.5)


def _move_apart(places: list[float], gap: float) -> list[float]:
    """Ascending places with at least `gap` between two, moved as little as keeps groups of them centred."""
    groups: list[tuple[float, int]] = []  # the centre, and how many
    for place in places:
        groups.append((place, 1))
        while len(groups) > 1:
            (low, n_low), (high, n_high) = groups[-2:]
            if low + (n_low - 1) / 2 * gap + gap <= high - (n_high - 1) / 2 * gap:
                break
            groups[-2:] = [((low * n_low + high * n_high) / (n_low + n_high), n_low + n_high)]
    return [centre + (i - (n - 1) / 2) * gap for centre, n in groups for i in range(n)]


def save(figure: Figure, files: list[Path]) -> None:
    """Writes the figure in the formats that the files' names end in, each whole, and closes it."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f"{file.stem}.tmp{file.suffix}")
        # Without the time, the same picture is the same file.
        metadata = {"Date": None} if file.suffix == ".svg" else None
        with plt.rc_context(STYLE):
            figure.savefig(beside, metadata=metadata)
        beside.rename(file)
    plt.close(figure)
