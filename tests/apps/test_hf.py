"""To Hugging Face's format and back, on small random models; transformers itself judges.

transformers takes seconds to import: functions do, so that the collection of the tests does not.
"""

import base64
import dataclasses
import io
import json
import os
import random
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from apps.main import hf
from apps.main.generate import load_consolidated_model_and_tokenizer
from apps.main.hf import export_hf, import_hf
from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import parse_args, to_dict
from lingua.checkpoint import CheckpointArgs, CheckpointManager, load_model
from lingua.data import DataArgs
from lingua.optim import OptimArgs, build_optimizer
from lingua.product_key.memory import ProductKeyArgs
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from lingua.transformer import hidden_size
from tests.helpers.training import run_command, run_in_process

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"dim": 48, "n_layers": 4, "n_heads": 4, "vocab_size": 264, "max_seqlen": 64, "rope_theta": 50000.0}
MEMORY = ProductKeyArgs(is_enabled=True, layers="1,3", mem_n_keys=12, mem_knn=5, mem_k_dim=16, mem_heads=2)


def with_memory(**changes):
    return {"productkey_args": dataclasses.replace(MEMORY, **changes)}


VARIANTS = {
    "dense": {"norm_eps": 1e-3, "multiple_of": 6},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "head_dim": {"n_heads": 5, "head_dim": 6},
    "wide_head_dim": {"n_heads": 2, "n_kv_heads": 1, "head_dim": 32},
    "window": {"sliding_window": 7, "n_kv_heads": 2},
    "memory": with_memory(),
    "memory_separate": with_memory(mem_share_values=False),
    "memory_v_dim": with_memory(mem_v_dim=20),
    "memory_gated_without_swilu": with_memory(mem_gated=True, swilu_projection=False),
    "memory_v_dim_without_swilu": with_memory(mem_v_dim=20, swilu_projection=False, mem_share_values=False),
    "memory_qk_norm": with_memory(mem_qk_norm=True),
    "memory_peer": with_memory(peer_variant=True),
    "memory_peer_separate": with_memory(peer_variant=True, mem_share_values=False, swilu_projection=False),
    "memory_window_grouped_tied": {**with_memory(), "sliding_window": 9, "n_kv_heads": 2, "weight_tying": True},
}
ARCHITECTURES = {"head_dim": "MistralForCausalLM", "window": "MistralForCausalLM"}


