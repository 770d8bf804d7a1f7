"""What a log line says of the memories' use, against the same worked out with NumPy from whole batches and tables."""

import base64
import copy
import functools
import math
import zlib

import numpy as np
import pytest
import torch

from lingua import memory_use
from lingua.memory_use import MemoryUse
from lingua.optim import OptimArgs, build_optimizer
from lingua.product_key import slot_use
from lingua.product_key.slot_use import SlotUse, paused
from tests.helpers.layouts import MODELS, SEQ_LEN, VOCABULARY, build, build_alone, here, model_args
from tests.helpers.ranks import run_ranks

N_STEPS, N_BATCHES, N_ROWS = 3, 2, 4


def draw_batches() -> torch.Tensor:
    """(steps, batches of a step, rows, tokens)"""
    shape = (N_STEPS, N_BATCHES, N_ROWS, SEQ_LEN)
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(5))


def optimizer_of(model, **options):
    return build_optimizer(model, OptimArgs(lr=0.05, warmup=0, scheduler="constant", **options), N_STEPS)[0]


def train(model, reducer, batches, use, logged=(1, 3), optim=None):
    """Trains as apps/main/train.py does; the metrics of the steps `logged`, counted from 1."""
    optimizer, lines = optimizer_of(model, **(optim or {})), []
    for number, step in enumerate(batches, start=1):
        for place, batch in enumerate(step, start=1):
            if reducer is not None:
                reducer.begin(last=place == len(step))
            (model(batch, batch) / len(step)).backward()
        if reducer is not None:
            reducer.finish()
        if number in logged:
            use.before_update(seed=number)
        optimizer.step()
        optimizer.zero_grad()
        if number in logged:
            lines.append(use.metrics())
    return lines


def reference(args, logged=(1, 3), optim=None):
    """The same from all batches, by the definitions, one slot after the other."""
    model = build_alone(args)
    read = {number: [] for number in model.memories()}  # (slots, weights) since the last line, each (queries, K)
    for number, memory in model.memories().items():

        def look(_module, _input, query, memory=memory, mine=read[number]):
            with torch.no_grad():
                scores, slots = (found.double().numpy() for found in memory.get_indices(query, memory.knn))
            exponents = np.exp(scores - scores.max(-1, keepdims=True))
            weights = exponents / exponents.sum(-1, keepdims=True)
            mine.append((slots.reshape(-1, memory.knn).astype(int), weights.reshape(-1, memory.knn)))

        memory.query_proj.register_forward_hook(look)
    optimizer, lines = optimizer_of(model, **(optim or {})), []
    ever = {number: set() for number in read}
    for number, step in enumerate(draw_batches(), start=1):
        for batch in step:
            (model(batch, batch) / len(step)).backward()
        tables = {n: [table.weight.detach().clone() for table in m.tables] for n, m in model.memories().items()}
        optimizer.step()
        optimizer.zero_grad()
        if number not in logged:
            continue
        line = {}
        for layer, memory in model.memories().items():
            total, top = np.zeros(memory.size), []
            for slots, weights in read[layer]:
                for row, of_row in zip(slots, weights, strict=True):
                    total[row] += of_row
                    top.append(of_row.max())
            read[layer].clear()
            now = np.flatnonzero(total)
            ever[layer] |= set(now.tolist())
            z = total[now] / total.sum()
            changed = [
                (after.weight.detach() - before).double().numpy()[now]
                for after, before in zip(memory.tables, tables[layer], strict=True)
            ]
            line |= {
                f"pk/layer_{layer}/read": len(now) / memory.size,
                f"pk/layer_{layer}/ever_read": len(ever[layer]) / memory.size,
                f"pk/layer_{layer}/kl": math.log(memory.size) + (z * np.log(z)).sum(),
                f"pk/layer_{layer}/top_weight": np.mean(top),
                f"pk/layer_{layer}/value_update_norm": math.sqrt(sum((change**2).sum() for change in changed)),
            }
        lines.append(line)
    return lines


def assert_alike(lines, expected):
    assert lines == [pytest.approx(line, rel=1e-5, abs=1e-7) for line in expected]


# Many slots, of which a step reads few.
SPARSELY_READ = model_args({"mem_n_keys": 20, "mem_knn": 2, "mem_heads": 1})


@pytest.mark.parametrize("args", [*MODELS.values(), SPARSELY_READ], ids=[*MODELS, "sparsely read"])
def test_metrics_are_their_definitions(args):
    """Of two lines, the second about two steps, with two batches in each."""
    model = build_alone(args)
    lines = train(model, None, draw_batches(), MemoryUse(model.memories()))
    assert_alike(lines, reference(args))
    if args is SPARSELY_READ:
        assert all(0 < lines[0][f"pk/layer_{i}/ever_read"] < lines[1][f"pk/layer_{i}/ever_read"] < 1 for i in (0, 2))


