"""What needs a CUDA device: `pytest -m gpu` runs all of it in one call."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.bench.layout import compare, measure
from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator
from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import from_dict
from lingua.distributed import DistributedArgs, World
from lingua.loss import linear_cross_entropy, tokens_of_chunk
from lingua.memory_use import MemoryUse
from lingua.nonfinite import Guard, GuardArgs, initial_grad
from lingua.optim import OptimArgs, build_optimizer, clip_gradients
from lingua.parallelize import parallelize, validate_parallelism
from lingua.probe import probe
from lingua.product_key import cpu_offload, large_search
from lingua.product_key import search as search_module
from lingua.product_key.memory import HashingMemory, ProductKeyArgs
from lingua.product_key.search import search
from lingua.product_key.slot_use import SlotUse
from lingua.product_key.xformer_embeddingbag import xformers_embedding_bag
from lingua.profiling import Profiler, ProfilingArgs, Workload
from lingua.tokenizer import build_tokenizer
from lingua.transformer import attend, create_causal_mask
from tests.helpers.lookups import DTYPES, check_products, check_rows, check_sums, draw
from tests.lingua import test_loss as loss_checks

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def relative_error(actual, expected):
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def fmha_has_operators():
    fmha = pytest.importorskip("xformers.ops").fmha
    x = torch.zeros(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    try:
        fmha.memory_efficient_attention(x, x, x, attn_bias=fmha.attn_bias.LowerTriangularMask())
    except NotImplementedError:  # what xformers says where none of its operators takes such inputs
        return False
    return True


def test_fmha_without_operators_says_so():
    if fmha_has_operators():
        pytest.skip("this xformers has them")
    x = torch.zeros(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="attn_impl: fmha cannot run here"):
        attend(x, x, x, create_causal_mask(8, "fmha"), "fmha")


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("impl", ["sdpa", "flex_attention", "fmha"])
def test_attention_implementations_agree(impl, kv_heads, window):
    if impl == "fmha" and not fmha_has_operators():
        pytest.skip("this xformers was built without CUDA operators")
    torch.manual_seed(0)
    shapes = [(2, 256, heads, 64) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    results = []
    for name, dtype in (("sdpa", torch.float64), (impl, torch.bfloat16)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        mask = create_causal_mask(256, name, window, torch.device("cuda"))
        y = attend(q, k, v, mask, name)
        y.backward(torch.ones_like(y))
        results.append([y, q.grad, k.grad, v.grad])
    for expected, actual in zip(*results, strict=True):
        assert relative_error(actual, expected) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", [False, True])
def test_memory_as_on_the_cpu(peer, dtype):
    memory = HashingMemory(48, 48, mem_n_keys=37, mem_heads=3, mem_knn=7, mem_k_dim=16, peer_variant=peer)
    for table in memory.tables:
        table.to(dtype)
    x = torch.randn(2, 50, 48)
    results = []
    for device in ("cpu", "cuda"):
        memory.to(device).zero_grad()
        y = memory(x.to(device))
        y.square().sum().backward()
        results.append({"y": y, **{name: p.grad.clone() for name, p in memory.named_parameters()}})
    for name, expected in results[0].items():
        assert relative_error(results[1][name], expected) < (1e-4 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "bag", "size", "dim"),
    [(300, 7, 40, 1), (64, 130, 5, 1024), (500, 32, 100_000, 48), (0, 4, 9, 8), (33, 9, 70, 5000)],
)
def test_lookup_against_float64(n, bag, size, dim, dtype):
    """Forward and both gradients; slots with far more places than a program sums, too; twice the same bits."""
    torch.manual_seed(0)
    indices = torch.randint(size, (n, bag), device="cuda", dtype=torch.int32)
    weight, scores, grad = (torch.randn(shape, device="cuda").to(dtype) for shape in ((size, dim), (n, bag), (n, dim)))
    results = []
    for _ in range(2):
        leaves = [weight.clone().requires_grad_(), scores.clone().requires_grad_()]
        y = xformers_embedding_bag(indices, *leaves)
        y.backward(grad)
        results.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    exact = [weight.double().requires_grad_(), scores.double().requires_grad_()]
    expected = (exact[0][indices.long()] * exact[1][..., None]).sum(1)
    expected.backward(grad.double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for actual, wanted in zip(results[0], [expected, *(leaf.grad for leaf in exact)], strict=True):
        assert n == 0 or relative_error(actual, wanted) < tolerance


@given(
    n=st.integers(0, 300),
    bag=st.one_of(st.integers(1, 20), st.integers(1, 200)),
    size=st.one_of(st.integers(1, 9), st.integers(1, 5000)),
    dim=st.one_of(st.integers(1, 40), st.integers(1, 2500)),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    score_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    long=st.sampled_from([1, 3, 16, 1024]),
    skew=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_lookups_of_any_shape(n, bag, size, dim, dtype, index_dtype, score_dtype, long, skew, seed):
    """Sums and both gradients; slots that are read from more than `long` places are summed in pieces."""
    indices, *others = draw(n, bag, size, dim, dtype, index_dtype, score_dtype, seed, "cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lingua.product_key.lookup_kernels.LONG", long)
        check_sums(indices.clamp(max=size // 3) if skew else indices, *others)


@given(
    n=st.integers(0, 300),
    bag=st.integers(1, 40),
    size=st.integers(1, 500),
    dim=st.one_of(st.integers(1, 40), st.integers(1, 1100)),
    dtype=st.sampled_from(DTYPES),
    x_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_products_of_any_shape(n, bag, size, dim, dtype, x_dtype, seed):
    indices, weight, grad, x = draw(n, bag, size, dim, dtype, seed=seed, device="cuda")
    check_products(indices, weight, x.to(x_dtype), grad)


@given(
    lookups=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 12)), min_size=1, max_size=3),
    n_slots=st.sampled_from([1, 2, 3, 20, 1000]),
    dim=st.one_of(st.integers(1, 40), st.integers(500, 1100)),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    long=st.sampled_from([3, 8, 1024]),
    seed=st.integers(0, 1000),
)
def test_rows_that_are_read(lookups, n_slots, dim, dtype, index_dtype, long, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lingua.product_key.lookup_kernels.LONG", long)
        check_rows(lookups, n_slots, dim, dtype, index_dtype, seed, "cuda")


@pytest.mark.parametrize("n_slots", [1, 2, 3, 50])
def test_long_slots_side_by_side(monkeypatch, n_slots):
    """Pieces with the end of one long slot and the start of another, and with short ones between them."""
    monkeypatch.setattr("lingua.product_key.lookup_kernels.LONG", 8)
    for seed in range(10):
        check_sums(*draw(400, 5, n_slots, 60, torch.float32, seed=seed, device="cuda"))


def test_tables_beyond_32_bits():
    """More elements than 32 bits count, with the last rows read: forward and backward."""
    size, dim = 2**21 + 3, 1104  # a number that bf16 has
    weight = torch.zeros(size, dim, device="cuda", dtype=torch.bfloat16)
    weight[-1], weight[-2] = 1, 2
    weight.requires_grad_()
    indices = torch.tensor([[size - 1, size - 2, 0]], device="cuda")
    scores = torch.ones(1, 3, device="cuda", requires_grad=True)
    y = xformers_embedding_bag(indices, weight, scores)
    assert torch.equal(y, torch.full_like(y, 3))
    y.backward(torch.ones_like(y))
    assert scores.grad.tolist() == [[dim, 2 * dim, 0]]
    assert weight.grad[[0, -1, -2]].float().sum().item() == 3 * dim
    assert weight.grad[1:-2].abs().max().item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_keys", "knn"), [(1024, 32), (37, 37), (100, 1), (512, 128)])
def test_search_is_exact(n_keys, knn, dtype):
    torch.manual_seed(0)
    query = torch.randn(50, 3, 2, 32, device="cuda").to(dtype).requires_grad_()
    keys = torch.randn(3, 2, n_keys, 32, device="cuda").to(dtype).requires_grad_()
    scores, slots = search(query, keys, knn)
    halves = [torch.einsum("nhd,hkd->nhk", query[:, :, half], keys[:, half]).float() for half in (0, 1)]
    sums = (halves[0][..., :, None] + halves[1][..., None, :]).flatten(-2)
    assert torch.equal(scores, sums.topk(knn).values)
    assert torch.equal(scores, sums.gather(-1, slots))
    assert all(len(set(row)) == knn for row in slots.flatten(0, 1).tolist())
    grad = torch.randn_like(scores)
    scores.backward(grad)
    actual = query.grad, keys.grad
    query.grad = keys.grad = None
    sums.gather(-1, slots).backward(grad)
    for found, wanted in zip(actual, (query.grad, keys.grad), strict=True):
        assert relative_error(found, wanted) < {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_search_gives_the_same_bits_twice(dtype):
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device="cuda").to(dtype) for shape in ((500, 2, 2, 32), (2, 2, 64, 32))]
    results = []
    for _ in range(2):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        scores, slots = search(*leaves, 9)
        scores.square().sum().backward()
        results.append([scores, slots, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["train_dense.npz", "train_memory.npz"])
def test_golden_losses(case):
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    entry = next(entry for entry in manifest if entry.get("file") == case)
    file = np.load(GOLDEN / case)
    args = LMTransformerArgs(**entry["model"], productkey_args=ProductKeyArgs(**entry["productkey_args"]))
    model = LMTransformer(args).cuda()
    model.load_state_dict({key[5:]: torch.from_numpy(file[key]) for key in file if key.startswith("init.")})
    optimizer, scheduler = build_optimizer(model, OptimArgs(**entry["optim"]), entry["n_steps"])
    for batch, expected in zip(torch.from_numpy(file["tokens"]).cuda(), file["losses"], strict=True):
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        clip_gradients(model, entry["optim"]["clip"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_train_stop_and_resume(tmp_path):
    """In bf16, the published default: USR2 stops it with a checkpoint, and it goes on to the end."""
    source = tmp_path / "data" / "words"
    source.mkdir(parents=True)
    lines = [json.dumps({"text": f"document {i} " * 50}) for i in range(200)]
    (source / "words.chunk.00.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "apps.main.train", f"dump_dir={tmp_path}/run", f"data.root_dir={tmp_path}/data"]
    command += ["data.sources.words=1", "data.seq_len=128", "model.dim=64", "model.n_heads=2", "model.n_layers=4"]
    command += [
        "model.productkey_args.is_enabled=true",
        "model.productkey_args.layers=1,3",
        "steps=600",
        "logging.freq=1",
    ]
    command += ["model.productkey_args.mem_n_keys=64", "model.productkey_args.mem_k_dim=32", "optim.warmup=10"]
    command += ["model.productkey_args.mem_heads=2"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ)
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 5):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(120) == 0
    stopped_at = json.loads(metrics.read_text().splitlines()[-1])["global_step"]
    assert stopped_at < 600
    assert (tmp_path / "run" / "checkpoints" / f"{stopped_at:010d}").is_dir()
    subprocess.run(command, cwd=ROOT, check=True)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["global_step"] for row in rows] == list(range(1, 601))
    assert rows[-1]["loss/out"] < 1.0
    assert rows[-1]["memory/max_active_gib"] > 0


PARTS = {
    "compile": {"compile": True},
    "each layer checkpointed": {"checkpoint_each_layer": True},
    "selective checkpointing, compile": {"selective_activation_checkpointing": True, "compile": True},
    "float8": {"float8_recipe": "rowwise"},
    "float8, compile": {"float8_recipe": "rowwise", "compile": True},
}


def train_a_little(distributed, memory=None, probing=False, **optim):
    """Losses of 12 steps on the same batch, in bf16; with a probe behind each of them."""
    sizes = {"layers": "1,3", "mem_n_keys": 64, "mem_knn": 16, "mem_k_dim": 64}
    args = LMTransformerArgs(
        dim=256,
        n_layers=4,
        n_heads=4,
        vocab_size=256,
        max_seqlen=128,
        productkey_args=ProductKeyArgs(is_enabled=True, **(sizes | (memory or {}))),
    )
    with torch.device("meta"):
        model = LMTransformer(args)
    for memory in model.memories().values():
        for table in memory.own_tables:
            table.to(torch.bfloat16)
    world = World(device=torch.device("cuda"))
    validate_parallelism(distributed, args, args.vocab_size, args.max_seqlen, world)
    reducer = parallelize(model, distributed, world)
    model.to_empty(device="cuda")
    model.init_weights()
    optimizer, scheduler = build_optimizer(model, OptimArgs(lr=1e-3, warmup=5, **optim), 100)
    tokens = torch.randint(256, (4, 129), generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for _ in range(12):
        reducer.begin(last=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        reducer.finish()
        clip_gradients(model, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if probing:
            records = probe_row(model, tokens[:1])
            assert len(records) == 167
            assert all(parameter.grad is None for parameter in model.parameters())
    return losses


def probe_row(model, row, dtype=torch.bfloat16):
    def compute_loss():
        with torch.autocast(row.device.type, dtype, enabled=dtype != torch.float32):
            return model(row[:, :-1], row[:, 1:])

    return probe(model, compute_loss)


def test_the_probe_measures_as_on_the_cpu():
    memory = ProductKeyArgs(is_enabled=True, layers="1", mem_n_keys=37, mem_heads=3, mem_knn=7, mem_k_dim=16)
    args = LMTransformerArgs(dim=48, n_layers=3, n_heads=4, vocab_size=64, max_seqlen=40, productkey_args=memory)
    model = LMTransformer(args)
    row = torch.randint(64, (1, 41), generator=torch.Generator().manual_seed(0))
    expected = probe_row(model, row, torch.float32)
    found = probe_row(model.cuda(), row.cuda(), torch.float32)
    for mine, plain in zip(found, expected, strict=True):
        assert all(mine[key] == plain[key] for key in ("name", "layer", "kind", "n"))
        assert [mine[key] for key in ("rms", "abs_max")] == pytest.approx([plain["rms"], plain["abs_max"]], rel=1e-2)


@pytest.mark.parametrize("update", ["dense", "sparse"])
def test_a_step_that_is_not_finite_changes_nothing(update):
    """And nobody waits for the GPU to find out; the loss is read one step later."""
    args = LMTransformerArgs(
        dim=64,
        n_layers=2,
        n_heads=2,
        vocab_size=64,
        max_seqlen=32,
        productkey_args=ProductKeyArgs(is_enabled=True, layers="1", mem_n_keys=16, mem_knn=4, mem_k_dim=32),
    )
    model = LMTransformer(args).cuda()
    model.layers[1].feed_forward.values.to(torch.bfloat16)
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.1, warmup=0, value_update=update), 10)
    guard = Guard(GuardArgs(), model, World(device=torch.device("cuda", torch.cuda.current_device())))
    tokens = torch.randint(64, (4, 33), device="cuda")
    states, heard = [], []
    for step in range(1, 5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]) * (float("nan") if step in (2, 3) else 1)
        loss.backward(initial_grad(loss))
        norms = clip_gradients(model, 1.0)
        torch.cuda.set_sync_debug_mode("error" if update == "dense" else "default")
        optimizer.found_inf = guard.decide(step, loss.detach(), norms)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
        guard.read()
        heard += [step] * guard.hear(guard.tell())
        moments = [tensor for parameter in model.parameters() for tensor in optimizer.state[parameter].values()]
        states.append([tensor.detach().clone() for tensor in (*model.parameters(), *moments)])
    assert all(map(torch.equal, states[0], states[1]))
    assert all(map(torch.equal, states[0], states[2]))
    assert not all(map(torch.equal, states[0], states[3]))
    assert all(tensor.isfinite().all() for tensor in states[3])
    assert heard == [3, 4]
    guard.read(everything=True)
    assert (guard.skipped, guard.is_over(4)) == (2, False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_sparse_updates_train(compiled, rounding):
    """Not alike to the last step: rows that a step does not read stay."""
    layout = DistributedArgs(compile=compiled)
    dense = train_a_little(DistributedArgs())
    sparse = train_a_little(layout, value_update="sparse", value_rounding=rounding)
    assert sparse[:3] == pytest.approx(dense[:3], rel=1e-2)
    assert sparse[10] < 0.5 * sparse[0]


def memory_use_of_a_step(distributed, device):
    args = LMTransformerArgs(
        dim=256,
        n_layers=3,
        n_heads=4,
        vocab_size=256,
        max_seqlen=64,
        productkey_args=ProductKeyArgs(is_enabled=True, layers="0,2", mem_n_keys=64, mem_knn=16, mem_k_dim=64),
    )
    model = LMTransformer(args).to(device)
    parallelize(model, distributed, World(device=torch.device(device)))
    use = MemoryUse(model.memories())
    optimizer, _ = build_optimizer(model, OptimArgs(lr=1e-3, warmup=0), 100)
    tokens = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    use.before_update(seed=0)
    optimizer.step()
    return use.metrics()


@pytest.mark.parametrize("distributed", [{}, {"compile": True, "checkpoint_each_layer": True}], ids=str)
def test_memory_use_as_on_the_cpu(distributed):
    """But for the few slots that rounding lets win or lose."""
    layout = DistributedArgs(model_dtype="fp32", **distributed)
    expected = memory_use_of_a_step(DistributedArgs(model_dtype="fp32"), "cpu")
    assert memory_use_of_a_step(layout, "cuda") == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"checkpoint_each_layer": True}], ids=str)
@pytest.mark.parametrize("memory", [{}, {"peer_variant": True}], ids=str)
def test_tables_in_the_cpus_memory_train_alike(memory, changes):
    """From the same weights; a CPU and a GPU round AdamW's update differently."""
    plain = train_a_little(DistributedArgs(**changes), memory, value_update="sparse")
    fetched = train_a_little(DistributedArgs(values_device="cpu", **changes), memory, value_update="sparse")
    assert fetched[:3] == pytest.approx(plain[:3], rel=1e-3)
    assert fetched[:11] == pytest.approx(plain[:11], rel=2e-2)
    assert plain[10] < 0.5 * plain[0]