@pytest.fixture(autouse=True, scope="module")
def _code_of_exported_models(tmp_path_factory):
    """Where transformers copies it to, instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


def write_checkpoint(folder, args, data=None):
    """A consolidated checkpoint of a random model, norms and biases too; returns it and the model."""
    model = LMTransformer(args)
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=random)
    folder.mkdir(parents=True)
    torch.save({"model": model.state_dict()}, folder / "consolidated.pth")
    (folder / "params.json").write_text(json.dumps({"model": to_dict(args), "data": to_dict(data or DataArgs())}))
    return folder, model.eval()


def load_hf(folder, **options):
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def load_tokenizer(folder, **options):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder, **options)


def some_tokens(n_words=258, shape=(2, 40)):
    return torch.randint(n_words, shape, generator=torch.Generator().manual_seed(2))


def assert_same_logits(hf_model, model, tokens=None, atol=1e-4):
    tokens = some_tokens() if tokens is None else tokens
    with torch.no_grad():
        ours, theirs = model(tokens), hf_model(tokens).logits
    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs.float(), rtol=0, atol=atol), (ours - theirs).abs().max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name of a variant -> (the exported folder, our model, the checkpoint)."""
    done = {}

    def export(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            checkpoint, model = write_checkpoint(folder / "ours", LMTransformerArgs(**SIZES | VARIANTS[name]))
            done[name] = export_hf(checkpoint, folder / "theirs"), model, checkpoint
        return done[name]

    return export


# --- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_exported_logits(exported, name):
    folder, model, _ = exported(name)
    loaded = load_hf(folder)
    memory = name.startswith("memory")
    wanted = "MemoryLinguaForCausalLM" if memory else ARCHITECTURES.get(name, "LlamaForCausalLM")
    assert type(loaded).__name__ == wanted
    assert (folder / "modeling_memory_lingua.py").exists() == memory
    assert loaded.dtype == torch.float32
    assert_same_logits(loaded, model)
    # Version 4 of transformers looks for the angle elsewhere.
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 50000.0
    assert (loaded.generation_config.bos_token_id, loaded.generation_config.eos_token_id) == (256, 257)


def test_a_window_is_seen(exported):
    folder, model, _ = exported("window")
    loaded = load_hf(folder, sliding_window=None)
    with torch.no_grad():
        assert not torch.allclose(loaded(some_tokens()).logits, model(some_tokens()), atol=1e-2)


def test_distributed_and_published_checkpoints(exported, tmp_path):
    _, model, _ = exported("memory")
    args = LMTransformerArgs(**SIZES | VARIANTS["memory"])
    optimizer, _ = build_optimizer(model, OptimArgs(), 10)
    config = {"model": to_dict(args), "data": to_dict(DataArgs())}
    CheckpointManager(CheckpointArgs(), tmp_path).save(7, model, optimizer, {"step": 7}, config)
    assert_same_logits(load_hf(export_hf(tmp_path / "0000000007", tmp_path / "distributed")), model)

    published, _ = write_checkpoint(tmp_path / "published", args)
    state = dict(model.state_dict())
    state["layers.3.feed_forward.values.weight"] = state["layers.1.feed_forward.values.weight"].clone()
    torch.save({"model": state}, published / "consolidated.pth")
    assert_same_logits(load_hf(export_hf(published, tmp_path / "from_published")), model)


@pytest.mark.parametrize("name", ["memory", "memory_peer", "memory_separate"])
def test_tables_are_stored_once_and_again_once(exported, name, tmp_path):
    folder, model, _ = exported(name)
    stored = load_file(folder / "model.safetensors")
    owners = (1, 3) if name == "memory_separate" else (1,)
    tables = ["values_u", "values_v"] if name == "memory_peer" else ["values"]
    wanted = {f"model.layers.{number}.mlp.{table}.weight" for number in owners for table in tables}
    assert {key for key in stored if ".values" in key} == wanted
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in model.parameters())

    load_hf(folder).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())
    assert (tmp_path / "again" / "modeling_memory_lingua.py").exists()
    assert_same_logits(load_hf(tmp_path / "again"), model)


@pytest.mark.parametrize("name", ["memory", "memory_peer", "grouped"])
def test_half_precision(exported, name, tmp_path):
    folder, model, checkpoint = exported(name)
    half = export_hf(checkpoint, tmp_path / "half", "bf16")
    whole = load_file(folder / "model.safetensors")
    stored = load_file(half / "model.safetensors")
    assert all(torch.equal(stored[key], tensor.bfloat16()) for key, tensor in whole.items())
    loaded = load_hf(half)
    assert loaded.dtype == torch.bfloat16
    assert_same_logits(load_hf(half, dtype=torch.float32), model, atol=0.3)
    with torch.no_grad():
        without_gradients = loaded(some_tokens()).logits.float()
    with_gradients = loaded(some_tokens()).logits.float()
    assert (with_gradients - without_gradients).norm() < 0.03 * without_gradients.norm()
    with_gradients.sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["memory", "memory_peer"])
def test_gradients_of_an_exported_memory(exported, name):
    folder, model, _ = exported(name)
    loaded, tokens = load_hf(folder), some_tokens()
    loaded(tokens, labels=tokens).loss.backward()
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    theirs, ours = loaded.model.layers[1].mlp, model.layers[1].feed_forward
    pairs = [(theirs.keys, ours.keys), (theirs.query_proj.weight, ours.query_proj.query_mlps[0].weight)]
    table = "values_u" if name == "memory_peer" else "values"
    pairs.append((getattr(theirs, table).weight, getattr(ours, table).weight))
    for their, our in pairs:
        assert our.grad.norm() > 0
        assert (their.grad - our.grad).norm() < 1e-3 * our.grad.norm()


