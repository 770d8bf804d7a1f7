"""What a model has learned of real text: bits a byte of held-out documents, and what tasks of lm-eval say.

    python -m apps.capacity.measure_text out=capacity.json eval.ckpt_dir=dumps/x/checkpoints/0000004000 \
        eval.dump_dir=dumps/x/evals/text
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.capacity.measure import sizes_of
from apps.main.eval import EvalArgs, flat_metrics, launch_eval
from lingua.args import parse_args, write_whole
from lingua.checkpoint import CONFIG_FILE, read_json
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.logger import init_logger


@dataclass
class MeasureTextArgs:
    """`eval`: what is measured, as apps.main.eval takes it. `out`: a JSON file for what is found."""

    out: str = ""
    eval: EvalArgs = field(default_factory=EvalArgs)


def measure_text(args: EvalArgs) -> dict[str, Any]:
    """Evaluates a checkpoint: `measures`, with a number for each validation source (bits a byte) and each metric of a
    task; `parameters`, `memory_parameters`, `flops_per_token`. Raises as `launch_eval`.
    """
    measures = {}
    for name, value in flat_metrics(launch_eval(args)).items():
        kind, _, rest = name.partition("/")
        what, _, metric = rest.rpartition("/")
        if kind == "eval" and metric != "sample_len" and "_stderr" not in metric:
            measures[f"{what}: {metric}"] = value
        elif metric == "bits_per_byte":
            measures[f"{what}: bits per byte"] = value
    config = read_json(Path(args.ckpt_dir) / CONFIG_FILE, ("data", "model"))
    return {"measures": measures, **sizes_of(args.ckpt_dir, config)}


def main() -> None:
    init_logger()
    args = parse_args(MeasureTextArgs)
    if not args.out:
        raise UserError("out: not set; name a JSON file for what is found")
    write_whole(Path(args.out), json.dumps(measure_text(args.eval), indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