def test_a_table_in_the_cpus_memory_is_rounded_at_random():
    """Of random numbers that are not those of the GPU."""
    options = {"value_update": "sparse", "value_rounding": "stochastic"}
    losses = train_a_little(DistributedArgs(values_device="cpu"), **options)
    assert losses == train_a_little(DistributedArgs(values_device="cpu"), **options)
    assert losses[10] < 0.5 * losses[0]


@pytest.mark.parametrize("peer", [False, True])
def test_a_table_in_the_cpus_memory_is_never_on_the_gpu(peer):
    """From its making to its updates a run takes less of the GPU's memory than one table of 2**20 rows."""
    memory = {"mem_n_keys": 1024, "peer_variant": peer}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses = train_a_little(DistributedArgs(values_device="cpu"), memory, value_update="sparse")
    assert torch.cuda.max_memory_allocated() - before < 2**20 * 256 * 2
    assert losses[10] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_the_gpu_and_back(dtype):
    """Through many buffers, with the GPU busy before and behind: none is filled again before it has arrived."""
    torch.manual_seed(0)
    table = torch.randn(300_000, 256).to(dtype)
    on_gpu, busy = table.cuda(), torch.randn(4096, 4096, device="cuda")
    for n in (0, 1, 1000, 250_000):
        slots = torch.randperm(len(table), device="cuda")[:n]
        for _ in range(3):
            busy @ busy
            fetched = cpu_offload._fetch(table, slots, slots.device)[:n]
            assert torch.equal(fetched, on_gpu[slots])
            busy @ busy
            back = torch.full_like(table, float("nan"))
            for some, rows in cpu_offload.bring_rows(slots, fetched, table.device, 7000):
                assert len(some) <= 7000
                back[some] = rows
            assert torch.equal(back[slots.cpu()], table[slots.cpu()])
            assert back.isnan().all(1).sum().item() == len(table) - n


