"""How parameters move: the registry of optimizers, groups, two gradient clippings, learning-rate schedules.

`optim.name` picks the optimizer out of OPTIMIZERS, which says what one has to provide. AdamW is PyTorch's. Another one
moves the parameters that it asks for; AdamW moves the rest. The value tables' gradients and updates are dense, as
published, or row-sparse (lingua/sparse_adamw.py), beside any optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from lingua import muon
from lingua.config import OptimArgs
from lingua.errors import UserError
from lingua.memory_layer import MemoryLayer
from lingua.product_key.row_gradients import RowGradients
from lingua.sharding import local_part
from lingua.sparse_adamw import SparseAdamW, fused_adamw, new_adamw_state

VALUE_UPDATES = ("dense", "sparse")
VALUE_ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class OptimizerRule:
    """What an optimizer provides beside AdamW: an entry of OPTIMIZERS.

    `new_state(parameter)`: the tensors that it keeps for a parameter, by name, beside a `step` of fp32 that is there.
    `update(parameters, states, group, skip)`: moves parameters that have gradients, which may be split over ranks
    (DTensors); all ranks call it together. `group` has the keys of `build_groups`. `skip` is None, or a tensor: where
    it is 1, neither a parameter nor its state may change by a bit, whatever the gradients are, and without waiting for
    a GPU. `can_skip`: that `update` does so.
    `moments`: tensors of a parameter's size and type in its state, for the planner.
    `takes`: picks its parameters out of a model; AdamW moves all others, and the value tables.
    """

    new_state: Callable[[nn.Parameter], dict[str, torch.Tensor]]
    update: Callable[[list[nn.Parameter], list[dict[str, torch.Tensor]], dict[str, Any], torch.Tensor | None], None]
    moments: int
    takes: Callable[[nn.Module], list[nn.Parameter]]
    can_skip: bool = False


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the blocks' linear layers: no embedding, output layer, norm, key or value table."""
    linears = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    return list(dict.fromkeys(linear.weight for linear in linears))


# `optim.name` -> what moves the parameters that it takes. None: AdamW alone.
OPTIMIZERS: dict[str, OptimizerRule | None] = {
    "adamw": None,
    "muon": OptimizerRule(muon.new_state, muon.update, moments=1, takes=hidden_matrices, can_skip=True),
}


def validate_optim_args(args: OptimArgs) -> None:
    """Raises UserError, one line that names the key."""
    if args.name not in OPTIMIZERS:
        raise UserError(f"optim.name: '{args.name}' must be one of {', '.join(OPTIMIZERS)}")
    rule = OPTIMIZERS[args.name]
    if rule is not None and not rule.can_skip:
        raise UserError(
            f"optim.name: {args.name} cannot skip a step whose gradients are not finite; let its update() heed `skip`, "
            "and set can_skip=True in lingua.optim.OPTIMIZERS"
        )
    if args.scheduler not in SCHEDULERS:
        raise UserError(f"optim.scheduler: '{args.scheduler}' must be one of {', '.join(SCHEDULERS)}")
    if args.value_update not in VALUE_UPDATES:
        raise UserError(f"optim.value_update: '{args.value_update}' is neither {' nor '.join(VALUE_UPDATES)}")
    if args.value_rounding not in VALUE_ROUNDINGS:
        raise UserError(f"optim.value_rounding: '{args.value_rounding}' is neither {' nor '.join(VALUE_ROUNDINGS)}")
    if args.value_rounding == "stochastic" and args.value_update != "sparse":
        raise UserError(
            "optim.value_rounding: stochastic cannot be combined with value_update=dense; set value_update=sparse"
        )
    for name in ("lr", "weight_decay", "epsilon", "warmup", "lr_min_ratio", "value_weight_decay"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"optim.{name}: {value} must be 0 or more")
    for name in ("beta1", "beta2", "momentum", "value_beta1"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"optim.{name}: {value} must be at least 0 and below 1")
    for name in ("clip", "cycle_length", "cosine_theta", "exp_factor"):
        if not 0 < getattr(args, name) < math.inf:
            raise UserError(f"optim.{name}: {getattr(args, name)} must be a number above 0")
    if not 0 <= args.decay_fraction <= 1:
        raise UserError(f"optim.decay_fraction: {args.decay_fraction} must be between 0 and 1")
    if args.scheduler == "wsd" and not args.lr_min_ratio > 0:
        raise UserError("optim.lr_min_ratio: the wsd schedule divides by it, so it must be above 0")
    if args.scheduler == "inv_sqrt" and args.warmup == 0:
        raise UserError(
            "optim.warmup: the inv_sqrt schedule decays with warmup / step, so with 0 every step would have the rate "
            "lr * lr_min_ratio; set 1 or more"
        )


