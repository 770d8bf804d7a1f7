"""The text log: stdout and `dump_dir/train.log` on the first rank; on stderr its errors, and the others' warnings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import BinaryIO, TextIO

from lingua.errors import UserError

logger = logging.getLogger(__name__)

# Locked by the run that writes into a dump_dir. A log may be rotated or deleted; this stays, empty.
LOCK_FILE = ".lock"

FORMAT = "%(levelname).1s %(asctime)s %(rank)s%(message)s"


class _GoesOn(logging.Handler):
    """Where a record cannot be written it says so once, and not again before one could be."""

    _failing = _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)
        self._failing = self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        first, self._failing, self._failed = not self._failing, True, True
        if first:
            logger.error("%s cannot be written (%s); going on without it", self.get_name(), error)


class _TerminalHandler(_GoesOn, logging.StreamHandler):
    """A separate class, so that a second run in a process finds the first one's and replaces it."""


class _LogFile(_GoesOn, logging.handlers.WatchedFileHandler):
    """Begun anew where it has been deleted, or its folder has."""

    def reopenIfNeeded(self) -> None:
        os.makedirs(os.path.dirname(self.baseFilename), exist_ok=True)
        super().reopenIfNeeded()


class _EarlyRecords(logging.handlers.MemoryHandler):
    """A separate class for the same reason."""


_OURS = (_TerminalHandler, _EarlyRecords)


def init_logger(rank: int = 0, world_size: int = 1, stream: TextIO | None = None) -> None:
    """Sends this process's log records to the terminal; call it before the first message.

    `stream`: where to, where stdout is for something else.
    """
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _OURS)]
    prefix = f"[rank {rank}] " if world_size > 1 else ""
    on_stderr = _add(_TerminalHandler(sys.stderr), prefix)
    on_stderr.setLevel(logging.ERROR if rank == 0 else logging.WARNING)
    if rank == 0:
        on_stdout = _add(_TerminalHandler(stream or sys.stdout), prefix)
        on_stdout.set_name("the log on stdout")
        on_stdout.addFilter(lambda record: logging.INFO <= record.levelno < logging.ERROR)
    # What is said before there is a log file is kept for it.
    _add(_EarlyRecords(capacity=1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False), "")
    logging.captureWarnings(True)


def claim(folder: Path) -> BinaryIO:
    """Keeps other runs out of a folder, by a lock, until the file that is returned is closed, or this process dies.

    Raises UserError where another run has it. A file system without locks gets a warning.
    """
    file = open(folder / LOCK_FILE, "ab")
    try:
        # Of a kind that children do not inherit, and that network filesystems know. It is gone as soon as this process
        # closes any file object on the file: nothing else opens it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(
                f"dump_dir: another run is writing into '{folder}'; wait for its end, or name another folder"
            ) from None
        logger.warning(
            "dump_dir: %s cannot be locked (%s): nothing keeps a second run out of it", folder / LOCK_FILE, error
        )
    return file


def add_log_file(file: Path) -> logging.Handler:
    """Appends this process's records to `file`, earlier ones too, until `remove_log_file`."""
    handler = _add(_LogFile(file, encoding="utf-8"), "")
    handler.set_name(str(file))
    root = logging.getLogger()
    for early in [handler for handler in root.handlers if isinstance(handler, _EarlyRecords)]:
        early.setTarget(handler)
        early.flush()
        root.removeHandler(early)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    logging.getLogger().removeHandler(handler)
    with contextlib.suppress(OSError):  # which it has reported
        handler.close()


def _add(handler: logging.Handler, rank: str) -> logging.Handler:
    handler.setFormatter(logging.Formatter(FORMAT, "%y-%m-%d %H:%M:%S", defaults={"rank": rank}))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    return handler