def test_moving_a_model_leaves_its_table():
    memory = HashingMemory(48, 48, mem_n_keys=37, mem_heads=3, mem_knn=7, mem_k_dim=16)
    x = torch.randn(2, 50, 48, device="cuda")
    with torch.no_grad():
        expected = memory.cuda()(x)
        memory.tables[0].keep_on_cpu(torch.device("cuda"))
        assert memory.tables[0].weight.device.type == "cpu"
        assert torch.equal(memory.cuda()(x), expected)
        assert memory.tables[0].weight.device.type == "cpu"
        assert memory.to("cuda", torch.bfloat16)(x.bfloat16()).is_cuda
        assert memory.tables[0].weight.device.type == "cpu"
        assert memory.tables[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", PARTS)
def test_parts_train_alike(name):
    """What changes how a block is computed changes its losses by rounding only; the probe goes with all of it."""
    if "float8" in name:
        pytest.importorskip("torchao")
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU has no float8")
    plain = train_a_little(DistributedArgs())
    changed = train_a_little(DistributedArgs(**PARTS[name]), probing=True)
    assert plain[10] < 0.5 * plain[0]
    # float8 drifts away as the batch is learnt by heart, more slowly.
    n_steps, close = (7, 5e-2) if "float8" in name else (11, 3e-2)
    assert changed[:n_steps] == pytest.approx(plain[:n_steps], rel=close)
    assert changed[10] < 0.5 * plain[0]


def test_layouts_through_nccl(tmp_path):
    """As far as one GPU goes: see gpu_one_rank.py."""
    subprocess.run([sys.executable, "-m", "tests.helpers.gpu_one_rank", str(tmp_path)], cwd=ROOT, check=True)


# --- generation and evaluation ---------------------------------------------------------------------------------------


def build_generator(dtype="fp32", model=None, **arguments):
    """Prompts for it, the generator, and the model, whose sizes a CPU can follow."""
    memory = ProductKeyArgs(is_enabled=True, layers="1", mem_n_keys=16, mem_knn=4, mem_k_dim=32, mem_heads=2)
    sizes = {"dim": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 258, "max_seqlen": 160}
    args = LMTransformerArgs(**(sizes | (model or {})), productkey_args=memory)
    built = LMTransformer(args).to("cuda").eval()
    defaults = {"max_gen_len": 40, "max_tokens": 2000, "dtype": dtype}
    tokenizer = build_tokenizer("bytes")
    tokenizer.eos_id = -1
    return PackedCausalTransformerGenerator(GeneratorArgs(**(defaults | arguments)), built, tokenizer), built


PROMPTS = ["a", "of some length, this one", "", "short"] * 3


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"sliding_window": 24}, {"weight_tying": True}])
@pytest.mark.parametrize("graph", [False, True])
def test_generation_recomputes_the_sequence(changes, graph):
    """Greedy, in fp32: the texts that a forward pass over the whole sequence for each token gives."""
    generator, model = build_generator(model=changes, reduce_generation_overhead=graph)
    texts, likelihoods, _ = generator.generate(PROMPTS)
    for prompt, text, likelihood in zip(PROMPTS, texts, likelihoods, strict=True):
        tokens = generator.tokenizer.encode(prompt, True)
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device="cuda"))[0].log_softmax(-1)
            targets = torch.tensor(tokens[1:], device="cuda")
            expected = logits[:-1].gather(-1, targets[:, None]).squeeze(-1).cpu()
            assert torch.allclose(likelihood, expected, atol=1e-4)
            said = []
            for _ in range(40):
                said.append(int(model(torch.tensor([tokens + said], device="cuda"))[0, -1].argmax()))
        assert text == generator.tokenizer.decode(said)


