"""What the programs of this folder take from YAML and the command line. As lingua/config.py, it imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lingua.config import (
    CheckpointArgs,
    DistributedArgs,
    GuardArgs,
    LMTransformerArgs,
    LoggingArgs,
    OptimArgs,
    ProfilingArgs,
)
from lingua.data import DataArgs
from lingua.launch import default_environment


@dataclass
class TrainArgs:
    """`eval`: a section of EvalArgs, for evaluation at `checkpoint.eval.every` and at the end; folders and step follow
    from the run. `async_eval_gpus`: in SLURM jobs of this number of GPUs instead of on the training's own.
    """

    name: str = "lingua"
    dump_dir: str = ""
    seed: int = 42
    grad_acc_steps: int = 1
    gc_collect_freq: int = 1000
    probe_freq: int | None = None
    steps: int = 1000
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    model: LMTransformerArgs = field(default_factory=LMTransformerArgs)
    distributed: DistributedArgs = field(default_factory=DistributedArgs)
    env: dict[str, str] = field(default_factory=default_environment)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    profiling: ProfilingArgs = field(default_factory=ProfilingArgs)
    logging: LoggingArgs = field(default_factory=LoggingArgs)
    guard: GuardArgs = field(default_factory=GuardArgs)
    async_eval_gpus: int | None = None
    eval: Any | None = None


def checkpoint_folder(args: TrainArgs) -> Path:
    return Path(args.checkpoint.path or Path(args.dump_dir) / "checkpoints")


@dataclass
class PlanArgs(TrainArgs):
    """A training config; `gpu_memory` in GiB, `out`: a JSON file for the figures."""

    world_size: int = 1
    gpu_memory: float = 80
    out: str | None = None


@dataclass
class GeneratorArgs:
    """How to continue prompts, and how many of them at once.

    `temperature` 0 takes the likeliest token. `top_k` leaves the k likeliest to choose from, `top_p` the likeliest that
    together have this probability; given both, `top_p` is of what `top_k` has left. A text ends before a string of
    `until`, at EOS, or after `max_gen_len` tokens. Of a prompt the last `max_prompt_len` tokens are read, or as many as
    leave room for `max_gen_len` in the model's max_seqlen. `max_tokens`: how many a batch takes in the cache, those to
    be generated included; a prompt that needs more is a batch by itself. `seed`: of samples.

    `compile_prefilling` compiles the reading of prompts; `reduce_generation_overhead` makes each further token one CUDA
    graph (on a CPU it does nothing). `show_progress`: a line every second instead of every 10. `values_device`: cpu
    leaves value tables in the CPU's memory, where they do not fit the GPU's; null: they lie where the model does.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    max_gen_len: int = 512
    max_tokens: int = 1024
    max_prompt_len: int | None = None
    until: list[str] = field(default_factory=list)
    compile_prefilling: bool = False
    reduce_generation_overhead: bool = False
    show_progress: bool = False
    dtype: str = "bf16"
    device: str = "cuda"
    values_device: str | None = None
    seed: int = 42


@dataclass
class GenerateArgs(GeneratorArgs):
    """`ckpt`: a checkpoint folder, distributed or consolidated. Prompts: one, a list, or a file; else the terminal's.

    `prompt_file`: a prompt a line, or with the ending .jsonl an object with "prompt" (or "text") a line. `out`: a file
    for an object a prompt: "prompt", "text", "finish_reason" (stop, eos or length), "n_prompt_tokens", "n_tokens",
    "log_likelihoods" of the generated tokens (as in `Continuation`).
    """

    ckpt: str = ""
    prompt: str | None = None
    prompts: list[str] = field(default_factory=list)
    prompt_file: str | None = None
    out: str | None = None


def without_prompts(argv: list[str]) -> list[str]:
    """What generate reads as YAML. A prompt is text as it is: "Question: what" would be a mapping."""
    return [argument for argument in argv if not argument.startswith("prompt=")]


@dataclass
class ValidationArgs:
    """`max_steps`: batches of the training's size for each source, null for all of it. They are filled with documents
    spread evenly over the source's files, always the same; the document that reaches the number is the last. Sources:
    folders with *.val.jsonl under `root_dir`. `slot_reads`: number of tokens of each source, the first ones, for
    which the slots that they read are written to a file (apps/main/slot_reads.py).
    """

    max_steps: int | None = None
    use_val_from_train_src: bool = True
    root_dir: str = ""
    sources: list[str] = field(default_factory=list)
    slot_reads: int | None = None


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
