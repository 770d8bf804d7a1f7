"""What a sheet shows of runs: panels of lines, as data."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from apps.plots.read import MEMORY_SLOTS, Column, Result, Run, labels_of
from lingua.errors import UserError

# Lines that can be told apart in one panel; and of one run among several, all in its colour.
MOST_LINES = 8
MOST_STYLES = 4

# What a panel below shows, or what follows from it; all else that a run logs has its own panel.
SHOWN = re.compile(r"(loss/out|(optim|speed|memory|pk|guard)/.*)$")
# Numbers in evaluations that are no results.
COUNTS = re.compile(r"n_documents|n_tokens|n_bytes|sample_len|.*stderr.*")

TRAINING_LOSS = "training loss"
GRADIENT_NORM = "gradient norm before clipping"
# What the guards have counted, in the panels that it concerns.
COUNTERS = {
    TRAINING_LOSS: {"guard/skipped": "skipped", "guard/loss_spikes": "spikes"},
    GRADIENT_NORM: {"guard/skipped": "skipped", "guard/grad_spikes": "spikes"},
}
# Metrics whose names alone say too little: (title, unit).
VALIDATION = {"loss": ("loss", "nats a token"), "bits_per_byte": ("bits per byte", "bits a byte of text")}
SLOT_USE = {
    "read": ("slots read since last log", "share of the table"),
    "ever_read": ("slots ever read", "share of the table"),
    "kl": ("slot use: KL from uniform", "nats"),
    "top_weight": ("weight of the top slot", "share of a head's weights"),
    "value_update_norm": ("norm of value updates", "all rows read"),
}


@dataclass
class Line:
    """Of run number `run`; `series`: which of the panel's things it tells of, "" where it is the panel's only one."""

    run: int
    series: str
    x: np.ndarray
    y: np.ndarray


@dataclass
class Mark:
    """Where something happened in run number `run`, and how often: it may be more often than it was noted."""

    run: int
    symbol: str
    what: str
    x: np.ndarray
    count: int


@dataclass
class Panel:
    """`log`: None where the numbers decide; `noisy`: to be smoothed; `sparse`: each point is shown; `from_zero`: an
    amount, of which the axis shows all.
    """

    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    log: bool | None = False
    noisy: bool = False
    sparse: bool = False
    from_zero: bool = False


Columns = dict[str, Column]


def build_panels(runs: list[Run], by_tokens: bool = False) -> list[Panel]:
    """The panels that there are numbers for, the training loss first. `by_tokens`: over tokens instead of steps.

    Raises UserError where a run does not say how many tokens it has read.
    """
    panels: list[Panel] = []

    def add(columns_of: Callable[[Run], Columns], title: str, unit: str = "", **looks: object) -> None:
        panels.extend(_split(runs, [columns_of(run) for run in runs], by_tokens, title, unit, looks))

    def pick(**names: str) -> Callable[[Run], Columns]:
        return lambda run: {
            "" if series == "all" else series: run.metrics[name]
            for series, name in names.items()
            if name in run.metrics
        }

    def add_results(kind: str, metric: str, title: str, unit: str = "") -> None:
        """One panel, or one for each of the settings that the numbers were made with, the same in all runs."""
        results = [result for run in runs for result in getattr(run, kind)]
        labels = labels_of(results)
        shown = [labels[result.source, result.settings] for result in results if result.metric == metric]
        for label in dict.fromkeys(shown):
            add(_results(kind, metric, labels, label), title + label, unit, sparse=True)

    add(pick(all="loss/out"), TRAINING_LOSS, "nats a token", log=None, noisy=True)
    for metric in _metrics_in(run.validation for run in runs):
        title, unit = VALIDATION.get(metric, (metric.replace("_", " "), ""))
        add_results("validation", metric, f"validation: {title}", unit)
    add(pick(weights="optim/lr", tables="optim/value_lr"), "learning rate", from_zero=True)
    norms = pick(weights="optim/grad_norm", tables="optim/value_grad_norm")
    add(norms, GRADIENT_NORM, log=True, noisy=True)
    add(pick(all="speed/wps"), "speed", "tokens/s a rank", noisy=True, from_zero=True)
    add(_utilisation, "model FLOPs utilisation", "% of the device's peak", noisy=True, from_zero=True)
    add(_waiting, "waiting for data", "% of a step", noisy=True, from_zero=True)
    held = pick(active="memory/max_active_gib", reserved="memory/max_reserved_gib", resident="memory/rss_gib")
    add(held, "memory", "GiB", from_zero=True)
    slots = labels_of(result for run in runs for result in run.validation if result.source == MEMORY_SLOTS)
    for (_, settings), label in slots.items():
        read = functools.partial(_slots_read, settings=settings)
        add(read, f"slots read in validation{label}", "% of the table", sparse=True, from_zero=True)
    for name in _memory_names(runs):
        title, unit = SLOT_USE.get(name, (f"memory layers: {name.replace('_', ' ')}", ""))
        add(lambda run, name=name: _of_layers(run, name), title, unit, noisy=True)
    for metric in _metrics_in(run.evals for run in runs):
        add_results("evals", metric, f"evaluation: {metric.replace('_', ' ')}")
    for name in sorted({name for run in runs for name in run.metrics if not SHOWN.match(name)}):
        if any(name in run.metrics and np.ptp(run.metrics[name].values) != 0 for run in runs):
            add(pick(all=name), name)
    for panel in panels:
        panel.marks = _marks(runs, panel, by_tokens)
    return panels


# --- columns that are put together -----------------------------------------------------------------------------------


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers in them by their size."""
    parts = {name: re.split(r"(\d+)", name) for name in names}
    return sorted(parts, key=lambda name: [(int(p), "") if p.isdecimal() else (-1, p) for p in parts[name]])


