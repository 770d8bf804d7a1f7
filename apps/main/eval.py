"""Evaluation of checkpoints: tasks of lm-eval, and loss on held-out text.

    python -m apps.main.eval config=apps/main/configs/eval.yaml ckpt_dir=dumps/debug/checkpoints/0000000600 dump_dir=...
    python -m apps.main.eval config=... ckpt_dir=latest dump_dir=dumps/debug    # a run's newest checkpoint
    python -m apps.main.eval config=... ckpt_dir=all dump_dir=dumps/debug       # all of them, for a curve
    torchrun --nproc-per-node 8 -m apps.main.eval config=...                    # the same numbers, sooner

Writes `results.json`, `validation.json`, `slot_reads.parquet` (what of them was asked for) and `config.yaml` into
dump_dir (for latest and all: dump_dir/evals/<step>), and appends to `metrics.eval.jsonl` and `metrics.validation.jsonl`
in metric_log_dir. Training calls `evaluate_checkpoint` with the ranks that it has.

All of these say with which settings they were made, in "settings". Results are replaced only by results of the same
settings. Others are refused where dump_dir is the folder itself; for latest, all and training they go to
dump_dir/evals/<step>.<digest>, 8 hexadecimal digits that the settings give.

A SLURM job that is preempted (TERM) begins its evaluation anew; at its time limit it ends without results.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import random
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from apps.main.config import EvalArgs
from lingua.launch import check_command_line

if __name__ == "__main__":
    check_command_line(EvalArgs)

import numpy as np
import torch

from apps.main.generate import (
    PackedCausalTransformerGenerator,
    load_consolidated_model_and_tokenizer,
    pick_device,
    validate_generator_args,
)
from apps.main.transformer import count_parameters
from apps.main.validation import (
    SETTINGS,
    EvaluationStopped,
    run_validation,
    validate_validation_args,
    validation_files,
)
from lingua import slurm
from lingua.args import check_writable, from_dict, parse_args, read_yaml, to_dict, to_yaml, write_whole
from lingua.checkpoint import find_damage, list_checkpoints
from lingua.distributed import broadcast_object, find_world, process_group, raise_on_all_ranks
from lingua.errors import UserError
from lingua.launch import StopSignal, run_main
from lingua.logger import init_logger
from lingua.metrics import MetricsLogger, start_wandb, validate_wandb_args
from lingua.sources import VALIDATION_FILES

logger = logging.getLogger(__name__)

# Bytes that must be free before the work begins.
ROOM_FOR_RESULTS = 2**16

RESULTS_FILE = "results.json"
VALIDATION_FILE = "validation.json"
SLOT_READS_FILE = "slot_reads.parquet"
FILES = {"results": RESULTS_FILE, "validation": VALIDATION_FILE, "slot_reads": SLOT_READS_FILE}
CONFIG_FILE = "config.yaml"


def validate_eval_args(args: EvalArgs, prefix: str = "") -> None:
    """Raises UserError, one line that names the key, for what can be checked without a checkpoint."""
    if args.validation is None and args.harness is None:
        raise UserError(f"{prefix}validation: null, and no harness is set, so there is nothing to evaluate")
    if args.validation is not None:
        validate_validation_args(args.validation, prefix)
    validate_generator_args(args.generator, f"{prefix}generator.")
    if args.wandb is not None:
        validate_wandb_args(args.wandb, f"{prefix}wandb")
    if args.harness is not None:
        try:
            from apps.main.harness import validate_harness_args
        except ImportError as error:
            raise UserError(
                f"{prefix}harness: lm-eval does not import ({error}); bash setup/create_env.sh --extras dev,eval"
            ) from None
        validate_harness_args(args.harness, prefix)


# --- which checkpoints -----------------------------------------------------------------------------------------------


def find_checkpoints(args: EvalArgs) -> list[EvalArgs]:
    """`args` for each checkpoint that `ckpt_dir` stands for, with the folders that its results belong in.

    Raises UserError where there is none.
    """
    for name in ("ckpt_dir", "dump_dir"):
        if not getattr(args, name):
            raise UserError(f"{name}: not set")
    if args.ckpt_dir not in ("latest", "all"):
        if not Path(args.ckpt_dir).is_dir():
            raise UserError(f"ckpt_dir: no folder '{args.ckpt_dir}'; name a checkpoint, or `latest` or `all` of a run")
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
        raise UserError(f"ckpt_dir: '{args.ckpt_dir}', but there is no whole checkpoint in '{folder}'")
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


# --- results and their settings --------------------------------------------------------------------------------------


def settings_of(args: EvalArgs) -> dict[str, dict[str, Any]]:
    """By kind of FILES that `args` ask for: what its numbers depend on, besides data and code. All of it is JSON."""
    generator, validation = args.generator, args.validation
    common = {
        "checkpoint": str(Path(args.ckpt_dir).absolute()),
        "global_step": args.global_step,
        "dtype": generator.dtype,
    }
    settings: dict[str, dict[str, Any]] = {}
    if validation is not None:
        sources = {name: getattr(validation, name) for name in ("use_val_from_train_src", "root_dir", "sources")}
        settings["validation"] = {**common, "max_steps": validation.max_steps, **sources}
        if validation.slot_reads is not None:
            settings["slot_reads"] = {**common, "slot_reads": validation.slot_reads, **sources}
    if args.harness is not None:
        # What a task may leave open of its generation.
        generation = {name: getattr(generator, name) for name in ("max_gen_len", "max_prompt_len", "seed")}
        settings["results"] = {**common, **generation, "harness": args.harness}
    return json.loads(json.dumps(settings, default=str))


def _recorded_settings(folder: Path, kind: str) -> dict[str, Any] | None:
    """Those that the results of this kind in `folder` were made with: as they say, or, where they were written by older
    code or there was nothing to write, as config.yaml beside them says. None where neither does, and for damaged ones.
    """
    file = folder / FILES[kind]
    try:
        if kind == "slot_reads":
            import pyarrow.parquet as pq

            recorded = json.loads(pq.read_schema(file).metadata[SETTINGS.encode()])
        else:
            recorded = json.loads(file.read_text(encoding="utf-8"))[SETTINGS]
        return dict(recorded)
    except ValueError:
        return None
    except (OSError, LookupError, TypeError):
        pass
    try:
        config = read_yaml(str(folder / CONFIG_FILE))
        return settings_of(from_dict(EvalArgs, config, CONFIG_FILE)).get(kind)
    except (OSError, ValueError):
        return None


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The step identifies the checkpoint, wherever that was moved to."""
    flat = [{**settings, **settings.get("harness", {})} for settings in (then, now)]
    keys = [key for key in dict.fromkeys([*flat[1], *flat[0]]) if key != "harness"]
    if now["global_step"] is not None:
        keys.remove("checkpoint")
    return [
        f"{key}: {json.dumps(flat[0].get(key))} there, {json.dumps(flat[1].get(key))} here"
        for key in keys
        if flat[0].get(key) != flat[1].get(key)
    ]