def test_sparse_updates():
    model, sparse = build_alone(SPARSELY_READ), {"value_update": "sparse"}
    lines = train(model, None, draw_batches(), MemoryUse(model.memories()), optim=sparse)
    assert_alike(lines, reference(SPARSELY_READ, optim=sparse))


@pytest.mark.parametrize(
    "distributed",
    [
        {"checkpoint_each_layer": True},
        {"selective_activation_checkpointing": True},
        {"compile": True, "checkpoint_each_layer": True},
        {"compile": True, "selective_activation_checkpointing": True},
    ],
    ids=str,
)
def test_what_is_computed_twice_or_compiled_counts_once(distributed, monkeypatch):
    """Compiled without a break, by the passes that could drop or move what is noted."""
    if "compile" in distributed:
        torch._dynamo.reset()
        compile_it = functools.partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
        monkeypatch.setattr(torch, "compile", compile_it)
    args = MODELS["one table"]
    model, reducer = build(args, **distributed)
    use = MemoryUse(model.memories())
    assert_alike(train(model, reducer, draw_batches(), use), reference(args))


ON_TWO_RANKS = ({}, {"memory_parallel_size": 2}, {"tp_size": 2}, {"fsdp_type": "full_shard"})


def on_ranks(memory):
    found = []
    for distributed in ON_TWO_RANKS:
        model, reducer = build(model_args(memory), **distributed)
        tp_size = distributed.get("tp_size", 1)
        rank, n_ranks = here().rank // tp_size, here().size // tp_size
        n_rows = N_ROWS // n_ranks
        use = MemoryUse(model.memories())
        lines = train(model, reducer, draw_batches()[:, :, rank * n_rows : (rank + 1) * n_rows], use)
        found.append({"lines": lines, "state": use.state()})
    return found


@pytest.mark.parametrize("memory", [{"mem_v_dim": 8}, {"peer_variant": True}], ids=["one table", "PEER"])
def test_two_ranks_say_what_one_process_says(memory):
    expected = reference(model_args(memory))
    first, second = run_ranks(2, on_ranks, memory)
    assert first == second
    for distributed, found in zip(ON_TWO_RANKS, first, strict=True):
        assert found["lines"] == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in expected], distributed
        assert found["state"] == first[0]["state"]


def test_only_what_is_learnt_from_counts():
    """Not evaluation, not a copy of the model, nor a pass that says so."""
    model = build_alone(MODELS["one table"])
    use = MemoryUse(model.memories())
    batch = draw_batches()[0, 0]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model(batch, batch)
    copied(batch, batch).backward()
    with paused(memory.slot_use for memory in model.memories().values()):
        model(batch, batch).backward()
    assert all(layer.use.n_queries == 0 and not layer.use.weights_M.any() for layer in use.layers.values())
    assert not any(layer.use.flags_S.any() for layer in use.layers.values())
    assert all(memory.slot_use.n_queries == batch.numel() * 3 for memory in copied.memories().values())
    model(batch, batch).backward()
    assert all(layer.use.n_queries == batch.numel() * 3 for layer in use.layers.values())


def test_use_is_even_at_best_and_one_slot_at_worst():
    args = model_args({"mem_n_keys": 4, "mem_heads": 1, "mem_knn": 1})
    model = build_alone(args)
    use = MemoryUse(model.memories())
    layer = use.layers[0]
    for slots, kl in ((torch.arange(16), 0.0), (torch.full((16,), 3), math.log(16))):
        for noted in (layer.use, use.layers[2].use):
            noted.note(slots[:, None, None], torch.ones(16, 1, 1))
        use.before_update(seed=0)
        assert use.metrics()["pk/layer_0/kl"] == pytest.approx(kl, abs=1e-12)


def test_a_part_of_the_rows_stands_for_all(monkeypatch):
    args = model_args({"mem_n_keys": 40, "mem_knn": 30})
    lines = []
    for n_rows in (10**6, 300):
        monkeypatch.setattr(memory_use, "MEASURED_ROWS", n_rows)
        model = build_alone(args)
        lines += train(model, None, draw_batches(), MemoryUse(model.memories()), logged=(2,))
    name = "pk/layer_0/value_update_norm"
    assert lines[0]["pk/layer_0/read"] * 1600 > 900
    assert lines[0][name] != lines[1].pop(name) == pytest.approx(lines[0].pop(name), rel=0.1)
    lines = [{key: value for key, value in line.items() if "norm" not in key} for line in lines]
    assert lines[0] == lines[1]