def test_graphs_change_nothing_in_half_precision():
    plain, _ = build_generator("bf16")
    graphed, _ = build_generator("bf16", reduce_generation_overhead=True)
    sampled, _ = build_generator("bf16", temperature=1.0)
    assert plain.generate(PROMPTS)[0] == graphed.generate(PROMPTS)[0]
    assert sampled.generate(PROMPTS)[0] != plain.generate(PROMPTS)[0]


def test_compiled_reading():
    plain, _ = build_generator()
    compiled, _ = build_generator(compile_prefilling=True)
    for here, there in zip(plain.generate(PROMPTS)[1], compiled.generate(PROMPTS)[1], strict=True):
        assert torch.allclose(here, there, atol=1e-4)


def test_evaluation_gives_its_memory_back(tmp_path):
    from apps.main.eval import EvalArgs, evaluate_checkpoint

    source = tmp_path / "data" / "words"
    source.mkdir(parents=True)
    (source / "words.val.jsonl").write_text("".join(json.dumps({"text": "words " * n}) + "\n" for n in range(50)))
    _, model = build_generator()
    torch.save({"model": model.state_dict()}, tmp_path / "consolidated.pth")
    sizes = {"dim": 128, "n_layers": 3, "n_heads": 4, "vocab_size": 258, "max_seqlen": 160}
    memory = {"is_enabled": True, "layers": "1", "mem_n_keys": 16, "mem_knn": 4, "mem_k_dim": 32, "mem_heads": 2}
    data = {"root_dir": str(tmp_path / "data"), "sources": {"words": 1.0}}
    params = {"model": sizes | {"productkey_args": memory}, "data": data}
    (tmp_path / "params.json").write_text(json.dumps(params))
    state, before = torch.cuda.get_rng_state(), None
    for _ in range(2):
        found = evaluate_checkpoint(EvalArgs(ckpt_dir=str(tmp_path), dump_dir=str(tmp_path / "evals")))
        held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        # The first time cuBLAS takes its workspace.
        assert before is None or held[0] <= before[0]
        before = held
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert found["validation"]["words"]["n_documents"] == 50


