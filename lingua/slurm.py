"""SLURM, seen from within a job: which rank this is, where the ranks meet, scratch folders, requeueing."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zlib
from datetime import datetime

from lingua.errors import UserError

logger = logging.getLogger(__name__)

# Seconds before a job's end at which SLURM sends USR2 (`--signal` in what lingua.stool submits), and by which it may be
# early: it looks once a minute.
WARNING_SECONDS, WARNING_SLACK = 120, 60

# Seconds to wait for an answer of SLURM's commands; a controller under load takes its time.
PATIENCE = 120
# Before a job's end, of which there are no more than WARNING_SECONDS: for an answer, for asking again, in between.
ANSWER_SECONDS, RETRY_SECONDS, PAUSE_SECONDS = 20, 60, 5

# Ports for the ranks to meet at, below those that Linux hands out by itself.
_FIRST_PORT, _N_PORTS = 15_000, 17_000


def in_job() -> bool:
    return "SLURM_JOB_ID" in os.environ


def find_ranks() -> tuple[int, int, int] | None:
    """(rank, local rank, number of ranks) of a process that `srun` started; None for any other.

    Raises UserError where SLURM's variables say no numbers.
    """
    if not in_job() or "SLURM_PROCID" not in os.environ:
        return None
    # A batch script has the variables of a first task, but is none: what it starts by itself runs alone.
    if os.environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in os.environ:
        return None
    # Of the step, where it says so: a step may have fewer tasks than its job.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    names = ("SLURM_PROCID", "SLURM_LOCALID", size)
    for name in names:
        if not os.environ.get(name, "").isdecimal():
            raise UserError(f"{name}: no number in the environment, though SLURM_JOB_ID is set; start with srun")
    rank, local_rank, n_ranks = (int(os.environ[name]) for name in names)
    if rank >= n_ranks:
        raise UserError(f"SLURM_PROCID: rank {rank} of {n_ranks} tasks ({size}); start with srun")
    return rank, local_rank, n_ranks


def has_gpu_of_its_own() -> bool:
    """Whether a task that sees one GPU shares it with no other task, as with `srun --gpus-per-task=1`."""
    gpus, node = os.environ.get("SLURM_GPUS_ON_NODE", ""), os.environ.get("SLURM_NODEID", "0")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", "")
    # Such as "4(x2),3": four on each of two nodes, three on one.
    on_nodes = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    return gpus.isdecimal() and node.isdecimal() and int(node) < len(on_nodes) and on_nodes[int(node)] <= int(gpus)


def first_host(nodes: str) -> str:
    """Of a list in SLURM's notation, such as `node[003-007,12],other[1-2]-ib`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0]) if match else ""


