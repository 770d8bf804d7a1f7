"""Numbers: metrics.jsonl and wandb, speed, memory, power."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from lingua.args import looks_secret, refuse_secrets
from lingua.config import LoggingArgs
from lingua.errors import UserError

logger = logging.getLogger(__name__)

# What stays in memory while metrics.jsonl cannot be written.
MAX_KEPT_LINES = 100_000


def validate_logging_args(args: LoggingArgs) -> None:
    """Raises UserError, one line that names the key."""
    if args.freq < 1:
        raise UserError(f"logging.freq: {args.freq} is too small, it must be 1 or more")
    if args.acc_freq is not None and args.acc_freq < 1:
        raise UserError(f"logging.acc_freq: {args.acc_freq} is too small, it must be 1 or more, or null")
    if args.wandb is not None:
        validate_wandb_args(args.wandb, "logging.wandb")


def validate_wandb_args(arguments: Any, key: str) -> None:
    """Raises UserError, one line that names `key` or what is under it, for what wandb.init does not take."""
    if not isinstance(arguments, dict):
        raise UserError(f"{key}: '{arguments}' where a section of wandb.init's arguments is wanted")
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"{key}: wandb does not import ({error}); install it, or set null") from None
    known = [name for name in inspect.signature(wandb.init).parameters if name != "config"]
    for name in arguments:
        if name not in known:
            raise UserError(f"{key}.{name}: wandb.init has no such argument; it has {', '.join(known)}")
    refuse_secrets(arguments, key)


class MetricsLogger:
    """Appends one JSON object a line to `file`, and sends the same to a wandb run where there is one.

    Lines that cannot be written, on a full disk, say, are kept and written as soon as that works again.
    """

    def __init__(self, file: Path, wandb_run: Any = None):
        self._path = file
        self._file = open(file, "ab", buffering=0)
        self._kept: deque[bytes] = deque(maxlen=MAX_KEPT_LINES)
        self._wandb = wandb_run

    def log(self, metrics: dict[str, Any]) -> None:
        stamped = {**metrics, "created_at": datetime.now(timezone.utc).isoformat()}
        failing = len(self._kept) > 0
        self._kept.append(json.dumps({name: _or_null(value) for name, value in stamped.items()}).encode() + b"\n")
        try:
            self._write_kept()
        except OSError as error:
            if not failing:
                logger.error("%s cannot be written (%s); its lines are kept until it can be", self._path, error)
        # wandb keeps one value of each name a step: that of the whole step, not of a batch within the next.
        if self._wandb is not None and metrics["acc_step"] == 0:
            self._wandb.log(metrics, step=metrics["global_step"])

    def log_to_wandb(self, metrics: dict[str, Any], step: int) -> None:
        """What has its own file, to the wandb run where there is one."""
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def _write_kept(self) -> None:
        if not self._path.exists() or not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            anew = open(self._path, "ab", buffering=0)
            self._file.close()
            self._file = anew
            logger.error("%s was deleted; it is begun anew", self._path)
        content, end = b"".join(self._kept), os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError:
            with contextlib.suppress(OSError):  # no line in part
                self._file.truncate(end)
            raise
        self._kept.clear()

    def close(self) -> None:
        """Raises OSError where lines are left that cannot be written."""
        try:
            if self._kept:
                self._write_kept()
        except OSError as error:
            raise OSError(f"{self._path}: the last {len(self._kept)} lines are not written ({error})") from None
        finally:
            self._file.close()


def _or_null(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def start_wandb(folder: Path, arguments: dict[str, Any], config: dict[str, Any], key: str = "logging.wandb") -> Any:
    """A wandb run whose files lie in `folder`, and which goes on as the same one when it is started there again.

    `arguments`: of wandb.init, config section `key`. Raises UserError where wandb refuses to start.
    """
    import wandb

    id_file = folder / "wandb_run_id"
    run_id = id_file.read_text() if id_file.exists() else uuid.uuid4().hex[:8]
    defaults = {"dir": str(folder), "id": run_id, "resume": "allow"}
    try:
        with _without_slurm_secrets():
            run = wandb.init(**{**defaults, **arguments}, config=config)
    except (wandb.Error, TypeError, ValueError) as error:
        raise UserError(f"{key}: wandb does not start ({error})") from None
    beside = folder / "wandb_run_id.tmp"
    beside.write_text(run_id)
    os.replace(beside, id_file)
    return run


@contextlib.contextmanager
def _without_slurm_secrets() -> Iterator[None]:
    """wandb saves all of SLURM's variables with a run, and one of them can be a token."""
    hidden = {
        name: os.environ.pop(name)
        for name, value in list(os.environ.items())
        if name.startswith("SLURM_") and looks_secret(name, value)
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def drop_metrics_after(file: Path, step: int, keep: bool = False) -> int:
    """Takes lines past the end of `step`, and one cut off by a kill, out of a metrics file before all that runs again.

    Returns how many. The file is replaced whole. `keep`: append them to `FILE.passed_over`.
    """
    if not file.exists():
        return 0
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _place_of(line) <= (step, 0)]
    if len(kept) < len(lines):
        if keep:
            with open(file.with_name(file.name + ".passed_over"), "ab") as passed_over:
                passed_over.writelines(line for line in lines if _place_of(line) > (step, 0))
        beside = file.with_name(file.name + ".tmp")
        beside.write_bytes(b"".join(kept))
        os.replace(beside, file)
    return len(lines) - len(kept)


