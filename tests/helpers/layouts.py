"""What the tests of several ranks share: layouts, and a small model laid out as apps/main/train.py does it."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.distributed import DistributedArgs, World, data_rank, validate_distributed_args
from lingua.optim import clip_gradients
from lingua.parallelize import GradientReducer, parallelize, validate_parallelism
from lingua.product_key.memory import ProductKeyArgs

# Number of ranks -> name -> `distributed.*`
LAYOUTS = {
    2: {
        "data parallel": {},
        "full_shard": {"fsdp_type": "full_shard"},
        "tensor parallel": {"tp_size": 2},
        "memory parallel": {"memory_parallel_size": 2},
        "memory parallel, full_shard": {"memory_parallel_size": 2, "fsdp_type": "full_shard"},
    },
    4: {
        "data parallel": {},
        "full_shard": {"fsdp_type": "full_shard"},
        "HSDP": {"fsdp_type": "full_shard", "dp_shard": 2},
        "tensor parallel": {"tp_size": 4},
        "tensor parallel, 2 replicas": {"tp_size": 2},
        "tensor parallel, full_shard": {"tp_size": 2, "fsdp_type": "full_shard"},
        "memory parallel": {"memory_parallel_size": 4},
        "memory parallel, 2 replicas": {"memory_parallel_size": 2},
        "memory parallel, full_shard": {"memory_parallel_size": 4, "fsdp_type": "full_shard"},
        "memory parallel, HSDP": {"memory_parallel_size": 2, "fsdp_type": "full_shard", "dp_shard": 2},
    },
}

SEQ_LEN, VOCABULARY = 8, 20


def model_args(memory: dict[str, Any] | None = None, **changes: Any) -> LMTransformerArgs:
    """Three blocks, memories in the first and the last. Many sizes are no multiple of 4 ranks, some are less than 2."""
    sizes = {"layers": "0,2", "mem_n_keys": 5, "mem_heads": 3, "mem_knn": 3, "mem_k_dim": 6, "mem_gated": True}
    productkey_args = ProductKeyArgs(**{"is_enabled": True, **sizes, **(memory or {})})
    options = {"dim": 12, "n_layers": 3, "n_heads": 4, "head_dim": 4, "multiple_of": 4, "seed": 3, **changes}
    return LMTransformerArgs(**options, vocab_size=VOCABULARY, max_seqlen=SEQ_LEN, productkey_args=productkey_args)


# Between them: tables shared and not, of the model's width and not, PEER, a tied output.
MODELS = {
    "one table": model_args({"mem_v_dim": 8}),
    "PEER": model_args({"mem_share_values": False, "peer_variant": True}, weight_tying=True),
}


def here() -> World:
    """This process among those of its group."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_rank(), dist.get_world_size())


def distributed_args(**distributed: Any) -> DistributedArgs:
    """Validated ones, in fp32 where they do not say otherwise."""
    args = DistributedArgs(**{"model_dtype": "fp32", **distributed})
    validate_distributed_args(args, here())
    return args


def build(args: LMTransformerArgs, **distributed: Any) -> tuple[LMTransformer, GradientReducer]:
    """The model laid out over the ranks, with its initial weights."""
    layout = distributed_args(**distributed)
    validate_parallelism(layout, args, args.vocab_size, args.max_seqlen, here())
    with torch.device("meta"):
        model = _with_tables_of_type(LMTransformer(args), layout.model_dtype)
    reducer = parallelize(model, layout, here())
    model.to_empty(device="cpu")
    model.init_weights()
    return model, reducer


def build_alone(args: LMTransformerArgs, model_dtype: str = "fp32") -> LMTransformer:
    """The model of one process, to compare with."""
    return _with_tables_of_type(LMTransformer(args), model_dtype)


def _with_tables_of_type(model: LMTransformer, model_dtype: str) -> LMTransformer:
    if model_dtype == "bf16":
        for memory in model.memories().values():
            for table in memory.tables:
                table.to(torch.bfloat16)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on every rank. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model: LMTransformer) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}


# --- training steps on batches that all layouts share ---------------------------------------------------------------

BATCHES, ROWS = 2, 4


def some_batches(step: int = 0) -> torch.Tensor:
    """Of one optimizer step, for all ranks together."""
    return torch.randint(VOCABULARY, (BATCHES, ROWS, SEQ_LEN + 1), generator=torch.Generator().manual_seed(step))


def backward(model: LMTransformer, reducer: GradientReducer, step: int = 0, **distributed: Any) -> None:
    """Each data-parallel rank takes its part of every batch."""
    number, n_parts = data_rank(distributed_args(**distributed), here())
    for count, batch in enumerate(some_batches(step), start=1):
        part = batch.chunk(n_parts)[number]
        reducer.begin(last=count == BATCHES)
        with torch.autocast("cpu", torch.bfloat16, enabled=distributed.get("model_dtype") == "bf16"):
            loss = model(part[:, :-1], part[:, 1:])
        (loss / BATCHES).backward()
    reducer.finish()


def train(
    model: LMTransformer, reducer: GradientReducer, optimizer: Optimizer, steps: range, clip: float, **distributed: Any
) -> list[tuple[float, float]]:
    """The norms of each step."""
    norms = []
    for step in steps:
        backward(model, reducer, step, **distributed)
        norms.append(tuple(norm.item() for norm in clip_gradients(model, clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole_state(model: LMTransformer, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter.detach()).clone()
        state |= {f"{name} {kind}": whole(value).clone() for kind, value in optimizer.state[parameter].items()}
    return state


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (actual[key] - tensor).norm() <= tolerance * tensor.norm() + 1e-9, key
