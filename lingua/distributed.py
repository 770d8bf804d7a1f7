"""Where am I: rank, device, process group; the few reductions that training needs."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lingua import slurm
from lingua.args import first_line
from lingua.config import DistributedArgs
from lingua.errors import UserError
from lingua.sharding import local_part as local_part

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds beyond distributed.timeout after which NCCL ends a process.
PATIENCE_WITH_NCCL = 60

# Seconds, which are nanoseconds in 64 bits somewhere in torch.
LONGEST_TIMEOUT = 10**9

# Set by torchrun to "True" where its agent keeps a store for the ranks.
AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"

# `distributed.check_every: null`. What a check takes grows with the number of ranks, by 70 us for each: some 0.07 s on
# 1,024 (apps/bench/host_barrier.py), 1.5 % of these seconds.
FEW_RANKS = 16
CHECK_SECONDS = 5

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass
class World:
    """This process among the others. `device`: where its model lives."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def find_ranks() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) from torchrun's variables, or else from those of SLURM's `srun`; (0, 0, 1)
    without either. It does not look at devices, so it can be called before `set_environment`.
    """
    if "LOCAL_RANK" in os.environ:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            if not os.environ.get(name, "").isdecimal():
                raise UserError(f"{name}: no number in the environment, though LOCAL_RANK is set; start with torchrun")
        rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return rank, local_rank, size
    return slurm.find_ranks() or (0, 0, 1)


def find_world() -> World:
    """This process's ranks, and the device that the machine has for it.

    Raises UserError where there are more local ranks than CUDA devices.
    """
    world = World(*find_ranks())
    if torch.cuda.is_available():
        n_devices, index = torch.cuda.device_count(), world.local_rank
        if n_devices == 1 and "LOCAL_RANK" not in os.environ and slurm.has_gpu_of_its_own():
            index = 0
        if index >= n_devices:
            raise UserError(
                f"local rank {index} has no GPU of its own: there are {n_devices}; "
                "lower torchrun's --nproc-per-node, or srun's --ntasks-per-node"
            )
        world.device = torch.device("cuda", index)
    return world


def validate_distributed_args(args: DistributedArgs, world: World) -> None:
    """Checks the sizes against the world, working out `dp_replicate` where they do not multiply to it.

    Raises UserError, one line that names the key.
    """
    for name in ("dp_shard", "dp_replicate", "tp_size", "memory_parallel_size"):
        if getattr(args, name) < 1:
            raise UserError(f"distributed.{name}: {getattr(args, name)} is too small, it must be 1 or more")
    if args.model_dtype not in DTYPES:
        raise UserError(f"distributed.model_dtype: '{args.model_dtype}' must be one of {', '.join(DTYPES)}")
    if args.fsdp_type not in ("no_shard", "full_shard"):
        raise UserError(f"distributed.fsdp_type: '{args.fsdp_type}' is neither no_shard nor full_shard")
    if args.values_device not in (None, "cpu"):
        raise UserError(f"distributed.values_device: '{args.values_device}' is neither null nor cpu")
    if args.float8_recipe not in (None, "rowwise"):
        raise UserError(f"distributed.float8_recipe: '{args.float8_recipe}' is neither null nor rowwise")
    for name in ("tp_size", "dp_shard", "memory_parallel_size"):
        if world.size % getattr(args, name):
            raise UserError(
                f"distributed.{name}: {getattr(args, name)} does not divide the {world.size} ranks of this run; "
                "lower it, or start more ranks with torchrun"
            )
    if args.timeout < 1:
        raise UserError(f"distributed.timeout: {args.timeout} seconds are too few, it must be 1 or more")
    if args.check_every is not None and args.check_every < 1:
        raise UserError(f"distributed.check_every: {args.check_every} is too small, it must be 1 or more, or null")
    if args.timeout > LONGEST_TIMEOUT:
        raise UserError(f"distributed.timeout: {args.timeout} seconds are more than {LONGEST_TIMEOUT}, of 30 years")
    if args.compile_cache_size_limit < 1:
        raise UserError(
            f"distributed.compile_cache_size_limit: {args.compile_cache_size_limit} is too small, it must be 1 or more"
        )
    if args.model_dtype == "fp16" and world.device.type == "cuda":
        logger.warning(
            "distributed.model_dtype: fp16 gradients can underflow, since losses are not scaled; prefer bf16"
        )
    if world.size % (args.dp_shard * args.tp_size):
        raise UserError(
            f"distributed.dp_shard: dp_shard={args.dp_shard} times tp_size={args.tp_size} does not divide the "
            f"{world.size} ranks of this run"
        )
    if args.memory_parallel_size > 1 and args.tp_size > 1:
        raise UserError(
            f"distributed.memory_parallel_size: {args.memory_parallel_size} with tp_size={args.tp_size}; set one of "
            "them to 1 (tensor parallelism splits the value table over its own ranks)"
        )
    if args.compile and args.tp_size > 1:
        raise UserError(
            f"distributed.compile: true with tp_size={args.tp_size}, which torch cannot compile; set compile=false"
        )
    if args.dp_shard > 1 and args.fsdp_type == "no_shard":
        raise UserError(f"distributed.fsdp_type: no_shard with dp_shard={args.dp_shard}; set full_shard, or dp_shard=1")
    args.dp_replicate = world.size // (args.dp_shard * args.tp_size)


def mesh_sizes(args: DistributedArgs, world: World) -> tuple[int, int, int]:
    """(dp_replicate, dp_shard, tp) as they are used, of validated `args`.

    As published, full_shard without a dp_shard of its own shards over all data-parallel ranks.
    """
    replicate = world.size // (args.dp_shard * args.tp_size)
    if args.fsdp_type == "full_shard" and args.dp_shard == 1:
        return 1, replicate, args.tp_size
    return replicate, args.dp_shard, args.tp_size


def data_rank(args: DistributedArgs, world: World) -> tuple[int, int]:
    """This process's rank among those that hold different data, and their number. A tensor-parallel group is one."""
    return world.rank // args.tp_size, world.size // args.tp_size