def test_growth_of_a_table(tmp_path):
    file = tmp_path / "growth.json"
    sizes = ["n_keys=[16,512]", "dim=128", "tokens=512", "heads=2", "knn=8", "rounds=1"]
    command = [sys.executable, "-m", "apps.bench.growth", *sizes, f"out={file}", f"plot={tmp_path / 'growth.png'}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    small, large, feed_forward = json.loads(file.read_text())["rows"]
    assert small["parameters"] < large["parameters"]
    assert 0 < small["peak GiB, dense"] < large["peak GiB, dense"]
    assert all(row[name] > 0 for row in (small, large) for name in ("search", "lookup", "layer", "step, sparse"))
    assert feed_forward["layer, backward too"] > 0
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_profiler_sees_kernels_and_allocations(tmp_path, caplog):
    caplog.set_level("INFO")
    args = ProfilingArgs(run=True, mem_warmup=1, mem_steps=1, profile_warmup=2, profile_steps=2)
    device, size = torch.device("cuda"), 1024
    x = torch.ones(size, size, device=device, dtype=torch.bfloat16)
    workload = Workload(flops_per_token=2 * size**3, tokens_per_step=1, dtype=torch.bfloat16)
    with Profiler(args, str(tmp_path), 0, 1, device, workload) as profiler:
        for step in range(1, 6):
            profiler.begin_step(step)
            _ = x @ x
            profiler.end_step()
    folder = tmp_path / "profiling"
    stem = "0000000003-0000000004.rank_0"
    memory = "0000000002-0000000002.rank_0.memory.pickle"
    assert sorted(path.name for path in folder.iterdir()) == [memory, f"{stem}.kernels.txt", f"{stem}.trace.json.gz"]
    assert b"test_gpu.py" in (folder / memory).read_bytes()  # who allocated
    tables = (folder / f"{stem}.kernels.txt").read_text()
    kernels = tables.split("Kernels and copies by the GPU's time")[1]
    assert any(line.split()[3:4] == ["2"] for line in kernels.splitlines())
    assert "MFU" in tables
    assert "pytorch.org/memory_viz" in caplog.text


@pytest.mark.parametrize("recomputed", [None, "checkpoint_each_layer", "selective_activation_checkpointing"])
@pytest.mark.parametrize("peer", [False, True])
def test_footprint_is_what_arithmetic_says(peer, recomputed):
    memory = {
        "is_enabled": True,
        "layers": "1",
        "mem_n_keys": 128,
        "mem_knn": 16,
        "mem_k_dim": 64,
        "peer_variant": peer,
    }
    values = {
        "data": {"batch_size": 2, "seq_len": 256},
        "model": {
            "dim": 256, "n_layers": 3, "n_heads": 4, "vocab_size": 512, "max_seqlen": 256, "productkey_args": memory
        },
        "distributed": {recomputed: True} if recomputed else {},
    }  # fmt: skip
    lines = compare(*measure(from_dict(TrainArgs, values, "test"), World(device=torch.device("cuda"))))
    for line in lines:
        # What is held at once is estimated from above; the less, the more of a small model is computed again.
        assert (0.35 if line["on a rank"] == "at once in a step" else 0.9) <= line["ratio"] <= 1.1, line


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [{}, {"shape": (4, 100), "dim": 64, "n_words": 40_003}], ids=["small", "several blocks"]
)
@pytest.mark.parametrize("check", loss_checks.CHECKS, ids=lambda check: check.__name__)
def test_loss(check, sizes, monkeypatch):
    monkeypatch.setattr("lingua.loss.CHUNK", 50 * 40_003)
    check("cuda", **sizes)


