"""Steps that are not finite: skipped on all ranks, to the bit; spikes."""

import contextlib
import random

import pytest
import torch
from torch import nn

from lingua.distributed import World, local_part, reduce_sum
from lingua.nonfinite import (
    Guard,
    GuardArgs,
    Usual,
    check_weights,
    initial_grad,
    refuse_optimizer,
    validate_guard_args,
)
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.parallelize import reshard
from tests.helpers.layouts import LAYOUTS, MODELS, SEQ_LEN, VOCABULARY, build, here
from tests.helpers.ranks import run_ranks

NAN, INF = float("nan"), float("inf")


# --- a bad step ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradient_of(module, value):
    """What flows back through the output of `module` is `value` at one place."""

    def change(grad):
        spoilt = grad.clone()
        local_part(spoilt).view(-1)[3] = value
        return spoilt

    hook = module.register_forward_hook(lambda _module, _inputs, output: output.register_hook(change) and None)
    yield
    hook.remove()


@contextlib.contextmanager
def loss_of(model, value):
    hook = model.register_forward_hook(lambda _module, _inputs, loss: loss + value)
    yield
    hook.remove()


FAULTS = {
    "loss nan": lambda model: loss_of(model, NAN),
    "loss inf": lambda model: loss_of(model, INF),
    "gradient nan": lambda model: gradient_of(model.layers[1], NAN),
    "gradient inf": lambda model: gradient_of(model.layers[2], -INF),
    # Of the value table and of what lies before it.
    "memory's gradient nan": lambda model: gradient_of(model.layers[0].feed_forward, NAN),
}


