"""Evaluation of checkpoints: tasks of lm-eval, and loss on held-out text.

    python -m apps.main.eval config=apps/main/configs/eval.yaml ckpt_dir=dumps/debug/checkpoints/0000000600 dump_dir=...
    python -m apps.main.eval config=... ckpt_dir=latest dump_dir=dumps/debug    # a run's newest checkpoint
    python -m apps.main.eval config=... ckpt_dir=all dump_dir=dumps/debug       # all of them, for a curve
    torchrun --nproc-per-node 8 -m apps.main.eval config=...                    # the same numbers, sooner

Writes `results.json`, `validation.json`, `slot_reads.parquet` (what of them was asked for) and `config.yaml` into
dump_dir (for latest and all: dump_dir/evals/<step>), and appends to `metrics.eval.jsonl` and `metrics.validation.jsonl`
in metric_log_dir. Training calls `evaluate_checkpoint` with the ranks that it has.

A SLURM job that is preempted (TERM) begins its evaluation anew; at its time limit it ends without results.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.main.generate import (
    GeneratorArgs,
    PackedCausalTransformerGenerator,
    load_consolidated_model_and_tokenizer,
    pick_device,
    validate_generator_args,
)
from apps.main.transformer import count_parameters
from apps.main.validation import (
    EvaluationStopped,
    ValidationArgs,
    run_validation,
    validate_validation_args,
    validation_files,
)
from lingua import slurm
from lingua.args import check_writable, parse_args, read_yaml, to_dict, to_yaml, write_whole
from lingua.checkpoint import find_damage, list_checkpoints
from lingua.distributed import StopSignal, find_world, from_first_rank, process_group, run_main, together
from lingua.logger import init_logger
from lingua.metrics import MetricsLogger, start_wandb, validate_wandb_args
from lingua.sources import VALIDATION_FILES

logger = logging.getLogger(__name__)

# Bytes that must be free before the work begins.
ROOM_FOR_RESULTS = 2**16

RESULTS_FILE = "results.json"
VALIDATION_FILE = "validation.json"


@dataclass
class EvalArgs:
    """`ckpt_dir`: a checkpoint folder, or `latest` or `all` of the run whose dump_dir is `dump_dir`.

    `harness`: arguments of lm_eval.simple_evaluate, and `include_path`, a folder of tasks. `wandb`: of wandb.init.
    `global_step`: what the metrics say; the checkpoint folder's number where null.
    """

    name: str = "evals"
    dump_dir: str | None = None
    metric_log_dir: str | None = None
    ckpt_dir: str = ""
    generator: GeneratorArgs = field(default_factory=GeneratorArgs)
    harness: Any | None = None
    validation: ValidationArgs | None = field(default_factory=ValidationArgs)
    wandb: Any | None = None
    global_step: int | None = None


def validate_eval_args(args: EvalArgs, prefix: str = "") -> None:
    """Raises ValueError, one line that names the key, for what can be told without a checkpoint."""
    if args.validation is None and args.harness is None:
        raise ValueError(f"{prefix}validation: null, and no harness is set, so there is nothing to evaluate")
    if args.validation is not None:
        validate_validation_args(args.validation, prefix)
    validate_generator_args(args.generator, f"{prefix}generator.")
    if args.wandb is not None:
        validate_wandb_args(args.wandb, f"{prefix}wandb")
    if args.harness is not None:
        try:
            from apps.main.harness import validate_harness_args
        except ImportError as error:
            raise ValueError(
                f"{prefix}harness: lm-eval does not import ({error}); bash setup/create_env.sh --extras dev,eval"
            ) from None
        validate_harness_args(args.harness, prefix)


# --- which checkpoints -----------------------------------------------------------------------------------------------


def find_checkpoints(args: EvalArgs) -> list[EvalArgs]:
    """`args` for each checkpoint that `ckpt_dir` stands for, with the folders that its results belong in.

    Raises ValueError where there is none.
    """
    for name in ("ckpt_dir", "dump_dir"):
        if not getattr(args, name):
            raise ValueError(f"{name}: not set")
    if args.ckpt_dir not in ("latest", "all"):
        if not Path(args.ckpt_dir).is_dir():
            raise ValueError(f"ckpt_dir: no folder '{args.ckpt_dir}'; name a checkpoint, or `latest` or `all` of a run")
        return [replace(args, global_step=_step_of(args.ckpt_dir) if args.global_step is None else args.global_step)]
    run = Path(args.dump_dir)
    folder = run / "checkpoints"
    if (run / "config.yaml").is_file():
        checkpoint = read_yaml(str(run / "config.yaml")).get("checkpoint")
        folder = Path((checkpoint or {}).get("path") or folder)
    whole = []
    for path in list_checkpoints(folder):
        problem = find_damage(path)
        if problem is None:
            whole.append(path)
        else:
            logger.warning("passing over the checkpoint %s: %s", path, problem)
    if not whole:
        raise ValueError(f"ckpt_dir: '{args.ckpt_dir}', but there is no whole checkpoint in '{folder}'")
    return [
        replace(
            args,
            ckpt_dir=str(path),
            dump_dir=str(run / "evals" / path.name),
            metric_log_dir=args.metric_log_dir or args.dump_dir,
            global_step=int(path.name),
        )
        for path in (whole if args.ckpt_dir == "all" else whole[-1:])
    ]


def _step_of(ckpt_dir: str) -> int | None:
    """The number that the checkpoint's folder, or the one above a consolidated one, is named by."""
    path = Path(ckpt_dir).absolute()
    return next((int(folder.name) for folder in (path, path.parent) if re.fullmatch(r"\d{10}", folder.name)), None)