def steps_to_next_check(args: DistributedArgs, world: World, before: int, seconds_per_step: float) -> int:
    """How many steps to do between two checks of all ranks. All must ask with the same numbers.

    Args:
        before: how many they were so far; they double at the most, since batches of all of them are fetched ahead.
    """
    if args.check_every is not None:
        return args.check_every
    if world.size <= FEW_RANKS:
        return 1
    return max(min(int(CHECK_SECONDS / max(seconds_per_step, 1e-3)), 2 * before), 1)


@contextlib.contextmanager
def process_group(world: World, timeout: int = 600) -> Iterator[None]:
    """Joins the other ranks: nccl for tensors on GPUs, gloo for those on CPUs. Nothing to do for one process.

    After `timeout` seconds without an answer from another rank, what waits for it fails. The group stays until the
    process ends (`run_main`): taking it down was seen to hang now and then.
    """
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.size == 1:
        yield
        return
    if not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:  # srun started it, which names no place to meet at
            os.environ.update({name: os.environ.get(name, value) for name, value in slurm.meeting_point().items()})
        # Published configs set it, and between GPUs with NVLink torch 2.11 fails with it: making the group, it looks
        # for a part of it that is not there yet.
        os.environ.pop("ENABLE_INTRA_NODE_COMM", None)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        try:
            # None: torch makes one out of MASTER_ADDR and MASTER_PORT.
            store = _store_of_this_start(world, timeout) if os.environ.get(AGENTS_STORE) == "True" else None
            dist.init_process_group(backend, timeout=limit, store=store, rank=world.rank, world_size=world.size)
        except ValueError as error:
            raise UserError(
                f"MASTER_ADDR, MASTER_PORT: ranks cannot meet ({first_line(error)}); start with torchrun, or set both"
            ) from None
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                port = os.environ["MASTER_PORT"]
                raise OSError(f"MASTER_PORT: port {port} is in use by something else; set another one") from None
            if not is_of_a_lost_rank(error):
                raise
            raise OSError(
                f"the {world.size} ranks have not met within {timeout} s (distributed.timeout); did all of them start? "
                f"({first_line(error)[:300]})"
            ) from None
        _let_nccl_wait(dist.distributed_c10d._get_default_group(), timeout)
    yield
    # Nobody leaves before all are done: the first rank keeps the store that others may still ask.
    reduce_sum([0.0])


