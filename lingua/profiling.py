"""Looks inside some steps of a run: where their time and memory go, and how much of the device's peak is used (MFU).

Two windows of steps, counted from the start of the process, which is what has to warm up. Each rank writes files of its
own, named by the steps they are of:

    0000000103-0000000104.rank_0.trace.json.gz   torch.profiler's trace
    0000000103-0000000104.rank_0.kernels.txt     speed and MFU; operators, and on a GPU kernels, by time
    0000000101-0000000102.rank_0.memory.pickle   on a GPU, a snapshot of every allocation
    0000000101-0000000102.rank_0.memory.json.gz  on a CPU, a trace with a curve of what tensors hold

A file is whole or it is not there. What is trained is the same as without it, to the bit.
"""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import resource
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from torch.profiler import ProfilerActivity, profile

from lingua.config import ProfilingArgs
from lingua.errors import UserError
from lingua.flops import known_peak, measured_peak, synchronize
from lingua.heartbeat import silent_stderr

logger = logging.getLogger(__name__)

# Steps before the first window of which speed is measured, too: those in a window are slower.
UNWATCHED_STEPS = 10

# Lines of a kernel table; what is left is summed up in one.
TABLE_ROWS = 40

# Allocations that a memory snapshot keeps, the last ones.
MAX_ALLOCATIONS = 1_000_000


def validate_profiling_args(args: ProfilingArgs, steps: int) -> None:
    """Raises UserError, one line that names the key, for windows that a run of `n_steps` steps cannot have."""
    for name in ("mem_warmup", "mem_steps", "profile_warmup", "profile_steps"):
        if getattr(args, name) < 0:
            raise UserError(f"profiling.{name}: {getattr(args, name)} is negative, it must be 0 or more")
    if not args.run:
        return
    if not args.trace_folder:
        raise UserError("profiling.trace_folder: not set; name a folder for the traces, such as profiling")
    windows = [("mem", args.mem_warmup, args.mem_steps), ("profile", args.profile_warmup, args.profile_steps)]
    windows = sorted((warmup, n_steps, name) for name, warmup, n_steps in windows if n_steps)
    if not windows:
        raise UserError("profiling.run: true, but mem_steps and profile_steps are both 0; set one of them, or false")
    for warmup, _, name in windows:
        if warmup >= steps:
            raise UserError(
                f"profiling.{name}_warmup: {warmup} leaves nothing to be seen of a run of steps={steps}; lower it, or "
                f"set {name}_steps=0"
            )
    if len(windows) == 2 and sum(windows[0][:2]) > windows[1][0]:
        (warmup, n_steps, first), (later, _, second) = windows
        raise UserError(
            f"profiling.{second}_warmup: {later} begins within the {n_steps} steps after {first}_warmup={warmup}, and "
            f"one recording slows the other; set it to {warmup + n_steps} or more"
        )


@dataclass
class Workload:
    """What MFU is made of: of one rank, FLOPs a token as the model counts them, in products of `dtype`."""

    flops_per_token: int
    tokens_per_step: float
    dtype: torch.dtype


