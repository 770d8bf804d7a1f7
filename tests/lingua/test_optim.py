"""Schedules against section 5 of the interface, parameter groups, the two clippings, placing a schedule."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.optim import (
    SCHEDULERS,
    OptimArgs,
    build_lr_fn,
    build_optimizer,
    clip_gradients,
    find_jump,
    find_oddities,
    make_state,
    set_schedule_step,
    split_parameters,
    validate_optim_args,
)
from lingua.product_key.memory import ProductKeyArgs


def build_model(**productkey_args) -> LMTransformer:
    options = {"layers": "1,2", "mem_n_keys": 8, "mem_heads": 2, "mem_knn": 4, "mem_k_dim": 4, **productkey_args}
    return LMTransformer(
        LMTransformerArgs(
            dim=8,
            n_layers=3,
            n_heads=2,
            vocab_size=11,
            max_seqlen=8,
            multiple_of=8,
            productkey_args=ProductKeyArgs(is_enabled=bool(productkey_args), **options),
        )
    )


def factors(n_steps: int, steps, **options) -> list[float]:
    schedule = build_lr_fn(OptimArgs(**options), n_steps)
    return [schedule(step) for step in steps]


# --- schedules ---------------------------------------------------------------------------------------------------


def reference(args: OptimArgs, n_steps: int, step: int) -> float | None:
    """Section 5 of the interface; None where it does not tell."""
    r, warmup = args.lr_min_ratio, args.warmup
    if args.scheduler == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if args.scheduler == "inv_sqrt":
        return max((warmup / step) ** args.exp_factor, r) if step else None
    if step > n_steps:
        return r
    if args.scheduler == "wsd":
        cycle = int(n_steps * args.cycle_length)
        decay = int(cycle * args.decay_fraction) if cycle else 0
        if not step or not decay:
            return None if not cycle else 1.0
        while step > cycle:
            step -= cycle
        p = (step - (cycle - decay)) / decay
        return 1.0 if p <= 0 else 1 / (p / r + 1 - p)
    if n_steps == warmup:
        return None
    s = (step - warmup) / (n_steps - warmup)
    if args.scheduler == "linear":
        return 1 + s * (r - 1)
    return r + (1 - r) / 2 * (1 + math.cos(math.pi * s**args.cosine_theta / args.cycle_length))


@given(
    args=st.builds(
        OptimArgs,
        scheduler=st.sampled_from(sorted(SCHEDULERS)),
        warmup=st.integers(0, 40),
        lr_min_ratio=st.floats(1e-6, 1),
        cycle_length=st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0, 1.5, 3.0]),
        cosine_theta=st.sampled_from([0.5, 1.0, 2.0]),
        decay_fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
        exp_factor=st.sampled_from([0.25, 0.5, 1.0]),
    ).filter(lambda args: args.scheduler != "inv_sqrt" or args.warmup > 0),
    n_steps=st.integers(1, 60),
)
def test_factors_follow_the_formulas(args, n_steps):
    schedule = build_lr_fn(args, n_steps)
    for step in range(max(n_steps, args.warmup) + 5):
        factor = schedule(step)
        assert 0 <= factor <= 1 + 1e-12
        expected = reference(args, n_steps, step)
        if expected is not None:
            assert factor == pytest.approx(expected, rel=1e-9, abs=1e-12), (step, args)


def test_wsd_at_its_borders():
    options = {"scheduler": "wsd", "warmup": 10, "lr_min_ratio": 0.1, "decay_fraction": 0.2}
    assert factors(100, [0, 5, 9, 10, 11, 79, 80], **options) == [0, 0.5, 0.9, 1, 1, 1, 1]
    assert factors(100, [81, 90, 99, 100, 101, 10**6], **options) == pytest.approx(
        [1 / (0.05 / 0.1 + 0.95), 1 / (0.5 / 0.1 + 0.5), 1 / (0.95 / 0.1 + 0.05), 0.1, 0.1, 0.1], rel=1e-12
    )


def test_wsd_in_several_cycles():
    options = {"scheduler": "wsd", "warmup": 5, "lr_min_ratio": 0.1, "decay_fraction": 0.2, "cycle_length": 0.5}
    steps = [5, 40, 45, 50, 51, 90, 95, 100, 101]
    middle = 1 / (0.5 / 0.1 + 0.5)
    assert factors(100, steps, **options) == pytest.approx([1, 1, middle, 0.1, 1, 1, middle, 0.1, 0.1])


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_without_warmup_the_first_step_is_whole(scheduler):
    assert factors(10, [0, 5, 10, 11], scheduler=scheduler, warmup=0, lr_min_ratio=0.2) == pytest.approx(
        [1, 0.6, 0.2, 0.2]
    )


@pytest.mark.parametrize("scheduler", ["wsd", "constant"])
def test_other_schedules_without_warmup_start_whole_too(scheduler):
    assert factors(10, [0], scheduler=scheduler, warmup=0) == [1]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "wsd", "inv_sqrt"])
def test_a_warmup_longer_than_the_run(scheduler):
    options = {"scheduler": scheduler, "warmup": 20, "lr_min_ratio": 0.1}
    assert factors(10, [0, 5, 10, 19], **options) == [0, 0.25, 0.5, 0.95]
    assert factors(10, [20, 25], **options) == pytest.approx(
        [1, (20 / 25) ** 0.5] if scheduler == "inv_sqrt" else [0.1, 0.1]
    )


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "wsd"])
def test_a_warmup_as_long_as_the_run(scheduler):
    first, *rest = factors(10, [9, 10, 11], scheduler=scheduler, warmup=10, lr_min_ratio=0.1)
    assert first == 0.9
    assert all(0.1 <= factor <= 1 for factor in rest)
    assert rest[1] == 0.1


def test_cosine_in_several_cycles_and_with_an_exponent():
    options = {"scheduler": "cosine", "warmup": 0, "lr_min_ratio": 0.2}
    assert factors(8, [0, 2, 4, 9], **options, cycle_length=0.5) == pytest.approx([1, 0.6, 0.2, 0.2])
    assert factors(8, [4], **options, cosine_theta=2.0) == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi / 4))])


# --- arguments ---------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("scheduler", value) for value in ("", "Cosine", "step")),
        *(("lr", value) for value in (-1e-3, NAN, INF)),
        *(("weight_decay", value) for value in (-0.1, NAN, INF)),
        *(("epsilon", value) for value in (-1e-8, NAN, INF)),
        *((beta, value) for beta in ("beta1", "beta2") for value in (-0.1, 1.0, 1.5, NAN)),
        *(("clip", value) for value in (0.0, -1.0, NAN, INF)),
        ("warmup", -1),
        *(("lr_min_ratio", value) for value in (-0.1, NAN, INF)),
        *(("cycle_length", value) for value in (0.0, -1.0, NAN, INF)),
        *(("cosine_theta", value) for value in (0.0, -1.0, NAN, INF)),
        *(("exp_factor", value) for value in (0.0, -1.0, NAN, INF)),
        *(("decay_fraction", value) for value in (-0.1, 1.1, NAN)),
    ],
)
def test_bad_arguments_name_their_key(key, value):
    args = OptimArgs(**{key: value})
    model = torch.nn.Linear(2, 2)
    for check in (
        validate_optim_args,
        lambda args: build_lr_fn(args, 10),
        lambda args: build_optimizer(model, args, 10),
    ):
        with pytest.raises(ValueError, match=rf"^optim\.{key}: ") as caught:
            check(args)
        assert "\n" not in str(caught.value)


def test_wsd_needs_a_ratio_above_zero():
    with pytest.raises(ValueError, match=r"^optim\.lr_min_ratio: "):
        validate_optim_args(OptimArgs(scheduler="wsd", lr_min_ratio=0.0))
    validate_optim_args(OptimArgs(scheduler="cosine", lr_min_ratio=0.0))


def test_the_defaults_are_valid():
    validate_optim_args(OptimArgs())


# --- groups ------------------------------------------------------------------------------------------------------


def names_of(model, parameters) -> set[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter] for parameter in parameters}


def test_a_dense_model_has_one_group():
    model = build_model()
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, scheduler="constant"), 10)
    (group,) = optimizer.param_groups
    assert names_of(model, group["params"]) == set(dict(model.named_parameters()))
    assert group["lr"] == 0.01


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("peer", [False, True])
def test_a_memory_model_has_three_groups(peer, share):
    model = build_model(peer_variant=peer, mem_share_values=share, mem_gated=True, value_fixed_lr=0.5)
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, scheduler="constant"), 10)
    dense, values, memory = (names_of(model, group["params"]) for group in optimizer.param_groups)
    tables = ("values_u", "values_v") if peer else ("values",)
    assert values == {
        f"layers.{block}.feed_forward.{table}.weight" for block in ([1] if share else [1, 2]) for table in tables
    }
    names = set(dict(model.named_parameters()))
    assert memory == {name for name in names if name.startswith(("layers.1.feed", "layers.2.feed"))} - values
    assert dense == names - values - memory
    assert "layers.0.feed_forward.w1.weight" in dense
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5, 0.01]


@pytest.mark.parametrize("update", ["dense", "sparse"])
def test_the_values_may_have_their_own_beta1_and_weight_decay(update):
    """Without a first moment and decay, a row that is not read in a step stays as it is."""
    args = OptimArgs(lr=0.01, scheduler="constant", value_update=update, value_beta1=0.0, value_weight_decay=0.0)
    model = build_model(value_fixed_lr=0.5)
    optimizer, _ = build_optimizer(model, args, 10)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95), (0.0, 0.95), (0.9, 0.95)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    table = model.layers[1].feed_forward.values.weight
    read_in_both = torch.ones(len(table), dtype=torch.bool)
    for token in (1, 2):
        before = table.detach().clone()
        tokens = torch.full((1, 4), token)
        model(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        read_in_both &= (table != before).any(1)
    assert 0 < read_in_both.sum() < len(table)
    unread = (table.detach() == before).all(1)
    assert unread.any()


def test_without_a_fixed_rate_the_values_have_the_models():
    optimizer, _ = build_optimizer(build_model(value_fixed_lr=None), OptimArgs(lr=0.01, scheduler="constant"), 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01] * 3


def test_a_fixed_rate_of_zero_freezes_the_values():
    model = build_model(value_fixed_lr=0.0)
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, scheduler="constant"), 10)
    table, query = model.layers[1].feed_forward.values.weight, model.layers[1].feed_forward.keys
    before = table.detach().clone(), query.detach().clone()
    model(torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)).backward()
    optimizer.step()
    assert torch.equal(table, before[0])
    assert not torch.equal(query, before[1])


def test_the_optimizer_is_adamw_as_configured():
    args = OptimArgs(lr=0.01, weight_decay=0.3, epsilon=1e-5, beta1=0.7, beta2=0.8, scheduler="constant")
    model = build_model(mem_gated=True)
    optimizer, _ = build_optimizer(model, args, 10)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.7, 0.8), 1e-5, 0.3, True)


def test_the_factor_applies_to_every_group():
    optimizer, scheduler = build_optimizer(
        build_model(value_fixed_lr=0.5), OptimArgs(lr=0.01, scheduler="linear", warmup=4, lr_min_ratio=0.5), 8
    )
    for factor in (0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.01 * factor, 0.5 * factor, 0.01 * factor]
        )
        optimizer.step()
        scheduler.step()


def test_half_precision_tables_train():
    model = build_model(value_fixed_lr=0.01)
    for table in model.layers[1].feed_forward.tables:
        table.to(torch.bfloat16)
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, scheduler="constant"), 10)
    tokens = torch.randint(11, (2, 8))
    losses = []
    for _ in range(15):
        loss = model(tokens, tokens)
        loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


# --- clipping ----------------------------------------------------------------------------------------------------


def norm(parameters) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters if p.grad is not None))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize(("dense_scale", "value_scale"), [(100.0, 100.0), (100.0, 1e-4), (1e-4, 100.0), (1e-4, 1e-4)])
def test_tables_and_the_rest_are_clipped_on_their_own(dense_scale, value_scale, share):
    torch.manual_seed(0)
    model = build_model(mem_share_values=share)
    kinds = split_parameters(model)
    rest, values = kinds["dense"] + kinds["memory"], kinds["values"]
    for parameters, scale in ((rest, dense_scale), (values, value_scale)):
        for parameter in parameters:
            parameter.grad = scale * torch.randn_like(parameter)
    before = copy.deepcopy([parameter.grad for parameter in (*rest, *values)])
    norms = norm(rest), norm(values)
    returned = clip_gradients(model, 0.7)
    assert [value.item() for value in returned] == pytest.approx(norms, rel=1e-5)
    assert norm(rest) == pytest.approx(min(norms[0], 0.7), rel=1e-4)
    assert norm(values) == pytest.approx(min(norms[1], 0.7), rel=1e-4)
    for parameter, grad in zip((*rest, *values), before, strict=True):
        cosine = torch.nn.functional.cosine_similarity(parameter.grad.flatten(), grad.flatten(), dim=0)
        assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_a_dense_model_has_one_norm():
    model = build_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    expected = norm(model.parameters())
    total, values = clip_gradients(model, 1.0)
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert values is None
    assert norm(model.parameters()) == pytest.approx(1, rel=1e-4)


def test_parameters_without_a_gradient_are_left_out():
    model = build_model(mem_gated=True)
    assert [value.item() for value in clip_gradients(model, 1.0)] == [0, 0]
    model.norm.weight.grad = torch.full_like(model.norm.weight, 2.0)
    assert [value.item() for value in clip_gradients(model, 1.0)] == pytest.approx([2 * 8**0.5, 0])


# --- the place in the schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
@pytest.mark.parametrize("step", [0, 1, 4, 7, 12, 30])
def test_a_placed_schedule_goes_on_as_a_stepped_one(step, scheduler):
    args = OptimArgs(lr=0.01, scheduler=scheduler, warmup=4, lr_min_ratio=0.3)
    stepped, placed = (build_optimizer(build_model(value_fixed_lr=0.5), args, 12) for _ in range(2))
    for _ in range(step):
        stepped[0].step()
        stepped[1].step()
    set_schedule_step(*placed, step)
    for _ in range(5):
        assert [group["lr"] for group in placed[0].param_groups] == [group["lr"] for group in stepped[0].param_groups]
        assert placed[1].last_epoch == stepped[1].last_epoch
        for optimizer, schedule in (stepped, placed):
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                schedule.step()


def test_a_placed_schedule_tells_its_rates():
    args = OptimArgs(lr=0.01, scheduler="linear", warmup=4, lr_min_ratio=0.5)
    optimizer, scheduler = build_optimizer(build_model(value_fixed_lr=0.5), args, 8)
    set_schedule_step(optimizer, scheduler, 6)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_a_schedule_can_be_placed_back():
    args = OptimArgs(lr=0.01, scheduler="cosine", warmup=4)
    optimizer, scheduler = build_optimizer(build_model(), args, 12)
    set_schedule_step(optimizer, scheduler, 10)
    set_schedule_step(optimizer, scheduler, 2)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


# --- what a config may not mean -------------------------------------------------------------------------------------


def test_inverse_square_root_needs_a_warmup():
    with pytest.raises(ValueError, match=r"^optim\.warmup: the inv_sqrt schedule .*; set 1 or more$"):
        validate_optim_args(OptimArgs(scheduler="inv_sqrt", warmup=0))
    validate_optim_args(OptimArgs(scheduler="inv_sqrt", warmup=1))
    validate_optim_args(OptimArgs(scheduler="cosine", warmup=0))


@pytest.mark.parametrize(
    ("options", "n_steps", "words"),
    [
        ({}, 100_000, []),
        ({"warmup": 9}, 10, []),
        ({"warmup": 10, "scheduler": "constant"}, 10, []),
        ({"warmup": 10}, 10, ["optim.warmup: 10 steps of 10: ", "0.9 of it"]),
        ({"warmup": 2000, "scheduler": "inv_sqrt"}, 11, ["optim.warmup: ", "0.005 of it"]),
        ({"annealing_step": 500, "warmup": 0}, 10, ["optim.annealing_step: 500 changes nothing"]),
    ],
)
def test_oddities(options, n_steps, words):
    lines = find_oddities(OptimArgs(**options), n_steps)
    assert len(lines) == bool(words)
    assert all(word in lines[0] for word in words)


def test_jumps_of_the_learning_rate():
    args = OptimArgs(lr=1.0, warmup=5, scheduler="linear", lr_min_ratio=0.1)
    assert find_jump(args, 60, args, 60, 60) is None
    assert find_jump(args, 60, args, 61, 30) is None
    assert find_jump(args, 60, args, 115, 60) == (
        "the learning rate of step 61 is 0.55, and was to be 0.1 by the checkpoint's config (steps=60)"
    )
    line = find_jump(args, 60, dataclasses.replace(args, lr=2.0, beta1=0.8), 60, 3)
    assert "of step 4 is 1.2, and was to be 0.6 by " in line
    assert line.endswith(" (optim.lr=1.0, optim.beta1=0.9)")


# --- state ----------------------------------------------------------------------------------------------------------


def test_state_is_what_a_step_would_make():
    made, stepped = (build_optimizer(nn.Linear(3, 2), OptimArgs(), 10)[0] for _ in range(2))
    make_state(made)
    for parameter in stepped.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    ours, theirs = (list(optimizer.state.values()) for optimizer in (made, stepped))
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() == their.keys()
        assert all((our[key].dtype, our[key].shape) == (their[key].dtype, their[key].shape) for key in our)
        assert all((our[key] == 0).all() for key in our)
