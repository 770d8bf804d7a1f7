"""Signs of life: what each rank is doing, so that whoever waits for one that hangs can name it, and where it was last.

    with Watch(timeout, folder) as watch:
        watch.at("waiting for data", step)

The main thread notes what it is at, which costs a microsecond. Other threads pass that on, every few seconds, to the
store where the ranks met, and look whether it stays at one thing for too long. What is said of a rank is its last sign,
so it can be said of a process that is stopped or gone, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

T = TypeVar("T")

Signs = dict[int, dict[str, Any]]  # of ranks

logger = logging.getLogger(__name__)

# What a rank does that hangs since another one does: of itself there is nothing to tell.
WAITING_FOR_RANKS = "waiting for the other ranks"

# Of the rank that keeps the store there is no sign where the store does not answer.
KEEPER = "rank 0 (the store that it keeps does not answer)"

# Seconds between a rank's signs, at the most.
INTERVAL = 10

# Seconds that a rank which finds another one lost gives the others to find so too.
PATIENCE_WITH_OTHER_RANKS = 3

# Seconds beyond the timeout in which a rank that waits for another one is told so by what it waits in.
PATIENCE_WITH_COLLECTIVES = 10

# Ranks of which more than the number is told.
N_DESCRIBED = 4

# Held for good by the thread that tells the loss of a rank, which ends the process.
_telling = threading.Lock()


@dataclass(frozen=True)
class _Doing:
    """`number`: how many things were done before. All ranks do the same ones, so who has the lowest is behind."""

    what: str
    step: int
    number: int
    since: float
    has_limit: bool


class Watch:
    """Within its `with`: tells what this process is doing, and when it does one thing for more than `timeout` seconds.

    The stack is written into `folder` then. A process among others ends, naming those that it waits for, if what it
    waits in does not end it: a collective on a GPU may not.
    """

    def __init__(self, timeout: float, folder: Path):
        self.timeout, self.folder = timeout, folder
        self.interval = min(timeout / 10, INTERVAL)
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._thread_id = threading.get_ident()
        self._doing = _Doing("starting", 0, 0, time.monotonic(), False)
        self._reported: _Doing | None = None
        self._stack_file: str | None = None
        self._first_look: tuple[float, Signs] | None = None
        self._ended, self._news = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watch", daemon=True)]
        if self.size > 1:
            # Its own thread: the store may be kept by a rank that hangs.
            self._threads.append(threading.Thread(target=self._give_signs, name="signs", daemon=True))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._news.set()
        for thread in self._threads:
            thread.join(1)
        faulthandler.cancel_dump_traceback_later()

    def at(self, what: str, step: int, has_limit: bool = True) -> None:
        """From now on the main thread is `what` ("waiting for data"), in `step`. `has_limit`: for `timeout` at most."""
        before = self._doing
        self._doing = _Doing(what, step, before.number + 1, time.monotonic(), has_limit)
        if before is self._reported and self.rank == 0:
            logger.warning("step %s: went on after %.0f s of %s", step, self._doing.since - before.since, before.what)

    def _give_signs(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        told_that_it_is_stuck = None
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that kept it
            while not self._ended.is_set():
                self._news.clear()
                doing = self._doing
                is_stuck = doing is self._reported
                # Who is stuck says so once: when others end for it, their store goes, and torch would complain.
                if is_stuck and doing is told_that_it_is_stuck:
                    self._news.wait(self.interval)
                    continue
                sign = {
                    "host": platform.node(),
                    "what": doing.what,
                    "step": doing.step,
                    "number": doing.number,
                    "since": time.time() - (time.monotonic() - doing.since),
                    "now": time.time(),
                    "stack": self._stack_file if is_stuck else None,
                    "is_stuck": is_stuck,
                }
                store.set(_sign_key(self.rank), json.dumps(sign))
                told_that_it_is_stuck = doing if is_stuck else None
                self._news.wait(self.interval)

    def _watch(self) -> None:
        while not self._ended.wait(self._pause()):
            # For a main thread that holds the interpreter, with which this one cannot write its stack.
            faulthandler.dump_traceback_later(self.timeout + 3 * self.interval, file=2)
            doing = self._doing
            passed = time.monotonic() - doing.since
            if not doing.has_limit or passed < self.timeout:
                self._first_look = None
                continue
            if doing is not self._reported:
                self._report(doing, passed)
            if self.size > 1 and passed > self.timeout + PATIENCE_WITH_COLLECTIVES:
                self._leave_if_others_are_lost(doing, passed)

    def _pause(self) -> float:
        doing = self._doing
        left = doing.since + self.timeout - time.monotonic()
        return min(self.interval, left + 0.01) if left > 0 and doing.has_limit else self.interval

    def _report(self, doing: _Doing, passed: float) -> None:
        frame = sys._current_frames().get(self._thread_id)
        if frame is None or doing.what == WAITING_FOR_RANKS:
            self._reported = doing
            return
        file = self.folder / f"rank_{self.rank:05d}.txt"
        where = f"its stack is in {file}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            head = f"{platform.node()}, process {os.getpid()}, step {doing.step}, {doing.what} for {passed:.0f} s\n\n"
            with open(file, "a") as stacks:
                stacks.write(head + "".join(traceback.format_stack(frame)) + "\n")
            self._stack_file = str(file)
        except OSError as error:
            where = f"its stack could not be written ({error})"
        self._reported = doing
        self._news.set()
        if self.rank == 0:  # the ranks that wait report the others
            doing_it = doing.what + (" (or waiting for another rank)" if self.size > 1 else "")
            message = "step %s: %s for %.0f s by now (distributed.timeout); %s"
            logger.warning(message, doing.step, doing_it, passed, where)

    def _leave_if_others_are_lost(self, doing: _Doing, passed: float) -> None:
        """Lost are those that give no signs any more, or else those that are behind all others."""
        try:
            signs = _with_limit(lambda: _read_signs(range(self.size)), PATIENCE_WITH_OTHER_RANKS)
        except RuntimeError:
            self._leave("another rank", passed)
        except FutureTimeoutError:
            self._leave(KEEPER if self.rank else "another rank", passed)
        if self._first_look is None:
            self._first_look = time.monotonic(), signs
        since, before = self._first_look
        if time.monotonic() - since < 3 * self.interval:
            return
        numbers = [sign["number"] for sign in signs.values()]
        lost = [
            rank
            for rank in range(self.size)
            if rank not in signs or (signs[rank] == before.get(rank) and not signs[rank]["is_stuck"])
        ] or [rank for rank, sign in signs.items() if sign["number"] == min(numbers) < max(numbers)]
        if lost and self.rank not in lost:
            self._leave(_describe(lost, signs), passed)

    def _leave(self, lost: str, passed: float) -> NoReturn:
        """Ends the process, whatever its main thread waits in."""
        if not is_first_to_tell():
            threading.Event().wait()
        faulthandler.cancel_dump_traceback_later()
        logging.shutdown()
        sys.stdout.flush()
        message = f"error: lost {lost}: without an answer for {passed:.0f} s (distributed.timeout)"
        print(message, file=sys.stderr, flush=True)  # noqa: T201
        if self.rank == 0:  # it keeps the store that others still ask
            time.sleep(PATIENCE_WITH_OTHER_RANKS)
        os._exit(1)


def is_first_to_tell() -> bool:
    """Whether the calling thread is the one that tells the loss of a rank and ends the process."""
    return _telling.acquire(blocking=False)


def name_lost_ranks() -> str:
    """Which ranks have not found by now, as this one has, that one is lost: it is among them; and their last signs."""
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()

    def ask() -> str:
        store.set(f"lost/{rank}", "")
        time.sleep(PATIENCE_WITH_OTHER_RANKS)
        missing = [other for other in range(size) if not store.check([f"lost/{other}"])]
        signs = _read_signs(missing)
        n_done = store.add("lost/done", 1)
        # The first rank keeps the store, so it leaves last.
        deadline = time.monotonic() + PATIENCE_WITH_OTHER_RANKS
        while rank == 0 and n_done < size - len(missing) and time.monotonic() < deadline:
            time.sleep(0.1)
            n_done = store.add("lost/done", 0)
        return _describe(missing, signs) if missing else "another rank"

    with silent_stderr():
        try:
            return _with_limit(ask, 3 * PATIENCE_WITH_OTHER_RANKS)
        except RuntimeError:
            return "another rank"
        except FutureTimeoutError:
            return KEEPER if rank else "another rank"


def _describe(ranks: list[int], signs: Signs) -> str:
    names = ", ".join(map(str, ranks))
    described = [_describe_sign(signs[rank]) for rank in ranks[:N_DESCRIBED] if rank in signs]
    return f"rank{'s' if len(ranks) > 1 else ''} {names}" + (f" ({'; '.join(described)})" if described else "")


def _describe_sign(sign: dict[str, Any]) -> str:
    since, now = (time.strftime("%H:%M:%S", time.localtime(sign[key])) for key in ("since", "now"))
    text = f"on {sign['host']}, step {sign['step']}, {sign['what']} since {since}, last sign at {now}"
    return text + (f", stack in {sign['stack']}" if sign["stack"] else "")


def _sign_key(rank: int) -> str:
    return f"sign/{rank}"


def _read_signs(ranks: Iterable[int]) -> Signs:
    """Those that there are, from the store."""
    store = dist.distributed_c10d._get_default_store()
    ranks = list(ranks)
    if not store.check([_sign_key(rank) for rank in ranks]):
        ranks = [rank for rank in ranks if store.check([_sign_key(rank)])]
    found = store.multi_get([_sign_key(rank) for rank in ranks]) if ranks else []
    return {rank: json.loads(sign) for rank, sign in zip(ranks, found, strict=True)}


def _with_limit(ask: Callable[[], T], seconds: float) -> T:
    """In its own thread, since the store may be kept by a rank that hangs: asking it has no time limit."""
    return ThreadPoolExecutor(max_workers=1).submit(ask).result(timeout=seconds)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Keeps back what torch's C++ code says on stderr by itself, such as stack traces of a connection that is gone."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
