"""The arithmetic of `apps.main.fits` against models that are built, and what it refuses."""

import contextlib
import itertools
from types import SimpleNamespace

import psutil
import pytest
import torch

from apps.main import fits
from apps.main.fits import (
    activation_needs,
    check_memory,
    count_parameters_by_part,
    dense_needs,
    loader_needs,
    table_needs,
)
from apps.main.train import TrainArgs, build_model
from apps.main.transformer import count_parameters
from lingua.args import parse_args
from lingua.data import QUEUED_BATCHES
from lingua.distributed import World
from lingua.launch import oom_as_user_error
from lingua.optim import build_optimizer
from tests.helpers.training import REPOSITORY

MEMORY = "model.productkey_args"
WITH_MEMORY = [f"{MEMORY}.is_enabled=true", f"{MEMORY}.layers='0,2'", f"{MEMORY}.mem_n_keys=16", f"{MEMORY}.mem_knn=4"]
SIZES = ["model.dim=32", "model.n_layers=3", "model.n_heads=4", "model.vocab_size=300", "data.seq_len=24"]

VARIANTS = [
    [],
    ["model.weight_tying=true", "model.n_kv_heads=2", "model.head_dim=6"],
    ["model.multiple_of=48", "model.ffn_dim_multiplier=1.7"],
    ["distributed.checkpoint_each_layer=true", "model.sliding_window=8"],
    WITH_MEMORY,
    [*WITH_MEMORY, f"{MEMORY}.mem_share_values=false", f"{MEMORY}.mem_v_dim=20", f"{MEMORY}.mem_k_dim=6"],
    [*WITH_MEMORY, f"{MEMORY}.peer_variant=true", f"{MEMORY}.swilu_projection=false"],
    [*WITH_MEMORY, f"{MEMORY}.mem_gated=true", f"{MEMORY}.mem_heads=3", "distributed.model_dtype=fp32"],
    [*WITH_MEMORY, f"{MEMORY}.mem_qk_norm=true"],
]


def make_args(*arguments: str) -> TrainArgs:
    args = parse_args(TrainArgs, ["dump_dir=x", *SIZES, *arguments])
    args.model.max_seqlen = args.data.seq_len
    return args


def shipped_args(name: str, *arguments: str) -> TrainArgs:
    args = parse_args(TrainArgs, [f"config={REPOSITORY}/apps/main/configs/{name}.yaml", *arguments])
    args.model.vocab_size = max(args.model.vocab_size, 32_000)
    return args


@pytest.mark.parametrize("arguments", VARIANTS)
def test_parameters_are_those_of_the_model(arguments):
    args = make_args(*arguments)
    counts = (sum(part.count for part in parts) for parts in count_parameters_by_part(args))
    assert tuple(counts) == count_parameters(build_model(args))


@pytest.mark.parametrize("name", ["debug", "dense_373m", "llama_1B", "llama_7B", "pk_7b", "pkplus_373m_1024k"])
def test_parameters_of_shipped_configs(name):
    args = shipped_args(name)
    counts = (sum(part.count for part in parts) for parts in count_parameters_by_part(args))
    assert tuple(counts) == count_parameters(build_model(args))


@pytest.mark.parametrize("update", ["dense", "sparse"])
@pytest.mark.parametrize("arguments", VARIANTS)
def test_a_step_takes_no_less(arguments, update):
    """Parameters, gradients and moments to the byte; activations at least what is said."""
    args = make_args(*arguments, f"optim.value_update={update}")
    model = build_model(args).to_empty(device="cpu")
    model.init_weights()
    optimizer, _ = build_optimizer(model, args.optim, 10)
    tokens = torch.randint(300, (args.data.batch_size, args.data.seq_len + 1))
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    dtype = args.distributed.model_dtype
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    of_the_model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    n_saved = sum(t.untyped_storage().nbytes() for pointer, t in saved.items() if pointer not in of_the_model)
    needs = {need.what: need.bytes for need in activation_needs(args, World())}
    for what in ("logits", "the mask", "rotations"):  # not all of it is kept, and not within the graph
        needs.pop(what, None)
    if not args.distributed.checkpoint_each_layer:
        assert sum(needs.values()) <= n_saved
    loss.backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    needs = [*dense_needs(args, World()), *table_needs(args, World())]
    assert sum(need.bytes for need in needs) == sum(t.nbytes for t in held)


