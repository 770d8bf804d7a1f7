"""A ladder of models trained on the same text: what they have learned over the size of the memory's table.

    python -m apps.capacity.run config=apps/capacity/configs/cpu.yaml      # half an hour on 2 cores
    python -m apps.capacity.run config=apps/capacity/configs/gpu.yaml      # one GPU; `minutes=9` stops in time
    python -m apps.capacity.run config=apps/capacity/configs/text.yaml     # likewise, on real text

The text is biographies that are made here or, where `steps` is set, what `train.data` names. Start the same command
again and it goes on: what is trained and measured is not done again. Several processes, on several GPUs or machines
that see the same `dump_dir`, share the runs. Each model is trained by `apps.main.train` and measured by
`apps.capacity.measure` or `measure_text`; results.json, capacity.png and capacity.svg in `dump_dir` hold what is done
so far.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from apps.capacity.figure import draw
from apps.capacity.measure import MeasureArgs
from apps.capacity.measure_text import MeasureTextArgs
from apps.capacity.people import People, write_exposures
from apps.main.eval import EvalArgs, validate_eval_args
from apps.main.train import TrainArgs, validate_train_args
from apps.main.transformer import LMTransformer, count_flops_per_token
from lingua.args import check_writable, first_line, from_dict, parse_args, to_dict, to_yaml, write_whole
from lingua.distributed import World
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.logger import init_logger
from lingua.sources import count_cores
from lingua.tokenizer import build_tokenizer
from lingua.transformer import hidden_size

logger = logging.getLogger(__name__)

# FLOPs per token may differ from what is asked for by this share.
FLOPS_TOLERANCE = 0.01
# Biographies, of other people, that the tokenizer is trained on; and of these people, that are counted in tokens.
TOKENIZER_BIOGRAPHIES, COUNTED_BIOGRAPHIES = 20_000, 2_000
# Others may be longer than those that are counted.
SPACE_FOR_LONGER = 1.2
SECONDS_BETWEEN_LINES = 30


@dataclass
class ModelArgs:
    """One rung. `flops`: FLOPs per token as a multiple of the first rung's; the feed-forwards' hidden size is chosen
    for it. `train`: keys of the training config that differ from the ladder's. `seeds`: how many runs.
    """

    name: str = ""
    flops: float = 1.0
    seeds: int = 1
    train: Any = field(default_factory=dict)


@dataclass
class LadderArgs:
    """Text: biographies of `people`, `exposures` of each, with a tokenizer of `vocab_size` that is trained on them. Or,
    where `steps` is set, that number of steps on the data and with the tokenizer of `train.data`; `eval`: how such
    models are measured, as in apps.main.eval.

    `train`: the training config of all models. Seeds, folders and, for biographies, steps and data are set by the
    ladder. `at_once`: runs at a time, which share the visible GPUs and the CPU cores. `minutes`: checkpoint and leave
    after that time.
    """

    dump_dir: str = ""
    people: int = 10_000
    people_seed: int = 0
    exposures: int = 100
    vocab_size: int = 4000
    steps: int | None = None
    eval: EvalArgs | None = None
    at_once: int = 1
    minutes: float | None = None
    train: Any = field(default_factory=dict)
    models: list[ModelArgs] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One training run of a rung."""

    name: str
    model: str
    folder: Path
    config: dict[str, Any]
    steps: int

    @property
    def result(self) -> Path:
        return self.folder / "capacity.json"


def main() -> None:
    init_logger()
    args = parse_args(LadderArgs)
    validate_ladder_args(args)
    runs = prepare(args)
    is_complete = train_all(args, runs)
    report(args, runs)
    if not is_complete:
        logger.info("not all runs are done; start the same command again to go on")


