"""Training, top to bottom: batch -> forward -> backward -> clip, step -> metrics -> checkpoint, evaluation, signals.

    python -m apps.main.train config=apps/main/configs/debug.yaml [key=value ...]
    torchrun --nproc-per-node 8 -m apps.main.train config=...

Start the same command again and it goes on from the newest whole checkpoint in dump_dir.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import math
import os
import platform
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.main.config import TrainArgs, checkpoint_folder
from lingua.launch import check_command_line

if __name__ == "__main__":
    check_command_line(TrainArgs)

import numpy as np
import torch
from torch import nn

from apps.main.fits import check_memory
from apps.main.transformer import (
    LMTransformer,
    count_flops_per_token,
    count_parameters,
    validate_model_args,
)
from lingua import slurm
from lingua.args import check_path, check_writable, from_dict, looks_secret, parse_args, to_dict, to_yaml, write_whole
from lingua.checkpoint import (
    CONFIG_FILE,
    CheckpointManager,
    load_model,
    load_training,
    read_json,
    read_train_state,
    refuse_damaged_distributed,
    refuse_parent,
)
from lingua.data import (
    build_dataloader_from_args,
    check_state_fits,
    count_skipped,
    describe_shared_sources,
    init_dataloader_state_from_args,
    shared_sources,
    validate_data_args,
)
from lingua.distributed import (
    DTYPES,
    World,
    broadcast_object,
    data_rank,
    find_ranks,
    find_world,
    gather_objects,
    process_group,
    raise_on_all_ranks,
    reduce_sum,
    steps_to_next_check,
    validate_distributed_args,
)
from lingua.errors import UserError
from lingua.flops import known_peak
from lingua.heartbeat import WAITING_FOR_RANKS, Watch
from lingua.launch import StopSignal, oom_as_user_error, run_main, set_environment, validate_environment
from lingua.logger import LOCK_FILE, add_log_file, claim, init_logger, remove_log_file
from lingua.memory_use import MemoryUse
from lingua.metrics import (
    MetricsLogger,
    Stopwatch,
    drop_metrics_after,
    format_duration,
    memory_metrics,
    power_draw,
    start_wandb,
    validate_logging_args,
)
from lingua.nonfinite import Guard, check_weights, refuse_optimizer, validate_guard_args
from lingua.optim import (
    OptimArgs,
    build_optimizer,
    find_jump,
    find_oddities,
    make_state,
    set_schedule_step,
    split_parameters,
    validate_optim_args,
)
from lingua.parallelize import local_bytes, parallelize, reshard, splits_tables_by_rows, validate_parallelism
from lingua.probe import append_probe, drop_probes_after, probe
from lingua.profiling import Profiler, Workload, validate_profiling_args
from lingua.tokenizer import build_tokenizer
from lingua.training_step import TrainingStep

logger = logging.getLogger(__name__)

Batch = tuple[np.ndarray, dict[str, Any]]  # and the loader's state after it

# Seconds for the last of a stopped run's metrics to reach Weights & Biases.
PATIENCE_WITH_WANDB = 60

# Of distributed.timeout, after which a loader that does nothing is given up.
PATIENCE_WITH_LOADER = 0.8

# On Ctrl-C, the last step is saved where that takes no longer: torchrun ends its ranks after 30 s. Before a checkpoint
# has been made, its time is estimated from its bytes, at SAVED_A_SECOND.
INTERRUPT_SECONDS, SAVED_A_SECOND = 20, 2**29

# Bytes that dump_dir must have free beside what checkpoints take; logs grow slowly.
ROOM_FOR_LOGS = 2**16


# --- before anything is written ------------------------------------------------------------------------------------


def validate_train_args(args: TrainArgs, world: World) -> None:
    """Checks the whole config and fills in what follows from other keys: vocabulary, sequence length, dp_replicate.

    Raises UserError, one line that names the key. Reads the tokenizer and folder listings, writes nothing.
    """
    if not args.dump_dir:
        raise UserError("dump_dir: not set; name the folder for this run's checkpoints and logs")
    for name in ("grad_acc_steps", "gc_collect_freq", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be 1 or more")
    if args.seed < 0:
        raise UserError(f"seed: {args.seed} is negative, it must be 0 or more")
    for key, path in (
        ("dump_dir", args.dump_dir),
        ("data.root_dir", args.data.root_dir),
        ("data.tokenizer.path", args.data.tokenizer.path),
        ("checkpoint.path", args.checkpoint.path),
        ("profiling.trace_folder", args.profiling.trace_folder),
        ("checkpoint.init_ckpt_path", args.checkpoint.init_ckpt_path),
    ):
        check_path(key, path)
    if args.probe_freq is not None and args.probe_freq < 1:
        raise UserError(f"probe_freq: {args.probe_freq} is too small, it must be 1 or more, or null")
    validate_distributed_args(args.distributed, world)
    validate_data_args(args.data)
    if args.data.n_views < 2:
        raise UserError(f"data.n_views: {args.data.n_views}; training needs 2, the input and the target")
    validate_optim_args(args.optim)
    validate_logging_args(args.logging)
    validate_guard_args(args.guard)
    validate_profiling_args(args.profiling, args.steps)
    n_words = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path).n_words
    if args.model.vocab_size == -1:
        args.model.vocab_size = n_words
    if args.model.vocab_size < n_words:
        raise UserError(f"model.vocab_size: {args.model.vocab_size} is less than the tokenizer's {n_words} words")
    validate_model_and_layout(args, world)
    if args.checkpoint.continue_training_from_init and args.checkpoint.init_ckpt_path is None:
        raise UserError("checkpoint.continue_training_from_init: set, but there is no checkpoint.init_ckpt_path")
    if args.checkpoint.init_ckpt_path is not None:
        if not Path(args.checkpoint.init_ckpt_path).exists():
            raise UserError(f"checkpoint.init_ckpt_path: no checkpoint at '{args.checkpoint.init_ckpt_path}'")
        try:
            refuse_parent(Path(args.checkpoint.init_ckpt_path))
        except ValueError as error:
            raise UserError(f"checkpoint.init_ckpt_path: {error}") from None
    if args.eval is not None or args.async_eval_gpus is not None:
        from apps.main.train_eval import validate_evaluation

        validate_evaluation(args)


def validate_model_and_layout(args: TrainArgs, world: World) -> None:
    """What needs neither data nor a tokenizer, of a config whose `distributed` and `model.vocab_size` are checked."""
    args.model.max_seqlen = args.data.seq_len
    validate_model_args(args.model)
    validate_parallelism(args.distributed, args.model, args.model.vocab_size, args.data.seq_len, world)
    validate_value_update(args, world)


def validate_value_update(args: TrainArgs, world: World) -> None:
    """Raises UserError, one line that names the key, where sparse updates do not go with the layout."""
    if args.distributed.values_device == "cpu" and args.optim.value_update != "sparse":
        raise UserError(
            f"distributed.values_device: cpu cannot be combined with optim.value_update={args.optim.value_update}, "
            "which makes a gradient of the table's size; set optim.value_update=sparse"
        )
    if args.optim.value_update == "sparse" and splits_tables_by_rows(args.distributed, world):
        raise UserError(
            "optim.value_update: sparse cannot be combined with distributed.fsdp_type=full_shard, which splits value "
            "tables by rows; set distributed.memory_parallel_size, or no_shard"
        )
    if args.optim.value_rounding == "stochastic" and args.distributed.model_dtype != "bf16":
        raise UserError(
            "optim.value_rounding: stochastic cannot be combined with "
            f"distributed.model_dtype={args.distributed.model_dtype}, with which value tables are in fp32; set "
            "model_dtype=bf16, or nearest"
        )


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of AdamW's two moments; no optimizer keeps more."""
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


