"""Draws what runs have left in their dump_dirs: one sheet of all, and one of the probe for each that has one.

    python -m apps.plots.run dump_dir=dumps/debug                     # dumps/debug/plots/run.png and run.svg
    python -m apps.plots.run dumps/a dumps/b x=tokens out=/tmp/ab     # several runs on one sheet
    python -m apps.plots.run dumps/a out=/tmp/a.png smooth=20

A run that goes on, was killed or has gone back to a checkpoint is drawn as far as it is there.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from apps.plots.panels import build_panels
from apps.plots.probe import draw_probe
from apps.plots.read import names_of, read_run
from apps.plots.sheet import draw_sheet
from apps.plots.style import FORMATS, save
from lingua.args import check_writable, parse_args
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.logger import init_logger

logger = logging.getLogger(__name__)

X_AXES = ("steps", "tokens")
OTHER_FORMATS = (".pdf", ".jpg", ".jpeg", ".eps", ".gif", ".webp")
ROOM_FOR_PICTURES = 2**22  # bytes


@dataclass
class PlotArgs:
    """`dump_dir`: of one run or several, also as words of their own.

    `out`: a folder, or a file that ends in .png or .svg; `plots` in the first dump_dir where null. `x`: steps, or
    tokens. `smooth`: log lines that a line is the mean of, 1: none, null: a 50th of all. `log_loss`: the loss on a log
    axis, null: where it falls by much. `statistics`: of the probe, a sheet for each.
    """

    dump_dir: list[str] = field(default_factory=list)
    out: str | None = None
    x: str = "steps"
    smooth: int | None = None
    log_loss: bool | None = None
    statistics: list[str] = field(default_factory=lambda: ["rms", "abs_max"])


def parse_command_line(argv: list[str]) -> PlotArgs:
    """Words without a key, and each `dump_dir=`, name a run's folder, as they stand."""
    folders = [os.path.expanduser(word.removeprefix("dump_dir=")) for word in argv if is_folder(word)]
    args = parse_args(PlotArgs, [word for word in argv if not is_folder(word)])
    args.dump_dir = list(dict.fromkeys(folders or args.dump_dir))
    if not args.dump_dir:
        raise UserError("dump_dir: not set; name the folder of a run, or of several")
    if args.x not in X_AXES:
        raise UserError(f"x: '{args.x}' is neither {' nor '.join(X_AXES)}")
    if args.smooth is not None and args.smooth < 1:
        raise UserError(f"smooth: {args.smooth} is too small, it must be 1 or more, or null")
    return args


def is_folder(word: str) -> bool:
    return word.startswith("dump_dir=") or "=" not in word or Path(word).is_dir()  # of a sweep: optim.lr=1e-4


def files_in(out: Path, name: str) -> list[Path]:
    """Where a sheet goes: both formats in a folder, or one file; of that the name is the first sheet's."""
    if out.suffix not in FORMATS:
        return [out / f"{name}{suffix}" for suffix in FORMATS]
    return [out if name.startswith("run") else out.with_name(f"{out.stem}.{name}{out.suffix}")]


def plot(args: PlotArgs) -> list[Path]:
    """Draws what there is, and returns the files. Raises UserError where there is nothing."""
    folders = [Path(folder) for folder in args.dump_dir]
    out = Path(args.out) if args.out is not None else folders[0] / "plots"
    if out.suffix in OTHER_FORMATS:
        raise UserError(f"out: '{out}'; pictures are written as {' and '.join(FORMATS)}, or name a folder")
    runs = []
    for folder, name in zip(folders, names_of(folders), strict=True):
        run = read_run(folder, name)
        if run.is_empty:
            logger.warning("%s: no metrics in it; left out", folder)
        else:
            runs.append(run)
    if not runs:
        where = f"'{folders[0]}'" + (f" and {len(folders) - 1} more" if folders[1:] else "")
        raise UserError(f"dump_dir: nothing to draw in {where}: no line in metrics.jsonl or its like yet")
    check_writable("out", out.parent if out.suffix in FORMATS else out, ROOM_FOR_PICTURES)
    sheets: dict[str, Figure] = {}
    panels = build_panels(runs, args.x == "tokens")
    if panels:
        figure = draw_sheet(panels, runs, "step" if args.x == "steps" else "tokens", args.smooth, args.log_loss)
        sheets["run" if len(runs) == 1 else "runs"] = figure
    for run in runs:
        suffix = re.sub(r"[^\w.-]+", "_", f".{run.name}") if len(runs) > 1 else ""
        for statistic in args.statistics if run.probe else ():
            sheets[f"probe.{statistic}{suffix}"] = draw_probe(run, statistic)
    if not sheets:
        raise UserError(f"dump_dir: nothing to draw in '{folders[0]}': none of its numbers is finite")
    # All are drawn before one is written: an error leaves nothing behind.
    for name, figure in sheets.items():
        save(figure, files_in(out, name))
    return [file for name in sheets for file in files_in(out, name)]


def main() -> None:
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(f"{__doc__}\n{inspect.getdoc(PlotArgs)}")  # noqa: T201
        return
    init_logger(stream=sys.stderr)
    for file in plot(parse_command_line(sys.argv[1:])):
        print(file)  # noqa: T201


if __name__ == "__main__":
    run_main(main)
