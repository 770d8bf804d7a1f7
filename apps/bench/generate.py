"""Generation beside `transformers`' generate() on the same model, exported, and beside what memory traffic allows.

    python -m apps.bench.generate config=apps/main/configs/debug.yaml [batch_sizes=[1,16]] [out=result.json]

A model of the config with random weights continues random prompts, greedily, by `max_gen_len` tokens each; both are
given the same prompts in turns and must say the same tokens (in half precision some part ways). `floor`: what a token
takes if all that it needs of weights, table rows and cache were read once at the speed at which this machine copies.
Below the table: where the time of a token goes, by operator, for the first batch size.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from apps.bench.report import report
from apps.main.generate import (
    BatchRun,
    GeneratorArgs,
    PackedCausalTransformerGenerator,
    load_consolidated_model_and_tokenizer,
    pick_device,
)
from apps.main.hf import export_hf
from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, count_parameters
from lingua.args import parse_args, to_dict
from lingua.checkpoint import CONFIG_FILE, CONSOLIDATED_FILE
from lingua.distributed import DTYPES
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.tokenizer import build_tokenizer


@dataclass
class BenchArgs(TrainArgs):
    """A training config; `rounds` are measured, one more is thrown away."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])
    prompt_len: int = 64
    max_gen_len: int = 128
    rounds: int = 5
    dtype: str = "fp32"
    device: str = "cuda"
    out: str | None = None


def save_random_model(args: BenchArgs, folder: Path) -> None:
    torch.save({"model": LMTransformer(args.model).state_dict()}, folder / CONSOLIDATED_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps({"model": to_dict(args.model), "data": to_dict(args.data)}))