def test_a_compiled_loss():
    """In the models' sizes, through the compiler's own code."""
    inputs = loss_checks.draw((2, 64), 64, 1000, "cuda")
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        results = [loss_checks.run(compute, *inputs, dtype) for compute in (compiled, linear_cross_entropy)]
        assert all(relative_error(mine, eager) < 1e-6 for mine, eager in zip(*results, strict=True))


def test_the_loss_waits_for_no_gpu_and_holds_a_chunk_of_logits():
    n_tokens, dim, n_words = 24_000, 64, 32_000
    h = torch.randn(n_tokens, dim, device="cuda", requires_grad=True)
    weight = torch.randn(n_words, dim, device="cuda", requires_grad=True)
    target = torch.randint(n_words, (n_tokens,), device="cuda")

    def train():
        with torch.autocast("cuda", torch.bfloat16):
            loss = linear_cross_entropy(h, weight, target)
        loss.backward()

    train()
    h.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    logits = 2 * tokens_of_chunk(n_tokens, n_words, h.device) * n_words
    assert logits < 2 * n_tokens * n_words / 2
    assert torch.cuda.max_memory_allocated() - before < logits + 4 * (h.nbytes + weight.nbytes)


# --- the search where it is large ------------------------------------------------------------------------------------

# Keys of each half, knn.
LARGE_SEARCHES = {
    "bfloat16": [(4096, 200), (5001, 7), (8192, 32), (16384, 64), (46340, 8), (8192, 256), (256, 256)],
    "float32": [(5000, 32), (4097, 128)],
    "float16": [(5001, 7)],
}