def test_many_small_weights_are_not_lost():
    """Beside a sum that has grown past what fp32 can tell apart."""
    model = build_alone(MODELS["one table"])
    use = MemoryUse(model.memories()).layers[0].use
    use.weights_M[3] = 2.0**25
    for _ in range(10):
        use.note(torch.full((1, 1, 2), 3), torch.full((1, 1, 2), 0.05))
    assert use.weights_M[3].item() == pytest.approx(2.0**25 + 1, abs=1e-3)


def as_on_a_gpu(monkeypatch):
    """Large tables are sampled."""
    monkeypatch.setattr(slot_use, "is_sampled", lambda n_slots, device: n_slots > slot_use.SAMPLED)
    monkeypatch.setattr(memory_use, "is_sampled", slot_use.is_sampled)


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_no_weight_reads_nothing(waits, monkeypatch):
    """0 and NaN, beside others of the same slots; places are recorded in parts. A GPU is not waited for."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(slot_use, "PLACES_AT_ONCE", 3)
    for n_slots in (9, 30_000):
        use = SlotUse(torch.full((n_slots + 1,), 0b1011, dtype=torch.uint8), place=1)
        use.waits = waits
        weights = torch.tensor([[[0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0]], [[float("nan")] * 3]])
        use.note(torch.tensor([[[1, 2, 3]], [[4, 1, 5]], [[6, 7, 8]]]), weights)
        expected = torch.full((n_slots,), 0b1011, dtype=torch.uint8)
        expected[[1, 2, 4]] = 0b1111
        assert torch.equal(use.flags_S, expected)
        assert use.weights_M.isfinite().all()
        assert use.weights_M[: use.n_exact].sum() == (2 if n_slots == 9 else 0)


# --- large tables ----------------------------------------------------------------------------------------------------


def test_slots_are_looked_at_in_parts(monkeypatch):
    """Lines and state are those of all slots at once."""
    results = []
    for at_once in (2**22, 8, 64):
        monkeypatch.setattr(memory_use, "SLOTS_AT_ONCE", at_once)
        monkeypatch.setattr(memory_use, "MEASURED_ROWS", 30)
        model = build_alone(SPARSELY_READ)
        use = MemoryUse(model.memories())
        lines = train(model, None, draw_batches(), use)
        state = use.state()
        resumed = MemoryUse(build_alone(SPARSELY_READ).memories())
        assert resumed.load(state)
        results.append((lines, state, resumed.state()))
    assert results[0][1] == results[0][2]
    assert results[1:] == results[:1] * 2


N_SLOTS = 200_000


def draw_reads(rng, how):
    """(queries, 1, 4) slots and weights."""
    n = 40_000
    if how == "even":
        slots = rng.integers(N_SLOTS, size=(n, 1, 4))
    elif how == "few slots":
        slots = rng.integers(50, size=(n, 1, 4)) * 3999
    else:  # half of the weight on some thousand slots, the rest on all, unevenly
        slots = np.minimum(rng.pareto(0.7, size=(n, 1, 4)) * 300, N_SLOTS - 1).astype(int) * 7919 % N_SLOTS
    weights = np.sort(rng.dirichlet(np.ones(4), size=(n, 1)))[..., ::-1].copy()
    return torch.from_numpy(slots), torch.from_numpy(weights).float()


@pytest.mark.parametrize("how", ["even", "few slots", "heavy tail"])
def test_kl_of_a_large_table_is_estimated(how, monkeypatch):
    """From the second line on close to what all slots' sums give, however uneven; reads are exact."""
    as_on_a_gpu(monkeypatch)
    use, rng = SlotUse(torch.zeros(N_SLOTS + 1, dtype=torch.uint8)), np.random.default_rng(1)
    assert len(use.weights_M) == slot_use.CHOSEN + slot_use.SAMPLED
    for line in range(3):
        total = torch.zeros(N_SLOTS, dtype=torch.float64)
        for _ in range(2):
            slots, weights = draw_reads(rng, how)
            use.note(slots, weights)
            total.scatter_add_(0, slots.flatten(), weights.flatten().double())
        n_read = int((total > 0).sum())
        assert int((use.flags_S & use.read_bit).bool().sum()) == n_read
        shares = (total[total > 0] / total.sum()).numpy()
        exact = math.log(N_SLOTS) + (shares * np.log(shares)).sum()
        estimate = memory_use._divergence(use.weights_M.numpy(), use.n_exact, use.n_queries, n_read, N_SLOTS)
        assert estimate == pytest.approx(exact, abs=0.03 if line or how == "even" else 1.5)
        use.clear()
        use.choose(use.candidates_C)


def sampled_on_ranks():
    slot_use.SAMPLED, slot_use.CHOSEN = 7, 4
    slot_use.is_sampled = lambda n_slots, device: n_slots > 7
    model, reducer = build(model_args())
    use, n_rows = MemoryUse(model.memories()), N_ROWS // 2
    lines = train(model, reducer, draw_batches()[:, :, here().rank * n_rows : (here().rank + 1) * n_rows], use)
    chosen = [layer.use.chosen_C.tolist() for layer in use.layers.values()]
    return {"lines": lines, "chosen": chosen}