@pytest.mark.parametrize("name", ["memory", "memory_peer", "memory_window_grouped_tied", "grouped"])
def test_generation_is_ours(exported, name):
    """With transformers' cache, and prompts of different lengths filled up on the left."""
    folder, model, _ = exported(name)
    loaded, tokenizer = load_hf(folder), load_tokenizer(folder, trust_remote_code=False)
    prompts = ["a", "import os", "näive  text, longer than the others"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0
    length = batch["input_ids"].shape[1]
    generated = loaded.generate(**batch, max_new_tokens=15, do_sample=False)[:, length:]
    for prompt, continuation in zip(prompts, generated.tolist(), strict=True):
        tokens = [256, *prompt.encode()]
        wanted = []
        with torch.no_grad():
            while len(wanted) < 15 and wanted[-1:] != [257]:
                wanted.append(int(model(torch.tensor([tokens + wanted]))[0, -1].argmax()))
        assert continuation[: len(wanted)] == wanted
        assert set(continuation[len(wanted) :]) <= {257}


@pytest.mark.parametrize("file", ["train_dense.npz", "train_memory.npz"])
def test_golden_models(file, tmp_path):
    case = next(c for c in json.loads((GOLDEN / "manifest.json").read_text()) if c.get("file") == file)
    arrays = np.load(GOLDEN / file)
    args = LMTransformerArgs(**case["model"], productkey_args=ProductKeyArgs(**case["productkey_args"]))
    args.vocab_size = len(arrays["init.tok_embeddings.weight"])
    # Their vocabulary is smaller than that of bytes.
    small = sentencepiece_model(model_type="unigram", vocab_size=60, hard_vocab_limit=False, character_coverage=0.98)
    (tmp_path / "small.model").write_bytes(small)
    data = DataArgs(tokenizer=TokenizerArgs("sp", str(tmp_path / "small.model")))
    folder, model = write_checkpoint(tmp_path / "ours", args, data)
    init = {k.removeprefix("init."): torch.from_numpy(arrays[k]) for k in arrays if k.startswith("init.")}
    model.load_state_dict(init)
    torch.save({"model": init}, folder / "consolidated.pth")
    loaded, tokens = load_hf(export_hf(folder, tmp_path / "theirs")), torch.from_numpy(arrays["tokens"])[0, :, :-1]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, torch.from_numpy(arrays["logits0"]), atol=1e-4)
        assert torch.allclose(loaded(tokens).logits, model(tokens), atol=1e-4)


# --- import ------------------------------------------------------------------------------------------------------


def llama(folder, max_shard_size="5GB", **changes):
    """A random Llama as transformers writes it."""
    import transformers

    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder, model


def imported_model(folder):
    """Our model from an imported folder, whatever its tokenizer."""
    params = json.loads((folder / "params.json").read_text())["model"]
    memory = ProductKeyArgs(**params.pop("productkey_args"))
    model = LMTransformer(LMTransformerArgs(**params, productkey_args=memory))
    load_model(folder, model)
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "shard"),
    [
        ({}, "5GB"),
        ({"tie_word_embeddings": True}, "5GB"),
        ({}, "20KB"),
        ({"head_dim": 16, "num_key_value_heads": 1}, "5GB"),
        ({"intermediate_size": 37, "rms_norm_eps": 1e-3}, "5GB"),
    ],
)
def test_imported_logits(tmp_path, changes, shard):
    folder, theirs = llama(tmp_path / "theirs", shard, **changes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    assert_same_logits(theirs, imported_model(import_hf(folder, tmp_path / "ours")), some_tokens(300))


def test_imported_sliding_window(tmp_path):
    import transformers

    settings = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "initializer_range": 0.2}
    theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**settings, max_position_embeddings=64)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(theirs, imported_model(import_hf(tmp_path / "theirs", tmp_path / "ours")), some_tokens(300))