@torch.no_grad()
def exact_search(query, keys, knn):
    """The scores of the halves, (N, H, n) each, as the kernels get them; the best of all pairs of the halves' best."""
    halves = [scores.transpose(0, 1).float() for scores in large_search.half_scores(query, keys)]
    best = [scores.topk(knn).values for scores in halves]
    return halves, (best[0][..., :, None] + best[1][..., None, :]).flatten(-2).topk(knn).values


@pytest.mark.parametrize(
    ("dtype", "n_keys", "knn"), [(name, *size) for name in LARGE_SEARCHES for size in LARGE_SEARCHES[name]]
)
def test_large_search_is_exact(dtype, n_keys, knn, monkeypatch):
    """Scores, slots and gradients; all at once and in parts; twice the same bits."""
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    query = torch.randn(50, 3, 2, 32, device="cuda").to(dtype).requires_grad_()
    keys = torch.randn(3, 2, n_keys, 32, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(50, 3, knn, device="cuda")
    halves, expected = exact_search(query, keys, knn)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for workspace in (2**29, 20 * n_keys * 6 * 4):
        monkeypatch.setattr(large_search, "WORKSPACE_BYTES", workspace)
        results = []
        for _ in range(2):
            query.grad = keys.grad = None
            scores, slots = search(query, keys, knn)
            scores.backward(grad)
            results.append((scores, slots, query.grad, keys.grad))
        assert all(map(torch.equal, *results))
        columns = slots // n_keys, slots % n_keys
        if workspace == 2**29:  # else products may be rounded in another order
            assert torch.equal(scores, expected)
            assert torch.equal(scores, halves[0].gather(-1, columns[0]) + halves[1].gather(-1, columns[1]))
        assert relative_error(scores, expected) < tolerance
        assert all(len(set(row)) == knn for row in slots.flatten(0, 1).tolist())
        exact = [tensor.detach().double().requires_grad_() for tensor in (query, keys)]
        of_halves = [torch.einsum("nhd,hkd->nhk", exact[0][:, :, i], exact[1][:, i]) for i in (0, 1)]
        sum(x.gather(-1, column) for x, column in zip(of_halves, columns, strict=True)).backward(grad.double())
        for leaf, wanted in zip((query, keys), exact, strict=True):
            assert relative_error(leaf.grad, wanted.grad) < tolerance


def test_large_search_with_equal_scores_and_what_is_no_number():
    n_keys = 5000
    query = torch.randint(3, (20, 2, 2, 8), device="cuda").bfloat16()
    keys = torch.randint(3, (2, 2, n_keys, 8), device="cuda").bfloat16()
    scores, slots = search(query, keys, 20)
    assert torch.equal(scores, exact_search(query, keys, 20)[1])
    assert all(len(set(row)) == 20 for row in slots.flatten(0, 1).tolist())
    keys[0, 1, n_keys - 3] = float("nan")
    query[:, 0] += 1
    scores, slots = search(query, keys, 20)
    assert scores[:, 0].isnan().all()
    assert (slots[:, 0] % n_keys == n_keys - 3).all()
    assert slots.min() >= 0
    assert slots.max() < n_keys**2
    assert all(len(set(row)) == 20 for row in slots.flatten(0, 1).tolist())


@pytest.mark.parametrize(
    ("n_keys", "knn", "dtype"), [(50000, 4, "bfloat16"), (600, 300, "bfloat16"), (90, 9, "float64")]
)
def test_large_search_without_kernels_says_so(n_keys, knn, dtype, caplog, monkeypatch):
    """Once, and finds the same; in parts."""
    query = torch.randn(300, 2, 2, 16, device="cuda").to(getattr(torch, dtype))
    keys = torch.randn(2, 2, n_keys, 16, device="cuda").to(query.dtype)
    search_module._warn_once.cache_clear()
    for size in (2**28, 7 * n_keys * 4 * query.element_size()):
        monkeypatch.setattr(search_module, "FALLBACK_BYTES", size)
        scores, slots = search(query, keys, knn)
        assert relative_error(scores, exact_search(query, keys, knn)[1]) < 1e-2
        assert all(len(set(row)) == knn for row in slots.flatten(0, 1).tolist())
    assert len([record for record in caplog.records if "PyTorch's operators" in record.getMessage()]) == 1


def test_large_search_stays_within_its_workspace():
    query = torch.randn(16384, 2, 2, 64, device="cuda").bfloat16().requires_grad_()
    keys = torch.randn(2, 2, 8192, 64, device="cuda").bfloat16().requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    search(query, keys, 32)[0].sum().backward()
    n_slots = 16384 * 2 * 32
    assert torch.cuda.max_memory_allocated() - before < large_search.WORKSPACE_BYTES + n_slots * 100


def test_slots_out_of_range_are_refused_in_debug_mode():
    """On a GPU that is looked at only there."""
    weight, weights = torch.ones(5, 4, device="cuda"), torch.ones(1, 2, device="cuda")
    for indices in ([[0, 5]], [[-1, 0]]):
        with torch.autograd.set_detect_anomaly(True), pytest.raises(IndexError, match="the table has slots 0 to 4"):
            xformers_embedding_bag(torch.tensor(indices, device="cuda"), weight, weights)


def test_recording_reads_waits_for_no_gpu_and_takes_little():
    """Of 4.2 million places, 2^26 slots: what is found is what a CPU finds."""
    slots = torch.randint(2**26, (32768, 4, 32), device="cuda")
    weights = torch.rand(32768, 4, 32, device="cuda").softmax(-1)
    use = SlotUse(torch.zeros(2**26 + 1, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        use.note(slots, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**27
    on_cpu = SlotUse(torch.zeros(2**26 + 1, dtype=torch.uint8))
    on_cpu.note(slots.cpu(), weights.cpu())
    assert torch.equal(use.flags_S.cpu(), on_cpu.flags_S)
    assert torch.allclose(use.weights_M[use.n_exact :].cpu(), on_cpu.weights_M[use.drawn_U.cpu()])
