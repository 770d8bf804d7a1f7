"""What keeps a bad step from spoiling a run: one whose gradients are not finite changes nothing, and is counted.

Whether a step is bad is decided where the gradients are, so nothing waits for a GPU. All ranks decide alike without
asking each other: the norms of gradients are those of the whole, and a rank whose loss is not finite begins its
backward pass with NaN, which the averaging of gradients carries to all. What was found is read when the step is done,
on a GPU while the next one is being computed.

A skipped step leaves parameters, moments and AdamW's own count of steps as they were, to the bit. The batches are
used up, so step number, learning rate and place in the data go on.
"""

from __future__ import annotations

import logging
import math
import platform
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from lingua.config import GuardArgs
from lingua.distributed import World, gather_objects, local_part
from lingua.errors import UserError

logger = logging.getLogger(__name__)

# What is counted, and what gradients have norms of.
COUNTS = ("skipped", "loss_spikes", "grad_spikes")
NORMS = ("gradient norm", "gradient norm of the value tables")

# Values that a running median is made of at the least.
MIN_VALUES = 20
# The usual deviation is taken from the value that this share does not exceed, and the one that it is not below, which
# are this many standard deviations from the median where values are normal. At the least it is a share of the median.
HIGH_SHARE, HIGH_SIGMAS = 0.9, 1.2816
LEAST_DEVIATION = 0.01


def validate_guard_args(args: GuardArgs) -> None:
    """Raises UserError, one line that names the key."""
    if args.max_bad_steps is not None and args.max_bad_steps < 1:
        raise UserError(f"guard.max_bad_steps: {args.max_bad_steps} is too small, it must be 1 or more, or null")
    least = max(MIN_VALUES, args.max_bad_steps or 0)
    if args.window < least:
        raise UserError(
            f"guard.window: {args.window} steps are too few, it must be {MIN_VALUES} or more, and max_bad_steps or more"
        )
    if args.spike_factor is not None and not 0 < args.spike_factor < math.inf:
        raise UserError(f"guard.spike_factor: {args.spike_factor} must be a number above 0, or null")


def refuse_optimizer(optimizer: Optimizer) -> None:
    """Raises UserError for an optimizer that takes no notice of `found_inf`: bad steps would reach the weights."""
    # torch's own sign of those that do: fused ones, and any that says so of itself.
    heeds = getattr(optimizer, "_step_supports_amp_scaling", False)
    if not heeds or any(group.get("fused") is False for group in optimizer.param_groups):
        raise UserError(
            f"{type(optimizer).__name__} cannot skip a step whose gradients are not finite: make it with fused=True, "
            "or let its step() do nothing where the tensor found_inf is 1, and set _step_supports_amp_scaling on it"
        )


def initial_grad(loss: torch.Tensor) -> torch.Tensor:
    """What the gradient of `loss` begins with: 1, or NaN where the loss is not finite."""
    return 1 + 0 * loss.detach()


@dataclass
class Reading:
    """What was found of a step: this rank's loss, a sum that is not finite where this rank's own gradients are not,
    and the norms, which are the same on all ranks.
    """

    step: int
    loss: float
    own_gradients: float
    norms: list[float]

    @property
    def is_bad(self) -> bool:
        return not all(map(math.isfinite, self.norms))


