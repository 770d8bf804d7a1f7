"""A program's frame: user errors against bugs, exit codes, signals, environment variables. It imports no torch."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lingua.args import first_line, looks_secret, parse_args, refuse_secrets
from lingua.errors import UserError

logger = logging.getLogger(__name__)

# Seconds that other ranks leave the first one to tell an error that all of them have.
PATIENCE_WITH_FIRST_RANK = 10

# Seconds that ranks which leave since another one has an error give that one to tell it.
PATIENCE_WITH_THE_ERROR = 3

# Exit code after Ctrl-C, as of a shell's commands.
INTERRUPTED = 128 + signal.SIGINT

# Settings of CUDA's allocator, all of which but the backend torch reads when it first looks for a device.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


# --- environment -----------------------------------------------------------------------------------------------------


def default_environment() -> dict[str, str]:
    """Variables set before training starts (config section `env`, which may name any others)."""
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_SERVICE_FORCE_INTEL": "GNU",
        "NCCL_IB_TIMEOUT": "22",
        "NCCL_DEBUG": "INFO",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def set_environment(variables: dict[str, str]) -> None:
    """Sets the variables of config section `env`, and logs each that had another value before.

    They reach what starts after this. Call it before anything looks at a device (`find_world`), and CUDA, its allocator
    and NCCL read them too. torch has its number of CPU threads since it was imported.
    """
    for name, value in variables.items():
        before = os.environ.get(name)
        if before not in (None, value):
            shown = "***" if looks_secret(name, before) else before
            logger.info("env: %s=%s from the config replaces %s", name, value, shown)
        os.environ[name] = value


def validate_environment(variables: dict[str, str]) -> None:
    """Raises UserError for what cannot be a variable, and for those that would carry a secret into saved configs."""
    refuse_secrets(variables, "env")
    for name in variables:
        if not name or "=" in name or "\0" in name + variables[name]:
            raise UserError(f"env.{name}: no variable can have this name, or value {variables[name][:30]!r}")
        backend = re.search(r"backend:\s*(\w+)", variables[name]) if name in ALLOCATOR_VARIABLES else None
        if backend and backend[1] != "native" and backend[0] not in os.environ.get(name, ""):
            raise UserError(
                f"env.{name}: {backend[0]} is read when torch is imported, before any config; export it in the shell"
            )


# --- the end of a program --------------------------------------------------------------------------------------------


def _has_process_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized()


def _is_of_a_lost_rank(error: BaseException) -> bool:
    if not _has_process_group():
        return False
    from lingua.distributed import is_of_a_lost_rank

    return is_of_a_lost_rank(error)


def _leave(code: object) -> None:
    """Ends the process; at once where there is a process group, which could wait for the others on its way out."""
    _flush_stdout()
    if _has_process_group():
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _flush_stdout() -> None:
    """On a full disk, Python would try once more when it ends, with a traceback and its own exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _launchers_rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's main function: a UserError or OSError ends in one line on stderr and exit code 1.

    So does a rank that died or hangs, on all the others. Any other exception is a bug and ends in its traceback.
    LINGUA_TRACEBACK=1 in the environment shows where a line came from.
    """
    try:
        main()
        if _has_process_group():
            _leave(0)
        _flush_stdout()
    except SystemExit as leaving:
        if _has_process_group() and leaving.code:
            # Another rank has the error (`together`). torchrun ends all of them when the first one leaves, so let it
            # speak before.
            time.sleep(PATIENCE_WITH_THE_ERROR)
        _leave(leaving.code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        of_the_user = isinstance(error, (UserError, OSError))
        lost = not of_the_user and _is_of_a_lost_rank(error)
        if not (of_the_user or lost) or os.environ.get("LINGUA_TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(error).split())
        if lost:
            from lingua.heartbeat import is_first_to_tell, name_lost_ranks

            while not is_first_to_tell():  # another thread does, and ends the process
                time.sleep(1)
            message = f"lost {name_lost_ranks()}: dead, or without an answer for too long ({message[:300]})"
        elif of_the_user and not _has_process_group() and _launchers_rank() != "0":
            # What is wrong before the ranks have met is mostly wrong on all of them: let the first one say it, after
            # which torchrun ends the others.
            time.sleep(PATIENCE_WITH_FIRST_RANK)
        if of_the_user or lost:
            _flush_stdout()
            print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        _leave(1)


def check_command_line(cls: type, argv: list[str] | None = None) -> None:
    """Ends the process, as `run_main` does, where its arguments do not fit dataclass `cls`.

    For a program's first lines: what is mistyped is reported before torch is imported, which takes seconds.
    """
    run_main(lambda: parse_args(cls, argv))


@contextlib.contextmanager
def oom_as_user_error(message: str) -> Iterator[None]:
    """Turns running out of memory, a GPU's or the CPU's, into a UserError of this message."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(message) from None
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise UserError(f"{message} ({first_line(error)})") from None


# --- signals ---------------------------------------------------------------------------------------------------------


def _forget_stop_signals() -> None:
    """In a forked process, such as a worker of a pool, signals end it again."""
    for number, default in STOP_SIGNALS.items():
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignal):
            signal.signal(number, default)
            if number == signal.SIGINT:
                signal.set_wakeup_fd(-1)  # it is the trainer's


@functools.cache
def _forget_stop_signals_in_children() -> None:
    """Once a process, and not before it needs to: an import changes nothing for a program that only uses a layer."""
    os.register_at_fork(after_in_child=_forget_stop_signals)


# The signals, and Python's own handlers for them.
STOP_SIGNALS = {
    signal.SIGUSR2: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class StopSignal:
    """Remembers, within its `with`, USR2 (SLURM's warning before a job's end) and TERM, for the loop to answer; within
    `taking_interrupts` INT, too. `name`: of the first one, None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def is_interrupt(self) -> bool:
        """Whether it is Ctrl-C."""
        return self.name == signal.SIGINT.name

    def __enter__(self) -> StopSignal:
        # Other threads cannot receive signals; training in one goes without.
        if threading.current_thread() is threading.main_thread():
            _forget_stop_signals_in_children()
            for number in (signal.SIGUSR2, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
            # A job of lingua.stool starts with them blocked: one that came too early comes now.
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def taking_interrupts(self, message: str | None) -> Iterator[None]:
        """The first INT (Ctrl-C) logs `message` and is remembered. The second ends the process at once, whatever its
        main thread waits in: another rank that hangs, a disk.
        """
        in_background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if in_background or threading.current_thread() is not threading.main_thread():
            yield
            return
        # Python runs handlers in the main thread, when that comes back from what it waits in. The signal's number is in
        # this socket at once.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        listener = threading.Thread(
            target=self._count_interrupts, args=(reader, message), name="interrupts", daemon=True
        )
        handler = signal.signal(signal.SIGINT, self._remember)
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGINT, handler)
            writer.shutdown(socket.SHUT_RDWR)  # for forked processes, too
            listener.join()
            writer.close()
            reader.close()

    def _count_interrupts(self, reader: socket.socket, message: str | None) -> None:
        n_interrupts = 0
        while number := reader.recv(1):
            if number[0] != signal.SIGINT:
                continue
            n_interrupts += 1
            if n_interrupts > 1:
                os._exit(INTERRUPTED)
            if message is not None:
                logger.warning("%s", message)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = self.name or signal.Signals(number).name