def test_config_of_older_transformers(tmp_path):
    """rope_theta by itself, tensors that were stored once, a tied output beside the embedding."""
    folder, theirs = llama(tmp_path / "theirs", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 500000.0, "rope_scaling": None}))
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(stored, folder / "model.safetensors")
    assert_same_logits(theirs, imported_model(import_hf(folder, tmp_path / "ours")), some_tokens(300))


@pytest.mark.parametrize("name", ["dense", "grouped", "tied", "head_dim", "wide_head_dim", "window"])
def test_there_and_back_is_the_same(exported, name, tmp_path):
    folder, model, checkpoint = exported(name)
    back = import_hf(folder, tmp_path / "back")
    again, tokenizer, config = load_consolidated_model_and_tokenizer(back)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    assert (tokenizer.n_words, config["data"]["tokenizer"]["name"]) == (258, "bytes")
    assert torch.equal(again(some_tokens()), model(some_tokens()))
    args = parse_args(TrainArgs, [f"config={back}/config.yaml", "data.seq_len=64"])
    assert to_dict(args.model) == config["model"]
    assert args.checkpoint.init_ckpt_path == str(back)
    assert args.data.tokenizer == TokenizerArgs("bytes")


def test_half_precision_stays(tmp_path):
    folder, theirs = llama(tmp_path / "theirs")
    theirs.bfloat16().save_pretrained(folder)
    back = import_hf(folder, tmp_path / "ours")
    state = torch.load(back / "consolidated.pth")["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert torch.equal(state["layers.2.feed_forward.w3.weight"], theirs.model.layers[2].mlp.up_proj.weight)


@pytest.mark.parametrize("changes", [{}, {"peer_variant": True, "mem_share_values": False}])
def test_import_with_memories(exported, changes, tmp_path):
    folder, dense, _ = exported("grouped")
    memory = dataclasses.replace(MEMORY, layers="0,2", **changes)
    back = import_hf(folder, tmp_path / "ours", memory, seed=5)
    params = json.loads((back / "params.json").read_text())["model"]
    args = parse_args(TrainArgs, [f"config={back}/config.yaml"]).model
    assert (to_dict(args), args.productkey_args) == (params, memory)
    fresh, loaded = LMTransformer(args), LMTransformer(dataclasses.replace(args, seed=6))
    load_model(Path(back), loaded)
    old = dense.state_dict()
    for key, tensor in loaded.state_dict().items():
        replaced = key.startswith(("layers.0.feed_forward", "layers.2.feed_forward"))
        assert torch.equal(tensor, fresh.state_dict()[key] if replaced else old[key]), key
    assert loaded.state_dict().keys() == fresh.state_dict().keys()
    export_hf(back, tmp_path / "again")
    assert_same_logits(load_hf(tmp_path / "again"), loaded.eval())


@pytest.mark.parametrize(("dim", "hidden"), [(4096, 11008), (4096, 14336), (2048, 8192), (576, 1536), (32, 1), (7, 9)])
def test_feed_forward_sizes(dim, hidden):
    multiple_of, multiplier = hf._feed_forward_settings(dim, hidden)
    assert hidden_size(dim, multiple_of, multiplier) == hidden
    if (dim, hidden) == (4096, 11008):
        assert (multiple_of, multiplier) == (256, None)
    if (dim, hidden) == (4096, 14336):
        assert (multiple_of, multiplier) == (256, 1.3)


def test_any_feed_forward_size():
    draw = random.Random(0)
    for _ in range(3000):
        dim, hidden = draw.randint(1, 9000), draw.randint(1, 40000)
        assert hidden_size(dim, *hf._feed_forward_settings(dim, hidden)) == hidden


# --- tokenizers --------------------------------------------------------------------------------------------------

WORDS = re.findall(r"\S+", "the quick brown fox jumps over lazy dogs, don't x=1234 café 中文 <|x|> zq")
TEXTS = [*hf.AWKWARD_TEXTS, "a zq b", "azqb", " zq zq", "<|x|><|x|>", "日本語 zq\u3000ＡＢ① ﬁ"]


def prose(seed, n_words):
    draw = random.Random(seed)
    return "".join(
        draw.choice(WORDS) + draw.choice([" ", " ", " ", "  ", ". ", "\n", "\t", ""]) for _ in range(n_words)
    )


def sentencepiece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(1, 3000).splitlines()), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def rank_file():
    pieces = [bytes([byte]) for byte in range(256)]
    for word in [*WORDS, " ", "        ", "aaaaaaaa"]:
        whole = (" " + word).encode()
        pieces += [whole[start:end] for end in range(2, len(whole) + 1) for start in (0, 1) if end - start > 1]
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(pieces))}
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())