def is_done(args: EvalArgs) -> bool:
    """Whether the results of these very arguments lie in dump_dir."""
    config = Path(args.dump_dir, "config.yaml")
    return config.is_file() and config.read_text(encoding="utf-8") == to_yaml(args) and bool(_read_found(args))


# --- evaluating ------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(args: EvalArgs, should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Evaluates one checkpoint: {"results": lm-eval's, "validation": what validation.json holds}, what was asked for.

    All ranks call it together; files are the first one's to write. Whatever it needs of memory is free again when it
    returns, and no random state of the process has changed. Raises ValueError for checkpoints, tasks and data that
    cannot work, and EvaluationStopped where `should_stop` says so on any rank.
    """
    with _as_it_was():
        return _evaluate(args, should_stop)


def _evaluate(args: EvalArgs, should_stop: Callable[[], bool] | None) -> dict[str, Any]:
    generator_args = args.generator
    model, tokenizer, config = load_consolidated_model_and_tokenizer(
        args.ckpt_dir, pick_device(generator_args.device), generator_args.dtype, generator_args.values_device
    )
    generator = PackedCausalTransformerGenerator(generator_args, model, tokenizer, config["data"]["add_bos"])
    where = torch.cuda.get_device_name() if generator.device.type == "cuda" else "the CPU"
    size = sum(count_parameters(model))
    logger.info("%s: %s parameters, in %s on %s", args.ckpt_dir, f"{size:,}", generator_args.dtype, where)
    found: dict[str, Any] = {}
    with together():
        files = validation_files(args.validation, config["data"]) if args.validation is not None else {}
        if args.validation is not None and not files and args.harness is None:
            raise ValueError(
                f"validation.sources: nothing to validate on, and no training source has {VALIDATION_FILES}; "
                "name one, and its folder in validation.root_dir"
            )
        if files and args.validation.slot_reads is not None and not model.memories():
            raise ValueError(f"validation.slot_reads: the model of {args.ckpt_dir} has no memories; leave it out")
    if args.harness is not None:
        from apps.main import harness

        found["results"] = harness.run_harness(args.harness, generator, should_stop)
    if files:
        found["validation"] = run_validation(args.validation, files, generator, config, should_stop)
        if args.validation.slot_reads is not None:
            from apps.main import slot_reads

            file, n_tokens = Path(args.dump_dir) / slot_reads.FILE, args.validation.slot_reads
            slot_reads.write_slot_reads(file, generator, files, config["data"], n_tokens, should_stop)
    with together():
        if find_world().rank == 0:
            _write(args, found)
    return found


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Restores the random states that lm-eval sets, and frees what evaluation has used."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        free_memory()


def free_memory() -> None:
    """Gives back what nobody needs any more, and forgets how much that was at most."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _write(args: EvalArgs, found: dict[str, Any]) -> None:
    folder = Path(args.dump_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if "results" in found:
        from apps.main import harness

        _write_whole(folder / RESULTS_FILE, harness.to_json(found["results"]))
        print(harness.tables(found["results"]), flush=True)  # noqa: T201
    if "validation" in found:
        _write_whole(folder / VALIDATION_FILE, json.dumps(found["validation"], indent=2))
    if args.metric_log_dir is not None:
        Path(args.metric_log_dir).mkdir(parents=True, exist_ok=True)
        for kind, values in metrics_of(found).items():
            metrics = MetricsLogger(Path(args.metric_log_dir) / f"metrics.{kind}.jsonl")
            metrics.log({"global_step": args.global_step, "acc_step": 0, **values})
            metrics.close()
    _write_whole(folder / "config.yaml", to_yaml(args))  # the last: with it the evaluation is done
    logger.info("evaluation: %s", folder)


def _write_whole(file: Path, text: str) -> None:
    write_whole(file, text.rstrip("\n") + "\n")


def metrics_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"eval": task -> its metrics, "validation": source -> its numbers}, without texts of single documents."""
    kinds = {}
    if "results" in found:
        tasks = {**found["results"]["results"], **found["results"].get("groups", {})}
        # Tasks' own aggregations may give numbers of numpy's.
        kinds["eval"] = {
            task: {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
            for task, metrics in tasks.items()
        }
    if "validation" in found:
        kinds["validation"] = found["validation"]
    return kinds


def flat_metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of `metrics_of` by names such as eval/hellaswag/acc and validation/wiki/loss, for wandb."""
    return {
        f"{kind}/{source}/{name.removesuffix(',none')}": value
        for kind, values in metrics_of(found).items()
        for source, numbers in values.items()
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }


def launch_eval(args: EvalArgs, should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Evaluates as `args` say, all checkpoints that `ckpt_dir` stands for, and returns what the last one has given.

    Under torchrun all ranks call it, within their process group. Raises ValueError for arguments, checkpoints, tasks
    and data that cannot work, and EvaluationStopped where `should_stop` says so on any rank.
    """
    rank = find_world().rank
    with together():
        # As the first rank sees the disk: others may see it later.
        found_here = find_checkpoints(args) if rank == 0 else []
        validate_eval_args(args)
        for key in ("dump_dir", "metric_log_dir"):
            if rank == 0 and getattr(args, key) is not None:
                check_writable(key, Path(getattr(args, key)), ROOM_FOR_RESULTS)
    checkpoints = from_first_rank(found_here)
    several = args.ckpt_dir == "all"
    wandb_run, curve = None, []
    with contextlib.ExitStack() as stack:
        if args.wandb is not None:
            with together():
                if rank == 0:
                    folder = (
                        Path(args.dump_dir) / "evals" if args.ckpt_dir in ("latest", "all") else Path(args.dump_dir)
                    )
                    folder.mkdir(parents=True, exist_ok=True)
                    wandb_run = start_wandb(folder, {"name": args.name, **args.wandb}, to_dict(args), "wandb")
                    stack.push(lambda kind, *_: wandb_run.finish(exit_code=0 if kind is None else 1))
        found: dict[str, Any] = {}
        for number, each in enumerate(checkpoints, start=1):
            done = several and from_first_rank(is_done(each))
            if several:
                logger.info("%s of %s: %s%s", number, len(checkpoints), each.dump_dir, " is there" if done else "")
            found = _read_found(each) if done else evaluate_checkpoint(each, should_stop)
            if rank == 0:
                curve.append((each.global_step, flat_metrics(found)))
                if wandb_run is not None:
                    wandb_run.log(curve[-1][1], step=each.global_step)
    if several and rank == 0:
        print(_curve_table(curve), flush=True)  # noqa: T201
    return found


def _read_found(args: EvalArgs) -> dict[str, Any]:
    wanted = {"results": RESULTS_FILE} if args.harness is not None else {}
    wanted |= {"validation": VALIDATION_FILE} if args.validation is not None else {}
    paths = {kind: Path(args.dump_dir) / file for kind, file in wanted.items()}
    return {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in paths.items() if path.is_file()}


def _curve_table(curve: list[tuple[int | None, dict[str, float]]]) -> str:
    """A line a checkpoint, a column a metric; deviations and counts are in the files."""
    left_out = ("_stderr", "sample_len", "n_documents", "n_tokens", "n_bytes", "memory_slots/")
    names = [name for name in curve[-1][1] if not any(part in name for part in left_out)]
    rows = [["step", *names]] + [
        [str(step), *(f"{values[name]:.4f}" if name in values else "" for name in names)] for step, values in curve
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> None:
    args = parse_args(EvalArgs)
    world = find_world()
    init_logger(world.rank, world.size)
    slurm.use_scratch()
    stop_signal = StopSignal()
    with contextlib.ExitStack() as signals:
        try:
            with process_group(world):
                if slurm.in_job():
                    signals.enter_context(stop_signal)
                    # The warning before the end is no reason to stop: what is begun may be done by then.
                    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
                launch_eval(args, should_stop=lambda: stop_signal.name == "SIGTERM")
        except EvaluationStopped:
            logger.info("evaluation ended by %s; start again to do it", stop_signal.name or "a signal")
            if world.rank == 0:
                slurm.requeue(made_progress=False)


ARGS = EvalArgs  # for lingua.stool, which checks a config before it waits in a queue


if __name__ == "__main__":
    run_main(main)
