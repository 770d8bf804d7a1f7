"""Evaluation within training: what section `eval` asks for, on the training's own ranks or as SLURM jobs.

apps/main/train.py imports this where a config has that section.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from apps.main.config import EvalArgs, TrainArgs, checkpoint_folder
from apps.main.eval import (
    evaluate_checkpoint,
    flat_metrics,
    free_memory,
    is_done,
    validate_eval_args,
    with_folder_for_settings,
)
from apps.main.validation import EvaluationStopped, validation_files
from lingua import slurm
from lingua.args import from_dict, to_dict
from lingua.distributed import broadcast_object, raise_on_all_ranks
from lingua.errors import UserError
from lingua.launch import StopSignal
from lingua.stool import FOR_JOBS_WITHIN, SCRIPT_FILE, StoolArgs, launch_job, list_jobs

if TYPE_CHECKING:
    from apps.main.train import Run

logger = logging.getLogger(__name__)


def validate_evaluation(args: TrainArgs) -> None:
    """Raises UserError, one line that names the key, for evaluation that would fail hours later."""
    if args.async_eval_gpus is not None:
        if args.async_eval_gpus < 1:
            raise UserError(f"async_eval_gpus: {args.async_eval_gpus} is too small, it must be 1 or more, or null")
        if args.eval is None:
            raise UserError("async_eval_gpus: set, but there is no section eval that says what to evaluate")
        if shutil.which("sbatch") is None:
            raise UserError("async_eval_gpus: set, but there is no sbatch on this machine; set it to null")
    if args.eval is None:
        return
    wanted = evaluation_args(args, step=0)
    validate_eval_args(wanted, "eval.")
    has_files = wanted.validation is not None and validation_files(wanted.validation, to_dict(args.data))
    if not has_files and wanted.harness is None:
        raise UserError(
            "eval.validation.sources: nothing to validate on: no source has *.val.jsonl; name one, and its root_dir"
        )


def evaluation_args(args: TrainArgs, step: int) -> EvalArgs:
    """What section `eval` asks for, of the checkpoint of `step`, into the run's folders: where evals/<step> holds
    results of other settings, into one beside it.

    Where it does not say otherwise it computes as training does, and generates within training's length. Raises
    UserError for what is no section of EvalArgs.
    """
    if not isinstance(args.eval, dict):
        raise UserError(f"eval: '{args.eval}' where a section of keys and values is wanted")
    of_the_run = ("ckpt_dir", "dump_dir", "metric_log_dir", "global_step")
    for name in of_the_run:
        if args.eval.get(name):
            raise UserError(f"eval.{name}: follows from the run; leave it out")
    try:
        wanted = from_dict(EvalArgs, {k: v for k, v in args.eval.items() if k not in of_the_run}, "section eval")
    except ValueError as error:
        raise UserError(f"eval.{error}") from None
    given = args.eval.get("generator") or {}
    if "dtype" not in given:
        wanted.generator.dtype = args.distributed.model_dtype
    if "values_device" not in given:
        wanted.generator.values_device = args.distributed.values_device
    if "max_gen_len" not in given:
        wanted.generator.max_gen_len = max(min(wanted.generator.max_gen_len, args.data.seq_len // 2), 1)
    wanted.ckpt_dir = str(checkpoint_folder(args) / f"{step:010d}")
    wanted.dump_dir = str(Path(args.dump_dir) / "evals" / f"{step:010d}")
    wanted.metric_log_dir = args.dump_dir
    wanted.global_step = step
    return with_folder_for_settings(wanted)


def evaluate(run: Run, stop_signal: StopSignal) -> None:
    """Evaluates the checkpoint of the step that was just done. All ranks call it together.

    What goes wrong there is told and does not end the training. A stop signal ends the evaluation, which is then made
    up for when the run goes on.
    """
    args, step = run.args, run.step
    run.watch.at("evaluating", step, has_limit=False)
    run.finish_saving()
    if run.checkpoints.saved != step:
        if run.world.rank == 0:
            logger.warning("step %s is not evaluated: it has no checkpoint", step)
        return
    try:
        with raise_on_all_ranks():
            # Its folder as the first rank sees the disk: others may see it later.
            wanted = evaluation_args(args, step) if run.world.rank == 0 else None
            if wanted is not None and args.async_eval_gpus is not None:
                submit_evaluation(wanted, args.async_eval_gpus)
        if args.async_eval_gpus is not None:
            return
        wanted = broadcast_object(wanted)
        logger.info("evaluating step %s", step)
        found = evaluate_checkpoint(wanted, should_stop=lambda: stop_signal.name is not None)
        if run.metrics is not None:
            run.metrics.log_to_wandb(flat_metrics(found), step)
    except EvaluationStopped:
        run.evaluation_stopped = True
        logger.info("evaluation of step %s ended by %s", step, stop_signal.name or "a signal")
    except (ValueError, OSError) as error:
        is_bug = not isinstance(error, (UserError, OSError))
        logger.error("step %s could not be evaluated: %s", step, " ".join(str(error).split()), exc_info=is_bug)
    except SystemExit:  # another rank has said what is wrong
        pass
    finally:
        free_memory()  # what an error kept alive, too
        run.stopwatch.restart_lap()


def lacks_evaluation(run: Run) -> bool:
    """Whether section `eval` asks for the results of a checkpoint that are not there, nor a job for them. The same on
    all ranks.
    """
    lacks = False
    with raise_on_all_ranks():
        if run.world.rank == 0:
            wanted = evaluation_args(run.args, run.step)
            submitted = run.args.async_eval_gpus is not None and Path(wanted.dump_dir, SCRIPT_FILE).exists()
            lacks = Path(wanted.ckpt_dir).is_dir() and not is_done(wanted) and not submitted
    return broadcast_object(lacks)


def find_awaited(args: TrainArgs, steps: list[int]) -> set[int]:
    """Of `steps`, those whose checkpoint a submitted evaluation has still to read: no results, and its job in the queue
    or running. Where SLURM does not answer, all those without results.
    """
    evals = Path(args.dump_dir) / "evals"
    submitted = {file.parent: step for step in steps for file in evals.glob(f"{step:010d}*/{SCRIPT_FILE}")}
    try:
        if args.eval is not None:
            wanted = [evaluation_args(args, step) for step in set(submitted.values())]
            done = {Path(each.dump_dir) for each in wanted if is_done(each)}
            submitted = {folder: step for folder, step in submitted.items() if folder not in done}
        if not submitted:
            return set()
        # An evaluation that has failed or was cancelled keeps nothing: SLURM lists it no longer.
        jobs = list_jobs(submitted, patience=slurm.ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        logger.warning("%s; checkpoints stay that evaluations may wait for: %s", error, [*submitted.values()])
        return set(submitted.values())
    return {step for folder, step in submitted.items() if jobs[folder]}


def submit_evaluation(wanted: EvalArgs, n_gpus: int) -> None:
    """Its own job through stool, on whole nodes of 8 GPUs where it is more than one node; where this run is a job,
    in the same partition, on the same account, and with the memory and on the kind of nodes that stool was told.
    """
    n_nodes = -(-n_gpus // 8)
    of_this_job = {
        "partition": os.environ.get("SLURM_JOB_PARTITION"),
        "account": os.environ.get("SLURM_JOB_ACCOUNT"),
        "qos": os.environ.get("SLURM_JOB_QOS"),
        "ncpu": int(os.environ.get("SLURM_CPUS_PER_TASK", 0)),
        **{name: os.environ.get(f"STOOL_{name.upper()}") for name in FOR_JOBS_WITHIN},
    }
    job = launch_job(
        StoolArgs(
            config=wanted,
            script="apps.main.eval",
            copy_code=False,
            dirs_exists_ok=True,
            nodes=n_nodes,
            ngpu=-(-n_gpus // n_nodes),
            **{name: value for name, value in of_this_job.items() if value},
        )
    )
    logger.info("the evaluation of step %s is job %s", wanted.global_step, job)
