"""A real SLURM of two nodes on this machine: Debian's slurm-wlm and munge, started in a temporary folder as root.

Nothing of the machine's own is touched: configuration, sockets, keys and logs lie in that folder, ports are free ones,
and the nodes' names are known only within the daemons' own mount namespace.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.helpers.training import PATIENCE, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")

CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job starts again when its credential is gone: after some seconds instead of two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Jobs of one test may run beside each other, whatever number of cores there is.
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=4 Gres=gpu:2
PartitionName=learn Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2
"""

# Seconds that SLURM gives a cancelled job between TERM and KILL.
KILL_WAIT = 30

# Files that are there on any machine stand in for GPUs, of which SLURM wants only that they are.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def why_not() -> str | None:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; apt install slurm-wlm munge"
    return None if os.geteuid() == 0 else "SLURM's daemons are started as root, and this is another user"


def _free_ports() -> list[int]:
    """One for the controller, and two neighbours for the nodes."""
    while True:
        with ExitStack() as stack:
            taken = [stack.enter_context(socket.socket()) for _ in range(3)]
            try:
                taken[0].bind(("127.0.0.1", 0))
                taken[1].bind(("127.0.0.1", 0))
                first = taken[1].getsockname()[1]
                taken[2].bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return [taken[0].getsockname()[1], first, first + 1]


class Cluster:
    """SLURM's commands need `SLURM_CONF`, which `variables` holds."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        munge, host = self.folder / "munge", socket.gethostname().split(".")[0]
        munge.mkdir(mode=0o700)
        (self.folder / "state").mkdir()
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        config = CONFIG.format(host=host, folder=self.folder, ports=_free_ports(), kill_wait=KILL_WAIT)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(GPUS)
        names = f"{Path('/etc/hosts').read_text()}\n127.0.0.1 n1 n2\n"
        (self.folder / "hosts").write_text(names)
        places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", "--force", *(f"--{option}={munge / name}" for option, name in places.items()))
        self.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            with_names = 'mount --bind "$0" /etc/hosts && exec slurmd -N "$1"'
            self.run("unshare", "--mount", "sh", "-c", with_names, str(self.folder / "hosts"), node)
        nodes = ("sinfo", "--noheader", "--Node", "--format=%N %t")
        wait_until(lambda: set(self.run(*nodes).splitlines()) == {"n1 idle", "n2 idle"}, pause=0.1)

    def stop(self) -> None:
        # Jobs end before the daemons do, which alone know the jobs' processes.
        in_queue, deadline = True, time.monotonic() + 2 * KILL_WAIT
        subprocess.run(["scancel", "--user=root"], env=self.environment(), check=False)
        while in_queue and time.monotonic() < deadline:
            time.sleep(0.2)
            asked = subprocess.run(["squeue", "--noheader"], env=self.environment(), capture_output=True, check=False)
            in_queue = asked.returncode == 0 and asked.stdout
        for file in [*self.folder.glob("slurm*.pid"), self.folder / "munge" / "pid"]:
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGKILL)

    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.variables}

    def run(self, *command: object) -> str:
        """What a command prints. Fails where it does."""
        result = subprocess.run(
            list(map(str, command)), env=self.environment(), capture_output=True, text=True, timeout=PATIENCE
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, less its name: `JobState`, `Restarts` ..."""
        lines = self.run("scontrol", "show", "job", number).splitlines()[1:]
        return dict(fact.split("=", 1) for line in lines for fact in line.split() if "=" in fact)

    def wait(self, number: str, *states: str) -> None:
        """Until a job is in one of these states; for its end, whatever that is, without any."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        deadline = time.monotonic() + PATIENCE
        while (state := self.job(number)["JobState"]) not in (states or ends):
            assert time.monotonic() < deadline, f"job {number} is still {state}"
            time.sleep(0.2)


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Skips the test where this cannot be; in CI that is a failure."""
    reason = why_not()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no SLURM: {reason}")
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