def validate_ladder_args(args: LadderArgs) -> None:
    """Raises UserError, one line that names the key."""
    if not args.dump_dir:
        raise UserError("dump_dir: not set; name the folder for data, runs and results")
    for name in ("exposures", "at_once", "vocab_size"):
        if getattr(args, name) < 1:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be 1 or more")
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"minutes: {args.minutes} must be above 0, or null")
    for key, train in [("train", args.train), *((f"models.{model.name}.train", model.train) for model in args.models)]:
        if not isinstance(train, dict):
            raise UserError(f"{key}: '{train}' where keys of the training config are wanted")
        if not isinstance(train.get("data", {}), dict):
            raise UserError(f"{key}.data: '{train['data']}' where a section of keys and values is wanted")
    if not args.models:
        raise UserError("models: empty; name at least one, such as {name: dense}")
    for number, model in enumerate(args.models):
        if not model.name or "/" in model.name:
            raise UserError(f"models.{number}.name: '{model.name}' cannot name a folder")
        if not 0 < model.flops < math.inf or model.seeds < 1:
            raise UserError(f"models.{number}: flops must be a number above 0 and seeds 1 or more, for '{model.name}'")
    names = [model.name for model in args.models]
    if len(set(names)) < len(names):
        raise UserError("models: two have the same name")
    if args.people_seed < 0:
        raise UserError(f"people_seed: {args.people_seed} is negative, it must be 0 or more")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"steps: {args.steps} is too small, it must be 1 or more, or null for biographies")
    if args.eval is not None:
        if args.steps is None:
            raise UserError("eval: measures models of real text; set steps and train.data, or leave it out")
        for name in ("ckpt_dir", "dump_dir", "metric_log_dir", "global_step"):
            if getattr(args.eval, name):
                raise UserError(f"eval.{name}: follows from the run; leave it out")
        validate_eval_args(args.eval, "eval.")
    check_writable("dump_dir", Path(args.dump_dir), 0)


# --- what all runs share: text, tokenizer, configs -----------------------------------------------------------------


def prepare(args: LadderArgs) -> list[Run]:
    """Writes text and tokenizer where they are missing, and the runs' configs. Returns the runs, in order.

    Raises UserError where `dump_dir` holds another experiment, or a model cannot have the FLOPs asked for.
    """
    folder = Path(args.dump_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "prepare.lock"):
        data = describe_text(args)
        record = folder / "data.json"
        if record.exists() and json.loads(record.read_text()) != data:
            raise UserError(f"dump_dir: {folder} holds text of {record.read_text().strip()}; name another folder")
        if args.steps is None:
            people = People(args.people, args.people_seed)
            write_whole(record, json.dumps(data) + "\n")
            runs = plan_runs(args, write_biographies(args, people))
        else:
            runs = plan_runs(args)
            write_whole(record, json.dumps(data) + "\n")
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
            write_whole(run.folder / "ladder.yaml", yaml.safe_dump(run.config, sort_keys=False))
    return runs


def describe_text(args: LadderArgs) -> dict[str, Any]:
    """What the runs in one `dump_dir` share: their text, and how they are measured."""
    if args.steps is None:
        return {name: getattr(args, name) for name in ("people", "people_seed", "exposures", "vocab_size")}
    return {"steps": args.steps, "data": args.train.get("data"), "eval": to_dict(args.eval or EvalArgs())}


def write_biographies(args: LadderArgs, people: People) -> list[int]:
    """Tokenizer and text, where they are missing. Returns the lengths of some biographies, in tokens."""
    folder = Path(args.dump_dir)
    tokenizer_file = folder / "tokenizer.model"
    if not tokenizer_file.exists():
        logger.info("training a tokenizer of %d words", args.vocab_size)
        train_tokenizer(tokenizer_file, args.vocab_size)
    logger.info("text: %d people, %d exposures (written once)", args.people, args.exposures)
    write_exposures(people, args.exposures, folder / "data" / "bios", os.cpu_count() or 1)
    tokenizer = build_tokenizer("sp", str(tokenizer_file))
    sample = itertools.islice(people.exposures(0), COUNTED_BIOGRAPHIES)
    return [len(tokenizer.encode(biography.text, True, True)) for biography in sample]