# --- building ------------------------------------------------------------------------------------------------------


def build_model(args: TrainArgs) -> LMTransformer:
    """The model without memory behind it (meta device): parameters in fp32, value tables in bf16 where computing is."""
    with torch.device("meta"):
        model = LMTransformer(args.model)
    if args.distributed.model_dtype == "bf16":
        for memory in model.memories().values():
            for table in memory.tables:
                table.to(torch.bfloat16)
    return model


def set_torch_options(args: TrainArgs) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.distributed.matmul_allow_tf32 else "highest")
    torch.autograd.set_detect_anomaly(args.distributed.detect_anomaly)


def log_start(args: TrainArgs, world: World, model: LMTransformer) -> None:
    dense, memory = count_parameters(model)
    threads = torch.get_num_threads()
    held = f"{local_bytes(model.parameters()) / 2**20:,.0f} MiB on this rank"
    if memory and args.distributed.values_device == "cpu":
        tables = split_parameters(model)["values"]
        held += f", {local_bytes(tables) / 2**20:,.0f} of them for values, in the CPU's memory with their moments"
        held += f" ({threads} threads)"
    logger.info("parameters: %s dense, %s in memory values; %s", f"{dense:,}", f"{memory:,}", held)
    logger.info(
        "%s rank(s) on %s (%s), computing in %s; torch %s, Python %s",
        world.size,
        torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"CPU, {threads} threads",
        platform.node(),
        args.distributed.model_dtype,
        torch.__version__,
        platform.python_version(),
    )
    launch = ("OMP_", "MKL_", "NCCL_", "TORCH", "CUDA_", "SLURM_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
    shown = sorted(
        f"{name}={value}"
        for name, value in os.environ.items()
        if name.startswith(launch) and not looks_secret(name, value)
    )
    logger.info("environment: %s", " ".join(shown))


# --- evaluation ----------------------------------------------------------------------------------------------------


def evaluate(run: Run, stop_signal: StopSignal, missing_only: bool = False) -> bool:
    """Evaluates the checkpoint of the step that was just done, where section `eval` asks for it; with `missing_only`
    only where its results are not there. Returns whether it did. All ranks call it together.
    """
    if run.args.eval is None:
        return False
    from apps.main import train_eval

    if missing_only and not train_eval.lacks_evaluation(run):
        return False
    train_eval.evaluate(run, stop_signal)
    return True


def find_awaited(args: TrainArgs, steps: list[int]) -> set[int]:
    """Of `steps`, those whose checkpoint a submitted evaluation has still to read."""
    if not (Path(args.dump_dir) / "evals").is_dir():
        return set()
    from apps.main import train_eval

    return train_eval.find_awaited(args, steps)


# --- training ------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What an optimizer step leaves to be logged; tensors, so that nothing waits for a GPU before a log line is due."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    value_grad_norm: torch.Tensor | None


class Run:
    """A run's moving parts, and how far it is: `step` optimizer steps done, the loader at `loader_state`."""

    def __init__(self, args: TrainArgs, world: World, watch: Watch):
        self.args, self.world, self.watch = args, world, watch
        self.step, self.total_tokens = 0, 0
        self.evaluation_stopped = False
        self.interrupted = False
        # Batches of the next steps, and the error that comes after them.
        self.fetched: deque[list[Batch]] = deque()
        self.data_error: UserError | OSError | None = None
        self.data_rank, self.data_ranks = data_rank(args.distributed, world)
        self.loader_state = init_dataloader_state_from_args(args.data, self.data_rank, self.data_ranks)
        self.stopwatch = Stopwatch()
        self.metrics: MetricsLogger | None = None
        # The ranks of a tensor-parallel group are at the same place in the data: the first of them writes it down.
        writes = world.rank % args.distributed.tp_size == 0
        self.checkpoints = CheckpointManager(
            args.checkpoint,
            checkpoint_folder(args),
            world.rank,
            self.data_rank if writes else None,
            args.distributed.timeout,
            Path(args.dump_dir),
            functools.partial(find_awaited, args),
        )
        self.model = build_model(args)
        self.tokens_per_step = args.grad_acc_steps * args.data.batch_size * args.data.seq_len
        self.flops_per_token = count_flops_per_token(self.model, args.data.seq_len)
        self.reducer = parallelize(self.model, args.distributed, world)
        self.guard = Guard(args.guard, self.model, world)
        # Of steps that other ranks may still report as bad, by step.
        self.latest_batches: dict[int, list[Batch]] = {}
        dtype = DTYPES[args.distributed.model_dtype]
        # Of one rank: those of a tensor-parallel group work on the same tokens.
        workload = Workload(self.flops_per_token, self.tokens_per_step / args.distributed.tp_size, dtype)
        self.profiler = Profiler(args.profiling, args.dump_dir, world.rank, world.size, world.device, workload)
        self.peak_flops = known_peak(world.device, dtype)

    def find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, if any. All ranks call it together."""
        folder = self.checkpoints.latest()
        if folder is None and self.args.checkpoint.continue_training_from_init:
            folder = Path(self.args.checkpoint.init_ckpt_path)
            refuse_damaged_distributed(folder)
        return folder

    def go_to(self, folder: Path | None) -> None:
        """Sets step and loader to where training goes on."""
        if folder is not None:
            train_state = read_train_state(folder, self.data_rank, self.data_ranks)
            self.step, self.loader_state = train_state["step"], train_state["data_loader_state"]
            # Other ranks may have read more tokens a step than these do.
            self.total_tokens = train_state.get("total_tokens", self.step * self.tokens_per_step * self.data_ranks)
            self.slots_read = train_state.get("memory_use")
            self.guard.restore(train_state.get("guard", {}))
            check_state_fits(self.args.data, self.loader_state)
            self.checkpoints.saved = self.step

    def materialize(self, resume_from: Path | None) -> None:
        """Gives the model its memory and weights, and makes the optimizer."""
        args, device = self.args, self.world.device
        self.model.to_empty(device=device)
        self.model.init_weights()
        self.optimizer, self.scheduler = build_optimizer(self.model, args.optim, args.steps, args.seed)
        model_dtype = args.distributed.model_dtype
        self.training_step = TrainingStep(self.model, self.reducer, self.optimizer, model_dtype, device)
        with raise_on_all_ranks():
            refuse_optimizer(self.optimizer)
        if resume_from is not None:
            make_state(self.optimizer)
            load_training(resume_from, self.model, self.optimizer, compared=True)
            set_schedule_step(self.optimizer, self.scheduler, self.step)
        elif args.checkpoint.init_ckpt_path is not None:
            try:
                load_model(Path(args.checkpoint.init_ckpt_path), self.model)
            except ValueError as error:
                raise UserError(f"checkpoint.init_ckpt_path: {error}") from None
            logger.info("weights from %s", args.checkpoint.init_ckpt_path)
        self.memory_use = MemoryUse(self.model.memories() if args.logging.memory_use else {})
        if resume_from is not None and not self.memory_use.load(broadcast_object(self.slots_read)):
            logger.warning("%s does not tell which memory slots were read: counted from here on", resume_from)

    def fetch(self, loader: Iterator[Batch], n_steps: int) -> None:
        """Makes sure that the batches of the next `n_steps` are in `fetched`, up to an error (`data_error`)."""
        self.watch.at("waiting for data", self.step + 1)
        with self.stopwatch.waiting_for_data():
            try:
                while len(self.fetched) < n_steps and self.data_error is None:
                    self.fetched.append([next(loader) for _ in range(self.args.grad_acc_steps)])
            except (UserError, OSError) as error:
                self.data_error = error

    def logs(self, step: int) -> bool:
        return step % self.args.logging.freq == 0 or step == self.args.steps

    def train_step(self, batches: list[Batch]) -> Step:
        """All batches forward and backward; gradients are averaged over ranks, clipped and used once."""
        self.latest_batches[self.step + 1] = batches
        self.loader_state = batches[-1][1]
        loss = self.training_step.backward(map(self.on_device, batches), len(batches), self.log_batches)
        norms = self.training_step.clip(self.args.optim.clip)
        if self.logs(self.step + 1):
            self.memory_use.before_update(seed=self.step)
        self.training_step.update(skip=self.guard.decide(self.step + 1, loss, norms))
        self.scheduler.step()
        self.step += 1
        self.total_tokens += self.tokens_per_step * self.data_ranks
        self.stopwatch.count_step()
        return Step(loss, *norms)

    def on_device(self, batch: Batch) -> torch.Tensor:
        return torch.from_numpy(batch[0]).to(self.world.device)

    def compute_again(self, step: int) -> None:
        """The forward passes of one of the latest steps, with the weights of now."""
        for batch in self.latest_batches[step]:
            self.training_step.loss(self.on_device(batch))
        reshard(self.model)

    def log_batches(self, n_done: int, loss_sum: torch.Tensor) -> None:
        """The loss within a step, over its first `n_done` batches, where logging.acc_freq asks for it."""
        acc_freq = self.args.logging.acc_freq
        if acc_freq is None or n_done == self.args.grad_acc_steps or n_done % acc_freq:
            return
        with raise_on_all_ranks():
            mean = self.mean_over_ranks(loss_sum / n_done)
            if self.metrics is not None:
                self.metrics.log({"global_step": self.step, "acc_step": n_done, "loss/out": mean})
                logger.info("step: %s  acc: %s  loss: %.4f", self.step, n_done, mean)

    def log_step(self, step: Step) -> None:
        self.watch.at("logging", self.step)
        args, device = self.args, self.world.device
        mean_loss = self.mean_over_ranks(step.loss)
        self.guard.read(everything=True)
        # Per rank: those of a tensor-parallel group work on the same tokens.
        speed = self.stopwatch.lap(self.tokens_per_step / args.distributed.tp_size, args.steps - self.step)
        # The rate that this step was taken with; the schedule stands at the next one already.
        used = [
            base * factor(self.step - 1)
            for base, factor in zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        ]
        metrics = {
            "global_step": self.step,
            "acc_step": 0,
            **speed,
            "speed/FLOPS": self.flops_per_token * speed["speed/wps"],
            "optim/grad_norm": step.grad_norm.item(),
            "optim/lr": used[0],
            "optim/total_tokens": self.total_tokens,
            **memory_metrics(device),
            **self.memory_use.metrics(),
            "loss/out": mean_loss,
            **self.guard.metrics(),
        }
        if args.data.on_error == "skip":
            n_skipped = reduce_sum([count_skipped(self.loader_state)])[0]
            metrics["data/skipped"] = round(n_skipped / args.distributed.tp_size)  # whose ranks read the same
        if self.peak_flops is not None:
            metrics["speed/mfu"] = metrics["speed/FLOPS"] / self.peak_flops
        if step.value_grad_norm is not None:
            metrics |= {"optim/value_grad_norm": step.value_grad_norm.item(), "optim/value_lr": used[1]}
        if self.metrics is not None:
            self.metrics.log(metrics)
            logger.info("%s", format_log_line(metrics, power_draw(device)))

    def probe(self, batches: list[Batch]) -> None:
        """Looks at the model that the step has left, with the first row of its batches."""
        self.watch.at("probing", self.step)
        start = time.perf_counter()
        tokens = torch.from_numpy(batches[0][0][:1]).to(self.world.device)

        records = probe(self.model, lambda: self.training_step.loss(tokens))
        append_probe(Path(self.args.dump_dir), self.step, self.world.rank, records)
        logger.info("probe of step %s: %s tensors in %.2f s", self.step, len(records), time.perf_counter() - start)
        self.stopwatch.restart_lap()

    def mean_over_ranks(self, loss: torch.Tensor) -> float:
        return reduce_sum([loss.item()])[0] / self.world.size

    def save(self, needed: bool) -> None:
        """Writes a checkpoint. Where that fails it is told, and training goes on, or ends where it was `needed`."""
        self.watch.at("saving a checkpoint", self.step)
        with raise_on_all_ranks():
            check_weights(self.model, self.step)
        train_state = {
            "step": self.step,
            "acc_step": 0,
            "total_tokens": self.total_tokens,
            "data_loader_state": self.loader_state,
            "guard": self.guard.state(),
        }
        slots_read = self.memory_use.state()
        if self.data_rank == 0:  # it is the same on all of them, and the first one's is always read
            train_state["memory_use"] = slots_read
        self.finish_saving()
        with self.telling_of_saving(needed):
            folder = self.checkpoints.save(self.step, self.model, self.optimizer, train_state, to_dict(self.args))
            if self.args.checkpoint.save_async:
                logger.info("writing in the background: %s", folder)
        self.stopwatch.restart_lap()

    def is_saved_within(self, seconds: float) -> bool:
        """Whether a checkpoint takes no longer, going by the last one or by its size. The same on all ranks."""
        expected = self.checkpoints.seconds or checkpoint_bytes(self.model) / SAVED_A_SECOND
        return broadcast_object(expected <= seconds)

    def finish_saving(self, needed: bool = False) -> None:
        """Waits for what is being written in the background. Failures as in `save`."""
        with self.telling_of_saving(needed):
            self.checkpoints.finish()

    @contextlib.contextmanager
    def telling_of_saving(self, needed: bool) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the same on all ranks
            if needed:
                with raise_on_all_ranks():
                    raise
            if self.world.rank == 0:
                logger.error("%s; training goes on without it", error)


def format_log_line(metrics: dict[str, Any], power: float | None) -> str:
    memory = metrics.get("memory/max_active_pct", metrics.get("memory/rss_pct"))
    return "  ".join(
        [
            f"step: {metrics['global_step']}",
            f"acc: {metrics['acc_step']}",
            f"loss: {metrics['loss/out']:.4f}",
            f"grad: {metrics['optim/grad_norm']:.2e}",
            f"flops: {metrics['speed/FLOPS']:.2e}",
            f"wps: {metrics['speed/wps']:.2e}",
            f"iter: {metrics['speed/curr_iter_time']:.3f}",
            f"data: {metrics['speed/data_load_time']:.3f}",
            f"lr: {metrics['optim/lr']:.2e}",
            f"mem: {memory:.0f}%",
            f"pow: {'-' if power is None else f'{power:.0f} W'}",
            f"left: {format_duration(metrics['speed/time_left'])}",
        ]
    )


@contextlib.contextmanager
def collecting_by_steps() -> Iterator[None]:
    """Python's garbage collector off: a rank that collects when it likes makes the others wait, so all do together."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def remove_made(folders: list[Path]) -> None:
    """Takes back folders that were made a moment ago, the innermost first with all in it, its parents if empty."""
    if folders:
        shutil.rmtree(folders[0], ignore_errors=True)
    for parent in folders[1:]:
        with contextlib.suppress(OSError):  # another run may have put its own there in the meantime
            parent.rmdir()


def finish_wandb(wandb_run: Any, succeeded: bool, stopped: bool) -> None:
    """Uploads what is left; of a run that was stopped for as long as SLURM can wait with requeueing it."""
    finishing = threading.Thread(target=wandb_run.finish, kwargs={"exit_code": 0 if succeeded else 1}, daemon=True)
    finishing.start()
    finishing.join(PATIENCE_WITH_WANDB if stopped else None)


def close_metrics(metrics: MetricsLogger) -> None:
    try:
        metrics.close()
    except OSError as error:
        logger.error("%s", error)


@contextlib.contextmanager
def open_logs(run: Run) -> Iterator[None]:
    """Makes dump_dir on the first rank, with config.yaml, train.log, metrics.jsonl; closes the logs at the end."""
    if run.world.rank != 0:
        yield
        return
    args, folder = run.args, Path(run.args.dump_dir)
    with contextlib.ExitStack() as stack:
        wandb_run = None
        if args.logging.wandb is not None:
            missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            try:
                wandb_run = start_wandb(folder, {"name": args.name, **args.logging.wandb}, to_dict(args))
            except ValueError:
                remove_made(missing)
                raise
            stack.push(lambda kind, *_: finish_wandb(wandb_run, kind is None, run.step < args.steps))
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(claim(folder))  # of two runs that have found no folder, one makes it
        stack.callback(remove_log_file, add_log_file(folder / "train.log"))
        write_whole(folder / "config.yaml", to_yaml(args))
        for name in ("metrics.jsonl", "metrics.eval.jsonl", "metrics.validation.jsonl"):
            # Where a damaged checkpoint was passed over, what came before it may be wanted when that is restored.
            dropped = drop_metrics_after(folder / name, run.step, keep=bool(run.checkpoints.passed_over))
            if dropped:
                logger.info("dropped %s lines of %s past step %s, which is computed again", dropped, name, run.step)
        run.metrics = MetricsLogger(folder / "metrics.jsonl", wandb_run)
        stack.callback(close_metrics, run.metrics)
        log_start(args, run.world, run.model)
        yield


def train(args: TrainArgs) -> None:
    """Trains as `args` say, from the newest checkpoint where there is one, until `args.steps` or a stop signal.

    Raises UserError for a config, data or checkpoint that cannot work (one line, nothing written by then), OSError
    where the disk fails, and KeyboardInterrupt after Ctrl-C, when all is closed.
    """
    rank, _, n_ranks = find_ranks()
    init_logger(rank, n_ranks)
    validate_environment(args.env)
    set_environment(args.env)  # before anything looks at a device, which find_world does first
    world = find_world()
    validate_train_args(args, world)
    check_memory(args, world)
    if world.rank == 0:
        for line in find_oddities(args.optim, args.steps):
            logger.warning("%s", line)
    slurm.use_scratch()
    set_torch_options(args)
    # Signals are remembered until the job is back in the queue: SLURM may send another one while logs are closed.
    with contextlib.ExitStack() as signals:
        run, first_step = finish(args, world, signals)
        # The checkpoint is whole and the logs are closed, on all ranks: SLURM may end the job.
        if (run.step < args.steps or run.evaluation_stopped) and world.rank == 0 and not run.interrupted:
            slurm.requeue(made_progress=run.step > first_step)
    if run.interrupted:
        raise KeyboardInterrupt


def finish(args: TrainArgs, world: World, signals: contextlib.ExitStack) -> tuple[Run, int]:
    """Trains what is left to be trained, and closes all but `signals`; the run and the step that it began at."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            oom_as_user_error("data.batch_size, model.*: the run does not fit the memory; make it smaller")
        )
        stack.enter_context(process_group(world, args.distributed.timeout))
        # Not before the ranks have met: who waits for one that never comes is ended by TERM as any process is (in a job
        # of lingua.stool, where it is blocked until now, by the time that ranks have to meet, or by SLURM's KILL).
        stop_signal = signals.enter_context(StopSignal())
        watch = stack.enter_context(Watch(args.distributed.timeout, Path(args.dump_dir) / "stacks"))
        with raise_on_all_ranks():
            run = Run(args, world, watch)
        resume_from = run.find_checkpoint()
        with raise_on_all_ranks():
            run.go_to(resume_from)
            first_step = run.step
            if run.step >= args.steps:
                logger.info("all %s steps are done (%s)", args.steps, resume_from)
            elif resume_from is not None and world.rank == 0:
                warn_of_jump(args, resume_from, run.step)
        if run.step >= args.steps:
            if not evaluate(run, stop_signal, missing_only=True):
                logger.info("nothing to do; raise steps to train on, or name another dump_dir for another run")
        else:
            train_from(run, resume_from, stop_signal, stack)
    return run, first_step


def warn_of_jump(args: TrainArgs, resume_from: Path, step: int) -> None:
    """Where the learning rate does not go on as the checkpoint's config has it."""
    try:
        config = read_json(resume_from / CONFIG_FILE)
        optim = {key: value for key, value in config["optim"].items() if key in vars(args.optim)}
        line = find_jump(from_dict(OptimArgs, optim, "optim"), config["steps"], args.optim, args.steps, step)
    except (KeyError, TypeError, AttributeError, ValueError, OSError):
        return  # of an initial checkpoint from elsewhere, whose config says nothing of it
    if line is not None:
        logger.warning("%s", line)


def train_from(run: Run, resume_from: Path | None, stop_signal: StopSignal, stack: contextlib.ExitStack) -> None:
    """All that is left of the run; `stack` closes loader and logs."""
    args = run.args
    shared = [pair for pairs in gather_objects(shared_sources(run.loader_state)) for pair in pairs]
    if run.world.rank == 0:
        for line in describe_shared_sources(shared, run.loader_state["made_with"]["streams"]):
            logger.warning("%s", line)
    with raise_on_all_ranks():
        # Before anything there is cleaned up, which another run may be writing. Where no run has been, no file is made
        # before all is checked.
        if run.world.rank == 0 and os.access(Path(args.dump_dir) / LOCK_FILE, os.W_OK):
            stack.enter_context(claim(Path(args.dump_dir)))
        run.checkpoints.clean_up()
        if args.checkpoint.path is not None:
            check_writable("checkpoint.path", run.checkpoints.path, checkpoint_bytes(run.model))
        room = ROOM_FOR_LOGS + (checkpoint_bytes(run.model) if args.checkpoint.path is None else 0)
        check_writable("dump_dir", Path(args.dump_dir), room)
        logger.info("filling the shuffle buffer: %s batches", args.data.prefetch_size)
        stack.enter_context(collecting_by_steps())
        # The other ranks wait for this one, for as long as their timeout: they are to hear before what is wrong.
        patience = PATIENCE_WITH_LOADER * args.distributed.timeout
        loader = stack.enter_context(build_dataloader_from_args(args.data, run.loader_state, patience))
        batches = itertools.chain([next(loader)], loader)
    run.materialize(resume_from)
    with raise_on_all_ranks():
        stack.enter_context(open_logs(run))
    with raise_on_all_ranks():
        keep = bool(run.checkpoints.passed_over)
        drop_probes_after(Path(args.dump_dir), run.step, run.world.rank, run.world.size, keep)
    with raise_on_all_ranks():
        # Last: where the run is killed before, the next start finds them damaged again, and keeps those metrics too.
        run.checkpoints.set_aside()
    stack.enter_context(run.profiler)
    logger.info("starting at step %s of %s%s", run.step, args.steps, f", from {resume_from}" if resume_from else "")
    ctrl_c = "Ctrl-C: ending after this step, with a checkpoint where that takes seconds; again to end at once"
    stack.enter_context(stop_signal.taking_interrupts(ctrl_c if run.world.rank == 0 else None))
    try:
        train_steps(run, batches, stop_signal)
    except (ValueError, OSError, SystemExit):
        # All ranks leave here together: what is being written in the background is brought to its end first.
        run.finish_saving()
        raise


def train_steps(run: Run, loader: Iterator[Batch], stop_signal: StopSignal) -> None:
    """The loop. The last step is checkpointed whatever the schedule of checkpoints says.

    All ranks wait for each other at a check, and agree on what any of them has: a stop signal, an error in the data,
    bad steps. Each has the batches of all steps up to the next check by then, so none of them waits in a step for a
    rank that cannot do it. What happens in between is answered at the next check; a bad step is skipped at once, since
    the gradients carry that to all ranks (lingua/nonfinite.py).
    """
    steps = run.args.steps
    if run.step > 0 and run.checkpoints.args.eval.is_due(run.step):
        evaluate(run, stop_signal, missing_only=True)  # which the run was stopped before or in
    run.stopwatch.restart_lap()
    every = run.args.distributed.check_every or 1  # steps from the next check to the one after it
    checked, interval, next_check, end = time.monotonic(), 0, run.step, steps
    failing = 0.0
    while run.step < end:
        run.fetch(loader, min(every, end - run.step))
        run.watch.at(WAITING_FOR_RANKS, run.step + 1)
        run.guard.read()
        if run.step == next_check:
            took = time.monotonic() - checked
            flags = [run.data_error is not None, stop_signal.name is not None, took]
            failing, stopping, took, *told = reduce_sum([*flags, *run.guard.tell()])
            run.watch.at("computing", run.step + 1)
            answer_bad_steps(run, told)
            run.latest_batches = {step: batches for step, batches in run.latest_batches.items() if step >= run.step}
            if stopping:
                failing = 0.0  # the data is read again when the run goes on
                break
            if failing:
                end, next_check = run.step + min(gather_objects(len(run.fetched))), steps
                continue
            seconds = took / run.world.size / interval if interval else math.inf
            checked, interval, next_check = time.monotonic(), every, run.step + every
            every = steps_to_next_check(run.args.distributed, run.world, every, seconds)
        run.watch.at("computing", run.step + 1)
        run.profiler.begin_step(run.step + 1)
        batches = run.fetched.popleft()
        step = run.train_step(batches)
        if run.logs(run.step):
            with raise_on_all_ranks():
                run.log_step(step)
        if run.profiler.end_step():
            run.stopwatch.restart_lap()
        if run.args.probe_freq is not None and run.step % run.args.probe_freq == 0:
            run.probe(batches)
        if run.checkpoints.is_due(run.step) or run.step == steps:
            run.save(needed=run.step == steps)
        if run.checkpoints.args.eval.is_due(run.step) or run.step == steps:
            evaluate(run, stop_signal)
        if run.step % run.args.gc_collect_freq == 0:
            gc.collect()
    run.watch.at("ending", run.step, has_limit=False)
    run.guard.read(everything=True)
    interrupted, *told = reduce_sum([stop_signal.is_interrupt, *run.guard.tell()])
    run.interrupted = interrupted > 0 and (run.step < steps or run.evaluation_stopped)
    answer_bad_steps(run, told)
    run.finish_saving()
    if run.step > run.checkpoints.saved:
        if not run.interrupted or run.is_saved_within(INTERRUPT_SECONDS):
            run.save(needed=not failing)
            run.finish_saving(needed=not failing)
        elif run.world.rank == 0:
            logger.warning("step %s is not saved, which takes long; the newest is %s", run.step, run.checkpoints.saved)
    if failing:
        with raise_on_all_ranks():
            if run.data_error is not None and not run.fetched:
                raise run.data_error
    if run.step < steps:
        logger.info("stopped after step %s by %s; start again to go on", run.step, stop_signal.name or "a signal")
    else:
        logger.info("done: %s steps", steps)


def answer_bad_steps(run: Run, told: list[float]) -> None:
    """Reports the bad steps that ranks have `told` of; where there are too many, saves and raises UserError.

    Weights are those after the last good step.
    """
    if not run.guard.hear(told):
        return
    with raise_on_all_ranks():
        lines = run.guard.explain()
    step = run.guard.step_to_compute_again()
    if step is not None:
        lines.append(run.guard.explain_again(run.model, step, run.step, lambda: run.compute_again(step)))
    if run.world.rank == 0:
        for line in lines:
            logger.warning("%s", line)
    if not run.guard.is_over(run.step):
        return
    run.finish_saving()
    if run.step > run.checkpoints.saved:
        run.save(needed=False)
        run.finish_saving()
    with raise_on_all_ranks():
        raise UserError(run.guard.why_over(run.step, run.checkpoints.saved))


def main() -> None:
    train(parse_args(TrainArgs))


ARGS = TrainArgs  # for lingua.stool, which checks a config before it waits in a queue


if __name__ == "__main__":
    run_main(main)