def _place_of(line: bytes) -> tuple[float, float]:
    """Steps done, and batches of the next one."""
    try:
        metrics = json.loads(line)
        step = metrics["global_step"]
        # Of a checkpoint without a step's name, evaluated into this run's folder: it belongs to no step.
        return (-1, 0) if step is None else (step, metrics.get("acc_step", 0))
    except (ValueError, KeyError, TypeError):
        return float("inf"), 0


# --- the machine ---------------------------------------------------------------------------------------------------


def memory_metrics(device: torch.device) -> dict[str, float]:
    """The resident memory of this process now, and the peak of the GPU's, if it has one, since the last call. GiB and
    %.
    """
    gib = 1024**3
    resident = psutil.Process().memory_info().rss
    of_the_process = {
        "memory/rss_gib": resident / gib,
        "memory/rss_pct": 100 * resident / psutil.virtual_memory().total,
    }
    if device.type != "cuda":
        return of_the_process
    total = torch.cuda.get_device_properties(device).total_memory
    stats = torch.cuda.memory_stats(device)
    active, reserved = stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"]
    torch.cuda.reset_peak_memory_stats(device)
    return of_the_process | {
        "memory/max_active_gib": active / gib,
        "memory/max_active_pct": 100 * active / total,
        "memory/max_reserved_gib": reserved / gib,
        "memory/max_reserved_pct": 100 * reserved / total,
        "memory/num_alloc_retries": stats["num_alloc_retries"],
        "memory/num_ooms": stats["num_ooms"],
    }


def power_draw(device: torch.device) -> float | None:
    """Watts that the GPU draws, or None where nothing tells."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except (RuntimeError, ModuleNotFoundError):  # no driver library for it, or no permission
        return None


class Stopwatch:
    """Time per step since the last `lap`, how much of it went by waiting for data, and how much is left."""

    def __init__(self) -> None:
        self._total_time = 0.0
        self._total_steps = 0
        self.restart_lap()

    def restart_lap(self) -> None:
        """Begins a lap now; what passed since the last one (a checkpoint, say) counts for no step."""
        self._lap_start = time.perf_counter()
        self._steps = 0
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def count_step(self) -> None:
        self._steps += 1

    def lap(self, tokens_per_step: int, steps_left: int) -> dict[str, float]:
        """Means since the lap began, which ends it: tokens per second, seconds a step, seconds a step waiting for data.

        Also the seconds that `steps_left` more take, at the pace of all laps so far.
        """
        passed = time.perf_counter() - self._lap_start
        steps = max(self._steps, 1)
        self._total_time += passed
        self._total_steps += steps
        metrics = {
            "speed/wps": tokens_per_step * steps / passed,
            "speed/curr_iter_time": passed / steps,
            "speed/data_load_time": self._waited / steps,
            "speed/time_left": self._total_time / self._total_steps * steps_left,
        }
        self.restart_lap()
        return metrics


def format_duration(seconds: float) -> str:
    """Such as 4:05 or 2:10:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
