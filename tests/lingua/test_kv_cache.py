"""Packed sequences and the cache, against the whole sequence in one forward pass."""

import itertools

import pytest
import torch

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.kv_cache import KVCache, Packing, read_without_cache
from lingua.product_key.memory import ProductKeyArgs

SIZES = {"dim": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 50, "max_seqlen": 40}
MODELS = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "one key-value head": {"n_kv_heads": 1},
    "window": {"sliding_window": 5},
    "grouped, window": {"n_kv_heads": 2, "sliding_window": 5},
    "wide heads, tied": {"head_dim": 24, "weight_tying": True},
}
LENGTHS = {"uneven": [7, 1, 12, 3], "even": [6, 6, 6], "one": [9], "longer than the window": [9, 15, 5]}


def build(**changes):
    memory = ProductKeyArgs(is_enabled=True, layers="1", mem_n_keys=8, mem_knn=4, mem_k_dim=8, mem_heads=2)
    return LMTransformer(LMTransformerArgs(**(SIZES | changes), productkey_args=memory)).eval()


def draw(lengths, extra=0):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(50, (length + extra,), generator=generator).tolist() for length in lengths]


def test_a_packing_knows_rows_and_positions():
    packing = Packing([2, 3, 1], torch.device("cpu"))
    assert packing.rows.tolist() == [0, 0, 1, 1, 1, 2]
    assert packing.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert packing.last.tolist() == [1, 4, 5]
    x = torch.arange(12.0).view(6, 2, 1)
    unpacked = packing.unpack(x)
    assert unpacked.shape == (3, 3, 2, 1)
    assert torch.equal(unpacked[1], x[2:5])
    assert not unpacked[0, 2].any()
    assert torch.equal(packing.pack(unpacked), x)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_reading_and_steps_are_the_whole_sequence(changes, lengths):
    """Logits of prompts, packed, and of 8 tokens more that come one by one, are those of each sequence by itself."""
    model, n_steps = build(**changes), 8
    sequences = draw(lengths, extra=n_steps)
    whole = [model(torch.tensor([sequence]))[0] for sequence in sequences]
    packing = Packing(lengths, torch.device("cpu"))
    prompts = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    row = torch.tensor([list(itertools.chain(*prompts))])
    window = model.sliding_window
    cache = KVCache(model, len(lengths), max(lengths) + n_steps, window, torch.float32, torch.device("cpu"))
    assert cache.keys[0].shape[1] == (changes.get("n_kv_heads") or 4)
    assert cache.keys[0].shape[2] == min(max(lengths) + n_steps, window or 1000)

    read = model(row, tok_idx=packing.positions, mask=cache.read(packing))[0].split(lengths)
    alone = model(row, tok_idx=packing.positions, mask=read_without_cache(packing, window))[0].split(lengths)
    for here, without, sequence, length in zip(read, alone, whole, lengths, strict=True):
        assert torch.allclose(here, sequence[:length], atol=1e-5)
        assert torch.allclose(without, sequence[:length], atol=1e-5)

    for step in range(n_steps):
        positions = torch.tensor(lengths) + step
        tokens = torch.tensor([[sequence[position] for sequence, position in zip(sequences, positions, strict=True)]])
        states = cache.step(positions, int(positions.max()) + 1, all_alike=len(set(lengths)) == 1)
        logits = model(tokens, tok_idx=positions, mask=states)[0]
        expected = torch.stack([sequence[position] for sequence, position in zip(whole, positions, strict=True)])
        assert torch.allclose(logits, expected, atol=1e-5)


@torch.no_grad()
def test_sequences_that_are_dropped_change_nothing_for_the_others():
    model, lengths = build(), [4, 6, 5]
    sequences = draw(lengths, extra=2)
    packing = Packing(lengths, torch.device("cpu"))
    cache = KVCache(model, 3, 8, None, torch.float32, torch.device("cpu"))
    prompts = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    model(torch.tensor([list(itertools.chain(*prompts))]), tok_idx=packing.positions, mask=cache.read(packing))
    cache.keep([2, 0])
    positions = torch.tensor([5, 4])
    tokens = torch.tensor([[sequences[2][5], sequences[0][4]]])
    logits = model(tokens, tok_idx=positions, mask=cache.step(positions, 6))[0]
    for here, number, position in zip(logits, (2, 0), (5, 4), strict=True):
        alone = model(torch.tensor([sequences[number][: position + 1]]))[0, -1]
        assert torch.allclose(here, alone, atol=1e-5)


@torch.no_grad()
def test_more_places_than_needed_do_no_harm():
    """As a CUDA graph steps, whose sizes cannot change."""
    model, lengths = build(), [3, 5]
    sequences = draw(lengths, extra=1)
    packing = Packing(lengths, torch.device("cpu"))
    cache = KVCache(model, 2, 30, None, torch.float32, torch.device("cpu"))
    prompts = [sequence[:length] for sequence, length in zip(sequences, lengths, strict=True)]
    model(torch.tensor([list(itertools.chain(*prompts))]), tok_idx=packing.positions, mask=cache.read(packing))
    positions = torch.tensor(lengths)
    tokens = torch.tensor([[sequence[-1] for sequence in sequences]])
    logits = model(tokens, tok_idx=positions, mask=cache.step(positions, 30))[0]
    for here, sequence in zip(logits, sequences, strict=True):
        assert torch.allclose(here, model(torch.tensor([sequence]))[0, -1], atol=1e-5)