def train_tokenizer(file: Path, vocab_size: int) -> None:
    """A sentencepiece model of biographies of other people, so that names and values are few tokens each.

    Raises UserError for a `vocab_size` that they do not give.
    """
    import sentencepiece

    biographies = itertools.islice(People(TOKENIZER_BIOGRAPHIES, 2**31).exposures(0), TOKENIZER_BIOGRAPHIES)
    unfinished = file.with_suffix(".tmp")
    try:
        with unfinished.open("wb") as out:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(biography.text for biography in biographies),
                model_writer=out,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=1.0,
                minloglevel=2,
            )
    except RuntimeError as error:
        unfinished.unlink()
        raise UserError(f"vocab_size: {vocab_size} cannot be had of these biographies ({first_line(error)})") from None
    unfinished.rename(file)


def plan_runs(args: LadderArgs, lengths: list[int] | None = None) -> list[Run]:
    """All runs with their training configs, the first seed of each model before the second ones.

    Args:
        lengths: of some biographies, in tokens, which say how many steps the exposures take. None for other text.

    Raises UserError for a config that cannot work, or cannot have the FLOPs asked for.
    """
    folder = Path(args.dump_dir)
    configs: list[dict[str, Any]] = []
    base: int | None = None
    for model in args.models:
        config = merge(copy.deepcopy(args.train), model.train)
        if lengths is not None:
            config["data"] = {
                "batch_size": 32,
                **config.get("data", {}),
                "root_dir": str(folder / "data"),
                "sources": {"bios": 1.0},
                "tokenizer": {"name": "sp", "path": str(folder / "tokenizer.model")},
            }
        config.setdefault("data", {})
        config["dump_dir"] = str(folder / "runs" / model.name)
        parsed = from_dict(TrainArgs, config, f"models.{model.name}.train")
        steps = args.steps
        if lengths is not None:
            needed = math.ceil(SPACE_FOR_LONGER * max(lengths))
            if parsed.data.seq_len < needed:
                raise UserError(
                    f"models.{model.name}.train.data.seq_len: {parsed.data.seq_len} is too short to measure "
                    f"biographies, which have up to {max(lengths)} tokens; make it {needed} or more"
                )
            n_tokens = args.people * args.exposures * sum(lengths) / len(lengths)
            steps = math.ceil(n_tokens / tokens_per_step(parsed))
        config["steps"] = parsed.steps = steps
        validate_train_args(parsed, World())
        if base is None:
            base = flops(parsed)
        multiplier = match_flops(parsed, round(base * model.flops), model.name)
        config.setdefault("model", {})["ffn_dim_multiplier"] = multiplier
        config["checkpoint"] = {"dump": {"every": config["steps"], "keep": 1}, "eval": {"every": 0}}
        configs.append(config)
    runs = []
    for seed in range(max(model.seeds for model in args.models)):
        for model, config in zip(args.models, configs, strict=True):
            if seed < model.seeds:
                name = f"{model.name}.seed{seed}"
                own = copy.deepcopy(config)
                own["name"], own["dump_dir"] = name, str(folder / "runs" / name)
                own["model"]["seed"] = own["data"]["seed"] = own["seed"] = seed
                runs.append(Run(name, model.name, folder / "runs" / name, own, own["steps"]))
    return runs


