"""The memory that lingua/README.md adds: through everything that asks a memory what it is."""

import pytest
import torch
from torch import nn

from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator
from apps.main.transformer import LMTransformer, count_flops_per_token, count_parameters
from apps.main.validation import record_slots
from lingua.memory_use import MemoryUse
from lingua.optim import OptimArgs, build_groups, build_optimizer
from lingua.probe import probe
from lingua.product_key.row_gradients import RowGradients
from lingua.tokenizer import build_tokenizer
from lingua.transformer import validate_transformer_args
from tests.helpers.layouts import (
    LAYOUTS,
    SEQ_LEN,
    assert_close,
    build,
    build_alone,
    model_args,
    some_batches,
    train,
    whole_state,
)
from tests.helpers.ranks import run_ranks

SECTION = {"layers": "0,1", "n_slots": 9, "n_hashes": 3}


def token_args(product_keys: bool = True, section: dict | None = None, **changes):
    """Beside the feed-forwards of blocks 0 and 1; product keys in the place of block 2's."""
    memory = {"layers": "2"} if product_keys else {"is_enabled": False}
    return model_args(memory, memories={"tokens": {**SECTION, **(section or {})}}, **changes)


def test_what_it_computes():
    model = build_alone(token_args())
    memory, owner = model.layers[1].memory, model.layers[0].memory
    assert memory.tables == (owner.values,)
    assert memory.own_tables == ()
    x, tokens = torch.randn(2, 5, 12), torch.randint(20, (2, 5))
    expected = torch.zeros(2, 5, 12)
    for row in range(2):
        for place in range(5):
            for number in range(3):
                factor = (2 * number + 1) * 2654435761 % (2**31 - 1)
                slot = (int(tokens[row, place]) + 1) * factor % (2**31 - 1) % 9
                gate = torch.sigmoid(memory.gate.weight[number] @ x[row, place] + memory.gate.bias[number])
                expected[row, place] += gate * owner.values.weight[slot]
    assert torch.allclose(memory(x, tokens), expected, atol=1e-5)


def test_it_is_added_to_the_feed_forward():
    model = build_alone(token_args(product_keys=False))
    inputs = []
    for module in (model.layers[0].ffn_norm, model.layers[0].feed_forward, model.layers[0].memory):
        module.register_forward_hook(lambda _module, args, output: inputs.append((args, output)))
    model.layers[0].register_forward_hook(lambda _module, _args, output: inputs.append(output))
    tokens = torch.randint(20, (2, SEQ_LEN))
    model(tokens)
    ((residual,), normed), (_, dense), ((x, of_memory), beside), result = inputs
    assert x is normed
    assert of_memory is tokens
    assert torch.equal(result, residual + (dense + beside))


def test_sizes_and_groups():
    model = build_alone(token_args(section={"value_lr": 0.5}))
    tables = [model.layers[0].memory.values.weight, model.layers[2].feed_forward.values.weight]
    assert count_parameters(model)[1] == sum(table.numel() for table in tables)
    product_keys = build_alone(model_args({"layers": "2"}))
    gates = 2 * (12 * 3 + 3)
    # In blocks 0 and 1 the gates and 3 rows of 12 columns.
    more = 6 * gates + 2 * 6 * 3 * 12
    assert count_flops_per_token(model, SEQ_LEN) == count_flops_per_token(product_keys, SEQ_LEN) + more
    groups = build_groups(model, OptimArgs(lr=0.01))
    assert [group["lr"] for group in groups] == [0.01, 0.5, 0.01, 0.001]
    assert [group["params"] for group in (groups[1], groups[3])] == [[tables[0]], [tables[1]]]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# --- layouts ---------------------------------------------------------------------------------------------------------

STEPS, CLIP = range(3), 1.0


def train_alone(update: str) -> dict[str, torch.Tensor]:
    model = build_alone(token_args())
    optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, value_update=update), len(STEPS))
    _, reducer = build(token_args())  # of one rank it has nothing to reduce
    reducer.model, reducer.tables = model, [table for m in model.memories().values() for table in m.own_tables]
    train(model, reducer, optimizer, STEPS, CLIP)
    return whole_state(model, optimizer)


def check_layouts(expected: dict[str, dict[str, torch.Tensor]]) -> None:
    for name, layout in LAYOUTS[2].items():
        for update in expected:
            if update == "sparse" and name == "full_shard":
                continue  # refused: it splits tables by rows
            model, reducer = build(token_args(), **layout)
            optimizer, _ = build_optimizer(model, OptimArgs(lr=0.01, value_update=update), len(STEPS))
            train(model, reducer, optimizer, STEPS, CLIP, **layout)
            try:
                assert_close(whole_state(model, optimizer), expected[update], 2e-4)
            except AssertionError as error:
                raise AssertionError(f"{name}, {update}: {error}") from None