def copy_speed(device: torch.device) -> float:
    """Bytes per second read, of copying a large tensor (which reads and writes each)."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / min(times)


def bytes_per_step(model: LMTransformer, batch: int, length: int, dtype: torch.dtype) -> int:
    """What one more token of each sequence must read: weights but embedding and tables, rows of those, the cache."""
    dense, _ = count_parameters(model)
    weights = (dense - model.tok_embeddings.weight.numel()) * dtype.itemsize
    rows = sum(m.reads * m.v_dim * len(m.tables) * m.tables[0].weight.element_size() for m in model.memories().values())
    attention = model.layers[0].attention
    cache = 2 * attention.n_kv_heads * attention.head_dim * length * len(model.layers) * dtype.itemsize
    return weights + batch * (rows + cache)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build_contestants(
    args: BenchArgs, folder: Path, device: torch.device
) -> tuple[
    dict[str, Callable[[list[list[int]]], list[list[int]]]], PackedCausalTransformerGenerator, Callable[[int], int]
]:
    """Name -> what continues prompts (of the same length) by max_gen_len tokens each; our generator; what a step of so
    many sequences must read, in bytes.
    """
    # Nothing is asked of a hub: the exported folder has all of it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    model, tokenizer, _ = load_consolidated_model_and_tokenizer(folder, device, args.dtype)
    tokenizer.eos_id = -1  # to the full length, whatever is said
    generator = PackedCausalTransformerGenerator(
        GeneratorArgs(max_gen_len=args.max_gen_len, dtype=args.dtype, device=args.device), model, tokenizer
    )

    def ours(prompts: list[list[int]], **changes: object) -> list[list[int]]:
        return [c.tokens for c in generator.continue_batch(prompts, replace(generator.args, **changes), seed=0)]

    exported = export_hf(folder, folder / "hf", dtype=args.dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=True, dtype=DTYPES[args.dtype]
    )
    theirs = theirs.to(device).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def of_transformers(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts, device=device)
        mask = torch.ones_like(ids)
        said = theirs.generate(ids, attention_mask=mask, max_new_tokens=args.max_gen_len, do_sample=False)
        return said[:, ids.shape[1] :].tolist()

    contestants = {"ours": ours, f"transformers {transformers.__version__}": of_transformers}
    if device.type == "cuda":
        contestants["ours, CUDA graph"] = lambda prompts: ours(prompts, reduce_generation_overhead=True)
    length = args.prompt_len + args.max_gen_len // 2
    return contestants, generator, lambda batch: bytes_per_step(model, batch, length, DTYPES[args.dtype])


def measure(args: BenchArgs, folder: Path, device: torch.device) -> tuple[list[dict[str, object]], str]:
    contestants, generator, needed = build_contestants(args, folder, device)
    speed = copy_speed(device)
    words = generator.tokenizer.n_words
    rows = []
    for batch in args.batch_sizes:
        drawn = torch.randint(words, (batch, args.prompt_len), generator=torch.Generator().manual_seed(0))
        prompts = drawn.tolist()
        times: dict[str, list[float]] = {name: [] for name in contestants}
        said: dict[str, list[list[int]]] = {}
        for _ in range(args.rounds + 1):
            for name, continue_all in contestants.items():
                start = time.perf_counter()
                said[name] = continue_all(prompts)
                _synchronize(device)
                times[name].append(time.perf_counter() - start)
        reading = time_of_reading(generator, prompts, device)
        for name, laps in times.items():
            seconds = statistics.median(laps[1:])
            same = sum(a == b for a, b in zip(said["ours"], said[name], strict=True))
            rows.append(
                {
                    "contestant": name,
                    "batch": batch,
                    "tokens/s": batch * args.max_gen_len / seconds,
                    "ms/step": 1000 * seconds / args.max_gen_len,
                    "floor ms": 1000 * needed(batch) / speed,
                    "prompts ms": 1000 * reading if name == "ours" else "-",
                    "same texts": f"{same} of {batch}",
                    "of ours": statistics.median(times["ours"][1:]) / seconds,
                }
            )
    return rows, where_time_goes(generator, args, device)


def time_of_reading(
    generator: PackedCausalTransformerGenerator, prompts: list[list[int]], device: torch.device
) -> float:
    times = []
    for _ in range(4):
        start = time.perf_counter()
        generator.continue_batch(prompts, replace(generator.args, max_gen_len=1), seed=0)
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def where_time_goes(generator: PackedCausalTransformerGenerator, args: BenchArgs, device: torch.device) -> str:
    """The operators that take most of a step, each without those that it calls."""
    prompts = [[1] * args.prompt_len] * args.batch_sizes[0]
    run = BatchRun(generator, prompts, generator.args, seed=0)
    steps = run.steps()
    for _ in range(5):
        next(steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    n_steps = min(40, args.max_gen_len - 6)
    with profile(activities=activities) as profiled:
        for _ in range(n_steps):
            next(steps)
        _synchronize(device)
    on_gpu = device.type == "cuda"
    spent = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
    }
    total = sum(time for time, _ in spent.values())
    lines = [f"a step of batch {args.batch_sizes[0]}, {'GPU' if on_gpu else 'CPU'} time by operator, profiled:"]
    for name, (microseconds, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:8]:
        share = microseconds / total
        lines.append(f"  {name[:50]:<50}  {share:6.1%}  {microseconds / n_steps:8.1f} us  {count / n_steps:6.1f} calls")
    return "\n".join(lines)


def main() -> None:
    args = parse_args(BenchArgs)
    if args.rounds < 1 or args.prompt_len < 1 or args.max_gen_len < 8 or not args.batch_sizes:
        raise UserError("rounds, prompt_len: must be 1 or more; max_gen_len: 8 or more; batch_sizes: at least one")
    args.model.max_seqlen = max(args.data.seq_len, args.prompt_len + args.max_gen_len)
    if args.model.vocab_size == -1:
        args.model.vocab_size = build_tokenizer(args.data.tokenizer.name, args.data.tokenizer.path).n_words
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(args, Path(folder))
        rows, where = measure(args, Path(folder), pick_device(args.device))
    title = f"generation, {args.name}, {args.dtype}, prompts of {args.prompt_len} and {args.max_gen_len} tokens more"
    report(title, rows, args.out)
    print(where)  # noqa: T201


if __name__ == "__main__":
    run_main(main)
