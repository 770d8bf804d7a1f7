"""What the tests of training share: a small corpus, a small config, and ways to run training.

What ends by itself runs in the test's process (`run_in_process`). Importing torch takes seconds, so processes are
mostly forked from a server that has done it (`Training`); `run_command` starts a command from nothing. Everything
computes with one thread.
"""

import contextlib
import importlib
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml

from tests.helpers.processes import PROCESSES

REPOSITORY = Path(__file__).parents[2]
# Far more than anything takes here: it ends what hangs, and is no measure of speed.
PATIENCE = 240

# Everything in metrics.jsonl that does not tell of times and of this machine.
COMPUTED = ("global_step", "acc_step", "loss/out", "optim/grad_norm", "optim/value_grad_norm", "optim/lr")
COMPUTED += ("optim/value_lr", "optim/total_tokens")

TRAIN = "apps.main.train"


# --- what to train, and on what -----------------------------------------------------------------------------------


def write_corpus(root: Path, n_documents: int = 60) -> Path:
    """Two sources, `alpha` of three chunk files and `beta` of two, of random words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 8))) for _ in range(200)]
    for source, n_files, key in (("alpha", 3, "text"), ("beta", 2, "content")):
        (root / source).mkdir(parents=True)
        for number in range(n_files):
            documents = [" ".join(rng.choices(words, k=rng.randint(3, 60))) for _ in range(n_documents)]
            lines = "".join(json.dumps({key: document}) + "\n" for document in documents)
            (root / source / f"{source}.chunk.{number:02d}.jsonl").write_text(lines)
    return root


def tiny_config(corpus: Path, dump_dir: Path) -> dict[str, Any]:
    """Three blocks, memories in the last two with one table of 256 slots; two batches a step."""
    return {
        "dump_dir": str(dump_dir),
        "steps": 60,
        "grad_acc_steps": 2,
        "data": {
            "root_dir": str(corpus),
            "sources": {"alpha": 2.0, "beta": 1.0},
            "batch_size": 2,
            "seq_len": 32,
            "prefetch_size": 8,
        },
        "optim": {"lr": 0.01, "warmup": 5},
        "model": {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 2,
            "multiple_of": 32,
            "productkey_args": {
                "is_enabled": True,
                "layers": "1,2",
                "mem_n_keys": 16,
                "mem_heads": 2,
                "mem_knn": 4,
                "mem_k_dim": 16,
            },
        },
        "distributed": {"model_dtype": "fp32"},
        "checkpoint": {"dump": {"every": 5}, "eval": {"every": 0}},
        "logging": {"freq": 1},
    }


def write_config(file: Path, config: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(config))
    return file


# --- processes ----------------------------------------------------------------------------------------------------


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's variables without those that a launcher sets, with one thread, and `variables`."""
    launchers = ("SLURM_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "WANDB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def _train_here(argv: list[str], environment: dict[str, str], logs: str, module: str = TRAIN) -> None:
    """What a forked process does: the same as `python -m module`."""
    for stream, name in ((1, "out"), (2, "err")):
        file = os.open(f"{logs}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    # As in a terminal, also where the tests run in the background of a shell, which then ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None  # what it has found out before; TMPDIR may say otherwise now

    import torch

    from lingua.launch import run_main
    from tests.helpers import faults

    torch.set_num_threads(1)
    if "HOLD" in environment:
        _wait_at(Path(environment["HOLD"]))
    if "FAULT" in environment:
        faults.inject(environment["FAULT"])
    sys.argv = [module, *argv]
    run_main(importlib.import_module(module).main)


class Hold:
    """Where a training process stops, as if the disk stood still there: `Training(..., **hold.variables)`.

    It waits before it opens or renames a file, if `pattern` is found in "open PATH" or "os.rename PATH".
    """

    def __init__(self, file: Path, pattern: str):
        self.file = file
        self.variables = {"HOLD": str(file)}
        file.write_text(pattern)

    def is_reached(self) -> bool:
        return _reached(self.file).exists()

    def release(self) -> None:
        self.file.unlink()


def _reached(hold: Path) -> Path:
    return hold.with_suffix(".reached")


def _wait_at(hold: Path) -> None:
    """Stops this process's threads at the hold, for as long as its file is there."""
    pattern = re.compile(hold.read_text())

    def look(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename") and pattern.search(f"{event} {arguments[0]}"):
            _reached(hold).touch()
            while hold.exists():
                time.sleep(0.002)

    sys.addaudithook(look)


@dataclass
class Result:
    code: int
    out: str
    err: str

    def the_error(self) -> str:
        """The one line of an error on stderr. Fails for any other end."""
        assert self.code != 0, f"it should have failed; stdout ends:\n{self.out[-500:]}"
        lines = self.err.splitlines()
        assert len(lines) == 1, f"wanted one line on stderr, found {len(lines)}:\n{self.err}"
        assert lines[0].startswith("error: "), lines[0]
        return lines[0]

    def ok(self) -> "Result":
        assert self.code == 0, f"exit code {self.code}; stderr:\n{self.err}\nstdout ends:\n{self.out[-2000:]}"
        return self


class Training:
    """A process of training, or of another module's `main`, forked from the server."""

    _number = 0

    def __init__(self, argv: list[object], logs: Path, module: str = TRAIN, **variables: str):
        Training._number += 1
        self._logs = f"{logs / 'process'}.{Training._number}"
        arguments = [str(argument) for argument in argv]
        environment = clean_environment(**{"TMPDIR": str(logs), **variables})
        self.process = PROCESSES.Process(
            target=_train_here, args=(arguments, environment, self._logs, module), daemon=True
        )
        self.process.start()

    def finish(self) -> Result:
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(
                f"no end after {PATIENCE} s; stdout:\n{self._read('out')}\nstderr:\n{self._read('err')}"
            )
        return Result(self.process.exitcode, self._read("out"), self._read("err"))

    def out(self) -> str:
        """What it has printed so far."""
        return self._read("out")

    def err(self) -> str:
        """The same of stderr."""
        return self._read("err")

    def _read(self, name: str) -> str:
        file = Path(f"{self._logs}.{name}")
        return file.read_text() if file.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal, where the process is still there."""
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)

    def wait_for(self, happened: Callable[[], object], pause: float = 0.02) -> bool:
        """Waits until `happened()` or the process's end; returns whether it is still there."""
        wait_until(lambda: self.process.exitcode is not None or happened(), pause)
        return self.process.exitcode is None


def run_in_process(argv: list[object], logs: Path, module: str = TRAIN, **variables: str) -> Result:
    """What `Training(argv, logs, module, **variables).finish()` gives, without a process: one rank, until it ends.

    Environment, streams and log handlers are as before when it returns.
    """
    import torch.distributed as dist

    from lingua.launch import run_main

    assert not dist.is_initialized(), "run_main would end this process"
    environment = clean_environment(**{"TMPDIR": str(logs), **variables})
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    code = 0
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(tempfile.TemporaryFile("w+", buffering=1)) for _ in range(2)]
        for fd, stream in enumerate(streams, start=1):
            saved = os.dup(fd)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, fd)
            os.dup2(stream.fileno(), fd)
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        stack.enter_context(mock.patch.dict(os.environ, environment, clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", [module, *map(str, argv)]))
        stack.enter_context(mock.patch.object(tempfile, "tempdir", None))
        try:
            run_main(importlib.import_module(module).main)
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            root.handlers, root.level = handlers, level
            logging.captureWarnings(False)
        for stream in streams:
            stream.seek(0)
        return Result(code, *(stream.read() for stream in streams))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(n_ranks: int, argv: list[object], logs: Path, **variables: str) -> list[Training]:
    """What torchrun starts, less torchrun."""
    launch = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Training(argv, logs, RANK=str(rank), LOCAL_RANK=str(rank), **launch, **variables) for rank in range(n_ranks)
    ]


def start_command(arguments: list[object], **variables: str) -> subprocess.Popen:
    """`python -m arguments...`, from the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=REPOSITORY,
        env=clean_environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish_command(process: subprocess.Popen) -> Result:
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {PATIENCE} s; stdout:\n{out}\nstderr:\n{err}") from None
    return Result(process.returncode, out, err)


def run_command(arguments: list[object], **variables: str) -> Result:
    return finish_command(start_command(arguments, **variables))


def torchrun(n_ranks: int, argv: list[object], module: str = TRAIN) -> list[object]:
    """Arguments for `start_command`. Standalone: a free port of its own, whatever else runs on the machine."""
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", n_ranks, "-m", module, *argv]


def wait_until(happened: Callable[[], object], pause: float = 0.02) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(pause)


# --- what a run left -----------------------------------------------------------------------------------------------


def read_metrics(dump_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dump_dir / "metrics.jsonl").read_text().splitlines()]


def read_losses(dump_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line, in the order of the file."""
    return [(line["global_step"], line["loss/out"]) for line in read_metrics(dump_dir)]


def computed(dump_dir: Path) -> list[dict[str, Any]]:
    """All lines, less what tells of times and of this machine."""
    return [{key: line[key] for key in COMPUTED} for line in read_metrics(dump_dir)]


def last_step(dump_dir: Path) -> int:
    """The step of the last whole line of a metrics file that may be being written."""
    file = dump_dir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["global_step"] if whole else 0


def list_steps(dump_dir: Path) -> list[int]:
    """The checkpoints. Fails for anything else in their folder."""
    names = sorted(os.listdir(dump_dir / "checkpoints"))
    assert all(len(name) == 10 and name.isdigit() for name in names), names
    return [int(name) for name in names]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, size: int | str, options: str = "") -> Iterator[None]:
    """A file system of its own at `path`, in memory."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(path)]
    mounted = (
        os.geteuid() == 0 and shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    )
    if not mounted:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("mounting a file system takes root, and works not here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def bytes_of(folder: Path) -> int:
    """As a file system of blocks of 4 KiB counts them."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())