class Guard:
    """Decides of every step whether it is skipped, counts those, and tells what was wrong with them.

    All ranks call its methods alike. `skipped`, `loss_spikes`, `grad_spikes`: steps of the whole run.
    """

    def __init__(self, args: GuardArgs, model: nn.Module, world: World):
        self.args, self.world = args, world
        self.skipped = self.loss_spikes = self.grad_spikes = 0
        # On a GPU the newest step is being computed while the one before it is read.
        self._behind = 1 if world.device.type == "cuda" else 0
        self._pending: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._unheard: list[Reading] = []
        self._alarming: list[Reading] = []
        self._skipped_lately: deque[int] = deque()
        self._usual = {name: Usual(args.window) for name in ("loss", *NORMS)}
        self._own_gradients = torch.zeros((), device=world.device)
        if world.size > 1:
            self._watch_gradients(model)

    def state(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTS}

    def restore(self, state: dict[str, int]) -> None:
        for name in COUNTS:
            setattr(self, name, state.get(name, 0))

    def metrics(self) -> dict[str, int]:
        return {f"guard/{name}": count for name, count in self.state().items()}

    def _watch_gradients(self, model: nn.Module) -> None:
        """At the embedding: the residual stream carries down to it what is not finite anywhere in a backward pass."""

        def note(grad: torch.Tensor) -> None:
            self._own_gradients.add_(local_part(grad).sum(dtype=torch.float32), alpha=0)

        def watch(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            if output.requires_grad:
                output.register_hook(note)

        model.tok_embeddings.register_forward_hook(watch)

    @torch.no_grad()
    def decide(self, step: int, loss: torch.Tensor, norms: Iterable[torch.Tensor | None]) -> torch.Tensor:
        """1 where the step is to be skipped, else 0; for the optimizer's `found_inf`, which fused AdamW heeds.

        Args:
            loss: this rank's.
            norms: of the gradients, as `clip_gradients` returns them.
        """
        device = self.world.device
        norms = torch.stack([norm.to(device, torch.float32) for norm in norms if norm is not None])
        numbers = torch.cat([torch.stack([loss.float(), self._own_gradients]), norms])
        self._own_gradients.zero_()
        done = None
        if device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        self._pending.append((step, numbers, done))
        return norms.isfinite().all().logical_not().float()

    def read(self, everything: bool = False) -> None:
        """Counts the steps that are done; with `everything` it waits for the newest one, too."""
        while len(self._pending) > (0 if everything else self._behind):
            step, numbers, done = self._pending.popleft()
            if done is not None:
                done.synchronize()
            loss, own_gradients, *norms = numbers.tolist()
            self._unheard.append(Reading(step, loss, own_gradients, norms))
            if self._unheard[-1].is_bad:
                self.skipped += 1
                self._skipped_lately.append(step)

    def tell(self) -> list[float]:
        """What the other ranks are to hear of the steps read since the last time, as sums over all ranks."""
        return [any(reading.is_bad for reading in self._unheard), *(reading.loss for reading in self._unheard)]

    def hear(self, sums: list[float]) -> bool:
        """Takes the sums of what all ranks have told, reports spikes, and returns whether a step was bad."""
        (is_alarming, *losses), readings = sums, self._unheard
        self._unheard, self._alarming = [], readings if is_alarming else []
        for reading, loss in zip(readings, losses, strict=True):
            self._look_for_spikes(reading.step, [loss / self.world.size, *reading.norms])
        return bool(is_alarming)

    def _look_for_spikes(self, step: int, values: list[float]) -> None:
        if self.args.spike_factor is None:
            return
        spikes = {
            name: usual.find_spike(value, self.args.spike_factor)
            for (name, usual), value in zip(self._usual.items(), values, strict=False)
        }
        self.loss_spikes += spikes["loss"] is not None
        self.grad_spikes += any(spikes.get(name) is not None for name in NORMS)
        for name, spike in spikes.items():
            if spike is not None and spike.begins and self.world.rank == 0:
                logger.warning("step %s: a spike of the %s: %s", step, name, spike.text)

    def explain(self) -> list[str]:
        """A line for each bad step that was heard of: what was not finite, and on which rank it began.

        Raises UserError where ranks have not decided alike, so that their weights differ now.
        """
        gathered = gather_objects((self._here(), self._alarming))
        ranks = [rank for rank, _ in gathered]
        lines = []
        for readings in zip(*(readings for _, readings in gathered), strict=True):
            skipped = [rank for rank, reading in zip(ranks, readings, strict=True) if reading.is_bad]
            if 0 < len(skipped) < len(ranks):
                raise UserError(
                    f"step {readings[0].step}: averaged gradients are not finite on {', '.join(skipped)}, but on other "
                    "ranks they are, so weights differ now; that is a fault of hardware or network: leave that machine "
                    "out, and start again from the last checkpoint"
                )
            if skipped:
                lines.append(_explain(readings, ranks))
        return lines

    def step_to_compute_again(self) -> int | None:
        """Of the bad steps that were heard of, the first with a loss that is not finite, where none was skipped just
        before: its forward pass may tell more. The same on all ranks.
        """
        wrong = gather_objects([reading.step for reading in self._alarming if not math.isfinite(reading.loss)])
        step = min(sum(wrong, []), default=None)
        return None if step is None or step - 1 in self._skipped_lately else step

    def explain_again(self, model: nn.Module, step: int, now: int, forward: Callable[[], object]) -> str:
        """Where in the model something is not finite when `forward` computes the step's loss once more.

        `now`: the newest step that is done, whose weights `forward` computes with.
        """
        gathered = gather_objects((self._here(), find_origin(model, forward)))
        origins = [f"{origin}" + (f" on {rank}" if self.world.size > 1 else "") for rank, origin in gathered if origin]
        is_older = any(later not in self._skipped_lately for later in range(step + 1, now + 1 - self._behind))
        again = f"step {step}, computed again" + f" with the weights of step {now}" * is_older
        if origins:
            return f"{again}: the first output that is not finite is that of {', '.join(origins)}"
        if is_older:
            return f"{again}, is finite everywhere"
        return f"{again}, is finite everywhere: that was a passing fault, of a machine perhaps"

    def _here(self) -> str:
        return f"rank {self.world.rank} ({platform.node()})"

    def is_over(self, step: int) -> bool:
        """Whether too many of the steps up to `step` were skipped."""
        while self._skipped_lately and self._skipped_lately[0] <= step - self.args.window:
            self._skipped_lately.popleft()
        return self.args.max_bad_steps is not None and len(self._skipped_lately) >= self.args.max_bad_steps

    def why_over(self, step: int, saved: int) -> str:
        """`saved`: the step of the newest checkpoint, which is an earlier one than `step` where saving has failed."""
        steps = self._skipped_lately
        what = "has the last good weights" if saved == step else "is the newest, since a later one could not be written"
        return (
            f"guard.max_bad_steps: {len(steps)} of the last {self.args.window} steps ({steps[0]} to {steps[-1]}) were "
            f"skipped, since loss or gradients were not finite; the checkpoint of step {saved} {what}: start again to "
            "go on, or, if that does not help, go back to an earlier one and lower optim.lr"
        )


def _explain(readings: tuple[Reading, ...], ranks: list[str]) -> str:
    first, is_alone = readings[0], len(ranks) == 1
    of_loss = [
        f"{reading.loss}" + ("" if is_alone else f" on {rank}")
        for rank, reading in zip(ranks, readings, strict=True)
        if not math.isfinite(reading.loss)
    ]
    began = [rank for rank, reading in zip(ranks, readings, strict=True) if not math.isfinite(reading.own_gradients)]
    norms = ", ".join(f"{name} {norm:.3g}" for name, norm in zip(NORMS, first.norms, strict=False))
    if of_loss:
        what = f"the loss is not finite ({', '.join(of_loss)})"
    elif is_alone:
        what = f"gradients are not finite ({norms})"
    elif began:
        what = f"gradients are not finite ({norms}), before averaging on {', '.join(began)}"
    else:
        what = f"gradients are not finite ({norms}), but on no rank those between the layers"
    return f"step {first.step} is skipped, as if it had not been: {what}"


@torch.no_grad()
def find_origin(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """The name of the first block, or other part of `model`, whose output is not finite in `forward`, which runs it."""
    found = []

    def look(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            if not found and not local_part(output).isfinite().all():
                found.append(name)

        return hook

    parts = {"tok_embeddings": model.tok_embeddings, "norm": model.norm, "output": model.output}
    parts |= {f"layers.{number}": block for number, block in enumerate(model.layers)}
    hooks = [part.register_forward_hook(look(name)) for name, part in parts.items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


class Spike(NamedTuple):
    """`begins`: whether the value before it was none."""

    begins: bool
    text: str


class Usual:
    """The last `window` values of something, to compare the next one with."""

    def __init__(self, window: int):
        self._values: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._is_high = False

    def find_spike(self, value: float, factor: float) -> Spike | None:
        """What is to be said of `value` where it is far above the usual ones, to which it belongs from now on."""
        if not math.isfinite(value):
            return None
        text = self._compare(value, factor)
        spike = None if text is None else Spike(begins=not self._is_high, text=text)
        self._is_high = spike is not None
        self._add(value)
        return spike

    def _compare(self, value: float, factor: float) -> str | None:
        n_values = len(self._sorted)
        if n_values < MIN_VALUES:
            return None
        low, middle, high = (self._sorted[int(share * n_values)] for share in (1 - HIGH_SHARE, 0.5, HIGH_SHARE))
        deviation = max((high - middle) / HIGH_SIGMAS, (middle - low) / HIGH_SIGMAS, LEAST_DEVIATION * abs(middle))
        if value - middle <= factor * deviation or deviation == 0:
            return None
        times = (value - middle) / deviation
        return f"{value:.4g}, {times:.0f} times the usual deviation above the median {middle:.4g} of {n_values} steps"

    def _add(self, value: float) -> None:
        if len(self._values) == self._values.maxlen:
            del self._sorted[bisect_left(self._sorted, self._values[0])]
        self._values.append(value)
        insort(self._sorted, value)


@torch.no_grad()
def check_weights(model: nn.Module, step: int) -> None:
    """Raises UserError where this rank's weights are not finite: no checkpoint is to be written of them."""
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if not torch.linalg.vector_norm(local_part(parameter), dtype=torch.float32).isfinite()
    ]
    if wrong:
        more = f" and {len(wrong) - 1} others" if len(wrong) > 1 else ""
        raise UserError(
            f"step {step}: weights are not finite ({wrong[0]}{more}), though the step's gradients were; nothing is "
            "saved of them: start again from the last checkpoint, with a lower optim.lr or a larger optim.epsilon"
        )
