"""What a run leaves in its dump_dir, as columns of numbers: only whole lines, and each step once."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


@dataclass
class Column:
    """Steps in ascending order, and a value for each; NaN where there was one, or an infinity."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class Run:
    """Of one dump_dir. `metrics`: name -> column; `validation`, `evals`: (metric, source or task) -> column; `probe`:
    the first rank's records as they are.
    """

    name: str
    folder: Path
    metrics: dict[str, Column] = field(default_factory=dict)
    validation: dict[tuple[str, str], Column] = field(default_factory=dict)
    evals: dict[tuple[str, str], Column] = field(default_factory=dict)
    probe: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.metrics or self.validation or self.evals or self.probe)


def read_run(folder: Path, name: str) -> Run:
    """Raises ValueError where there is no such folder. One without metrics gives an empty run."""
    if not folder.is_dir():
        raise ValueError(f"dump_dir: no folder '{folder}'; name the dump_dir of a run")
    run = Run(name, folder)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line.get("acc_step", 0) == 0]
    run.metrics = columns(going_on(lines))
    run.validation = split_names(columns(merged(read_lines(folder / "metrics.validation.jsonl"))))
    run.evals = split_names(columns(merged(read_lines(folder / "metrics.eval.jsonl"))))
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


def merged(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations come in any order, and of a step now these tasks and now those; the later one of the same counts."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["global_step"], {}).update(record)
    return [by_step[step] for step in sorted(by_step)]


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


def split_names(found: dict[str, Column]) -> dict[tuple[str, str], Column]:
    """source/metric -> (metric, source)."""
    split = {}
    for name, column in found.items():
        source, _, metric = name.rpartition("/")
        split[metric.removesuffix(",none"), source] = column
    return split


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of their paths that tell the folders apart."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
