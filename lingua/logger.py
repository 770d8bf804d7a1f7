"""The text log: stdout and `dump_dir/train.log` on the first rank; warnings on stderr from the others."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(levelname).1s %(asctime)s %(rank)s%(message)s"


def init_logger(rank: int = 0, world_size: int = 1) -> None:
    """Sends this process's log records to the terminal; call it before the first message."""
    first = rank == 0
    handler = logging.StreamHandler(sys.stdout if first else sys.stderr)
    handler.setLevel(logging.INFO if first else logging.WARNING)
    _add(handler, f"[rank {rank}] " if world_size > 1 else "")
    logging.captureWarnings(True)


def add_log_file(file: Path, rank: int = 0) -> None:
    """Appends the first rank's records to `file` too."""
    if rank == 0:
        _add(logging.FileHandler(file, encoding="utf-8"), "")


def _add(handler: logging.Handler, rank: str) -> None:
    handler.setFormatter(logging.Formatter(FORMAT, "%y-%m-%d %H:%M:%S", defaults={"rank": rank}))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
