"""What layouts of ranks are made of, through nccl, on one GPU: run by test_gpu.py in a process of its own.

    python -m tests.helpers.gpu_one_rank FOLDER

FSDP over one rank, a table split over one rank (in the CPU's memory, too) and saving in the background, beside the same
model without them.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.checkpoint import CheckpointArgs, CheckpointManager, load_training
from lingua.distributed import DistributedArgs
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.parallelize import GradientReducer, Meshes, _shard
from lingua.product_key.colwise_embeddingbag import ColwiseEmbeddingBag
from lingua.product_key.memory import ProductKeyArgs


def build(laid_out: bool, peer: bool, on_cpu: bool):
    memories = ProductKeyArgs(is_enabled=True, layers="1,3", mem_n_keys=64, mem_knn=16, mem_k_dim=64, peer_variant=peer)
    args = LMTransformerArgs(dim=256, n_layers=4, n_heads=4, vocab_size=256, max_seqlen=128, productkey_args=memories)
    with torch.device("meta"):
        model = LMTransformer(args)
    tables = [table for memory in model.memories().values() for table in memory.own_tables]
    for table in tables:
        table.to(torch.bfloat16)
    meshes = Meshes()
    if laid_out:
        if on_cpu:
            model.keep_values_on_cpu(torch.device("cuda", 0))
        whole = init_device_mesh("cuda", (1, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
        memory = init_device_mesh("cuda", (1, 1), mesh_dim_names=("memory_replicate", "memory_parallel"))
        meshes = Meshes(data=whole, every_data=whole["dp_shard"], memory=memory)
        for table in tables:
            parallelize_module(table, memory, ColwiseEmbeddingBag())
        _shard(model, whole, DistributedArgs(fsdp_type="full_shard", model_dtype="bf16"), by_rows=False)
    model.to_empty(device="cuda")
    model.init_weights()
    return model, GradientReducer(model, meshes, 1, by_rows=False)


def train(model, reducer, optimizer, n_steps):
    tokens = torch.randint(256, (4, 129), generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for _ in range(n_steps):
        reducer.begin(last=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        reducer.finish()
        norms = clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item(), *(norm.item() for norm in norms)])
    return torch.tensor(losses)


def main(folder: Path) -> None:
    torch.cuda.set_device(0)
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    for peer, on_cpu in ((False, False), (True, False), (False, True), (True, True)):
        plain, laid_out = build(False, peer, on_cpu), build(True, peer, on_cpu)
        args = OptimArgs(lr=1e-3, warmup=0, value_update="sparse" if on_cpu else "dense")
        optimizers = [build_optimizer(model, args, 100)[0] for model, _ in (plain, laid_out)]
        expected, found = (
            train(*pair, optimizer, 8) for pair, optimizer in zip((plain, laid_out), optimizers, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=1e-3)
        # Trained on while it is written; what is loaded from it goes on as the original did.
        path = folder / f"peer-{peer}-{on_cpu}"
        manager = CheckpointManager(CheckpointArgs(save_async=True), path)
        checkpoint = manager.save(8, laid_out[0], optimizers[1], {"step": 8, "data_loader_state": {}}, {})
        onward = train(*laid_out, optimizers[1], 3)
        manager.finish()
        load_training(checkpoint, plain[0], optimizers[0])
        torch.testing.assert_close(train(*plain, optimizers[0], 3), onward, rtol=5e-2, atol=1e-3)
    print("the same")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