class Profiler:
    """Opens and closes the windows as steps go by. Does nothing where `args.run` is off.

    Within its `with`: `begin_step` and `end_step` around each step. A run that ends or is stopped in a window leaves
    files of the steps it has done there; one that fails leaves none.
    """

    def __init__(
        self, args: ProfilingArgs, dump_dir: str, rank: int, n_ranks: int, device: torch.device, workload: Workload
    ):
        self._folder = Path(dump_dir) / args.trace_folder
        self._rank, self._n_ranks, self._device, self._workload = rank, n_ranks, device, workload
        self._windows: dict[range, type[_Recording]] = {}
        if args.run:
            of_memory = _Snapshot if device.type == "cuda" else _MemoryTrace
            for warmup, n_steps, kind in (
                (args.mem_warmup, args.mem_steps, of_memory),
                (args.profile_warmup, args.profile_steps, _KernelTrace),
            ):
                if n_steps:
                    self._windows[range(warmup, warmup + n_steps)] = kind
        first = min((window.start for window in self._windows), default=0)
        # Not the first step of all, which compiles and allocates.
        self._timed = range(max(first - UNWATCHED_STEPS, 1), first + 1)
        self._times: list[float] = []
        self._done = 0
        self._recording: _Recording | None = None

    def __enter__(self) -> Profiler:
        if self._windows:
            # Kineto's messages are for its developers; whoever wants them sets another level.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            self._attempt(self._make_folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            if self._recording is not None:
                self._recording.stop()
            return
        self._close()
        if any(self._done <= window.start for window in self._windows):
            logger.warning("profiling: the run ended after %s steps, before all was recorded", self._done)

    def begin_step(self, step: int) -> None:
        """Before the step that brings the run to `step`."""
        if self._done in self._timed:
            synchronize(self._device)
            self._times.append(time.perf_counter())
        for window, kind in self._windows.items():
            if self._done == window.start:
                self._attempt(lambda kind=kind: self._open(kind(step, self._device)))

    def end_step(self) -> bool:
        """Behind it. Whether files were written, which took time."""
        self._done += 1
        if self._recording is None:
            return False
        self._recording.n_steps += 1
        if not any(self._done == window.stop for window in self._windows):
            return False
        self._close()
        return True

    def _open(self, recording: _Recording) -> None:
        recording.start()
        self._recording = recording

    def _close(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.stop()
            self._attempt(lambda: self._write(recording))

    def _attempt(self, what: Callable[[], None]) -> None:
        """What fails here, such as a full disk, is told and ends no training."""
        try:
            what()
        except (OSError, RuntimeError, ValueError) as error:
            logger.error("profiling: not all could be written to %s: %s", self._folder, " ".join(str(error).split()))

    def _make_folder(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(f"tmp.*.rank_{self._rank}.*"):  # of a process that was killed
            left_over.unlink()

    def _write(self, recording: _Recording) -> None:
        stem = f"{recording.first_step:010d}-{recording.last_step:010d}.rank_{self._rank}"

        def create(ending: str, write: Callable[[Path], None]) -> Path:
            file, beside = self._folder / f"{stem}.{ending}", self._folder / f"tmp.{stem}.{ending}"
            try:
                write(beside)
                beside.rename(file)
            finally:
                beside.unlink(missing_ok=True)
            return file

        told = recording.write(create, self._measure)
        others = f"; each of the {self._n_ranks} ranks has its own" if self._n_ranks > 1 else ""
        steps = f"{recording.first_step} to {recording.last_step}"
        logger.info("profiling: steps %s: %s%s", steps, told, others)

    def _measure(self, recording: _Trace) -> tuple[str, str]:
        """MFU in a few words, and the head of a kernel table, which says how it comes about."""
        known = known_peak(self._device, self._workload.dtype)
        peak = known or measured_peak(self._device, self._workload.dtype)
        laps = [after - before for before, after in zip(self._times, self._times[1:], strict=False)]
        speeds = {"traced": recording.seconds / recording.n_steps}
        if laps:
            speeds = {"not traced": statistics.median(laps), **speeds}
        prefix, unit = ("T", 1e12) if peak >= 1e12 else ("G", 1e9)
        lines, words = [f"{'':36}{'s/step':>10}{'tokens/s':>12}{f'{prefix}FLOP/s':>10}{'MFU':>8}"], []
        for name, seconds in speeds.items():
            tokens = self._workload.tokens_per_step / seconds
            flops = tokens * self._workload.flops_per_token
            of_which = f"median of {len(laps)}" if name == "not traced" else f"mean of {recording.n_steps}"
            label = f"steps {name}, {of_which}"
            lines.append(f"{label:36}{seconds:10.4f}{tokens:12,.0f}{flops / unit:10.4g}{flops / peak:8.1%}")
            words.append(f"{flops / peak:.1%} {name}")
        where = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "a CPU"
        dtype = str(self._workload.dtype).removeprefix("torch.")
        source = "dense, of its datasheet" if known else "the fastest product of two matrices measured here"
        head = [
            f"Steps {recording.first_step} to {recording.last_step}, rank {self._rank} of {self._n_ranks}, on {where}, "
            f"torch {torch.__version__}",
            "",
            *lines,
            "",
            f"The model takes {self._workload.flops_per_token:,} FLOPs a token, forward and backward (speed/FLOPS).",
            f"The peak is {peak / unit:,.4g} {prefix}FLOP/s in {dtype}: {source}.",
        ]
        return f"MFU {', '.join(words)}", "\n".join(head)


# --- what is recorded ----------------------------------------------------------------------------------------------

# Makes the file of an ending, whole, by a function that writes to a path; returns the file.
Create = Callable[[str, Callable[[Path], None]], Path]


class _Recording(ABC):
    """Of the steps from `first_step` on, of which `n_steps` are done so far."""

    def __init__(self, first_step: int, device: torch.device):
        self.first_step, self.device = first_step, device
        self.n_steps = 0

    @property
    def last_step(self) -> int:
        return self.first_step + self.n_steps - 1

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def write(self, create: Create, measure: Callable[[_Trace], tuple[str, str]]) -> str:
        """Makes the files, when it has stopped. Returns what was found, where it is, and how to open it."""


class _Snapshot(_Recording):
    """Every allocation on a GPU, and the lines of Python that made it."""

    def start(self) -> None:
        torch.cuda.memory._record_memory_history(max_entries=MAX_ALLOCATIONS, stacks="python")

    def stop(self) -> None:
        synchronize(self.device)
        self._snapshot = torch.cuda.memory._snapshot(self.device)  # which is gone when recording ends
        torch.cuda.memory._record_memory_history(enabled=None)

    def write(self, create: Create, measure: Callable[[_Trace], tuple[str, str]]) -> str:
        file = create("memory.pickle", lambda path: path.write_bytes(pickle.dumps(self._snapshot)))
        return f"every allocation in {file} (open in pytorch.org/memory_viz)"


class _Trace(_Recording):
    """What torch.profiler sees, in Chrome's format."""

    with_memory = False

    def start(self) -> None:
        synchronize(self.device)
        self._began = time.perf_counter()
        on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            record_shapes=True,
            with_stack=True,  # it names the modules
            profile_memory=self.with_memory,
        )
        self._profile.start()

    def stop(self) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self._began
        self._profile.stop()

    def export(self, beside: Path) -> bytes:
        """The trace as JSON; `beside` is where a file of it may be for a moment."""
        raw = beside.with_name(f"{beside.name}.raw")
        try:
            self._profile.export_chrome_trace(str(raw))
            return raw.read_bytes()
        finally:
            raw.unlink(missing_ok=True)


class _KernelTrace(_Trace):
    """A trace, and tables of what takes the time."""

    def write(self, create: Create, measure: Callable[[_Trace], tuple[str, str]]) -> str:
        events: list[dict[str, Any]] = []

        def write_trace(path: Path) -> None:
            content = self.export(path)
            events.extend(orjson.loads(content)["traceEvents"])
            path.write_bytes(gzip.compress(content, 5))

        mfu, head = measure(self)
        trace = create("trace.json.gz", write_trace)
        tables = [head, _table("Operators by the CPU's time, without that of operators in them", _operators(events))]
        if self.device.type == "cuda":
            kernels = _kernels(events)
            tables.append(_table("Kernels and copies by the GPU's time", kernels))
            if not kernels:
                tables.append("There are none: CUPTI, which sees them, was not permitted to, or is in use.")
        table = create("kernels.txt", lambda path: path.write_text("\n\n".join(tables) + "\n", encoding="utf-8"))
        return f"{mfu}: trace {trace} (open in ui.perfetto.dev or chrome://tracing), tables {table}"


class _MemoryTrace(_Trace):
    """In a snapshot's place where there is no GPU: a trace with a curve of what tensors hold."""

    with_memory = True

    def start(self) -> None:
        held = torch.empty(1)
        super().start()
        # The first to be freed of what was there before makes torch say that it knows nothing of such: one line in
        # each thousand.
        with silent_stderr():
            del held

    def write(self, create: Create, measure: Callable[[_Trace], tuple[str, str]]) -> str:
        most = 0

        def write_trace(path: Path) -> None:
            nonlocal most
            trace = orjson.loads(self.export(path))
            curve = _memory_curve(trace["traceEvents"])
            most = max((point["args"]["MiB"] for point in curve), default=0)
            trace["traceEvents"] += curve
            path.write_bytes(gzip.compress(orjson.dumps(trace), 5))

        file = create("memory.json.gz", write_trace)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return (
            f"no GPU, so no snapshot; tensors took {most:,.1f} MiB more than before at the most, the process "
            f"{peak / 2**20:,.0f} MiB so far: trace {file} (open in ui.perfetto.dev or chrome://tracing)"
        )


# --- out of a trace's events ---------------------------------------------------------------------------------------


@dataclass
class Spent:
    """Microseconds and calls of all events of a name; `own`: without the time of events within them."""

    own: float = 0.0
    whole: float = 0.0
    calls: int = 0


def _operators(events: Iterable[dict[str, Any]]) -> dict[str, Spent]:
    """Of operators, which may call each other, on each thread."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    spent: dict[str, Spent] = defaultdict(Spent)
    for of_thread in threads.values():
        within: list[dict[str, Any]] = []
        for event in sorted(of_thread, key=lambda event: (event["ts"], -event["dur"])):
            while within and within[-1]["ts"] + within[-1]["dur"] <= event["ts"]:
                within.pop()
            if within:
                spent[within[-1]["name"]].own -= event["dur"]
            mine = spent[event["name"]]
            mine.own += event["dur"]
            mine.whole += event["dur"]
            mine.calls += 1
            within.append(event)
    return spent


def _kernels(events: Iterable[dict[str, Any]]) -> dict[str, Spent]:
    """Of what runs on a GPU."""
    spent: dict[str, Spent] = defaultdict(Spent)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            mine = spent[event["name"]]
            mine.own += event["dur"]
            mine.whole += event["dur"]
            mine.calls += 1
    return spent


def _table(title: str, spent: dict[str, Spent]) -> str:
    """The longest first."""
    ordered = sorted(spent.items(), key=lambda item: -item[1].own)
    rest = [of_name for _, of_name in ordered[TABLE_ROWS:]]
    if rest:
        ordered = [
            *ordered[:TABLE_ROWS],
            (
                f"{len(rest)} more",
                Spent(sum(s.own for s in rest), sum(s.whole for s in rest), sum(s.calls for s in rest)),
            ),
        ]
    total = sum(of_name.own for _, of_name in ordered) or 1.0
    lines = [title, "", f"{'own ms':>12}{'share':>8}{'whole ms':>12}{'calls':>9}  name"]
    for name, of_name in ordered:
        times = f"{of_name.own / 1e3:12,.3f}{of_name.own / total:8.1%}{of_name.whole / 1e3:12,.3f}{of_name.calls:9,}"
        lines.append(f"{times}  {name[:200]}")
    return "\n".join(lines)


def _memory_curve(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points of a counter, in MiB above the first, out of the profiler's allocations."""
    points = sorted(
        (event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0),
        key=lambda event: event["ts"],
    )
    held, curve = 0, []
    for point in points:
        held += point["args"]["Bytes"]
        counter = {"ph": "C", "name": "memory of tensors", "pid": point["pid"], "tid": point["tid"], "ts": point["ts"]}
        curve.append({**counter, "args": {"MiB": held / 2**20}})
    return curve
