"""The sections of a config, but for `data` (lingua/data.py): every key, its type and default.

It imports no torch, which takes seconds: what is mistyped is reported before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lingua.product_key.args import ProductKeyArgs


@dataclass
class BaseTransformerArgs:
    """`memories`: sections of memories other than product keys, by name (lingua/memories.py)."""

    dim: int = 512
    n_layers: int = 8
    head_dim: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    ffn_dim_multiplier: float | None = None
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    init_base_std: float | None = None
    init_std_factor: str = "disabled"
    max_seqlen: int = 1024
    productkey_args: ProductKeyArgs = field(default_factory=ProductKeyArgs)
    memories: dict[str, Any] = field(default_factory=dict)


@dataclass
class LMTransformerArgs(BaseTransformerArgs):
    """Config section `model`. `vocab_size` comes from the tokenizer where it is -1, `max_seqlen` from the data."""

    seed: int = 42
    vocab_size: int = -1
    weight_tying: bool = False
    sliding_window: int | None = None


@dataclass
class OptimArgs:
    """Config section `optim`. `name`: one of OPTIMIZERS (lingua/optim.py); `momentum`: Muon's. `value_update: sparse`
    touches only the rows of value tables that a step has read, with `value_rounding: stochastic` rounding bf16 tables
    at random (both: lingua/sparse_adamw.py).

    `value_beta1`, `value_weight_decay`: of the value tables, where they differ from the other parameters'. A row is
    read in few steps. With `beta1` it keeps moving along the gradient of its last read for about 1 / (1 - beta1)
    steps, so 0 often learns more (apps/capacity/LOG.md).
    """

    name: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.1
    epsilon: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95
    clip: float = 1.0
    scheduler: str = "cosine"
    warmup: int = 2000
    lr_min_ratio: float = 0.1
    cycle_length: float = 1.0
    cosine_theta: float = 1.0
    annealing_step: int = 1000
    decay_fraction: float = 0.1
    exp_factor: float = 0.5
    value_update: str = "dense"
    value_rounding: str = "nearest"
    value_beta1: float | None = None
    value_weight_decay: float | None = None


@dataclass
class DistributedArgs:
    """How the model is laid out over ranks (config section `distributed`)."""

    dp_shard: int = 1
    dp_replicate: int = 1
    tp_size: int = 1
    memory_parallel_size: int = 1
    # Where value tables and their moments lie: cpu, or null for where the model is.
    values_device: str | None = None
    selective_activation_checkpointing: bool = False
    checkpoint_each_layer: bool = False
    compile: bool = False
    fsdp_type: str = "no_shard"
    model_dtype: str = "bf16"
    float8_recipe: str | None = None
    float8_filter: str = r"layers\.[0-9]+\."
    matmul_allow_tf32: bool = False
    detect_anomaly: bool = False
    compile_cache_size_limit: int = 8
    # Seconds without an answer from another rank after which a run ends.
    timeout: int = 600
    # Steps between the checks for stop signals, errors in the data and bad steps, at each of which all ranks wait for
    # each other; null: every step on few ranks, about every 5 seconds on more (lingua/distributed.py).
    check_every: int | None = None
    # Read, so that published configs load: the data loader's worker is its own program, whatever this says.
    spawn_method: str = "forkserver"


@dataclass
class SaveEvery:
    """`every`: steps between checkpoints, 0 or less for never; `keep`: how many of them stay, 0 or less for all."""

    every: int = 1000
    keep: int = 0

    def is_due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0


@dataclass
class CheckpointArgs:
    """Config section `checkpoint`. `path`: dump_dir/checkpoints where null. `save_async`: train on while writing."""

    dump: SaveEvery = field(default_factory=SaveEvery)
    eval: SaveEvery = field(default_factory=SaveEvery)
    path: str | None = None
    init_ckpt_path: str | None = None
    continue_training_from_init: bool = False
    save_async: bool = False


@dataclass
class ProfilingArgs:
    """The memory of `mem_steps` steps is recorded after `mem_warmup` ones, `profile_steps` are traced after
    `profile_warmup` (0 steps: not at all). `trace_folder` is one of dump_dir, unless it begins with a slash.
    """

    run: bool = False
    trace_folder: str = "profiling"
    mem_warmup: int = 100
    mem_steps: int = 2
    profile_warmup: int = 102
    profile_steps: int = 2


@dataclass
class LoggingArgs:
    """`freq`: steps between log lines; `acc_freq`: batches between those within a step; `wandb`: for wandb.init;
    `memory_use`: what the memories read, too (lingua/memory_use.py).
    """

    freq: int = 10
    acc_freq: int | None = None
    wandb: dict[str, Any] | None = None
    memory_use: bool = True


@dataclass
class GuardArgs:
    """Config section `guard`.

    `max_bad_steps`: how many steps of the last `window` may be skipped, since loss or gradients were not finite, before
    the run ends; null: any number. `spike_factor`: a loss or gradient norm this many of its usual deviations above the
    median of the last `window` is reported; null: never.
    """

    max_bad_steps: int | None = 10
    window: int = 100
    spike_factor: float | None = 10.0
