"""What the tests of several ranks share: layouts, and a small model laid out as apps/main/train.py does it."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.distributed import DistributedArgs, World, validate_distributed_args
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