def _sorted(columns: Columns) -> Columns:
    return {name: columns[name] for name in in_order(columns)}


def _results(kind: str, metric: str, labels: dict[tuple[str, str], str], label: str) -> Callable[[Run], Columns]:
    def results(run: Run) -> Columns:
        return {
            source: column
            for (name, source, settings), column in getattr(run, kind).items()
            if name == metric and source != MEMORY_SLOTS and labels[source, settings] == label
        }

    return lambda run: _sorted(results(run))


def _metrics_in(kinds: Iterable[dict[Result, Column]]) -> list[str]:
    """Names of metrics in the order in which they come up."""
    names = dict.fromkeys(result.metric for found in kinds for result in found if result.source != MEMORY_SLOTS)
    return [name for name in names if not COUNTS.match(name)]


def _utilisation(run: Run) -> Columns:
    column = run.metrics.get("speed/mfu")
    return {} if column is None else {"": Column(column.steps, 100 * column.values)}


def _waiting(run: Run) -> Columns:
    waited, whole = run.metrics.get("speed/data_load_time"), run.metrics.get("speed/curr_iter_time")
    if waited is None or whole is None or len(waited.steps) != len(whole.steps):
        return {}
    share = np.divide(100 * waited.values, whole.values, out=np.zeros(len(whole.steps)), where=whole.values > 0)
    return {"": Column(waited.steps, share)}


def _slots_read(run: Run, settings: str) -> Columns:
    """Of validations with these settings."""
    total = run.validation.get(Result("total", MEMORY_SLOTS, settings))
    if total is None:
        return {}
    size = dict(zip(total.steps, total.values, strict=True))
    found = {}
    for (name, source, its_settings), column in run.validation.items():
        if (source, its_settings) == (MEMORY_SLOTS, settings) and name.startswith("read"):
            layer = name.removeprefix("read_by_layer_")
            series = f"layer {layer}" if layer != name else "all layers"
            found[series] = Column(column.steps, 100 * column.values / [size[step] for step in column.steps])
    # Where there is one memory layer, all are that one.
    if len(found) == 2:
        found.pop("all layers", None)
    return _sorted(found)


def _memory_names(runs: list[Run]) -> list[str]:
    """Of `pk/layer_{i}/<name>`, and of `pk/<name>`, which is of all layers."""
    found = (re.match(r"pk/(?:layer_\d+/)?(.+)", name) for run in runs for name in run.metrics)
    return list(dict.fromkeys(match[1] for match in found if match))


def _of_layers(run: Run, name: str) -> Columns:
    found = {}
    for key, column in run.metrics.items():
        match = re.fullmatch(rf"pk/(?:layer_(\d+)/)?{re.escape(name)}", key)
        if match:
            found[f"layer {match[1]}" if match[1] else "all layers"] = column
    return _sorted(found)


# --- panels out of columns -------------------------------------------------------------------------------------------


def _split(
    runs: list[Run], found: list[Columns], by_tokens: bool, title: str, unit: str, looks: dict[str, object]
) -> list[Panel]:
    """One panel, or several where it would have more lines than can be told apart; none without a number."""
    series = list(dict.fromkeys(name for columns in found for name in columns))
    n_runs = sum(1 for columns in found if columns)
    at_once = MOST_LINES if n_runs == 1 else max(min(MOST_STYLES, MOST_LINES // max(n_runs, 1)), 1)
    panels, n_panels = [], math.ceil(len(series) / at_once)
    for part in range(n_panels):
        shown = series[len(series) * part // n_panels : len(series) * (part + 1) // n_panels]
        panel = Panel(title, unit, **looks)
        for number, columns in enumerate(found):
            for name in shown:
                if name in columns and not np.isnan(columns[name].values).all():
                    x = tokens_at(runs[number], columns[name].steps) if by_tokens else columns[name].steps
                    panel.lines.append(Line(number, name, x, columns[name].values))
        if n_panels > 1:
            panel.title += f", {shown[0]}" if at_once == 1 else f" ({part + 1} of {n_panels})"
        if panel.lines:
            panels.append(panel)
    return panels


def _marks(runs: list[Run], panel: Panel, by_tokens: bool) -> list[Mark]:
    """Where numbers of the panel are not finite, and where what is counted has become more."""
    marks = []
    counters = next((counters for title, counters in COUNTERS.items() if panel.title.startswith(title)), {})
    for number in dict.fromkeys(line.run for line in panel.lines):
        run = runs[number]
        gaps = [line.x[np.isnan(line.y)] for line in panel.lines if line.run == number]
        gaps = np.unique(np.concatenate(gaps))
        if len(gaps):
            marks.append(Mark(number, "x", "not finite", gaps, len(gaps)))
        for name, what in counters.items():
            column = run.metrics.get(name)
            if column is not None and column.values[-1] > 0:
                steps = column.steps[np.diff(column.values, prepend=0) > 0]
                x = tokens_at(run, steps) if by_tokens else steps
                marks.append(Mark(number, "x" if what == "skipped" else "^", what, x, int(column.values[-1])))
    return marks


def tokens_at(run: Run, steps: np.ndarray) -> np.ndarray:
    """How many tokens were read up to each step. Raises UserError where the run does not say."""
    column = run.metrics.get("optim/total_tokens")
    if column is None:
        raise UserError(f"x: tokens, but {run.folder / 'metrics.jsonl'} has no optim/total_tokens; set x=steps")
    known, read = np.concatenate([[0], column.steps]), np.concatenate([[0], column.values])
    # Beyond the last line, such as an evaluation's checkpoint, at the pace so far.
    return np.where(steps <= known[-1], np.interp(steps, known, read), read[-1] / known[-1] * steps)
