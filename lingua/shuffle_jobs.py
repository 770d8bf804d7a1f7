"""Who works on the tasks of a shuffle: this process, several of it, or a SLURM job array; and how far they are.

A worker process is its own program that imports what reading and sorting need, and nothing of the program that
started it. It ends when its pipe does, so none outlives who started it by more than a moment.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, TextIO

from lingua import shuffle
from lingua.args import first_line
from lingua.documents import InputFile
from lingua.errors import UserError
from lingua.shuffle import Plan
from lingua.shuffle_output import (
    begin,
    check_space,
    check_unchanged,
    clear_leftovers,
    find_result,
    lock,
    publish,
    remove_parts,
    text_bytes,
)
from lingua.slurm import ask_slurm, partition_minutes, why_waiting
from lingua.sources import count_cores

# What a process takes before any data: Python, numpy, orjson; and Arrow with its buffers.
PROCESS_BYTES, ARROW_BYTES = 48_000_000, 72_000_000
REPORT_SECONDS = 0.2
POLL_SECONDS, QUEUE_SECONDS = 1.0, 10.0  # to look for the files of a job array, and into SLURM's queue
# Files of another machine are seen a little later on some network filesystems.
LISTING_SECONDS = 60.0

# Signals to the job are the main process's to answer; a worker goes when its pipe does.
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

OnProgress = Callable[[int, float, int], None]  # task, how much of it is done (0 to 1), its documents so far


@dataclass(frozen=True)
class Resources:
    """`memory`: bytes for all processes together. `workers`: 1: this process; more: that number beside it.

    None: one a core, as long as each has MIN_SHARE of the memory for its data.
    """

    memory: int
    workers: int | None = None

    def share(self, n_workers: int, files: tuple[InputFile, ...]) -> int:
        """Bytes for the data that one of `n_workers` workers processes."""
        return max(self._left(n_workers, files) // n_workers, shuffle.MIN_SHARE)

    def n_workers(self, n_tasks: int, files: tuple[InputFile, ...]) -> int:
        wanted = self.workers
        if wanted is None:
            enough = [n for n in range(2, count_cores() + 1) if self._left(n, files) >= n * shuffle.MIN_SHARE]
            wanted = enough[-1] if enough else 1
        return min(wanted, n_tasks)

    def least(self, n_workers: int, files: tuple[InputFile, ...]) -> int:
        """Bytes that `n_workers` workers take, however little memory is given."""
        return self.memory - self._left(n_workers, files) + n_workers * shuffle.MIN_SHARE

    def _left(self, n_workers: int, files: tuple[InputFile, ...]) -> int:
        """Of the memory, when all processes have started."""
        n_processes = n_workers + 1 if n_workers > 1 else 1
        each = PROCESS_BYTES if all(file.is_plain for file in files) else PROCESS_BYTES + ARROW_BYTES
        return self.memory - n_processes * each


@dataclass(frozen=True)
class Cluster:
    """A job array of `tasks` jobs, each with `cpus` workers. `minutes`: a job's time limit; None: the partition's.

    `kind`: of submitit's executors: "slurm", "local" (processes of this machine) or "debug" (this process).
    """

    kind: str = "slurm"
    tasks: int = 8
    cpus: int = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    minutes: int | None = None


# --- progress ----------------------------------------------------------------------------------------------------


class Progress:
    """A line on a terminal, written again and again; elsewhere a line every 10 seconds and at the end.

    `weights`: bytes of each task, of which all but `pending` are done already.
    """

    def __init__(self, title: str, weights: list[float], pending: list[int], stream: TextIO | None = None):
        self.title, self.weights = title, weights
        self.stream = stream or sys.stderr
        self._on_terminal = self.stream.isatty()
        self._done = sum(weights) - sum(weights[task] for task in pending)
        self._first_done = self._done
        self._documents = 0
        self._open: dict[int, tuple[float, int]] = {}
        self._start = self._last = time.monotonic()

    def update(self, task: int, done: float, documents: int) -> None:
        if done >= 1:
            self._open.pop(task, None)
            self._done += self.weights[task]
            self._documents += documents
        else:
            self._open[task] = done, documents
        if time.monotonic() - self._last >= (REPORT_SECONDS if self._on_terminal else 10):
            self._write()

    def finish(self) -> None:
        self._write()
        if self._on_terminal:
            self.stream.write("\n")
            self.stream.flush()

    def _write(self) -> None:
        self._last = time.monotonic()
        done = self._done + sum(part * self.weights[task] for task, (part, _) in self._open.items())
        documents = self._documents + sum(count for _, count in self._open.values())
        total, elapsed = sum(self.weights), max(self._last - self._start, 1e-3)
        speed = (done - self._first_done) / elapsed
        left = _clock((total - done) / speed) if speed else "-"
        line = f"{self.title:8} {done / 1e6:,.0f} of {total / 1e6:,.0f} MB  {documents:,} documents"
        line += f"  {speed / 1e6:,.0f} MB/s  " + (f"{left} left" if total > done else f"in {_clock(elapsed)}")
        self.stream.write(f"\r{line}\x1b[K" if self._on_terminal else f"{line}\n")
        self.stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"


# --- on this machine ---------------------------------------------------------------------------------------------


def run_here(kind: str, tasks: list[int], plan: Plan, resources: Resources, on_progress: OnProgress) -> None:
    """Works on all of `tasks`. Raises UserError for what is wrong with data, disk or a worker."""
    n_workers = resources.n_workers(len(tasks), plan.files)
    if not n_workers:
        return
    share = resources.share(n_workers, plan.files)
    if n_workers > 1:
        _run_processes(kind, tasks, plan, n_workers, share, on_progress)
        return
    worker = shuffle.KINDS[kind](plan, share)
    for task in tasks:
        documents = worker.run(task, lambda done, documents, task=task: on_progress(task, min(done, 0.999), documents))
        on_progress(task, 1.0, documents)


class _Worker:
    """A process that works on one task after the other."""

    def __init__(self, kind: str, plan: Plan, share: int):
        self.connection, theirs = Pipe()
        package_root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        fd = theirs.fileno()
        # The worker inherits these signals blocked, so that none ends it before it has said that it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED_SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from lingua.shuffle_jobs import serve; serve({fd})"],
                stdin=subprocess.DEVNULL,
                pass_fds=[fd],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self.task = -1
        self.send((kind, plan.work, share))

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died: `receive` tells how
            self.connection.send(message)

    def receive(self) -> tuple[Any, ...]:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            code = self.process.wait()
        if code >= 0:
            raise UserError(f"a worker ended with exit code {code}; see its message above")
        name = signal.Signals(-code).name if -code in iter(signal.Signals) else f"signal {-code}"
        memory = "; out of memory? give less MEMORY, or use fewer workers" if name == "SIGKILL" else ""
        raise UserError(f"a worker was killed by {name}{memory} (started again it goes on from here)")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def _run_processes(
    kind: str, tasks: list[int], plan: Plan, n_workers: int, share: int, on_progress: OnProgress
) -> None:
    waiting = deque(tasks)
    workers: dict[Connection, _Worker] = {}
    try:
        for _ in range(n_workers):
            worker = _Worker(kind, plan, share)
            workers[worker.connection] = worker
            worker.task = waiting.popleft()
            worker.send(worker.task)
        busy = set(workers)
        while busy:
            for connection in wait(list(busy)):
                worker = workers[connection]
                what, *values = worker.receive()
                if what == "error":
                    raise UserError(values[0])
                if what == "crash":
                    raise RuntimeError(values[0])
                done, documents = values
                on_progress(worker.task, done, documents)
                if what == "done" and waiting:
                    worker.task = waiting.popleft()
                    worker.send(worker.task)
                elif what == "done":
                    busy.remove(connection)
    finally:
        for worker in workers.values():
            worker.close()


def serve(fd: int) -> None:
    """A worker's main program: answers on the pipe `fd` until it closes."""
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED_SIGNALS)
    connection = Connection(fd)
    last = 0.0

    def report(done: float, documents: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            try:
                connection.send(("progress", min(done, 0.999), documents))
            except OSError:
                sys.exit()  # who started this is gone; what is half written goes, too

    def fail(kind: str, message: str) -> None:
        with contextlib.suppress(OSError):
            connection.send((kind, message))

    try:
        kind, work, share = connection.recv()
        worker = shuffle.KINDS[kind](_load_plan(work), share)
        while True:
            documents = worker.run(connection.recv(), report)
            connection.send(("done", 1.0, documents))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # who started this is gone
    except (UserError, OSError) as error:
        fail("error", " ".join(str(error).split()))
    except MemoryError:
        fail("error", "a worker is out of memory; give less MEMORY, or use fewer workers")
    except Exception:
        fail("crash", f"a worker failed\n{traceback.format_exc()}")


def _load_plan(work: str) -> Plan:
    plan = Plan.load(work)
    if plan is None:
        raise UserError(f"{work}: no plan there; another process removed it")
    return plan


# --- as a job array ----------------------------------------------------------------------------------------------


def check_memory(memory: int) -> None:
    """Raises UserError where this machine has less than `memory` bytes."""
    import psutil

    total = psutil.virtual_memory().total
    if memory > total:
        raise UserError(f"MEMORY {memory / 1e9:g}: this machine has {total / 1e9:.1f} GB; it works with less, too")


class ShareOfTasks:
    """What one job of an array does: those of `tasks` that are not done.

    submitit calls it in the job, and makes the job again with it where SLURM ended it early.
    """

    def __init__(self, kind: str, work: str, tasks: list[int], resources: Resources):
        self.kind, self.work, self.tasks, self.resources = kind, work, tasks, resources

    def __call__(self) -> None:
        plan = _load_plan(self.work)
        check_memory(self.resources.memory)
        pending = set(shuffle.pending_tasks(self.kind, plan))
        tasks = [task for task in self.tasks if task in pending]
        run_here(self.kind, tasks, plan, self.resources, lambda task, done, documents: None)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_on_cluster(
    kind: str,
    tasks: list[int],
    plan: Plan,
    resources: Resources,
    cluster: Cluster,
    on_progress: OnProgress,
    say: Callable[[str], None],
) -> None:
    """Works on all of `tasks` by a job array, and waits for it. Raises UserError where a job fails, with its log.

    Jobs of a run that was killed may go on beside these: what both write is the same.
    """
    if not tasks:
        return
    import submitit

    folder = Path(plan.work, "jobs")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster.kind)
    except RuntimeError as error:
        raise UserError(f"no SLURM here: {error}") from None
    slurm = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    # Whole GB, and one for what Python and the filesystem take beside it.
    memory = {"mem_gb": -(-resources.memory // 10**9) + 1} if _counts_memory(cluster) else {}
    executor.update_parameters(
        name=f"{kind}_{plan.name}",
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=cluster.cpus,
        timeout_min=_minutes(cluster),
        **memory,
        **{f"slurm_{key}": value for key, value in slurm.items() if value is not None},
    )
    count = min(cluster.tasks, len(tasks))
    shares = [ShareOfTasks(kind, plan.work, tasks[number::count], resources) for number in range(count)]
    try:
        with executor.batch():
            jobs = [executor.submit(share) for share in shares]
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
        raise UserError(f"the job array cannot be submitted: {' '.join(str(error).split())}") from None
    if cluster.kind == "slurm":
        array = jobs[0].job_id.split("_")[0]
        time.sleep(1)  # until SLURM has looked at it
        reason = ""
        with contextlib.suppress(OSError):
            reason = why_waiting(array)
        say(f"{kind}: job {array}, {count} tasks" + (f", waiting ({reason})" if reason else ""))
    try:
        _wait_for_jobs(kind, tasks, plan, jobs, cluster, on_progress)
    except BaseException:
        for job in jobs:
            with contextlib.suppress(Exception):
                job.cancel()
        raise


def _minutes(cluster: Cluster) -> int:
    """A time limit that the partition allows: SLURM takes others, and never starts them."""
    if cluster.kind != "slurm":
        return cluster.minutes or 1440
    longest = partition_minutes(cluster.partition)
    if cluster.minutes is not None and cluster.minutes > longest:
        raise UserError(f"--slurm_time {cluster.minutes}: more than the {longest:g} minutes of the partition")
    return cluster.minutes or int(min(longest, 30 * 1440))


def _counts_memory(cluster: Cluster) -> bool:
    """Where SLURM hands out cores only, it may know of no memory, and then refuses who asks for some."""
    if cluster.kind != "slurm":
        return True
    found = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    chosen = re.search(r"^SelectTypeParameters\s*=(.*)$", found.stdout, re.MULTILINE)
    return chosen is None or "MEMORY" in chosen[1]


def _wait_for_jobs(
    kind: str, tasks: list[int], plan: Plan, jobs: list[Any], cluster: Cluster, on_progress: OnProgress
) -> None:
    left = set(tasks)
    running, asked = list(jobs), time.monotonic()
    ended: dict[str, float] = {}  # when jobs were first seen to be gone without a result
    while left:
        pending = set(shuffle.pending_tasks(kind, plan))
        for task in sorted(left - pending):
            on_progress(task, 1.0, shuffle.KINDS[kind].n_documents(plan, task))
        left &= pending
        for job in [job for job in running if job.paths.result_pickle.exists()]:
            running.remove(job)
            if (error := job.exception()) is not None:
                raise UserError(f"job {job.job_id} failed: {_reason(error)}; its log is {job.paths.stderr}")
        now = time.monotonic()
        if left and now - asked >= QUEUE_SECONDS:
            asked = now
            for job in running:
                if _is_gone(job, cluster) and now - ended.setdefault(job.job_id, now) >= LISTING_SECONDS:
                    raise UserError(
                        f"job {job.job_id} ended without a result: cancelled, out of memory or over its time? its log "
                        f"is {job.paths.stderr} (started again it goes on from here)"
                    )
            if not running and now - ended.setdefault("all", now) >= LISTING_SECONDS:
                raise UserError(f"{plan.work}: all jobs ended, and {len(left)} of their files cannot be seen from here")
        if left:
            time.sleep(POLL_SECONDS)


def _is_gone(job: Any, cluster: Cluster) -> bool:
    """Whether a job neither waits nor runs, as far as is known. Asks the queue: not all clusters keep accounts."""
    if cluster.kind != "slurm":
        return job.done()
    try:
        listed = ask_slurm("squeue", "--noheader", "--array", "--format=%i", f"--jobs={job.job_id.partition('_')[0]}")
    except OSError as error:
        return "Invalid job id" in str(error)
    return job.job_id not in listed.split()


def _reason(error: BaseException) -> str:
    """What submitit tells of a failed job holds a traceback, if the job had its own exception."""
    told = str(error).splitlines()
    exceptions = [line.partition(": ")[2] for line in told if re.match(r"[\w.]+(Error|Exception): ", line)]
    return exceptions[-1] if exceptions else first_line(error)


# --- all of it ---------------------------------------------------------------------------------------------------


def of_documents(on_error: str, columns: tuple[str, ...] | None) -> dict[str, Any]:
    """What the manifest of a finished shuffle says of its documents, if they are what these options ask for."""
    return {"columns": None if columns is None else list(columns)} | ({"skipped": 0} if on_error == "stop" else {})


@contextlib.contextmanager
def _pass(title: str, weights: list[float], pending: list[int]) -> Iterator[OnProgress]:
    progress = Progress(title, weights, pending)
    yield progress.update
    progress.finish()


def run(
    plan: Plan,
    resources: Resources,
    source: dict[str, Any],
    cluster: Cluster | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Shuffles, or goes on with a shuffle that was stopped; the manifest of what is in `plan.out` then.

    `source`: what the manifest tells of where the files are from; `say`: for what the user should know. Raises
    UserError, one line, for what is wrong with files, disk, memory or jobs, or with what there is in `plan.out`.
    """
    if sum(file.size for file in plan.files) == 0:
        raise UserError(f"{plan.name}: all {len(plan.files)} files are empty")
    wanted = {"seed": plan.seed, "nchunks": plan.nchunks, "n_validation": plan.n_validation}
    wanted |= {"inputs": [[f.name, f.size] for f in plan.files]} | of_documents(plan.on_error, plan.columns)
    manifest = find_result(plan.out, plan.name, wanted)
    if manifest is not None:
        clear_leftovers(plan.work, plan.stage)
        say(f"{plan.out}: nothing to do, it is there: {manifest['documents']:,} documents in {plan.nchunks} chunks")
        return manifest
    if any(path.startswith("memory://") for path in (plan.out, *(file.path for file in plan.files))):
        resources = replace(resources, workers=1)  # nothing else can see these
    check_space(plan, text_bytes(plan.files, plan.columns))
    with lock(Path(plan.stage)):
        return _run_locked(plan, resources, source, cluster, say)


def _run_locked(
    plan: Plan, resources: Resources, source: dict[str, Any], cluster: Cluster | None, say: Callable[[str], None]
) -> dict[str, Any]:
    begin(plan, say)
    n_workers = resources.n_workers(max(len(plan.units()), plan.nchunks), plan.files)
    if (least := resources.least(n_workers, plan.files)) > resources.memory:
        fewer = ", or use fewer workers" if n_workers > 1 else ""
        wanted = math.ceil(least / 1e7) / 100
        say(f"MEMORY {resources.memory / 1e9:g}: {n_workers} worker(s) take {wanted:.2f} GB; give that{fewer}")

    def work_on(kind: str, pending: list[int], weights: list[float]) -> None:
        with _pass(kind, weights, pending) as on_progress:
            if cluster is None:
                run_here(kind, pending, plan, resources, on_progress)
            else:
                run_on_cluster(kind, pending, plan, resources, cluster, on_progress, say)

    try:
        if cluster is None:
            remove_parts(plan)
        if shuffle.load_cuts(plan) is None:
            units = plan.units()
            sizes = [sum(part.file.size / part.count for part in unit) for unit in units]
            pending = shuffle.pending_tasks("scatter", plan)
            if len(pending) < len(units):
                say(f"going on: {len(units) - len(pending)} of {len(units)} parts of the input are read")
            work_on("scatter", pending, sizes)
            check_unchanged(plan.files, say)
            shuffle.save_cuts(plan)
            skipped = shuffle.read_skipped(plan)
            for line in skipped.first:
                say(f"skipped: {line}")
            if skipped.count:
                say(f"skipped, in all: {skipped.count:,} documents")
        totals = shuffle.load_cuts(plan).totals
        check_space(plan, totals.bytes)
        pending = shuffle.pending_tasks("gather", plan)
        if len(pending) < plan.nchunks:
            say(f"going on: {plan.nchunks - len(pending)} of {plan.nchunks} chunks are written")
        work_on("gather", pending, [totals.bytes / plan.nchunks] * plan.nchunks)
        return publish(plan, source, totals)
    finally:
        if cluster is None:
            remove_parts(plan)
