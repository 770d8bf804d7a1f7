"""The figure of a ladder: what is learned over the size of the memory's table, dense models as lines."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

MEMORY_COLOR, DENSE_COLOR = "#D55E00", "#0072B2"
DASHES = ("-", (0, (6, 1.5)), (0, (3, 1.5)), (0, (1, 1.2)))


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draws `file`.png and `file`.svg: of biographies bits learned and values recalled exactly, of other text a panel
    for each of its `measures`.

    Args:
        results: a dictionary a run, as results.json has them. Runs of one model are its seeds: their mean is drawn,
            with a bar from the least to the most.
    """
    models: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        models.setdefault(row["model"], []).append(row)
    dense = [rows for rows in models.values() if not rows[0]["slots"]]
    memories = sorted((rows for rows in models.values() if rows[0]["slots"]), key=lambda rows: rows[0]["slots"])
    is_text = "measures" in results[0]
    measures = (
        list(results[0]["measures"]) if is_text else ["bits learned (millions)", "values recalled exactly (share)"]
    )
    n_rows, n_columns = math.ceil(len(measures) / 3), min(len(measures), 3)
    with plt.rc_context(
        {"font.size": 8, "svg.hashsalt": "lingua", "axes.spines.top": False, "axes.spines.right": False}
    ):
        size = (4.5 * n_columns, 1 + 2.8 * n_rows)
        figure, grid = plt.subplots(n_rows, n_columns, figsize=size, layout="constrained", squeeze=False)
        panels = list(grid.flat)
        for axes in panels[len(measures) :]:
            axes.remove()
        if is_text:
            for axes, name in zip(panels, measures, strict=False):
                draw_panel(axes, dense, memories, lambda row, name=name: row["measures"][name], name)
            title = f"{results[0]['tokens'] / 1e6:,.3g} million tokens of text"
        else:
            draw_panel(panels[0], dense, memories, lambda row: row["bits"] / 1e6, measures[0])
            draw_panel(panels[1], dense, memories, lambda row: row["exact_match_mean"], measures[1])
            possible = results[0]["possible_bits"] / 1e6
            panels[0].axhline(possible, color="#999999", linewidth=0.8)
            panels[0].annotate(
                "all there is to know", (0.01, possible), xycoords=("axes fraction", "data"), va="bottom"
            )
            panels[0].set_ylim(bottom=0)
            panels[1].set_ylim(0, 1.02)
            title = f"{results[0]['people']:,} people, {results[0]['exposures']} exposures of each"
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(title, fontsize=9, fontweight="bold")
        for ending in (".png", ".svg"):
            figure.savefig(file.with_name(file.name + ending), dpi=150)
        plt.close(figure)


def draw_panel(axes: Axes, dense: list, memories: list, value, label: str) -> None:
    base = dense[0][0]["flops_per_token"] if dense else None
    for rows, dash in zip(dense, DASHES * (1 + len(dense) // len(DASHES)), strict=False):
        times = rows[0]["flops_per_token"] / base
        axes.axhline(
            mean(map(value, rows)),
            color=DENSE_COLOR,
            linestyle=dash,
            label=f"dense, {times:.2g}x FLOPs, {short(rows[0]['parameters'])} parameters",
        )
    if memories:
        slots = [rows[0]["slots"] for rows in memories]
        means = [mean(map(value, rows)) for rows in memories]
        low, high = ([pick(map(value, rows)) for rows in memories] for pick in (min, max))
        first, last = memories[0][0], memories[-1][0]
        times = f", {last['flops_per_token'] / base:.2g}x FLOPs" if base else ""
        axes.errorbar(
            slots,
            means,
            yerr=[[m - x for m, x in zip(means, low, strict=True)], [x - m for m, x in zip(means, high, strict=True)]],
            color=MEMORY_COLOR,
            marker="o",
            capsize=2,
            label=f"memory{times}, {short(first['parameters'])} to {short(last['parameters'])} parameters",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(slots, [f"$2^{{{math.log2(n):g}}}$" for n in slots])
        axes.minorticks_off()
    axes.set_xlabel("slots in the memory's table")
    axes.set_ylabel(label)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)


def short(count: int) -> str:
    """Such as 457k or 16.8M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
