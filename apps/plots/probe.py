"""What the probe has seen (lingua/probe.py) over depth and steps: small pictures, in rows by kind of tensor and columns
by where in a block it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import ListedColormap, LogNorm, Normalize, SymLogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from apps.plots.read import Run
from apps.plots.style import STYLE, TICKS, ShortNumbers
from lingua.errors import UserError

# In the order of a forward pass, then those of the way back. Others come after them.
KINDS = (
    "residual",
    "attention_entropy",
    "memory_query",
    "memory_scores",
    "memory_values",
    "memory_output",
    "grad_residual",
    "input",
    "weight",
    "output",
    "grad_output",
    "grad_weight",
)
PARTS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2", "query_proj", "swilu_projection", "value_proj", "gating", "output")
# Kinds and statistics in units in which a tenth and a half are near each other.
LINEAR = ("attention_entropy", "zeros", "nonfinite")
SIGNED = ("mean", "min", "max")
LARGE, SMALL = (2.3, 1.9), (1.35, 1.15)  # inches
NOT_FINITE = "#bdbdbd"


@dataclass
class Picture:
    """One kind of tensor at one place of the blocks: rows of `values` are depths, columns steps. NaN: not finite;
    `is_there`: where there is a record at all.
    """

    kind: str
    part: str
    values: np.ndarray
    is_there: np.ndarray


@dataclass
class View:
    """`depths`: numbers of blocks, with -1 for what comes before them and `n_blocks` for what comes after."""

    steps: np.ndarray
    depths: np.ndarray
    n_blocks: int
    pictures: list[Picture] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Picture]:
        return [picture for picture in self.pictures if picture.kind == kind]


def build_view(run: Run, statistic: str) -> View:
    """Raises UserError where the probe has no such statistic."""
    found: dict[tuple[str, str], dict[tuple[int | None, int], float]] = {}
    for record in run.probe:
        kind, name = record.get("kind"), record.get("name")
        if isinstance(kind, str) and isinstance(name, str) and statistic in record:
            in_block = re.match(r"layers\.(\d+)\.?", name)
            depth = int(in_block[1]) if in_block else -1 if name == "tok_embeddings" else None
            part = name[in_block.end() :] if in_block else "" if depth == -1 else name
            value = record[statistic]
            number = float(value) if isinstance(value, int | float) else np.nan
            found.setdefault((kind, part), {})[depth, record["global_step"]] = number
    if not found:
        known = sorted({key for record in run.probe for key, value in record.items() if isinstance(value, int | float)})
        named = ", ".join(key for key in known if key not in ("global_step", "layer", "n"))
        raise UserError(f"statistics: '{statistic}' must be one of {named}, which the probe has in '{run.folder}'")
    places = {place for cells in found.values() for place in cells}
    n_blocks = 1 + max((depth for depth, _ in places if depth is not None), default=-1)
    depths = np.array(sorted({n_blocks if depth is None else depth for depth, _ in places}))
    steps = np.array(sorted({step for _, step in places}))
    rows, columns = ({value: i for i, value in enumerate(values.tolist())} for values in (depths, steps))
    view = View(steps, depths, n_blocks)
    for (kind, part), cells in sorted(found.items(), key=lambda item: _order(*item[0])):
        values, is_there = np.full((len(depths), len(steps)), np.nan), np.zeros((len(depths), len(steps)), bool)
        for (depth, step), value in cells.items():
            place = rows[n_blocks if depth is None else depth], columns[step]
            values[place], is_there[place] = value, True
        view.pictures.append(Picture(kind, part, values, is_there))
    return view


def _order(kind: str, part: str) -> tuple[int, str, int, str]:
    short_name = short_part(part)
    return (
        KINDS.index(kind) if kind in KINDS else len(KINDS),
        kind,
        PARTS.index(short_name) if short_name in PARTS else len(PARTS),
        part,
    )


def short_part(part: str) -> str:
    """attention.wq -> wq, feed_forward.query_proj.query_mlps.0 -> query_proj."""
    return re.sub(r"^(attention|feed_forward)\.?|\.query_mlps\.0$", "", part)


def draw_probe(run: Run, statistic: str) -> Figure:
    """Kinds of which there is one picture stand above, each with its own scale; below, those of the linears."""
    view = build_view(run, statistic)
    kinds = list(dict.fromkeys(picture.kind for picture in view.pictures))
    single = [picture for kind in kinds if len(view.of_kind(kind)) == 1 for picture in view.of_kind(kind)]
    several = [kind for kind in kinds if len(view.of_kind(kind)) > 1]
    parts = sorted({p.part for kind in several for p in view.of_kind(kind)}, key=lambda part: _order("", part))
    width = max(LARGE[0] * len(single), SMALL[0] * len(parts) + 1.6, 6)
    heights = [LARGE[1] + 0.3] * bool(single) + [SMALL[1] * len(several) + 0.4] * bool(several)
    with plt.rc_context({**STYLE, "axes.grid": False, "axes.titleweight": "normal", "axes.titlesize": 8}):
        figure = plt.figure(figsize=(width, sum(heights) + 0.4), layout="constrained")
        figure.suptitle(f"{run.name}   probe: {statistic}, {explain_depths(view)}", x=0.008, ha="left", fontsize=11)
        bands = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if single:
            _draw_single(bands.pop(0), view, single, statistic)
        if several:
            _draw_grid(bands.pop(0), view, several, parts, statistic)
    return figure


def explain_depths(view: View) -> str:
    """What the rows are, for a title."""
    outside = {-1: "-1: the embedding", view.n_blocks: f"{view.n_blocks}: after the last block"}
    named = [text for depth, text in outside.items() if depth in view.depths]
    return "by " + " and ".join([f"block ({', '.join(named)})" if named else "block", "step; grey: not finite"])


def _draw_single(band: SubFigure, view: View, pictures: list[Picture], statistic: str) -> None:
    for ax, picture in zip(band.subplots(1, len(pictures), squeeze=False)[0], pictures, strict=True):
        mesh = _draw(ax, view, picture, _scale([picture], statistic))
        where = short_part(picture.part)
        ax.set_title(picture.kind.replace("_", " ") + (f", {where}" if where not in ("", "values") else ""))
        ax.set_xlabel("step")
        _colour_bar(band, mesh, [ax])
    band.axes[0].set_ylabel("block")


def _draw_grid(band: SubFigure, view: View, kinds: list[str], parts: list[str], statistic: str) -> None:
    """A row has one scale, so that its pictures can be compared."""
    axes = band.subplots(len(kinds), len(parts), squeeze=False, sharex=True, sharey=True)
    for row, kind in zip(axes, kinds, strict=True):
        pictures = {picture.part: picture for picture in view.of_kind(kind)}
        scale = _scale(list(pictures.values()), statistic)
        mesh = None
        for ax, part in zip(row, parts, strict=True):
            if part in pictures:
                mesh = _draw(ax, view, pictures[part], scale)
            else:
                ax.set_axis_off()
        row[0].set_ylabel(kind.replace("_", " "))
        _colour_bar(band, mesh, list(row))
    for ax, part in zip(axes[0], parts, strict=True):
        ax.set_title(short_part(part))
    for ax in axes[-1]:
        ax.set_xlabel("step")


def _draw(ax: Axes, view: View, picture: Picture, scale: tuple[str, Normalize]) -> QuadMesh:
    colours, norm = scale
    edges = _edges(view.steps), np.append(view.depths - 0.5, view.depths[-1] + 0.5)
    bad = picture.is_there & ~np.isfinite(picture.values)
    if bad.any():
        grey = ListedColormap([NOT_FINITE])
        ax.pcolormesh(*edges, np.ma.masked_where(~bad, np.ones(bad.shape)), cmap=grey, rasterized=True)
    shown = np.ma.masked_where(~np.isfinite(picture.values), picture.values)
    if isinstance(norm, LogNorm):
        shown = np.ma.clip(shown, norm.vmin, None)  # a zero has no logarithm: it is the darkest
    mesh = ax.pcolormesh(*edges, shown, cmap=colours, norm=norm, rasterized=True)
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=TICKS))
    ax.xaxis.set_major_formatter(ShortNumbers())
    return mesh


def _edges(steps: np.ndarray) -> np.ndarray:
    """Half-way between steps; those at the ends as far from the outer steps as their other edges are."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - between[0]], between, [2 * steps[-1] - between[-1]]])