class Trainer:
    """A step as apps/main/train.py does it, of two batches."""

    def __init__(self, model_name, value_update, layout):
        half = layout.get("model_dtype") == "bf16"
        self.model, self.reducer = build(MODELS[model_name], **layout)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        rounding = "stochastic" if half and value_update == "sparse" else "nearest"
        args = OptimArgs(lr=0.1, warmup=0, value_update=value_update, value_rounding=rounding)
        self.optimizer, _ = build_optimizer(self.model, args, 10)
        self.guard, self.n_steps = Guard(GuardArgs(), self.model, here()), 0
        # Ranks of tensor parallelism work on the same tokens.
        self.random = torch.Generator().manual_seed(0 if "tp_size" in layout else here().rank)

    def step(self, fault=None):
        """`fault`: on rank 1. Returns what the guard says."""
        self.n_steps += 1
        with FAULTS[fault](self.model) if fault and here().rank == 1 else contextlib.nullcontext():
            losses = torch.zeros(())
            for last in (False, True):
                tokens = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=self.random)
                self.reducer.begin(last=last)
                with self.autocast:
                    loss = self.model(tokens, tokens)
                (loss / 2).backward(initial_grad(loss))
                losses += loss.detach()
        self.reducer.finish()
        norms = clip_gradients(self.model, 1.0)
        self.optimizer.found_inf = self.guard.decide(self.n_steps, losses / 2, norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.guard.read()
        return self.guard.explain() if self.guard.hear(reduce_sum(self.guard.tell())) else []

    def forward(self):
        with self.autocast:
            self.model(torch.ones(2, SEQ_LEN, dtype=torch.long))
        reshard(self.model)

    def state(self):
        """Copies of weights, moments and numbers of steps."""
        state = {}
        for name, parameter in self.model.named_parameters():
            state |= {name: parameter.detach()}
            state |= {f"{name} {key}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: local_part(tensor).clone() for name, tensor in state.items()}


def spoil(every_case):
    """Of each case and fault: whether the bad step has changed anything on this rank, and what the guard says."""
    found = []
    for faults, *case in every_case:
        trainer, of_case = Trainer(*case), {}
        trainer.step()
        before = trainer.state()
        for fault in faults:
            lines = trainer.step(fault)
            step = trainer.guard.step_to_compute_again()
            if step is not None:
                lines.append(trainer.guard.explain_again(trainer.model, step, step, trainer.forward))
            now = trainer.state()
            of_case[fault] = [
                now.keys() == before.keys() and all(map(torch.equal, now.values(), before.values())),
                lines,
            ]
        assert trainer.step() == []
        after = trainer.state()
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert after["norm.weight step"] == before["norm.weight step"] + 1
        assert not torch.equal(after["norm.weight"], before["norm.weight"])
        assert trainer.guard.skipped == len(faults)
        found.append(of_case)
    return found


def test_a_bad_step_of_one_rank_changes_nothing_on_any():
    """On every layout, with one model or another; with sparse updates where they go."""
    dense = [(list(FAULTS), list(MODELS)[n % 2], "dense", layout) for n, layout in enumerate(LAYOUTS[2].values())]
    sparse = [
        (list(FAULTS)[::2], "one table", "sparse", layout)
        for layout in ({}, {"memory_parallel_size": 2, "model_dtype": "bf16"})
    ]
    for of_rank in run_ranks(2, spoil, dense + sparse):
        for (_, model, _, layout), of_case in zip(dense + sparse, of_rank, strict=True):
            for fault, (is_same, lines) in of_case.items():
                what = f"{model}, {layout}, {fault}: {lines}"
                assert is_same, what
                line, *again = lines
                assert " is skipped" in line, what
                # Not again, where the step before was bad as well.
                assert [" is finite everywhere" in other for other in again] == [True] * (fault == "loss nan"), what
                assert "rank 1 (" in line, what
                # Ranks of tensor parallelism give it to each other within the pass.
                assert "rank 0 (" not in line or "tp_size" in layout, what
                assert ("the loss is not finite" in line) == fault.startswith("loss"), what


def disagree():
    """The averaged gradients of rank 1 are not what rank 0 has: a fault of a machine."""
    guard = Guard(GuardArgs(), build(MODELS["one table"])[0], here())
    guard.decide(1, torch.tensor(2.0), [torch.tensor(NAN if here().rank == 1 else 1.0), None])
    guard.read()
    assert guard.hear(reduce_sum(guard.tell()))
    with pytest.raises(
        ValueError, match=r"^step 1: averaged gradients are not finite on rank 1 \(\S+\), but on other "
    ):
        guard.explain()


def test_ranks_that_do_not_decide_alike():
    run_ranks(2, disagree)


def alone(**changes):
    return Guard(GuardArgs(**changes), nn.Linear(2, 2), World())


def take(guard, step, loss, *norms):
    guard.decide(step, torch.tensor(loss), [torch.tensor(norm) for norm in norms])
    guard.read()
    return guard.explain() if guard.hear(reduce_sum(guard.tell())) else []


@pytest.mark.parametrize(
    ("norms", "skipped"),
    [((1.0, 2.0), 0), ((NAN, 1.0), 1), ((1.0, INF), 1), ((1e30, 1.0), 0), ((0.0,), 0), ((INF,), 1)],
)
def test_norms_decide(norms, skipped):
    found_inf = alone().decide(1, torch.tensor(2.0), [*map(torch.tensor, norms), None])
    assert found_inf.dtype == torch.float32
    assert found_inf.item() == skipped


def test_which_gradients_were_not_finite():
    (line,) = take(alone(), 3, 2.5, 0.5, NAN)
    assert line == (
        "step 3 is skipped, as if it had not been: gradients are not finite (gradient norm 0.5, gradient norm of the "
        "value tables nan)"
    )


def test_too_many_within_the_window():
    """In a row or not; those that were long ago count no more."""
    guard, bad, over = alone(max_bad_steps=3, window=20), (1, 10, 22, 29, 41, 42, 60), []
    for step in range(1, 70):
        take(guard, step, 2.0, NAN if step in bad else 1.0)
        over += [step] * guard.is_over(step)
    # At step 29 with 10 and 22; at 41 with 22 and 29; 42, 41 and 29 until 49.
    assert over == [29, *range(41, 49), 60]
    assert guard.skipped == 7
    assert not alone(max_bad_steps=None).is_over(10)


def test_counts_go_on_with_a_run():
    guard, again = alone(), alone()
    take(guard, 1, NAN, NAN)
    again.restore(guard.state())
    take(again, 2, NAN, NAN)
    assert again.metrics() == {"guard/skipped": 2, "guard/loss_spikes": 0, "guard/grad_spikes": 0}


# --- spikes -------------------------------------------------------------------------------------------------------


def test_spikes_of_a_noisy_series():
    usual, noise, found = Usual(100), random.Random(0), {}
    for step in range(400):
        value = 3 * 0.998**step + noise.gauss(0, 0.05) + {200: 3.0, 201: 2.9, 300: 4.0}.get(step, 0)
        spike = usual.find_spike(value, 10)
        if spike is not None:
            found[step] = spike.begins
    assert found == {200: True, 201: False, 300: True}


@pytest.mark.parametrize(
    ("before", "value", "is_spike"),
    [
        ([2.0] * 19, 100.0, False),  # too few to tell
        ([2.0] * 20, 2.19, False),  # no noise at all: a hundredth of the median is the least deviation
        ([2.0] * 20, 2.21, True),
        ([2.0, 4.0] * 20, 14.0, False),
        ([2.0, 4.0, 2.0] * 20, 20.0, True),
        ([0.0] * 30, 1.0, False),
        ([2.0] * 20, 0.0, False),
        ([2.0] * 20, NAN, False),
        ([2.0] * 20, INF, False),
    ],
)
def test_what_is_a_spike(before, value, is_spike):
    usual = Usual(100)
    assert all(usual.find_spike(other, 10) is None for other in before)
    assert (usual.find_spike(value, 10) is not None) == is_spike


def test_the_window_moves_on():
    """What is usual are the last values alone, so a new level is so after a while."""
    usual = Usual(20)
    spikes = [usual.find_spike(value, 10) is not None for value in [1.0] * 30 + [2.0] * 30]
    assert spikes == [False] * 30 + [True] * 2 + [False] * 28


def test_spikes_can_be_left_alone(caplog):
    guard = alone(spike_factor=None)
    for step in range(1, 40):
        take(guard, step, 100.0 if step == 30 else 2.0, 1.0)
    assert guard.loss_spikes == 0
    assert not caplog.records


def test_a_spike_is_one_line(caplog):
    guard = alone()
    for step in range(1, 60):
        take(guard, step, 2.0, 9.0 if step in (30, 31, 32) else 1.0, 5.0 if step == 40 else 0.5)
    assert (guard.loss_spikes, guard.grad_spikes) == (0, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "step 30: a spike of the gradient norm: 9, 800 times the usual deviation above the median 1 of 29 steps",
        "step 40: a spike of the gradient norm of the value tables: 5, 900 times the usual deviation above the median "
        "0.5 of 39 steps",
    ]


# --- optimizers ---------------------------------------------------------------------------------------------------


def test_optimizers_that_cannot_skip_are_refused():
    """Those that pass do skip."""
    parameter = nn.Parameter(torch.ones(3))
    for optimizer in (torch.optim.AdamW([parameter], fused=True), torch.optim.SGD([parameter], lr=1.0, fused=True)):
        refuse_optimizer(optimizer)
        parameter.grad, optimizer.found_inf = torch.full((3,), NAN), torch.ones(())
        optimizer.step()
        assert torch.equal(parameter, torch.ones(3))
    group = {"params": [parameter], "fused": False}
    for name, optimizer in (
        ("SGD", torch.optim.SGD([parameter], lr=1.0)),
        ("AdamW", torch.optim.AdamW([parameter])),
        ("AdamW", torch.optim.AdamW([group], fused=True)),
        ("RMSprop", torch.optim.RMSprop([parameter])),
    ):
        with pytest.raises(ValueError, match=f"^{name} cannot skip a step .*fused=True"):
            refuse_optimizer(optimizer)


# --- weights, arguments -------------------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3))
    check_weights(model, 4)
    with torch.no_grad():
        model[1].bias[2], model[2].weight[1, 1] = INF, NAN
    with pytest.raises(ValueError, match=r"^step 4: weights are not finite \(1\.bias and 1 others\), .*[^\n]$"):
        check_weights(model, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_bad_steps": 0}, ["guard.max_bad_steps: 0", "null"]),
        ({"window": 5}, ["guard.window: 5", "20 or more"]),
        ({"window": 30, "max_bad_steps": 31}, ["guard.window: 30", "max_bad_steps"]),
        *(({"spike_factor": value}, ["guard.spike_factor: ", "null"]) for value in (0.0, -1.0, NAN, INF)),
    ],
)
def test_bad_arguments_name_their_key(changes, words):
    with pytest.raises(ValueError, match=".") as caught:
        validate_guard_args(GuardArgs(**changes))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_good_arguments():
    validate_guard_args(GuardArgs())
    validate_guard_args(GuardArgs(max_bad_steps=None, window=20, spike_factor=None))
