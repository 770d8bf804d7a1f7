"""What a run leaves in its dump_dir, as columns of numbers: only whole lines, and each step once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lingua.errors import UserError

logger = logging.getLogger(__name__)

# In lines of evaluations, beside sources and tasks (apps/main/validation.py).
MEMORY_SLOTS, SETTINGS = "memory_slots", "settings"
# Settings that tell series apart, before any others.
NAMED_FIRST = ("max_steps", "limit", "num_fewshot", "dtype", "n_documents")


@dataclass
class Column:
    """Steps in ascending order, and a value for each; NaN where there was one, or an infinity."""

    steps: np.ndarray
    values: np.ndarray


class Result(NamedTuple):
    """Which number of evaluations: the source or task, and with what settings, as JSON, it was made."""

    metric: str
    source: str
    settings: str


@dataclass
class Run:
    """Of one dump_dir. `metrics`: name -> column; `validation` of held-out text, `evals` of tasks; `probe`: the first
    rank's records as they are.
    """

    name: str
    folder: Path
    metrics: dict[str, Column] = field(default_factory=dict)
    validation: dict[Result, Column] = field(default_factory=dict)
    evals: dict[Result, Column] = field(default_factory=dict)
    probe: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.metrics or self.validation or self.evals or self.probe)


def read_run(folder: Path, name: str) -> Run:
    """Raises UserError where there is no such folder. One without metrics gives an empty run."""
    if not folder.is_dir():
        raise UserError(f"dump_dir: no folder '{folder}'; name the dump_dir of a run")
    run = Run(name, folder)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line.get("acc_step", 0) == 0]
    run.metrics = columns(going_on(lines))
    run.validation = results_in(read_lines(folder / "metrics.validation.jsonl"), validation_settings)
    run.evals = results_in(read_lines(folder / "metrics.eval.jsonl"), task_settings)
    run.probe = read_lines(folder / "probe" / "probe.0.jsonl")
    return run


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The file's objects that belong to a step, in its order; none where it is missing.

    The last line may be cut off, by a kill or since it is being written. Other lines that cannot be read are left out
    with a warning.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    found, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record["global_step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                broken.append(number)
            continue
        # Of a checkpoint without a step's name: it belongs to no step.
        if isinstance(step, int):
            found.append(record)
    if broken:
        more = f" and {len(broken) - 1} more lines are no records" if broken[1:] else " is no record"
        logger.warning("%s:%s%s; left out", file, broken[0], more)
    return found


def going_on(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where a run went back to a checkpoint, what it had computed beyond that does not count."""
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["global_step"] >= record["global_step"]:
            kept.pop()
        kept.append(record)
    return kept


def columns(records: list[dict[str, Any]]) -> dict[str, Column]:
    """All numbers by their names; of objects within a record as name/inner name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in _numbers(record, ""):
            steps, values = found.setdefault(name, ([], []))
            steps.append(record["global_step"])
            values.append(value)
    for name in ("global_step", "acc_step"):
        found.pop(name, None)
    return {name: Column(np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def _numbers(record: dict[str, Any], prefix: str) -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}/")
        elif value is None:  # how a number that is not finite is written
            yield f"{prefix}{name}", math.nan
        elif isinstance(value, int | float) and not isinstance(value, bool):
            # Neither of the infinities, nor a whole number beyond all floats.
            yield f"{prefix}{name}", float(value) if abs(value) < 1e300 else math.nan


# --- evaluations -----------------------------------------------------------------------------------------------------

Record = dict[str, Any]


def results_in(records: list[Record], settings_of: Callable[[Record, str], Record]) -> dict[Result, Column]:
    """The numbers of each source or task, those of different settings apart.

    Evaluations come in any order, and of a step now these tasks and now those; the later one of the same counts.
    """
    by_step: dict[tuple[str, str], dict[int, Record]] = {}
    for record in sorted(records, key=lambda record: record["global_step"]):
        for source, numbers in record.items():
            if isinstance(numbers, dict) and source != SETTINGS:
                settings = {k: v for k, v in settings_of(record, source).items() if v is not None}
                key = source, json.dumps(settings, sort_keys=True)
                step = record["global_step"]
                by_step.setdefault(key, {})[step] = {"global_step": step, **numbers}
    return {
        Result(name.removesuffix(",none"), source, settings): column
        for (source, settings), steps in by_step.items()
        for name, column in columns(list(steps.values())).items()
    }


def validation_settings(record: Record, source: str) -> Record:
    """Of numbers of a source, or of all of them: how much text they cover, and what else they depend on."""
    settings = _settings_in(record)
    covered = [record[source]]
    if source == MEMORY_SLOTS:
        covered = [found for name, found in record.items() if isinstance(found, dict) and name != SETTINGS]
    counts = {
        name: sum(found[name] for found in covered if isinstance(found.get(name), int))
        for name in ("n_documents", "n_bytes")
        if any(name in found for found in covered)
    }
    return {name: settings[name] for name in ("max_steps", "dtype") if name in settings} | counts


def task_settings(record: Record, task: str) -> Record:
    settings = _settings_in(record)
    harness = settings.pop("harness", {})
    n_shot = settings.pop("n_shot", {})
    own = [entry for entry in harness.get("tasks", []) if isinstance(entry, dict) and entry.get("task") == task]
    found = {**settings, **{name: value for name, value in harness.items() if name != "tasks"}}
    if task in n_shot:
        found["num_fewshot"] = n_shot[task]
    if own:
        found["task"] = own[0]
    if "sample_len" in record[task]:
        found["sample_len"] = record[task]["sample_len"]
    return found


def _settings_in(record: Record) -> Record:
    """None in lines of older code. The checkpoint is no matter: it is the step."""
    settings = record.get(SETTINGS)
    if not isinstance(settings, dict):
        return {}
    return {name: value for name, value in settings.items() if name not in ("checkpoint", "global_step")}


def labels_of(results: Iterable[Result]) -> dict[tuple[str, str], str]:
    """(source, settings) -> "", or, where the source is there with several settings, what differs: ", max_steps=2"."""
    by_source: dict[str, dict[str, Record]] = {}
    for result in results:
        by_source.setdefault(result.source, {})[result.settings] = json.loads(result.settings)
    labels = {}
    for source, found in by_source.items():
        texts = dict.fromkeys(found, "")
        names = {name for values in found.values() for name in values}
        for name in sorted(names, key=lambda name: (NAMED_FIRST.index(name) if name in NAMED_FIRST else 99, name)):
            longer = {settings: f"{texts[settings]}, {name}={_shown(found[settings], name)}" for settings in found}
            if len(set(longer.values())) > len(set(texts.values())):
                texts = longer
        labels |= {(source, settings): text for settings, text in texts.items()}
    return labels


def _shown(settings: Record, name: str) -> str:
    """`?`: older code did not record it. All that do record the dtype."""
    value = settings.get(name)
    if value is None and "dtype" not in settings:
        return "?"
    return value if isinstance(value, str) else json.dumps(value)


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of their paths that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