def find_oddities(args: OptimArgs, n_steps: int) -> list[str]:
    """What a run of `n_steps` does that its config may not mean: a line that names the key for each."""
    lines = []
    if args.scheduler != "constant" and args.warmup >= n_steps:
        lines.append(
            f"optim.warmup: {args.warmup} steps of {n_steps}: the learning rate never gets to optim.lr, its last one "
            f"is {(n_steps - 1) / args.warmup:.2g} of it"
        )
    if args.annealing_step != OptimArgs.annealing_step:
        lines.append(f"optim.annealing_step: {args.annealing_step} changes nothing; no schedule uses it")
    return lines


def find_jump(before: OptimArgs, n_before: int, now: OptimArgs, n_now: int, step: int) -> str | None:
    """A line where a resume at `step` changes the learning rate by more than a tenth of what it would have been."""
    old, new = (args.lr * build_lr_fn(args, n)(step) for args, n in ((before, n_before), (now, n_now)))
    if abs(new - old) <= 0.1 * max(old, new):
        return None
    changed = [f"steps={n_before}"] * (n_before != n_now)
    changed += [f"optim.{name}={value}" for name, value in vars(before).items() if value != getattr(now, name)]
    return (
        f"the learning rate of step {step + 1} is {new:.3g}, and was to be {old:.3g} by the checkpoint's config "
        f"({', '.join(changed)})"
    )


# --- schedules: the factor on the learning rate at a step, section 5 of the interface ------------------------------


def _constant(args: OptimArgs, n_steps: int, step: int) -> float:
    return 1.0


def _linear(args: OptimArgs, n_steps: int, step: int) -> float:
    if step < args.warmup:
        return step / args.warmup
    if step >= n_steps:
        return args.lr_min_ratio
    progress = (step - args.warmup) / (n_steps - args.warmup)
    return 1 + progress * (args.lr_min_ratio - 1)


def _inv_sqrt(args: OptimArgs, n_steps: int, step: int) -> float:
    if step < args.warmup:
        return step / args.warmup
    return max((args.warmup / step) ** args.exp_factor if step else 1.0, args.lr_min_ratio)


def _cosine(args: OptimArgs, n_steps: int, step: int) -> float:
    if step < args.warmup:
        return step / args.warmup
    if step > n_steps or n_steps == args.warmup:
        return args.lr_min_ratio
    progress = (step - args.warmup) / (n_steps - args.warmup)
    # Without the sign that Lingua's later version flips in odd cycles: the memory paper's code has none.
    wave = math.cos(math.pi * progress**args.cosine_theta / args.cycle_length)
    return args.lr_min_ratio + (1 - args.lr_min_ratio) / 2 * (1 + wave)


def _wsd(args: OptimArgs, n_steps: int, step: int) -> float:
    """Warmup, stable, decay (Wen et al., 2024, arXiv 2410.05192), once or, with a short cycle, several times."""
    if step < args.warmup:
        return step / args.warmup
    if step > n_steps:
        return args.lr_min_ratio
    cycle = max(int(n_steps * args.cycle_length), 1)
    decay = int(cycle * args.decay_fraction)
    step_in_cycle = (step - 1) % cycle + 1 if step else 0
    if step_in_cycle <= cycle - decay:
        return 1.0
    progress = (step_in_cycle - (cycle - decay)) / decay
    return 1 / (progress / args.lr_min_ratio + 1 - progress)


SCHEDULERS = {"constant": _constant, "linear": _linear, "inv_sqrt": _inv_sqrt, "cosine": _cosine, "wsd": _wsd}