def test_two_ranks_train_as_one_process():
    run_ranks(2, check_layouts, {update: train_alone(update) for update in ("dense", "sparse")})


# --- what looks at it ------------------------------------------------------------------------------------------------


def test_what_was_read():
    model = build_alone(token_args())
    use = MemoryUse(model.memories())
    batch = some_batches()[0]
    model(batch[:, :-1], batch[:, 1:]).backward()
    use.before_update(0)
    metrics = use.metrics()
    slots = model.layers[0].memory.slots(batch[:, :-1].flatten())
    assert metrics["pk/layer_0/read"] == slots.unique().numel() / 9
    assert metrics["pk/layer_1/read"] == metrics["pk/layer_0/read"]
    assert 0 < metrics["pk/layer_0/top_weight"] < 1
    with record_slots(model) as used, torch.no_grad():
        model(batch[:, :-1])
    assert used[0].nonzero().flatten().tolist() == slots.unique().tolist()
    assert used[2].any()


def test_the_probe_sees_it():
    model = build_alone(token_args())
    batch = some_batches()[0]
    records = probe(model, lambda: model(batch[:, :-1], batch[:, 1:]))
    kinds = {(record["name"], record["kind"]) for record in records}
    assert {("layers.1.memory.values", "memory_values"), ("layers.1.memory.gate", "grad_weight")} <= kinds
    assert ("layers.1.memory", "memory_query") not in kinds  # it does not search
    assert ("layers.2.feed_forward", "memory_query") in kinds


def test_generation_with_a_cache():
    tokenizer = build_tokenizer("bytes")
    args = token_args()
    args.vocab_size, args.max_seqlen = tokenizer.n_words, 40
    model = LMTransformer(args).eval().requires_grad_(False)
    generator_args = GeneratorArgs(max_gen_len=12, max_tokens=100, dtype="fp32", device="cpu")
    generator = PackedCausalTransformerGenerator(generator_args, model, tokenizer)
    texts, _, _ = generator.generate(["a", "some words", "other ones"])
    for prompt, text in zip(["a", "some words", "other ones"], texts, strict=True):
        tokens = tokenizer.encode(prompt, True, False)
        n_prompt = len(tokens)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        expected = tokens[n_prompt:]
        if tokenizer.eos_id in expected:
            expected = expected[: expected.index(tokenizer.eos_id)]
        assert text == tokenizer.decode(expected)


def test_rows_alone_have_gradients():
    model = build_alone(token_args(product_keys=False))
    build_optimizer(model, OptimArgs(value_update="sparse"), 1)
    tokens = torch.tensor([[3, 3, 4]])
    model(tokens, tokens).backward()
    [table] = model.layers[0].memory.own_tables
    assert isinstance(table.row_gradients, RowGradients)
    assert table.weight.grad is None
    slots, _ = table.row_gradients.rows()
    assert slots.tolist() == model.layers[0].memory.slots(tokens.flatten()).unique().tolist()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memories", "line"),
    [
        ({"words": {}}, r"model\.memories\.words: must be one of tokens "),
        ({"product_key": {}}, r"model\.memories\.product_key: must be one of tokens .*model\.productkey_args"),
        ({"tokens": 3}, r"model\.memories\.tokens: '3' where a section of keys and values is wanted"),
        ({"tokens": {"slots": 3}}, r"model\.memories\.tokens\.slots: unknown key; .* has layers, n_slots"),
        ({"tokens": {"n_slots": "many"}}, r"model\.memories\.tokens\.n_slots: 'many' must be of type int"),
        ({"tokens": {}}, r"model\.memories\.tokens\.layers: '' is no list of blocks"),
        ({"tokens": {"layers": "3"}}, r"model\.memories\.tokens\.layers: there is no block 3"),
        ({"tokens": {"layers": "0,2"}}, r"model\.memories\.tokens\.layers: block 2 has a memory of kind product_key"),
        ({"tokens": {"layers": "0", "n_slots": 0}}, r"model\.memories\.tokens\.n_slots: 0 is too small"),
        ({"tokens": {"layers": "0", "value_lr": -1}}, r"model\.memories\.tokens\.value_lr: -1.0 must be"),
    ],
)
def test_bad_sections_name_their_key(memories, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        validate_transformer_args(model_args({"layers": "2"}, memories=memories))


def test_a_block_number_needs_no_quotes():
    validate_transformer_args(token_args(section={"layers": 1}))
    assert isinstance(build_alone(token_args(section={"layers": 1})).layers[1].memory, nn.Module)
