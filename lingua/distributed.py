"""Where am I: rank, device, process group; the few reductions that training needs; the launch environment."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lingua import slurm
from lingua.args import first_line, looks_secret, refuse_secrets
from lingua.errors import UserError
from lingua.sharding import local_part as local_part
from lingua.watch import is_first_to_tell, name_lost_ranks

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Seconds that other ranks leave the first one to tell an error that all of them have.
PATIENCE_WITH_FIRST_RANK = 10

# Seconds that ranks which leave since another one has an error give that one to tell it.
PATIENCE_WITH_THE_ERROR = 3

# Seconds beyond distributed.timeout after which NCCL ends a process.
PATIENCE_WITH_NCCL = 60

# Seconds, which are nanoseconds in 64 bits somewhere in torch.
LONGEST_TIMEOUT = 10**9

# Exit code after Ctrl-C, as of a shell's commands.
INTERRUPTED = 128 + signal.SIGINT

# Set by torchrun to "True" where its agent keeps a store for the ranks.
AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"

# Settings of CUDA's allocator, all of which but the backend torch reads when it first looks for a device.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

# `distributed.check_every: null`. What a check takes grows with the number of ranks, by 70 us for each: some 0.07 s on
# 1,024 (apps/bench/host_barrier.py), 1.5 % of these seconds.
FEW_RANKS = 16
CHECK_SECONDS = 5

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


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
    # each other; null: every step up to FEW_RANKS, and about every CHECK_SECONDS on more ranks.
    check_every: int | None = None
    # Read, so that published configs load: the data loader's worker is a program of its own, whatever this says.
    spawn_method: str = "forkserver"


def default_environment() -> dict[str, str]:
    """Variables set before training starts (config section `env`, which may name any others)."""
    return {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_SERVICE_FORCE_INTEL": "GNU",
        "NCCL_IB_TIMEOUT": "22",
        "NCCL_DEBUG": "INFO",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


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
        raise UserError(f"distributed.model_dtype: '{args.model_dtype}' is none of {', '.join(DTYPES)}")
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


def set_environment(variables: dict[str, str]) -> None:
    """Sets the variables of config section `env`, and logs each that had another value before.

    They reach what starts after this. Call it before anything looks at a device (`find_world`), and CUDA, its allocator
    and NCCL read them too. torch has its number of CPU threads since it was imported.
    """
    for name, value in variables.items():
        before = os.environ.get(name)
        if before not in (None, value):
            shown = "***" if looks_secret(name, before) else before
            logger.info("env: %s=%s from the config replaces %s", name, value, shown)
        os.environ[name] = value


def validate_environment(variables: dict[str, str]) -> None:
    """Raises UserError for what cannot be a variable, and for those that would carry a secret into saved configs."""
    refuse_secrets(variables, "env")
    for name in variables:
        if not name or "=" in name or "\0" in name + variables[name]:
            raise UserError(f"env.{name}: no variable can have this name, or value {variables[name][:30]!r}")
        backend = re.search(r"backend:\s*(\w+)", variables[name]) if name in ALLOCATOR_VARIABLES else None
        if backend and backend[1] != "native" and backend[0] not in os.environ.get(name, ""):
            raise UserError(
                f"env.{name}: {backend[0]} is read when torch is imported, before any config; export it in the shell"
            )


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


def from_first_rank(value: T) -> T:
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
def together() -> Iterator[None]:
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
    """For groups that torch makes with a timeout of its own, as those of a DeviceMesh."""
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


def _leave(code: object) -> None:
    """Ends the process; at once where there is a process group, which could wait for the others on its way out."""
    _flush_stdout()
    if dist.is_initialized():
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _flush_stdout() -> None:
    """On a full disk, Python would try once more when it ends, with a traceback and an exit code of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _launchers_rank() -> str:
    return os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"