def build_lr_fn(args: OptimArgs, n_steps: int) -> Callable[[int], float]:
    """step -> factor on every group's learning rate. Raises UserError for an unknown `args.scheduler`."""
    validate_optim_args(args)
    schedule = SCHEDULERS[args.scheduler]
    return lambda step: schedule(args, n_steps, step)


# --- groups --------------------------------------------------------------------------------------------------------


def _memories(model: nn.Module) -> list[MemoryLayer]:
    return [module for module in model.modules() if isinstance(module, MemoryLayer)]


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The model's parameters by kind, each once: `dense`, `values` (tables), `memory` (the rest of the memories)."""
    memories = _memories(model)
    values = {table.weight: None for memory in memories for table in memory.tables}
    memory = {p: None for module in memories for p in module.parameters() if p not in values}
    dense = [p for p in model.parameters() if p not in values and p not in memory]
    return {"dense": dense, "values": list(values), "memory": list(memory)}


def row_gradients(model: nn.Module) -> dict[nn.Parameter, RowGradients]:
    """Those of the value tables whose gradients stay row-sparse."""
    by_rows = {table.weight: table.row_gradients for memory in _memories(model) for table in memory.tables}
    return {weight: rows for weight, rows in by_rows.items() if rows is not None and not rows.whole}


def build_groups(model: nn.Module, args: OptimArgs) -> list[dict[str, Any]]:
    """The optimizer's groups. One for a dense model; with memories, those of `split_parameters` in its order.

    The tables' group has the learning rate `value_fixed_lr` where that is set; the schedule's factor applies to it too.
    Tables of memories with another learning rate than the first memory's have their own groups, after these. The
    memories' other parameters train like the dense ones; that they are a group is the published order. What another
    optimizer than AdamW takes is the last group, which names it by the key `optimizer`.
    """
    kinds = split_parameters(model)
    rule = OPTIMIZERS[args.name]
    taken = [] if rule is None else rule.takes(model)
    left = {kind: [p for p in parameters if p not in set(taken)] for kind, parameters in kinds.items()}
    groups = [{"params": left["dense"], "lr": args.lr}]
    if kinds["values"]:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for memory in _memories(model):
            rate = args.lr if memory.value_fixed_lr is None else memory.value_fixed_lr
            by_rate.setdefault(rate, []).extend(table.weight for table in memory.own_tables)
        own = {} if args.value_beta1 is None else {"betas": (args.value_beta1, args.beta2)}
        if args.value_weight_decay is not None:
            own["weight_decay"] = args.value_weight_decay
        first, *others = ({"params": tables, "lr": rate, **own} for rate, tables in by_rate.items() if tables)
        groups += [first, {"params": left["memory"], "lr": args.lr}, *others]
    if taken:
        groups.append({"params": taken, "lr": args.lr, "optimizer": args.name, "momentum": args.momentum})
    return groups


class MixedOptimizer(SparseAdamW):
    """AdamW, sparse for tables with row-sparse gradients; groups that name another of OPTIMIZERS move by that.

    Of parameters that are split over ranks, AdamW updates this rank's parts as plain tensors: through DTensor the same
    update costs a host many times more, the first one most of all.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = _new_state(parameter, group)
            states = [self.state[parameter] for parameter in parameters]
            update = OPTIMIZERS[group["optimizer"]].update if "optimizer" in group else _adamw
            update(parameters, states, group, skip)
        self.step_rows()
        return loss


def _adamw(
    parameters: list[nn.Parameter],
    states: list[dict[str, torch.Tensor]],
    group: dict[str, Any],
    skip: torch.Tensor | None,
) -> None:
    """An OptimizerRule's `update`."""
    fused_adamw(
        [local_part(parameter) for parameter in parameters],
        [local_part(parameter.grad) for parameter in parameters],
        [local_part(state["exp_avg"]) for state in states],
        [local_part(state["exp_avg_sq"]) for state in states],
        [state["step"] for state in states],
        group,
        skip,
    )


