"""All measurements of one device, one after the other: its tables, and a JSON file of each in a folder.

python -m apps.bench.all                   # on a GPU where there is one, within 8 minutes
python -m apps.bench.all device=cpu out=/tmp/results
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lingua.args import parse_args
from lingua.errors import UserError
from lingua.launch import run_main

DEBUG = "config=apps/main/configs/debug.yaml"
# A model of the paper's size, without what only several GPUs or a tokenizer's file allow.
LARGE = (
    "config=apps/main/configs/pkplus_373m_1024k.yaml data.tokenizer.name=bytes data.tokenizer.path=null "
    "distributed.memory_parallel_size=1 distributed.compile=false"
)

ON_A_GPU = {
    "memory_layer": "memory_layer",
    "loss": "loss",
    "values_on_cpu": "values_on_cpu",
    "train_step": f"train_step {LARGE} rounds=3 steps_per_round=2",
    "train_step_sparse": f"train_step {LARGE} rounds=3 steps_per_round=2 optim.value_update=sparse",
    "growth": "growth",
    "generate": f"generate {DEBUG} rounds=2",
}
ON_A_CPU = {
    "memory_layer": "memory_layer device=cpu",
    "loss": "loss device=cpu",
    "values_on_cpu": "values_on_cpu device=cpu",
    "train_step": f"train_step {DEBUG}",
    "train_step_sparse": f"train_step {DEBUG} optim.value_update=sparse",
    "growth": "growth device=cpu",
    "generate": f"generate {DEBUG} rounds=2",
    "dataloader": "dataloader seconds=5",
}


@dataclass
class BenchArgs:
    """`device`: cuda or cpu, null: what there is; `out`: a folder for the results."""

    device: str | None = None
    out: str | None = None


def main() -> None:
    args = parse_args(BenchArgs)
    if args.device not in (None, "cuda", "cpu"):
        raise UserError(f"device: '{args.device}' is neither cuda nor cpu")
    on_gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    # Those that look for a GPU themselves find none, if none is wanted.
    environment = os.environ if on_gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    failed = []
    for name, words in (ON_A_GPU if on_gpu else ON_A_CPU).items():
        module, *arguments = words.split()
        if args.out is not None:
            arguments.append(f"out={Path(args.out, f'{name}.json')}")
        print(f"\n{name}: python -m apps.bench.{module} {' '.join(arguments)}", flush=True)  # noqa: T201
        start = time.monotonic()
        command = [sys.executable, "-m", f"apps.bench.{module}", *arguments]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)  # noqa: T201
    if failed:
        raise UserError(f"no result of {', '.join(failed)}; see above")


if __name__ == "__main__":
    run_main(main)