def test_ranks_choose_the_same_slots_of_a_large_table():
    first, second = run_ranks(2, sampled_on_ranks)
    assert first == second
    assert all(slots[0] < 25 for slots in first["chosen"])
    for line, expected in zip(first["lines"], reference(model_args()), strict=True):
        for name, value in expected.items():
            if name.endswith("kl"):
                assert 0 <= line[name] < math.log(25)
            else:
                assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_bits_of_many_layers_do_not_meet(monkeypatch):
    """Five layers of a table: four in a byte, the fifth in another; what is held is what the planner counts."""
    args = model_args({"layers": "0,1,2,3,4", "mem_n_keys": 6}, n_layers=5)
    model = build_alone(args)
    use = MemoryUse(model.memories())
    uses = [layer.use for layer in use.layers.values()]
    for number, of_layer in enumerate(uses):
        of_layer.note(torch.tensor([[[number]]]), torch.ones(1, 1, 1))
    use.before_update(seed=0)
    line = use.metrics()
    assert [line[f"pk/layer_{i}/read"] for i in range(5)] == [1 / 36] * 5
    for number, of_layer in enumerate(uses):
        assert (of_layer.flags_S & of_layer.ever_bit).nonzero().flatten().tolist() == [number]
        assert not (of_layer.flags_S & of_layer.read_bit).any()
    held = {tensor.data_ptr(): tensor.nbytes for x in uses for tensor in (x.flags, x.weights_M)}
    assert sum(held.values()) == memory_use.bytes_held(36, [5], torch.device("cuda")) == 2 * 37 + 5 * 36 * 8
    assert memory_use.bytes_held(N_SLOTS, [2], torch.device("cpu")) == N_SLOTS + 1 + 2 * 8 * N_SLOTS
    as_on_a_gpu(monkeypatch)
    large = [SlotUse(torch.zeros(N_SLOTS + 1, dtype=torch.uint8)) for _ in range(2)]
    held = sum(tensor.nbytes for x in large for tensor in (x.flags, x.weights_M, x.chosen_C, x.drawn_U))
    assert held == memory_use.bytes_held(N_SLOTS, [1, 1], torch.device("cuda"))


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def test_what_was_ever_read_goes_on_from_its_state():
    """Reads that no line has told of, too."""
    model, (first, second) = build_alone(SPARSELY_READ), draw_batches()[:2, 0]

    def line_of(use, *batches):
        for batch in batches:
            model(batch, batch).backward()
        use.before_update(seed=0)
        return use.metrics()

    unbroken, alone = (line_of(MemoryUse(model.memories()), *batches) for batches in ([first, second], [second]))
    use = MemoryUse(model.memories())
    model(first, first).backward()
    state = use.state()
    resumed = MemoryUse(model.memories())
    assert resumed.load(state)
    line = line_of(resumed, second)
    for layer in (0, 2):
        read, ever_read = f"pk/layer_{layer}/read", f"pk/layer_{layer}/ever_read"
        assert line[ever_read] == unbroken[ever_read] > alone[ever_read]
        assert line[read] == alone[read]


@pytest.mark.parametrize("what", [None, [], {}, "layer", "slots", "bits"])
def test_a_state_that_does_not_fit_counts_nothing(what):
    model = build_alone(SPARSELY_READ)
    use = MemoryUse(model.memories())
    train(model, None, draw_batches(), use)
    state = use.state()
    if what == "layer":
        del state["2"]
    elif what == "slots":
        state["2"] = MemoryUse(build_alone(MODELS["one table"]).memories()).state()["2"]
    elif what == "bits":
        state["2"] = state["2"][:-8]
    else:
        state = what
    fresh = MemoryUse(model.memories())
    assert not fresh.load(state)
    assert not any(layer.use.flags_S.any() for layer in fresh.layers.values())


def test_a_state_of_an_older_checkpoint_is_taken():
    """Of the same form since there are such states: bits of the slots, the first in the highest place."""
    model = build_alone(SPARSELY_READ)
    ever = torch.zeros(400, dtype=torch.bool)
    ever[[0, 9, 399]] = True
    bits = base64.b64encode(zlib.compress(np.packbits(ever.numpy()).tobytes())).decode()
    use = MemoryUse(model.memories())
    assert use.load({"0": bits, "2": bits})
    for layer in use.layers.values():
        assert (layer.use.flags_S & layer.use.ever_bit).nonzero().flatten().tolist() == [0, 9, 399]
    assert use.state() == {"0": bits, "2": bits}