def build_optimizer(model: nn.Module, args: OptimArgs, n_steps: int, seed: int = 0) -> tuple[AdamW, LambdaLR]:
    """The optimizer of `build_groups` and its schedule.

    With `value_update: sparse` the tables' gradients are row-sparse from now on; clear them by the optimizer's
    `zero_grad`. `seed`: of stochastic rounding. Raises UserError for arguments that cannot work.
    """
    validate_optim_args(args)
    groups = build_groups(model, args)
    options = {
        "betas": (args.beta1, args.beta2),
        "eps": args.epsilon,
        "weight_decay": args.weight_decay,
        "fused": True,
    }
    if args.value_update == "sparse":
        for memory in _memories(model):
            for table in memory.own_tables:
                table.note_rows()
    optimizer = MixedOptimizer(groups, row_gradients(model), args.value_rounding == "stochastic", seed, **options)
    return optimizer, LambdaLR(optimizer, build_lr_fn(args, n_steps))


def count_moments(model: nn.Module, args: OptimArgs) -> dict[nn.Parameter, int]:
    """For each parameter, how many tensors of its size and type the optimizer keeps."""
    rule = OPTIMIZERS[args.name]
    taken = set() if rule is None else set(rule.takes(model))
    return {parameter: rule.moments if parameter in taken else 2 for parameter in model.parameters()}


def make_state(optimizer: AdamW) -> None:
    """Makes the state that a checkpoint is read into. torch would make it by a step, with a gradient of each
    parameter's size: of a table with sparse updates that is more than a run ever takes.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = _new_state(parameter, group)


def _new_state(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the optimizer of the group keeps for a parameter. AdamW, which loads all of it, looks for a `step`."""
    if "optimizer" not in group:
        return new_adamw_state(parameter)
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, **OPTIMIZERS[group["optimizer"]].new_state(parameter)}


def set_schedule_step(optimizer: AdamW, scheduler: LambdaLR, step: int) -> None:
    """Puts both where `step` calls of `scheduler.step()` would have put them."""
    scheduler.last_epoch = step
    for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * factor(step)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def clip_gradients(model: nn.Module, max_norm: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Clips the gradients of the value tables and of all else, each to `max_norm` on its own.

    Of parameters that are split over ranks (DTensors) the norm is that of the whole. All ranks must call it. Returns
    the norms before clipping, in fp32 or more: (all else, tables or None where there are none).
    """
    kinds = split_parameters(model)
    rest = _clip(kinds["dense"] + kinds["memory"], {}, max_norm)
    values = _clip(kinds["values"], row_gradients(model), max_norm) if kinds["values"] else None
    return rest, values


@torch.no_grad()
def _clip(parameters: list[nn.Parameter], by_rows: dict[nn.Parameter, RowGradients], max_norm: float) -> torch.Tensor:
    laid_out, local = [], []
    for parameter in parameters:
        if parameter in by_rows:
            if not by_rows[parameter].is_empty:
                laid_out.append(parameter)
                local.append(by_rows[parameter].rows()[1])
        elif parameter.grad is not None:
            laid_out.append(parameter.grad)
            local.append(local_part(parameter.grad))
    if not local:
        return torch.zeros(())
    norm = _total_norm(laid_out, local)
    # The small term is torch's, against a division by zero.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for part in _by_device_and_type(local):
        torch._foreach_mul_(part, factor.to(part[0]))
    return norm


def _total_norm(laid_out: list[torch.Tensor], local: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients as one vector. `local`: what this rank holds of them; `laid_out`: tensors that lie on
    the ranks as they do.
    """
    # What is split over the same ranks is summed over them at once.
    held: dict[tuple[ProcessGroup, ...], list[torch.Tensor]] = {}
    for whole, part in zip(laid_out, local, strict=True):
        groups = ()
        if isinstance(whole, DTensor):
            split = [dim for dim, placement in enumerate(whole.placements) if not placement.is_replicate()]
            groups = tuple(whole.device_mesh.get_group(dim) for dim in split if whole.device_mesh.size(dim) > 1)
        held.setdefault(groups, []).append(part)
    squares = []
    for groups, parts in held.items():
        norms = [
            norm
            for alike in _by_device_and_type(parts)
            for norm in torch._foreach_norm(alike, dtype=torch.promote_types(alike[0].dtype, torch.float32))
        ]
        square = torch.stack(norms).square().sum()
        for group in groups:
            all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def _by_device_and_type(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(alike.values())