def _store_of_this_start(world: World, timeout: int) -> dist.Store:
    """Where the ranks tell each other their addresses: a new store, kept by the first rank.

    torchrun offers one that its agent keeps, in which, after a restart, the addresses of the dead ranks still stand
    (torch 2.13): a rank that is faster than another takes the old one's, and both wait in vain. So it serves here for
    nothing but the new store's own address. That of a store which died with its rank answers nobody, and is read again.
    """
    host, limit = os.environ["MASTER_ADDR"], timedelta(seconds=timeout)
    agents = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    if world.rank == 0:
        store = dist.TCPStore(host, 0, world.size, is_master=True, wait_for_workers=False, timeout=limit)
        name = uuid.uuid4().hex
        store.set(name, "")
        agents.set("lingua/store", f"{store.port} {name}")
        return store
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        port, name = agents.get("lingua/store").decode().split()
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            store = dist.TCPStore(host, int(port), is_master=False, timeout=limit)
            if store.check([name]):
                return store
        except (OSError, dist.DistError):
            pass
        time.sleep(0.1)
    raise dist.DistError("the first rank does not answer")


def rank_and_size() -> tuple[int, int]:
    """This process's rank among those of its process group, and their number; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# --- reductions ----------------------------------------------------------------------------------------------------


def reduce_sum(values: list[float]) -> list[float]:
    """Element-wise sums of plain numbers over all ranks, through the CPU: no GPU is waited for."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def any_rank(*flags: bool) -> list[bool]:
    """Of each flag, whether it is set on any rank; all ranks get the same answers."""
    return [count > 0 for count in reduce_sum([float(flag) for flag in flags])]


def broadcast_object(value: T) -> T:
    """The first rank's value, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in the order of ranks, on all of them. `group`: of all ranks, too."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Around what all ranks do: a ValueError or OSError of one of them ends it on all, and no rank is left waiting.

    The first rank that has an error raises it; the others leave by SystemExit, silently. A ValueError that is no
    UserError is a bug, but callers catch it, too (a failed evaluation does not end a run): all ranks must agree on it.
    """
    error = None
    try:
        yield
    except (ValueError, OSError) as caught:
        error = caught
    if not dist.is_initialized():
        if error is not None:
            raise error
        return
    if not reduce_sum([error is not None])[0]:
        return
    failed = gather_objects(error is not None)
    if error is not None and failed.index(True) == dist.get_rank():
        raise error
    sys.exit(1)


@contextlib.contextmanager
def failing_alike(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """As `together`, for what a run can do without: all ranks raise OSError, with the first one's message."""
    message = None
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error)
    for told in gather_objects(message, group):
        if told is not None:
            raise OSError(told)


def set_group_timeout(groups: list[dist.ProcessGroup], seconds: int) -> None:
    """For groups that torch makes with its own timeout, as those of a DeviceMesh."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        _let_nccl_wait(group, seconds)


def _let_nccl_wait(group: dist.ProcessGroup, seconds: int) -> None:
    """Longer than all else: where NCCL gives up it ends the process, before anybody could say which rank is lost."""
    if not dist.is_nccl_available() or torch.device("cuda") not in group._device_types:
        return
    backend = group._get_backend(torch.device("cuda"))
    if isinstance(backend, dist.ProcessGroupNCCL):
        backend._set_default_timeout(timedelta(seconds=seconds + PATIENCE_WITH_NCCL))


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone, or did not answer in time."""
    # gloo has no exception of its own; its messages name the place in its sources, or the connection.
    signs = ("gloo/", "Application timeout", "pair closure")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