def meeting_point() -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT for the ranks of this step: its first node, and a port that follows from the job.

    Raises UserError without a list of nodes.
    """
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    host = next((first_host(os.environ[name]) for name in names if os.environ.get(name)), "")
    if not host:
        raise UserError("SLURM_JOB_NODELIST: not in the environment, though SLURM_JOB_ID is set; start with srun")
    # Jobs that share a node, steps of one job, and its starts, meet at ports of their own.
    names = ("SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    step = ".".join([os.environ["SLURM_JOB_ID"], *(os.environ.get(name, "0") for name in names)])
    return {"MASTER_ADDR": host, "MASTER_PORT": str(_FIRST_PORT + zlib.crc32(step.encode()) % _N_PORTS)}


def scratch_variables() -> dict[str, str]:
    """Within a job: temporary files go to the job's own scratch folder where the cluster makes one, and Triton's
    compiled kernels to the node's own disk, since a home folder over the network makes all ranks wait.
    """
    if not in_job():
        return {}
    folders = (os.environ.get("SLURM_TMPDIR"), f"/scratch/slurm_tmpdir/{os.environ['SLURM_JOB_ID']}")
    own = next((folder for folder in folders if folder and os.path.isdir(folder) and os.access(folder, os.W_OK)), None)
    kernels = os.path.join(own or tempfile.gettempdir(), f"triton_{os.getuid()}")
    return {"TRITON_CACHE_DIR": kernels} | ({"TMPDIR": own} if own else {})


def use_scratch() -> None:
    """Sets `scratch_variables`, but for what the user has set for Triton."""
    for name, value in scratch_variables().items():
        if name == "TMPDIR":
            os.environ[name] = value
            tempfile.tempdir = None  # found out before
        else:
            os.environ.setdefault(name, value)


def ask_slurm(*command: str, environment: dict[str, str] | None = None, patience: float = PATIENCE) -> str:
    """What one of SLURM's commands prints. Raises OSError, one line, where it fails; TimeoutError without an answer.

    The user's own filters and formats (`SQUEUE_PARTITION`, say) do not count.
    """
    variables = {
        name: value
        for name, value in (os.environ if environment is None else environment).items()
        if not name.startswith(("SQUEUE_", "SINFO_", "SCONTROL_")) and name != "SLURM_TIME_FORMAT"
    }
    # SLURM sends a job's signals to all its processes: the command, which inherits the mask, is not to end by one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=patience, stdin=subprocess.DEVNULL, env=variables
        )
    except FileNotFoundError:
        raise OSError(f"{command[0]}: not on the PATH of this machine") from None
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"{command[0]}: no answer within {patience:g} s") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if result.returncode:
        said = re.sub(rf"({command[0]}: )?(error|fatal): ", "", " ".join(result.stderr.split()))
        raise OSError(f"{command[0]}: {said or f'exit code {result.returncode}'}")
    # Headings, where it is asked for several clusters.
    return "".join(line for line in result.stdout.splitlines(keepends=True) if not line.startswith("CLUSTER:"))


def _ask_until(deadline: float, *command: str) -> str:
    """As `ask_slurm`, again and again where the controller cannot be reached: it may be starting anew."""
    while True:
        try:
            return ask_slurm(*command, patience=ANSWER_SECONDS)
        except OSError as error:
            away = isinstance(error, TimeoutError) or re.search(
                r"unable to contact|timed out|connect", str(error), re.I
            )
            if not away or time.monotonic() >= deadline:
                raise
            logger.warning("%s; asking again", error)
        time.sleep(PAUSE_SECONDS)


def partition_minutes(partition: str | None = None) -> float:
    """The longest time of a job in a partition (None: the default one); infinity where there is no limit.

    Raises UserError for a partition that SLURM does not have, OSError where SLURM does not answer.
    """
    wanted = [] if partition is None else [f"--partition={partition}"]
    listed = ask_slurm("sinfo", "--noheader", *wanted, "--format=%P %l").split("\n")
    limits = [line.split() for line in listed if line.strip()]
    if partition is None:
        limits = [line for line in limits if line[0].endswith("*")] or limits
    if not limits:
        known = ", ".join(sorted(set(ask_slurm("sinfo", "--noheader", "--format=%R").split())))
        raise UserError(f"partition: SLURM has no '{partition}'; it has {known}")

    def minutes(limit: str) -> float:
        if not re.fullmatch(r"[\d:-]+", limit):
            return math.inf
        days, _, clock = limit.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        hours, minute, second = [0] * (3 - len(parts)) + parts
        return int(days or 0) * 1440 + hours * 60 + minute + second / 60

    return min(minutes(limit) for _, limit in limits)


def why_waiting(job: str) -> str:
    """SLURM's word for why a job is not running yet, such as Priority or PartitionTimeLimit; nothing if it is."""
    reasons = ask_slurm("squeue", "--noheader", f"--job={job}", "--states=PENDING", "--format=%r").split("\n")
    return next((reason.strip() for reason in reasons if reason.strip() not in ("", "None")), "")


def requeue(made_progress: bool) -> None:
    """Puts this batch job back into the queue, once all ranks have left their work; SLURM then ends it.

    Call it in one process only. Nothing happens without a batch job, nor for one that is being cancelled. Raises
    OSError where SLURM refuses, and where the job's time is over without `made_progress`: it would go round for ever.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    if shutil.which("scontrol") is None:
        logger.warning("job %s is not requeued, since there is no scontrol here; start it again to go on", job)
        return
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        # One task of an array has the array's number as its own, which would mean all of them.
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    deadline = time.monotonic() + RETRY_SECONDS
    facts = _ask_until(deadline, "scontrol", "show", "job", job)
    # The first line holds the job's name, which may say anything; the others start with their first key.
    fact = {
        key: match[1]
        for key, line in {
            "JobState": r"JobState=(\S+)",
            "BatchFlag": r"Requeue=\d+ .*BatchFlag=(\d)",
            "EndTime": r"StartTime=\S+ EndTime=(\S+)",
            "PreemptTime": r"PreemptEligibleTime=\S+ PreemptTime=(\S+)",
        }.items()
        if (match := re.search(rf"^   {line}", facts, re.MULTILINE))
    }
    if fact.get("BatchFlag") != "1":
        logger.info("job %s is no batch job, so it is not requeued; start again to go on", job)
    elif fact.get("JobState") not in ("RUNNING", "SUSPENDED"):
        logger.info("job %s is %s, so it is not requeued", job, fact.get("JobState", "gone").lower())
    elif not made_progress and fact.get("PreemptTime") in (None, "None") and _ends_soon(fact.get("EndTime", "")):
        raise OSError(
            f"job {job} has reached its time limit without getting on (no step done), so it is not requeued; "
            "give it more time"
        )
    else:
        logger.info("requeueing job %s", job)
        try:
            _ask_until(deadline, "scontrol", "requeue", job)
        except OSError as error:
            if "pending" not in str(error):  # it is back already: the answer was lost when it was asked for first
                raise


def _ends_soon(end: str) -> bool:
    try:
        return datetime.fromisoformat(end).timestamp() - time.time() <= WARNING_SECONDS + WARNING_SLACK
    except ValueError:  # Unknown
        return False