def run_main(main: Callable[[], None]) -> None:
    """Runs a command's main function: a UserError or OSError ends in one line on stderr and exit code 1.

    So does a rank that died or hangs, on all the others. Any other exception is a bug and ends in its traceback.
    LINGUA_TRACEBACK=1 in the environment shows where a line came from.
    """
    try:
        main()
        if dist.is_initialized():
            _leave(0)
        _flush_stdout()
    except SystemExit as leaving:
        if dist.is_initialized() and leaving.code:
            # Another rank has the error (`together`). torchrun ends all of them when the first one leaves, so let it
            # speak before.
            time.sleep(PATIENCE_WITH_THE_ERROR)
        _leave(leaving.code)
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        of_the_user = isinstance(error, (UserError, OSError))
        lost = not of_the_user and dist.is_initialized() and is_of_a_lost_rank(error)
        if not (of_the_user or lost) or os.environ.get("LINGUA_TRACEBACK"):
            traceback.print_exc()
        message = " ".join(str(error).split())
        if lost:
            while not is_first_to_tell():  # another thread does, and ends the process
                time.sleep(1)
            message = f"lost {name_lost_ranks()}: dead, or without an answer for too long ({message[:300]})"
        elif of_the_user and not dist.is_initialized() and _launchers_rank() != "0":
            # What is wrong before the ranks have met is mostly wrong on all of them: let the first one say it, after
            # which torchrun ends the others.
            time.sleep(PATIENCE_WITH_FIRST_RANK)
        if of_the_user or lost:
            _flush_stdout()
            print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        _leave(1)


# --- signals -------------------------------------------------------------------------------------------------------


def _forget_stop_signals() -> None:
    """In a forked process, such as a worker of a pool, signals end it again."""
    for number, default in STOP_SIGNALS.items():
        if isinstance(getattr(signal.getsignal(number), "__self__", None), StopSignal):
            signal.signal(number, default)
            if number == signal.SIGINT:
                signal.set_wakeup_fd(-1)  # it is the trainer's


@functools.cache
def _forget_stop_signals_in_children() -> None:
    """Once a process, and not before it needs to: an import changes nothing for a program that only uses a layer."""
    os.register_at_fork(after_in_child=_forget_stop_signals)


# The signals, and Python's own handlers for them.
STOP_SIGNALS = {
    signal.SIGUSR2: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}


class StopSignal:
    """Remembers, within its `with`, USR2 (SLURM's warning before a job's end) and TERM, for the loop to answer; within
    `taking_interrupts` INT, too. `name`: of the first one, None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    @property
    def is_interrupt(self) -> bool:
        """Whether it is Ctrl-C."""
        return self.name == signal.SIGINT.name

    def __enter__(self) -> StopSignal:
        # Other threads cannot receive signals; training in one goes without.
        if threading.current_thread() is threading.main_thread():
            _forget_stop_signals_in_children()
            for number in (signal.SIGUSR2, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
            # A job of lingua.stool starts with them blocked: one that came too early comes now.
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def taking_interrupts(self, message: str | None) -> Iterator[None]:
        """The first INT (Ctrl-C) logs `message` and is remembered. The second ends the process at once, whatever its
        main thread waits in: another rank that hangs, a disk.
        """
        in_background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        if in_background or threading.current_thread() is not threading.main_thread():
            yield
            return
        # Python runs handlers in the main thread, when that comes back from what it waits in. The signal's number is in
        # this socket at once.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        listener = threading.Thread(
            target=self._count_interrupts, args=(reader, message), name="interrupts", daemon=True
        )
        handler = signal.signal(signal.SIGINT, self._remember)
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            signal.signal(signal.SIGINT, handler)
            writer.shutdown(socket.SHUT_RDWR)  # for forked processes, too
            listener.join()
            writer.close()
            reader.close()

    def _count_interrupts(self, reader: socket.socket, message: str | None) -> None:
        n_interrupts = 0
        while number := reader.recv(1):
            if number[0] != signal.SIGINT:
                continue
            n_interrupts += 1
            if n_interrupts > 1:
                os._exit(INTERRUPTED)
            if message is not None:
                logger.warning("%s", message)

    def _remember(self, number: int, _frame: object) -> None:
        self.name = self.name or signal.Signals(number).name