def _scale(pictures: list[Picture], statistic: str) -> tuple[str, Normalize]:
    """(colour map, scale) for all numbers of the pictures."""
    values = np.concatenate([picture.values[np.isfinite(picture.values)] for picture in pictures])
    if not len(values):
        return "viridis", Normalize(0, 1)
    if statistic in SIGNED and pictures[0].kind not in LINEAR:
        size = float(np.abs(values).max()) or 1.0
        return "PuOr", SymLogNorm(size / 1000, vmin=-size, vmax=size)
    low, high = float(values.min()), float(values.max())
    positive = values[values > 0]
    if statistic in LINEAR or pictures[0].kind in LINEAR or not len(positive):
        return "viridis", Normalize(min(low, 0.0), high or 1.0)
    low = float(positive.min())
    return "viridis", LogNorm(low, max(high, low * 1.01))


def _colour_bar(band: SubFigure, mesh: QuadMesh, axes: list[Axes]) -> None:
    bar = band.colorbar(mesh, ax=axes, pad=0.02, aspect=16, fraction=0.05)
    bar.outline.set_visible(False)
    low, high = mesh.norm.vmin, mesh.norm.vmax
    middle = (low * high) ** 0.5 if isinstance(mesh.norm, LogNorm) else (low + high) / 2
    bar.ax.yaxis.set_major_locator(FixedLocator([low, middle, high]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(ShortNumbers())