def test_the_loader_holds_its_buffer_and_batches():
    args = make_args("data.batch_size=3", "data.prefetch_size=5", "grad_acc_steps=4", "data.n_views=2")
    buffer, batches, _ = loader_needs(args)
    assert buffer.bytes == 5 * 3 * 25 * 4
    assert batches.bytes == (4 + QUEUED_BATCHES) * 3 * 24 * 2 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.dim=1000000000"], ["model.dim=1000000000", "GiB"]),
        (["model.n_layers=1000000000"], ["model.n_layers=1000000000"]),
        (["model.vocab_size=1000000000000"], ["model.vocab_size=1000000000000", "embedding and output"]),
        (["model.multiple_of=1000000000"], ["model.multiple_of=1000000000"]),
        (["model.ffn_dim_multiplier=1e12"], ["model.ffn_dim_multiplier=1000000000000.0"]),
        (["model.head_dim=1000000000"], ["model.head_dim=1000000000", "attention"]),
        (["data.batch_size=10000000"], ["data.batch_size=10000000"]),
        (["data.seq_len=100000000"], ["data.seq_len=100000000"]),
        (["data.prefetch_size=1000000000"], ["data.prefetch_size=1000000000", "shuffle buffer"]),
        (["grad_acc_steps=10000000000"], ["grad_acc_steps=10000000000", "batches of a step"]),
        (["data.n_views=10000000000"], ["data.n_views=10000000000"]),
        (["model.sliding_window=5", "data.seq_len=300000"], ["model.sliding_window=5", "mask"]),
        ([*WITH_MEMORY, f"{MEMORY}.mem_n_keys=1000000"], [f"{MEMORY}.mem_n_keys=1000000", "value tables"]),
        ([*WITH_MEMORY, f"{MEMORY}.mem_heads=1000000000"], [f"{MEMORY}.mem_heads=1000000000", "queries and keys"]),
        ([*WITH_MEMORY, f"{MEMORY}.mem_k_dim=1000000000"], [f"{MEMORY}.mem_k_dim=1000000000"]),
        ([*WITH_MEMORY, f"{MEMORY}.mem_v_dim=1000000000"], [f"{MEMORY}.mem_v_dim=1000000000"]),
    ],
)
def test_what_cannot_fit_is_named(monkeypatch, arguments, words):
    monkeypatch.setattr(fits, "cpu_memory", lambda: 2**36)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check_memory(make_args(*arguments), World())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_more_ranks_make_it_fit(monkeypatch):
    """The 7B model, as the README has it: 103 GB of the dense part and 34 of the table, on 80 GB."""
    monkeypatch.setattr(fits, "cpu_memory", lambda: 80 * 10**9)
    with pytest.raises(ValueError, match=r"^model\.n_layers=32, model\.dim=4096, .*feed-forwards, with gradients"):
        check_memory(shipped_args("pk_7b", "distributed.memory_parallel_size=1"), World())
    layout = ["distributed.fsdp_type=full_shard", "distributed.dp_shard=8", "distributed.memory_parallel_size=8"]
    args = shipped_args("pk_7b", *layout)
    check_memory(args, World(size=8))
    assert sum(need.bytes for need in dense_needs(args, World(size=8))) == pytest.approx(13e9, rel=0.02)
    assert sum(need.bytes for need in table_needs(args, World(size=8))) == pytest.approx(4.3e9, rel=0.02)


@pytest.mark.parametrize(("place", "refused_by"), [(None, "a GPU has"), ("cpu", "this process can have")])
def test_value_tables_count_where_they_lie(monkeypatch, place, refused_by):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(fits, "cpu_memory", lambda: 2**31)
    world = World(device=torch.device("cuda", 0))
    args = make_args(*WITH_MEMORY, f"{MEMORY}.mem_n_keys=2048")
    args.distributed.values_device = place
    with pytest.raises(ValueError, match=refused_by) if place is None else contextlib.nullcontext():
        check_memory(args, world)
    args.model.productkey_args.mem_n_keys = 8192
    with pytest.raises(ValueError, match=f"value tables, .*{refused_by}"):
        check_memory(args, world)


def test_limits_of_the_machine_count(monkeypatch, tmp_path):
    total = psutil.virtual_memory().total
    monkeypatch.setattr(fits, "CGROUP_LIMITS", (str(tmp_path / "memory.max"),))
    monkeypatch.setattr(fits.resource, "getrlimit", lambda _: (fits.resource.RLIM_INFINITY,) * 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fits.cpu_memory() == total
    for limit, found in itertools.product(("max", str(2**30)), (1, 4)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(found))
        assert fits.cpu_memory() == (total if limit == "max" else 2**30) // found
    monkeypatch.setattr(fits.resource, "getrlimit", lambda _: (psutil.Process().memory_info().vms + 2**20,) * 2)
    assert fits.cpu_memory() < 2**21


def test_running_out_of_memory_is_told_in_one_line():
    with (
        pytest.raises(ValueError, match=r"^model: too large \(.*DefaultCPUAllocator"),
        oom_as_user_error("model: too large"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ValueError, match="^model: too large$"), oom_as_user_error("model: too large"):
        bytearray(2**62)