def merge(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`config` with the keys of `more` over it, section by section."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(config.get(key), dict):
            merge(config[key], value)
        else:
            config[key] = copy.deepcopy(value)
    return config


def tokens_per_step(args: TrainArgs) -> int:
    return args.data.batch_size * args.data.seq_len * args.grad_acc_steps


def flops(args: TrainArgs) -> int:
    """FLOPs per token of the config's model."""
    with torch.device("meta"):
        return count_flops_per_token(LMTransformer(args.model), args.data.seq_len)


def match_flops(args: TrainArgs, target: int, name: str) -> float:
    """The `model.ffn_dim_multiplier` with which FLOPs per token are nearest to `target`; sets it in `args`.

    Raises UserError where they cannot come within a hundredth of it.
    """
    unit, whole = args.model.multiple_of, int(2 * 4 * args.model.dim / 3)

    def set_hidden(units: int) -> int:
        # In the middle of the values that give this hidden size, so that rounding cannot reach another one.
        args.model.ffn_dim_multiplier = max(units * unit - unit / 2, 0.5) / whole
        assert hidden_size(args.model.dim, unit, args.model.ffn_dim_multiplier) == units * unit
        return flops(args)

    one, two = set_hidden(1), set_hidden(2)
    units = 1 if one == two else max(1, round(1 + (target - one) / (two - one)))
    reached = set_hidden(units)
    if abs(reached - target) > FLOPS_TOLERANCE * target:
        raise UserError(
            f"models.{name}: {reached:.4g} FLOPs per token with feed-forwards of {units * unit} hidden units, but "
            f"{target:.4g} are asked for; change its sizes, model.multiple_of or flops"
        )
    return args.model.ffn_dim_multiplier


# --- the runs --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Waits for other processes that hold the lock."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def claim(run: Run) -> Any | None:
    """A lock on the run, as an open file, or None where another process has it or it is done."""
    handle = (run.folder / "ladder.lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        return None
    if run.result.exists():
        handle.close()
        return None
    return handle


def measuring(args: LadderArgs, run: Run, checkpoint: Path) -> list[str]:
    """The module that measures the run's checkpoint, and its arguments."""
    dtype = run.config.get("distributed", {}).get("model_dtype", "bf16")
    if args.steps is None:
        measured = MeasureArgs(str(checkpoint), args.people, args.people_seed, dtype, out=str(run.result))
        return ["apps.capacity.measure", *(f"{key}={value}" for key, value in to_dict(measured).items())]
    evaluation = args.eval or EvalArgs()
    evaluation = replace(
        evaluation,
        ckpt_dir=str(checkpoint),
        dump_dir=str(run.folder / "evals" / checkpoint.name),
        generator=replace(evaluation.generator, dtype=dtype),
    )
    file = run.folder / "measure.yaml"
    write_whole(file, to_yaml(MeasureTextArgs(str(run.result), evaluation)))
    return ["apps.capacity.measure_text", f"config={file}"]


class Worker:
    """Trains and measures one run in its own processes, on one GPU or the CPU."""

    def __init__(self, run: Run, lock: Any, gpu: str | None, args: LadderArgs):
        self.run, self.lock, self.gpu, self.args = run, lock, gpu, args
        self.stage = "training"
        self.is_stopped = False
        self.process = self._start("apps.main.train", f"config={run.folder / 'ladder.yaml'}")

    def _start(self, module: str, *argv: str) -> subprocess.Popen:
        # Each run has a share of the cores: with more threads than cores, torch's wait for each other.
        n_threads = max(count_cores() // self.args.at_once, 1)
        environment = {"OMP_NUM_THREADS": str(n_threads), **os.environ}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        self.errors = (self.run.folder / f"{self.stage}.err").open("wb")
        return subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C comes to this process alone, which passes it on as TERM
        )

    def is_done(self) -> bool:
        """Whether it has ended; goes from training to measuring. Raises UserError where either has failed."""
        code = self.process.poll()
        if code is None:
            return False
        self.errors.close()
        if self.is_stopped and code in (0, -signal.SIGTERM):
            self.lock.close()
            return True
        if code != 0:
            error = (self.run.folder / f"{self.stage}.err").read_text(errors="replace").strip().splitlines()
            last = error[-1] if error else "without a message"
            raise UserError(
                f"{self.run.name}: {self.stage} ended with code {code}: {last}; all of it: {self.errors.name}"
            )
        checkpoint = self.run.folder / "checkpoints" / f"{self.run.steps:010d}"
        if self.stage == "training" and checkpoint.exists():
            self.stage = "measuring"
            self.process = self._start(*measuring(self.args, self.run, checkpoint))
            return False
        self.lock.close()
        return True

    def stop(self) -> None:
        """Training saves a checkpoint and ends; measuring begins again next time."""
        self.is_stopped = True
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def describe(self) -> str:
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            line = json.loads((self.run.folder / "metrics.jsonl").read_text().splitlines()[-1])
            step, loss = line["global_step"], line["loss/out"]
            return f"{self.run.name} {self.stage}, step {step}/{self.run.steps}, loss {loss:.3f}"
        return f"{self.run.name} {self.stage}"


def train_all(args: LadderArgs, runs: list[Run]) -> bool:
    """Trains and measures what is not done and not in another process's hands; whether all is done then.

    Raises UserError after all others have ended, if a run failed.
    """
    gpus: list[str | None] = [None]
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = list(visible.split(",")) if visible else [str(number) for number in range(torch.cuda.device_count())]
    deadline = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    waiting, workers, failures, shown, is_stopping = list(runs), [], [], -math.inf, False
    try:
        while workers or (waiting and not is_stopping):
            while waiting and len(workers) < args.at_once and not is_stopping:
                run = waiting.pop(0)
                lock = claim(run)
                if lock is not None:
                    free = min(gpus, key=lambda gpu: sum(worker.gpu == gpu for worker in workers))
                    workers.append(Worker(run, lock, free, args))
            for worker in list(workers):
                try:
                    is_done = worker.is_done()
                except UserError as error:
                    failures.append(error)
                    logger.error("%s", error)
                    is_done = True
                if is_done:
                    workers.remove(worker)
                    if worker.run.result.exists():
                        report(args, runs)
            if time.monotonic() > deadline and not is_stopping:
                logger.info("%g minutes are over; saving %d runs", args.minutes, len(workers))
                is_stopping = True
                for worker in workers:
                    worker.stop()
            if workers and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                n_done = sum(run.result.exists() for run in runs)
                logger.info("%d of %d runs done; %s", n_done, len(runs), "; ".join(w.describe() for w in workers))
            time.sleep(0.5)
    except KeyboardInterrupt:
        logger.info("stopping: %d runs save a checkpoint", len(workers))
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.process.wait()
    if failures:
        raise failures[0]
    return all(run.result.exists() for run in runs)


# --- results ---------------------------------------------------------------------------------------------------------


def report(args: LadderArgs, runs: list[Run]) -> None:
    """Writes results.json and the figure, and logs the table, of the runs that are done."""
    done = [(run, json.loads(run.result.read_text())) for run in runs if run.result.exists()]
    if not done:
        return
    folder = Path(args.dump_dir)
    results = []
    for run, found in done:
        config = from_dict(TrainArgs, run.config, str(run.folder / "ladder.yaml"))
        memory = config.model.productkey_args
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        times = sorted(json.loads(line)["speed/curr_iter_time"] for line in lines)
        results.append(
            {
                "run": run.name,
                "model": run.model,
                "slots": memory.mem_n_keys**2 if memory.is_enabled else 0,
                "steps": run.steps,
                "tokens": run.steps * tokens_per_step(config),
                **({"exposures": args.exposures} if args.steps is None else {}),
                "loss": json.loads(lines[-1])["loss/out"],
                "seconds_per_step": times[len(times) // 2],
                **found,
            }
        )
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    draw(results, folder / "capacity")
    columns = {"slots": "slots", "parameters": "parameters", "FLOPs": "flops_per_token"}
    if args.steps is None:
        measures = ["kbits", "bits/par", "exact"]
        values = [(row["bits"] / 1e3, row["bits_per_parameter"], row["exact_match_mean"]) for row in results]
        total = f"of {results[0]['possible_bits'] / 1e3:.1f} kbits in all; "
    else:
        measures, total = list(results[0]["measures"]), ""
        values = [tuple(row["measures"].values()) for row in results]
    widths = [max(8, len(name)) for name in measures]
    names = " ".join(f"{name:>{width}}" for name, width in zip(measures, widths, strict=True))
    logger.info("%-24s %10s %12s %10s %s", "run", *columns, names)
    for row, numbers in zip(results, values, strict=True):
        found = " ".join(f"{number:>{width}.3f}" for number, width in zip(numbers, widths, strict=True))
        logger.info("%-24s %10d %12d %10d %s", row["run"], *(row[key] for key in columns.values()), found)
    logger.info("%s%s.png and .svg, results.json", total, folder / "capacity")


if __name__ == "__main__":
    run_main(main)
