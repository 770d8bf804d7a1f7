"""The text log: stdout and `dump_dir/train.log` on the first rank; warnings on stderr from the others."""

from __future__ import annotations

import errno
import fcntl
import logging
import logging.handlers
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

FORMAT = "%(levelname).1s %(asctime)s %(rank)s%(message)s"


class _TerminalHandler(logging.StreamHandler):
    """Of a class of its own, so that a second run in a process finds the first one's and replaces it."""


class _EarlyRecords(logging.handlers.MemoryHandler):
    """Of a class of its own for the same reason."""


_OURS = (_TerminalHandler, _EarlyRecords)


def init_logger(rank: int = 0, world_size: int = 1, stream: TextIO | None = None) -> None:
    """Sends this process's log records to the terminal; call it before the first message.

    `stream`: where to, where stdout is for something else.
    """
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _OURS)]
    handler = _TerminalHandler(stream or (sys.stdout if rank == 0 else sys.stderr))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    _add(handler, f"[rank {rank}] " if world_size > 1 else "")
    # What is said before there is a log file is kept for it.
    _add(_EarlyRecords(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False), "")
    logging.captureWarnings(True)


def claim(folder: Path) -> BinaryIO:
    """Keeps other runs out of a folder, by a lock on its log file, until the file that is returned is closed, or this
    process dies. Raises ValueError where another run has it.
    """
    file = open(folder / "train.log", "ab")
    try:
        # Of a kind that children do not inherit, and that network filesystems know.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(
                f"dump_dir: another run is writing into '{folder}'; wait for its end, or name another folder"
            ) from None
    return file


def add_log_file(file: Path) -> logging.Handler:
    """Appends this process's records to `file`, earlier ones too, until `remove_log_file`."""
    handler = _add(logging.FileHandler(file, encoding="utf-8"), "")
    root = logging.getLogger()
    for early in [handler for handler in root.handlers if isinstance(handler, _EarlyRecords)]:
        early.setTarget(handler)
        early.flush()
        root.removeHandler(early)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    logging.getLogger().removeHandler(handler)
    handler.close()


def _add(handler: logging.Handler, rank: str) -> logging.Handler:
    handler.setFormatter(logging.Formatter(FORMAT, "%y-%m-%d %H:%M:%S", defaults={"rank": rank}))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    return handler