BPE = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True}
UNIGRAM = {"model_type": "unigram", "vocab_size": 310, "byte_fallback": True}
VERBATIM = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TOKENIZER_FILES = {
    "bytes": None,
    "mock": None,
    "tiktoken": rank_file,
    "sp_bpe": lambda: sentencepiece_model(**BPE),
    "sp_unigram": lambda: sentencepiece_model(**UNIGRAM),
    "sp_bpe_verbatim": lambda: sentencepiece_model(**BPE, **VERBATIM),
    "sp_unigram_verbatim": lambda: sentencepiece_model(**UNIGRAM, **VERBATIM),
    "sp_bpe_with_unknown": lambda: sentencepiece_model(model_type="bpe", vocab_size=120),
    "sp_unigram_with_unknown": lambda: sentencepiece_model(model_type="unigram", vocab_size=80),
    "sp_bpe_own_pieces": lambda: sentencepiece_model(**BPE, user_defined_symbols=["<|x|>", "zq"]),
    "sp_unigram_own_pieces": lambda: sentencepiece_model(**UNIGRAM, user_defined_symbols=["<|x|>", "zq"]),
    "sp_without_bos": lambda: sentencepiece_model(**BPE, bos_id=-1, add_dummy_prefix=False),
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """(name in TOKENIZER_FILES, add_bos) -> (the exported folder, our tokenizer)."""

    def export(name, add_bos=True):
        folder = tmp_path_factory.mktemp(name)
        args = TokenizerArgs(name.partition("_")[0])
        if TOKENIZER_FILES[name]:
            args.path = str(folder / "given.model")
            Path(args.path).write_bytes(TOKENIZER_FILES[name]())
        tokenizer = build_tokenizer(args.name, args.path)
        data = DataArgs(add_bos=add_bos, tokenizer=args)
        model = LMTransformerArgs(dim=16, n_layers=1, n_heads=2, vocab_size=tokenizer.n_words + 2)
        checkpoint, _ = write_checkpoint(folder / "ours", model, data)
        return export_hf(checkpoint, folder / "theirs"), tokenizer

    return export


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_exported_tokenizer(with_tokenizer, name):
    folder, ours = with_tokenizer(name)
    theirs = load_tokenizer(folder)
    has_bos = ours.bos_id >= 0
    for text in [*TEXTS, *(prose(seed, 25) for seed in range(20))]:
        ids = ours.encode(text, add_bos=has_bos)
        assert theirs.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False) == ids[has_bos:]
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
    assert len(theirs) == ours.n_words
    assert theirs.bos_token_id == (ours.bos_id if has_bos else None)
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id
    assert theirs.decode([*ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)
    theirs.save_pretrained(folder.parent / "again")
    assert load_tokenizer(folder.parent / "again").encode(TEXTS[7]) == theirs.encode(TEXTS[7])


def test_without_bos(with_tokenizer):
    folder, ours = with_tokenizer("bytes", add_bos=False)
    theirs = load_tokenizer(folder)
    assert theirs.bos_token is None
    assert theirs.encode("ab") == [97, 98]
    assert (
        json.loads((import_hf(folder, folder.parent / "back") / "params.json").read_text())["data"]["add_bos"] is False
    )


@pytest.mark.parametrize("name", ["bytes", "mock", "tiktoken", "sp_bpe", "sp_unigram", "sp_without_bos"])
def test_tokenizer_there_and_back(with_tokenizer, name):
    folder, ours = with_tokenizer(name)
    _, back, config = load_consolidated_model_and_tokenizer(import_hf(folder, folder.parent / "back"))
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (back.n_words, back.bos_id, back.eos_id) == (ours.n_words, ours.bos_id, ours.eos_id)
    assert config["data"]["add_bos"] == (ours.bos_id >= 0)


def test_rank_file_out_of_tokenizer_json(with_tokenizer):
    folder, ours = with_tokenizer("tiktoken")
    (folder / "tokenizer.model").unlink()
    _, back, config = load_consolidated_model_and_tokenizer(import_hf(folder, folder.parent / "back"))
    assert config["data"]["tokenizer"] == {"name": "tiktoken", "path": str(folder.parent / "back" / "tokenizer.model")}
    assert [back.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert back.special_tokens == ours.special_tokens


@pytest.mark.parametrize("change", ["pattern", "merges", "empty", "none", "damaged"])
def test_tokenizer_that_cannot_be_brought(with_tokenizer, change, caplog):
    folder, _ = with_tokenizer("tiktoken")
    (folder / "tokenizer.model").unlink()
    file = folder / "tokenizer.json"
    if change == "pattern":
        file.write_text(file.read_text().replace("{1,3}", "{1,2}"))
    elif change == "merges":
        file.write_text(file.read_text().replace('"ignore_merges": true', '"ignore_merges": false'))
    elif change == "empty":
        file.write_text("{}")
    else:
        file.unlink()
    if change == "damaged":
        (folder / "tokenizer.model").write_bytes(b"AA== 0\n")
    back = import_hf(folder, folder.parent / "back")
    assert "could not be brought along" in caplog.text
    assert not (back / "tokenizer.model").exists()
    assert imported_model(back).max_seqlen == 1024
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.*tokenizer\.model.*: no such file"):
        load_consolidated_model_and_tokenizer(back)


# --- what cannot be done -----------------------------------------------------------------------------------------


def refusal(function, *arguments, out):
    """The one line, after which nothing is left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at by the caller
        function(*arguments)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),  # beside rope_parameters
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', wanted an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one for each kind of layer"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"intermediate_size": 90}, "mlp.*has shape .*88.*90"),
        ({"num_hidden_layers": 2}, r"unexpected tensor model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"lack the tensor model\.layers\.3\.\S+ and 8 more"),
        ({"num_attention_heads": 5, "head_dim": None}, "n_kv_heads"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight differs from"),
    ],
)
def test_models_that_cannot_be_imported(tmp_path, changes, message):
    folder, _ = llama(tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    line = refusal(import_hf, folder, tmp_path / "out", out=tmp_path / "out")
    assert re.search(message, line), line


def test_files_that_cannot_be_imported(tmp_path):
    out = tmp_path / "out"
    folder, _ = llama(tmp_path / "theirs", "20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b""):
        shard.write_bytes(content)
        assert f"{shard}: cut short or damaged" in refusal(import_hf, folder, out, out=out)
    shard.unlink()
    assert f"{shard}: missing" in refusal(import_hf, folder, out, out=out)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert 'has no "weight_map"' in refusal(import_hf, folder, out, out=out)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    assert "weight_map is no mapping" in refusal(import_hf, folder, out, out=out)
    assert "is_enabled is false" in refusal(import_hf, folder, out, ProductKeyArgs(layers="1"), out=out)
    (folder / "model.safetensors.index.json").unlink()
    assert "no weights; wanted model.safetensors" in refusal(import_hf, folder, out, out=out)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is a pickle" in refusal(import_hf, folder, out, out=out)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(import_hf, folder, out, out=out)
    assert "hf_dir: no folder" in refusal(import_hf, tmp_path / "nowhere", out, out=out)


def test_tensors_of_another_type(tmp_path):
    folder, _ = llama(tmp_path / "theirs")
    stored = load_file(folder / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(torch.int8)
    save_file(stored, folder / "model.safetensors")
    assert "model.norm.weight is torch.int8" in refusal(import_hf, folder, tmp_path / "out", out=tmp_path / "out")


def test_memories_that_do_not_fit(exported, tmp_path):
    folder, _, _ = exported("dense")
    for changes, message in (({"layers": "9"}, "there is no block 9"), ({"mem_knn": 50}, "mem_knn: 50")):
        memory = dataclasses.replace(MEMORY, **changes)
        assert message in refusal(import_hf, folder, tmp_path / "out", memory, out=tmp_path / "out")


def test_exports_that_cannot_be_done(exported, tmp_path):
    _, _, checkpoint = exported("dense")
    out = tmp_path / "out"
    assert "dtype: 'fp64'" in refusal(export_hf, checkpoint, out, "fp64", out=out)
    assert "ckpt: no folder" in refusal(export_hf, tmp_path / "nowhere", out, out=out)
    assert "out_dir: not set" in refusal(export_hf, checkpoint, "", out=out)
    out.mkdir()
    (out / "precious").touch()
    assert "is no empty folder" in refusal(export_hf, checkpoint, out, out=out)
    assert "is a file, not a folder" in refusal(export_hf, checkpoint, out / "precious", out=out)
    assert "is no empty folder" in refusal(import_hf, checkpoint, out, out=out)
    (out / "precious").unlink()
    assert (export_hf(checkpoint, out) / "config.json").exists()  # an empty one is filled


def test_tokenizer_that_cannot_be_exported(tmp_path):
    file = tmp_path / "given.model"
    file.write_bytes(sentencepiece_model(model_type="char", vocab_size=40, hard_vocab_limit=False))
    data = DataArgs(tokenizer=TokenizerArgs("sp", str(file)))
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 330}
    checkpoint, _ = write_checkpoint(tmp_path / "ours", LMTransformerArgs(**sizes), data)
    assert "neither BPE nor unigram" in refusal(export_hf, checkpoint, tmp_path / "out", out=tmp_path / "out")
    # Whitespace behind words instead of before them, which the library has no normalizer for.
    file.write_bytes(sentencepiece_model(**BPE, treat_whitespace_as_suffix=True))
    line = refusal(export_hf, checkpoint, tmp_path / "out", out=tmp_path / "out")
    assert line.startswith("data.tokenizer.name=sp: cannot be exported")


def test_nothing_is_left_of_what_cannot_be_written(exported, tmp_path, monkeypatch):
    folder, _, checkpoint = exported("dense")

    def fail(*_, **__):
        raise OSError("No space left on device")

    for function, argument, target in ((export_hf, checkpoint, "shutil.copyfile"), (import_hf, folder, "torch.save")):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            if function is export_hf:
                patch.setattr(hf, "_edit_json", fail)
            with pytest.raises(OSError, match="No space left"):
                function(argument, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_command(exported, tmp_path):
    _, model, checkpoint = exported("grouped")
    done = run_in_process(["export", f"ckpt_dir={checkpoint}", f"out_dir={tmp_path}/hf"], tmp_path, "apps.main.hf").ok()
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/hf')" in done.out
    memory = ["is_enabled=true", 'layers="1,3"', "mem_n_keys=8", "mem_knn=4"]
    arguments = [f"hf_dir={tmp_path}/hf", f"out_dir={tmp_path}/ours", "seed=3"]
    arguments += [f"productkey_args.{key}" for key in memory]
    run_in_process(["import", *arguments], tmp_path, "apps.main.hf").ok()
    imported = imported_model(tmp_path / "ours")
    assert sorted(imported.memories()) == [1, 3]
    assert torch.equal(imported.output.weight, model.output.weight)


def test_wrong_first_word(tmp_path):
    """The second one of a process, as users start it."""
    misspelled = run_in_process(["exprot"], tmp_path, "apps.main.hf")
    missing = run_command(["apps.main.hf"])
    for result, word in ((misspelled, "exprot"), (missing, "nothing")):
        assert result.the_error().startswith(f"error: the first word is {word}, wanted export or import")