def find_conflict(args: EvalArgs) -> str | None:
    """Which results in dump_dir, made with other settings, would be replaced by those of `args`; None if none would."""
    folder = Path(args.dump_dir)
    if not any((folder / file).is_file() for file in FILES.values()):
        return None
    for kind, now in settings_of(args).items():
        file, then = folder / FILES[kind], _recorded_settings(folder, kind)
        if file.is_file() and then is None:
            return f"{file} does not say with which settings it was made"
        if file.is_file() and _differences(then, now):
            return f"{file} was made with other settings ({'; '.join(_differences(then, now))})"
    return None


def with_folder_for_settings(args: EvalArgs) -> EvalArgs:
    """`args`; where their dump_dir holds results of other settings, with one beside it, named by a digest of theirs."""
    conflict = find_conflict(args)
    if conflict is None:
        return args
    settings = settings_of(args)
    for each in settings.values():
        del each["checkpoint"], each["global_step"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    logger.info("%s; the new results are in %s.%s", conflict, args.dump_dir, digest)
    return replace(args, dump_dir=f"{args.dump_dir}.{digest}")


def is_done(args: EvalArgs) -> bool:
    """Whether dump_dir holds the results that `args` ask for."""
    folder = Path(args.dump_dir)
    if not any((folder / file).is_file() for file in FILES.values()):
        return False
    recorded = {kind: _recorded_settings(folder, kind) for kind in settings_of(args)}
    return all(
        recorded[kind] is not None and not _differences(recorded[kind], now) for kind, now in settings_of(args).items()
    )


# --- evaluating ------------------------------------------------------------------------------------------------------


def evaluate_checkpoint(args: EvalArgs, should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Evaluates one checkpoint: {"results": lm-eval's, "validation": what validation.json holds}, what was asked for.

    All ranks call it together; files are the first one's to write. Whatever it needs of memory is free again when it
    returns, and no random state of the process has changed. Raises UserError for checkpoints, tasks and data that
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
    settings = settings_of(args)
    with raise_on_all_ranks():
        files = validation_files(args.validation, config["data"]) if args.validation is not None else {}
        if args.validation is not None and not files and args.harness is None:
            raise UserError(
                f"validation.sources: nothing to validate on, and no training source has {VALIDATION_FILES}; "
                "name one, and its folder in validation.root_dir"
            )
        if (
            files
            and args.validation.slot_reads is not None
            and not any(memory.query_linear is not None for memory in model.memories().values())
        ):
            raise UserError(
                f"validation.slot_reads: the model of {args.ckpt_dir} has no memories that search; leave it out"
            )
    if args.harness is not None:
        from apps.main import harness

        found["results"] = harness.run_harness(args.harness, generator, should_stop)
        if found["results"] is not None:
            found["results"] = {SETTINGS: settings["results"], **found["results"]}
    if files:
        found["validation"] = run_validation(args.validation, files, generator, config, should_stop)
        found["validation"][SETTINGS] = settings["validation"]
        if args.validation.slot_reads is not None:
            from apps.main import slot_reads

            file, n_tokens = Path(args.dump_dir) / SLOT_READS_FILE, args.validation.slot_reads
            metadata = {SETTINGS: json.dumps(settings["slot_reads"])}
            slot_reads.write_slot_reads(file, generator, files, config["data"], n_tokens, should_stop, metadata)
    with raise_on_all_ranks():
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
    # Metrics before the files that say that the evaluation is done.
    if args.metric_log_dir is not None:
        Path(args.metric_log_dir).mkdir(parents=True, exist_ok=True)
        for kind, values in metrics_of(found).items():
            metrics = MetricsLogger(Path(args.metric_log_dir) / f"metrics.{kind}.jsonl")
            metrics.log({"global_step": args.global_step, "acc_step": 0, **values})
            metrics.close()
    if "results" in found:
        from apps.main import harness

        _write_whole(folder / RESULTS_FILE, harness.to_json(found["results"]))
        print(harness.tables(found["results"]), flush=True)  # noqa: T201
    if "validation" in found:
        _write_whole(folder / VALIDATION_FILE, json.dumps(found["validation"], indent=2))
    _write_whole(folder / CONFIG_FILE, to_yaml(args))
    logger.info("evaluation: %s", folder)


def _write_whole(file: Path, text: str) -> None:
    write_whole(file, text.rstrip("\n") + "\n")


def metrics_of(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"eval": task -> its metrics, "validation": source -> its numbers}, without texts of single documents.

    Beside tasks and sources each has "settings"; those of tasks with their numbers of examples in the prompt, "n_shot".
    """
    kinds = {}
    if "results" in found:
        tasks = {**found["results"]["results"], **found["results"].get("groups", {})}
        # Tasks' own aggregations may give numbers of numpy's.
        kinds["eval"] = {
            task: {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
            for task, metrics in tasks.items()
        }
        if SETTINGS in found["results"]:
            kinds["eval"][SETTINGS] = {**found["results"][SETTINGS], "n_shot": found["results"].get("n-shot", {})}
    if "validation" in found:
        kinds["validation"] = found["validation"]
    return kinds


def flat_metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of `metrics_of` by names such as eval/hellaswag/acc and validation/wiki/loss, for wandb."""
    return {
        f"{kind}/{source}/{name.removesuffix(',none')}": value
        for kind, values in metrics_of(found).items()
        for source, numbers in values.items()
        if source != SETTINGS
        for name, value in numbers.items()
        if isinstance(value, int | float)
    }


def launch_eval(args: EvalArgs, should_stop: Callable[[], bool] | None = None) -> dict[str, Any]:
    """Evaluates as `args` say, all checkpoints that `ckpt_dir` stands for, and returns what the last one has given.

    Under torchrun all ranks call it, within their process group. Raises UserError for arguments, checkpoints, tasks
    and data that cannot work, and EvaluationStopped where `should_stop` says so on any rank.
    """
    rank = find_world().rank
    with raise_on_all_ranks():
        # As the first rank sees the disk: others may see it later.
        found_here = find_checkpoints(args) if rank == 0 else []
        validate_eval_args(args)
        if args.ckpt_dir in ("latest", "all"):
            found_here = [with_folder_for_settings(each) for each in found_here]
        for each in found_here:
            if conflict := find_conflict(each):
                raise UserError(f"dump_dir: {conflict}; name another folder, or remove that file")
        for key in ("dump_dir", "metric_log_dir"):
            if rank == 0 and getattr(args, key) is not None:
                check_writable(key, Path(getattr(args, key)), ROOM_FOR_RESULTS)
    checkpoints = broadcast_object(found_here)
    several = args.ckpt_dir == "all"
    wandb_run, curve = None, []
    with contextlib.ExitStack() as stack:
        if args.wandb is not None:
            with raise_on_all_ranks():
                if rank == 0:
                    folder = (
                        Path(args.dump_dir) / "evals" if args.ckpt_dir in ("latest", "all") else Path(args.dump_dir)
                    )
                    folder.mkdir(parents=True, exist_ok=True)
                    wandb_run = start_wandb(folder, {"name": args.name, **args.wandb}, to_dict(args), "wandb")
                    stack.push(lambda kind, *_: wandb_run.finish(exit_code=0 if kind is None else 1))
        found: dict[str, Any] = {}
        for number, each in enumerate(checkpoints, start=1):
            done = several and broadcast_object(is_done(each))
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
    paths = {kind: Path(args.dump_dir) / FILES[kind] for kind in settings_of(args) if kind != "slot_reads"}
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
