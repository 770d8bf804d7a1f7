"""Hugging Face format: export a checkpoint to it, and start from a Llama that is in it.

    python -m apps.main.hf export ckpt_dir=dumps/debug/checkpoints/0000000600 out_dir=/tmp/hf
    python -m apps.main.hf import hf_dir=/tmp/llama out_dir=/tmp/start productkey_args.is_enabled=true \
        productkey_args.layers="4,8"

A dense model becomes a Llama, with a sliding window a Mistral; one with memory layers brings its own code along
(apps/main/hf_memory.py) and is loaded with trust_remote_code=True. An imported folder is a consolidated
checkpoint: give it to `checkpoint.init_ckpt_path`, and its config.yaml to `config=`.

The two sides name things differently, and turn positions differently: our rotary embedding turns dimensions 2i and
2i + 1 of a head together, theirs i and i + D/2, so that the rows of the query and key projections change places.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import logging
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from apps.main.generate import load_consolidated_model_and_tokenizer
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import check_writable, first_line, from_dict, parse_args, to_dict, to_yaml
from lingua.checkpoint import read_json, write_consolidated
from lingua.data import DataArgs
from lingua.distributed import DTYPES
from lingua.errors import UserError
from lingua.launch import run_main
from lingua.logger import init_logger
from lingua.product_key.memory import ProductKeyArgs, memory_kwargs, memory_layers
from lingua.tokenizer import (
    LLAMA3_SPLIT_PATTERN,
    ByteLevelTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    TokenizerArgs,
    build_tokenizer,
    proto_fields,
)
from lingua.transformer import head_sizes, hidden_size

if TYPE_CHECKING:
    import tokenizers
    import transformers

logger = logging.getLogger(__name__)

SHARD_SIZE = "5GB"
MODELING_FILE = "modeling_memory_lingua.py"
TOKENIZER_MODEL = "tokenizer.model"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"

# Our names and theirs, outside the blocks and within them.
OUTSIDE_BLOCKS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_BLOCKS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.query_proj.query_mlps.0": "mlp.query_proj",
}

# What tokenizers stumble over, for comparing two of them.
AWKWARD_TEXTS = (
    "",
    " ",
    "   ",
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing ",
    "two  spaces, three   spaces",
    "\n",
    "line\nline\r\n\n\n  line\n",
    "\ttab\t\ttabs",
    "naïve café Ωmega Straße",
    "中文。日本語、テスト русский हिन्दी",
    "😀 👩‍👩‍👧",
    "1 12 123 1234 12345678 3.14159",
    "don't WE'LL I'm",
    "def f(x_y: int = 1) -> list[str]:\n    return [f'{x}' for x in range(10)]  # ok\n",
    'a<b && c>=d || !e; /* */ \\ "q" @#$%^&*~`',
    "e\u0301 \u00a0 \u2028 \u00ad \x00 \x1c",
    "a" * 50 + " " * 50 + "ab" * 50,
)


@dataclass
class ExportArgs:
    """`ckpt_dir`: a checkpoint, distributed or consolidated; `dtype`: of the weights, fp32 where null."""

    ckpt_dir: str = ""
    out_dir: str = ""
    dtype: str | None = None


@dataclass
class ImportArgs:
    """`hf_dir`: a folder with config.json and safetensors; `seed`: of the memories that `productkey_args` puts in."""

    hf_dir: str = ""
    out_dir: str = ""
    productkey_args: ProductKeyArgs = field(default_factory=ProductKeyArgs)
    seed: int = 42


def export_hf(ckpt_dir: str | Path, out_dir: str | Path, dtype: str | None = None) -> Path:
    """Writes model and tokenizer of a checkpoint in Hugging Face format; returns `out_dir`.

    Args:
        ckpt_dir: whatever `load_consolidated_model_and_tokenizer` takes.
        out_dir: a folder that is empty or not there yet.
        dtype: fp32, bf16 or fp16; None for fp32, as the model is loaded.

    Raises UserError, in one line, for what is no checkpoint, a folder that is not empty, and a tokenizer that the
    `tokenizers` library cannot be made to follow.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: '{dtype}' must be one of {', '.join(DTYPES)}")
    out_dir = _fresh_folder(out_dir)
    _library("transformers")
    model, tokenizer, config = load_consolidated_model_and_tokenizer(ckpt_dir)
    args = from_dict(LMTransformerArgs, config["model"], f"model in {ckpt_dir}")
    if args.memories:
        raise UserError(f"ckpt_dir: a model with model.memories.{next(iter(args.memories))} has no Hugging Face format")
    add_bos = config["data"]["add_bos"] and tokenizer.bos_id >= 0
    tokenizer_args = TokenizerArgs(**config["data"]["tokenizer"])
    hf_tokenizer = _pretrained_tokenizer(tokenizer_args.name, tokenizer, add_bos, args.max_seqlen)
    hf_model = _hf_model(model, args, tokenizer, add_bos, DTYPES[dtype or "fp32"])
    with _written_whole(out_dir) as folder:
        hf_model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        _edit_json(folder / "config.json", rope_theta=args.rope_theta)  # where transformers 4 looks for it
        if memory_layers(args.productkey_args, args.n_layers):
            shutil.copyfile(Path(__file__).with_name("hf_memory.py"), folder / MODELING_FILE)
        hf_tokenizer.save_pretrained(folder)
        # The name that transformers 4 and 5 both know.
        _edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        if tokenizer_args.path and tokenizer_args.name in ("sp", "tiktoken"):
            shutil.copyfile(tokenizer_args.path, folder / TOKENIZER_MODEL)
    trust = ", trust_remote_code=True" if hf_model.config.model_type == "memory_lingua" else ""
    logger.info("wrote %s (%s) to %s", type(hf_model).__name__, str(hf_model.dtype).removeprefix("torch."), out_dir)
    logger.info("load it with AutoModelForCausalLM.from_pretrained(%r%s)", str(out_dir), trust)
    # Without it, transformers 5 asks at the terminal before it reads a tokenizer that lies beside code.
    logger.info("and its tokenizer with AutoTokenizer.from_pretrained(%r%s)", str(out_dir), trust)
    return out_dir


def import_hf(
    hf_dir: str | Path, out_dir: str | Path, productkey_args: ProductKeyArgs | None = None, seed: int = 42
) -> Path:
    """Writes a Llama or Mistral in Hugging Face format as a consolidated checkpoint; returns `out_dir`.

    Tensors keep the type that they are stored in: loading copies them into the model's type anyway.
    Besides consolidated.pth and params.json it writes config.yaml, the beginning of a training config. A tokenizer that
    cannot be brought along gets a warning, and params.json then names the file tokenizer.model, which is still to be
    put into the folder.

    Args:
        hf_dir: a folder with config.json and safetensors, in one file or in several with an index.
        out_dir: a folder that is empty or not there yet.
        productkey_args: memories for some blocks, in place of their feed-forward, freshly initialised from `seed`.

    Raises UserError, in one line that names the file, for another kind of model and for damaged or missing files.
    """
    out_dir, hf_dir = _fresh_folder(out_dir), Path(hf_dir)
    if not hf_dir.is_dir():
        raise UserError(f"hf_dir: no folder '{hf_dir}'; name one with config.json and safetensors")
    config_file = hf_dir / "config.json"
    if not config_file.is_file():
        raise UserError(f"hf_dir: no config.json in '{hf_dir}'")
    args = _model_args(read_json(config_file), config_file)
    args.productkey_args, args.seed = productkey_args or ProductKeyArgs(), seed
    if args.productkey_args.layers and not args.productkey_args.is_enabled:
        raise UserError(
            f"productkey_args.layers: '{args.productkey_args.layers}', but is_enabled is false; set it to true"
        )
    state = _imported_state(args, hf_dir)
    with _written_whole(out_dir) as folder:
        data = _bring_tokenizer(hf_dir, folder, out_dir)
        write_consolidated(folder, state, {"model": to_dict(args), "data": to_dict(data)})
        start = _StartConfig(
            args,
            _StartData(args.max_seqlen, data.add_bos, data.add_eos, data.tokenizer),
            _StartWeights(str(out_dir)),
        )
        (folder / "config.yaml").write_text(to_yaml(start), encoding="utf-8")
    fresh = (
        f", with fresh memories in blocks {args.productkey_args.layers}"
        if productkey_args is not None and productkey_args.is_enabled
        else ""
    )
    logger.info("wrote a model of %d blocks to %s%s", args.n_layers, out_dir, fresh)
    logger.info("start training from it with config=%s/config.yaml and your data, dump_dir and optim", out_dir)
    return out_dir


@dataclass
class _StartData:
    seq_len: int
    add_bos: bool
    add_eos: bool
    tokenizer: TokenizerArgs


@dataclass
class _StartWeights:
    init_ckpt_path: str


@dataclass
class _StartConfig:
    """The beginning of a config for apps.main.train."""

    model: LMTransformerArgs
    data: _StartData
    checkpoint: _StartWeights


# --- the model, there and back -----------------------------------------------------------------------------------


def _hf_name(name: str) -> str:
    """Their name of our parameter `name`."""
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    _, number, inside = name.split(".", 2)
    module, _, leaf = inside.rpartition(".")
    module = IN_BLOCKS.get(module) or module.replace("feed_forward", "mlp")
    return f"model.layers.{number}.{module}.{leaf}"


def _is_rotated(name: str) -> bool:
    return name.endswith((".wq.weight", ".wk.weight"))


def _to_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (2i, 2i+1) of each head to (i, i + D/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _to_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (i, i + D/2) of each head to (2i, 2i+1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _hf_model(
    model: LMTransformer, args: LMTransformerArgs, tokenizer: Tokenizer, add_bos: bool, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """The model as one of transformers', which shares its tensors where neither type nor order change."""
    transformers = _library("transformers")
    head_dim, n_heads, n_kv_heads = head_sizes(args)
    eos_id = tokenizer.eos_id if tokenizer.eos_id >= 0 else None
    settings = {
        "vocab_size": model.tok_embeddings.num_embeddings,
        "hidden_size": args.dim,
        "intermediate_size": hidden_size(args.dim, args.multiple_of, args.ffn_dim_multiplier),
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": args.max_seqlen,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "tie_word_embeddings": args.weight_tying,
        "bos_token_id": tokenizer.bos_id if add_bos else None,
        "eos_token_id": eos_id,
    }
    with_memory = memory_layers(args.productkey_args, args.n_layers)
    if with_memory:
        from apps.main.hf_memory import MemoryLinguaConfig, MemoryLinguaForCausalLM

        memory = memory_kwargs(args.productkey_args)
        del memory["value_fixed_lr"]  # of training
        name = MODELING_FILE.removesuffix(".py")
        auto_map = {"AutoConfig": MemoryLinguaConfig, "AutoModelForCausalLM": MemoryLinguaForCausalLM}
        settings["auto_map"] = {auto: f"{name}.{cls.__name__}" for auto, cls in auto_map.items()}
        settings |= {"memory_layers": with_memory, "sliding_window": args.sliding_window, **memory}
        config_class, model_class = MemoryLinguaConfig, MemoryLinguaForCausalLM
    elif args.sliding_window is not None or args.dim % n_heads:
        # A Mistral without a window is a Llama whose heads need not divide the width.
        settings["sliding_window"] = args.sliding_window
        config_class, model_class = transformers.MistralConfig, transformers.MistralForCausalLM
    else:
        config_class, model_class = transformers.LlamaConfig, transformers.LlamaForCausalLM
    with torch.device("meta"):
        hf_model = model_class(config_class(**settings))
    state = {
        _hf_name(name): (_to_halves(weight, head_dim) if _is_rotated(name) else weight).to(dtype)
        for name, weight in model.state_dict().items()
    }
    if args.weight_tying:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    hf_model.load_state_dict(state, assign=True)
    hf_model.tie_weights()
    # Padding is for generation alone: a model whose config names EOS for it would never train EOS's embedding.
    hf_model.generation_config = transformers.GenerationConfig(
        bos_token_id=settings["bos_token_id"], eos_token_id=eos_id, pad_token_id=eos_id
    )
    return hf_model.eval()


def _model_args(config: dict[str, Any], file: Path) -> LMTransformerArgs:
    """Our settings for their config.json. Raises UserError for what our model cannot be."""
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UserError(f"{file}: model_type is {kind!r}; only llama and mistral can be imported")
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise UserError(f"{file}: {key} is {config.get(key)!r}, wanted a number of 1 or more")
    # transformers 4 says it in rope_scaling and rope_theta, 5 in rope_parameters.
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{file}: {key} is {config[key]!r}, wanted an object or null")
    kinds = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    rope = {**kinds[0], **kinds[1]}
    types = [kind.get("rope_type", kind.get("type", "default")) for kind in kinds]
    rope_type = next((name for name in types if name != "default"), "default")
    per_layer = any(isinstance(value, dict) for value in rope.values())
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1
    if rope_type != "default" or per_layer or partial != 1:
        found = "one for each kind of layer" if per_layer else f"{rope_type!r} with partial_rotary_factor {partial}"
        raise UserError(
            f"{file}: the rotary embedding (rope_parameters, rope_scaling) is {found}, only 'default' can be"
        )
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, wanted) != wanted:
            raise UserError(f"{file}: {key} is {config[key]!r}, only {wanted!r} can be imported")
    if len(set(config.get("layer_types") or ())) > 1:
        raise UserError(f"{file}: layer_types differ from block to block, here all blocks attend alike")
    dim, n_heads = config["hidden_size"], config["num_attention_heads"]
    multiple_of, multiplier = _feed_forward_settings(dim, config["intermediate_size"])
    # What is not in the file has the default of transformers' config classes.
    mistral = kind == "mistral"
    values = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "head_dim": config.get("head_dim") or dim // n_heads,
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads", 8 if mistral else None) or n_heads,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "max_seqlen": config.get("max_position_embeddings", 4096 * 32 if mistral else 2048),
        "vocab_size": config["vocab_size"],
        "weight_tying": config.get("tie_word_embeddings", False),
        "sliding_window": config.get("sliding_window", 4096) if mistral else None,
    }
    return from_dict(LMTransformerArgs, values, str(file))


def _feed_forward_settings(dim: int, hidden: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) with which `hidden_size` is `hidden`; the roundest multiplier that does it."""
    multiple_of = 256 if hidden % 256 == 0 else hidden & -hidden  # or the largest power of two that divides
    if hidden_size(dim, multiple_of, None) == hidden:
        return multiple_of, None
    middle = (hidden + 1 - multiple_of / 2) / int(2 * 4 * dim / 3)  # of all that are rounded up to `hidden`
    multipliers = (round(middle, digits) for digits in range(1, 18))
    return multiple_of, next(m for m in multipliers if m > 0 and hidden_size(dim, multiple_of, m) == hidden)


def _imported_state(args: LMTransformerArgs, hf_dir: Path) -> dict[str, torch.Tensor]:
    """Our state dict: the folder's tensors, and new memories where `args` wants them."""
    with torch.device("meta"):
        model = LMTransformer(args)
    for memory in model.memories().values():
        memory.to_empty(device="cpu")
    # What is on the meta device draws its seed and no more, so the memories get what a whole model's would.
    model.init_weights()
    state = model.state_dict()
    wanted = {_hf_name(name): name for name, weight in state.items() if weight.is_meta}
    replaced = tuple(f"model.layers.{number}.mlp." for number in model.memories())
    head_dim, tied_output = head_sizes(args)[0], None
    for file, name, tensor in _stored_tensors(hf_dir):
        if name == "lm_head.weight" and args.weight_tying:
            tied_output = tensor
            continue
        if name.startswith(replaced) or name.endswith("rotary_emb.inv_freq"):  # the latter in old checkpoints
            continue
        if name not in wanted:
            raise UserError(f"{file}: unexpected tensor {name}; config.json tells of a model without it")
        ours = wanted.pop(name)
        if tensor.shape != state[ours].shape:
            shapes = f"{list(tensor.shape)}, by config.json it should be {list(state[ours].shape)}"
            raise UserError(f"{file}: {name} has shape {shapes}")
        if tensor.dtype not in DTYPES.values():
            raise UserError(f"{file}: {name} is {tensor.dtype}; wanted weights in fp32, bf16 or fp16")
        state[ours] = _to_pairs(tensor, head_dim) if _is_rotated(ours) else tensor
    if wanted:
        more = f" and {len(wanted) - 1} more" if len(wanted) > 1 else ""
        raise UserError(f"{hf_dir}: its safetensors lack the tensor {min(wanted)}{more}")
    if tied_output is not None and not torch.equal(tied_output, state["tok_embeddings.weight"]):
        raise UserError(
            f"{hf_dir}: lm_head.weight differs from model.embed_tokens.weight, though config.json has "
            "tie_word_embeddings true"
        )
    return dict(state)


def _stored_tensors(hf_dir: Path) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """(file, name, tensor) of all safetensors of the model, one at a time."""
    safetensors = _library("safetensors")
    for file in _weight_files(hf_dir):
        try:
            with safetensors.safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - it is no dictionary
                    yield file, name, stored.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise UserError(f"{file}: cut short or damaged ({first_line(error)}); fetch it again") from None


def _weight_files(hf_dir: Path) -> list[Path]:
    single, index = hf_dir / "model.safetensors", hf_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = next(iter(sorted(hf_dir.glob("pytorch_model*.bin"))), None)
        found = f"{pickled.name} is a pickle, which can run code when it is read" if pickled else "no weights"
        raise UserError(f"{hf_dir}: {found}; wanted model.safetensors or model.safetensors.index.json")
    weight_map = read_json(index, ("weight_map",))["weight_map"]
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: weight_map is no mapping of tensors to files; fetch it again")
    files = [hf_dir / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing, though {index.name} names it; fetch it again")
    return files


# --- the tokenizer -----------------------------------------------------------------------------------------------


def _pretrained_tokenizer(
    name: str, tokenizer: Tokenizer, add_bos: bool, max_seqlen: int
) -> transformers.PreTrainedTokenizerFast:
    """The same tokenizer as one of transformers'. Raises UserError where it turns out not to be the same."""
    processors = _library("tokenizers").processors
    backend = _sentencepiece(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else _byte_level(tokenizer)
    special = {}
    if add_bos:
        bos = special["bos_token"] = backend.id_to_token(tokenizer.bos_id)
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, tokenizer.bos_id)]
        )
    if tokenizer.eos_id >= 0:
        special["eos_token"] = special["pad_token"] = backend.id_to_token(tokenizer.eos_id)
    theirs = _library("transformers").PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",  # as generation wants it
        **special,
    )
    for text in AWKWARD_TEXTS:
        ids = tokenizer.encode(text, add_bos=add_bos)
        if theirs.encode(text) != ids or theirs.decode(ids, skip_special_tokens=True) != tokenizer.decode(ids):
            raise UserError(
                f"data.tokenizer.name={name}: cannot be exported, since the tokenizers library treats {text!r} "
                "otherwise"
            )
    theirs.model_max_length = max_seqlen  # now, since longer texts get a warning
    return theirs


def _byte_level(tokenizer: ByteLevelTokenizer) -> tokenizers.Tokenizer:
    """Byte-pair encoding on bytes: of `bytes` and `mock` without merges, of `tiktoken` with Llama 3's pattern."""
    library = _library("tokenizers")
    alphabet = _byte_alphabet()
    vocabulary = {
        "".join(alphabet[byte] for byte in token): number
        for number, token in enumerate(tokenizer.token_bytes)
        if token  # special tokens have no bytes
    }
    merges = _all_merges(sorted(vocabulary, key=vocabulary.get), vocabulary)
    backend = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = library.decoders.ByteLevel()
    special = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    if isinstance(tokenizer, TiktokenTokenizer):
        split = library.pre_tokenizers.Split(library.Regex(LLAMA3_SPLIT_PATTERN), "isolated")
        backend.pre_tokenizer = library.pre_tokenizers.Sequence([split, backend.pre_tokenizer])
        special = tokenizer.special_tokens
    # They follow the vocabulary, in this order.
    names = sorted(special, key=special.get)
    backend.add_special_tokens([library.AddedToken(name, special=True, normalized=False) for name in names])
    return backend


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: its own where that can be seen.

    The others are given the characters from 256 on, in order (Radford et al., 2019).
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _all_merges(pieces: list[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Each pair of pieces that make up a third, those of the first of `pieces` first.

    Both rank files and sentencepiece say which pieces come first and join whatever neighbours make one up.
    """
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


# Types of sentencepiece's pieces, and the number of its model that is byte-pair encoding (unigram: 1, or not said).
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
UNIGRAM, BPE = 1, 2


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """A sentencepiece model in parts of the tokenizers library (field numbers: sentencepiece_model.proto).

    One difference is known: where the model's table of characters maps one that carries a combining mark, as in a
    no-break space with an accent, the library drops the mark.

    Raises UserError for a model that is neither byte-pair encoding nor unigram.
    """
    library = _library("tokenizers")
    model = tokenizer.model
    fields = list(proto_fields(model.serialized_model_proto()))
    trainer, normalizer = (dict(proto_fields(dict(fields)[number])) for number in (2, 3))
    found = [dict(proto_fields(value)) for number, value in fields if number == 1]
    pieces = [(piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)) for piece in found]
    unknown, byte_fallback = pieces[model.unk_id()][0], bool(trainer.get(35, False))
    if trainer.get(3, UNIGRAM) == UNIGRAM:
        scored = [(piece, score) for piece, score, _ in pieces]
        backend = library.Tokenizer(library.models.Unigram(scored, unk_id=model.unk_id(), byte_fallback=byte_fallback))
    elif trainer[3] == BPE:
        normal = {piece: score for piece, score, kind in pieces if kind == NORMAL}
        vocabulary = {piece: number for number, (piece, _, _) in enumerate(pieces)}
        merges = _all_merges(sorted(normal, key=normal.get, reverse=True), normal)
        # Pieces that the model's user defined are not made by merges.
        whole = any(kind == USER_DEFINED for _, _, kind in pieces)
        options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": whole}
        backend = library.Tokenizer(library.models.BPE(vocabulary, merges, **options))
    else:
        raise UserError("data.tokenizer.name=sp: cannot be exported, its model is neither BPE nor unigram")
    control = [piece for piece, _, kind in pieces if kind == CONTROL]
    backend.add_special_tokens([library.AddedToken(piece, special=True, normalized=False) for piece in control])
    # Not as added tokens, which the normalizer would take for ends of the text. The longest one that fits is taken.
    own = sorted((piece for piece, _, kind in pieces if kind == USER_DEFINED), key=len, reverse=True)
    if own:
        pattern = library.Regex("|".join(map(re.escape, own)))
        backend.pre_tokenizer = library.pre_tokenizers.Split(pattern, "isolated")

    add_prefix, remove_extra = normalizer.get(3, True), normalizer.get(4, True)
    steps = [library.normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    if remove_extra:
        steps += [
            library.normalizers.Replace(library.Regex(r"\A +| +\z"), ""),
            library.normalizers.Replace(library.Regex(" {2,}"), " "),
        ]
    steps += [library.normalizers.Prepend("▁")] if add_prefix else []
    backend.normalizer = library.normalizers.Sequence([*steps, library.normalizers.Replace(" ", "▁")])
    surface = trainer.get(44, " \N{DOUBLE QUESTION MARK} ".encode()).decode()  # what an unknown piece is decoded to
    undo = [library.decoders.Replace(unknown, surface), library.decoders.Replace("▁", " ")]
    undo += [library.decoders.ByteFallback(), library.decoders.Fuse()]
    undo += [library.decoders.Strip(" ", 1, 0)] if add_prefix else []
    backend.decoder = library.decoders.Sequence(undo)
    return backend


def _bring_tokenizer(hf_dir: Path, folder: Path, out_dir: Path) -> DataArgs:
    """Writes the tokenizer's file into `folder`, which will be `out_dir`; returns the data settings that go with it."""
    args = _find_tokenizer(hf_dir, folder)
    if args is None:
        file = hf_dir / "tokenizer.json"
        name = "tiktoken" if file.is_file() and b'"ByteLevel"' in file.read_bytes() else "sp"
        path = out_dir / TOKENIZER_MODEL
        logger.warning(
            "the tokenizer of %s could not be brought along: put its tokenizer.model at %s, or set data.tokenizer.name "
            "and data.tokenizer.path",
            hf_dir,
            path,
        )
        return DataArgs(tokenizer=TokenizerArgs(name, str(path)))
    tokenizer = build_tokenizer(args.name, args.path)
    add_bos = True
    settings_file = hf_dir / "tokenizer_config.json"
    if settings_file.is_file():
        settings = read_json(settings_file)
        add_bos = bool(settings.get("add_bos_token", settings.get("bos_token")))
    if args.path is not None:
        args.path = str(out_dir / TOKENIZER_MODEL)
    return DataArgs(add_bos=add_bos and tokenizer.bos_id >= 0, add_eos=tokenizer.eos_id >= 0, tokenizer=args)


def _find_tokenizer(hf_dir: Path, folder: Path) -> TokenizerArgs | None:
    """Its name, and its file in `folder`; None where there is none that we can read."""
    copy = str(folder / TOKENIZER_MODEL)
    if (hf_dir / TOKENIZER_MODEL).is_file():
        shutil.copyfile(hf_dir / TOKENIZER_MODEL, copy)
        for name in ("sp", "tiktoken"):
            with contextlib.suppress(ValueError):
                build_tokenizer(name, copy)
                return TokenizerArgs(name, copy)
        Path(copy).unlink()
        return None
    if not (hf_dir / "tokenizer.json").is_file():
        return None
    found = read_json(hf_dir / "tokenizer.json")
    for name in ("bytes", "mock"):
        if _is_alike(found, build_tokenizer(name)):
            return TokenizerArgs(name)
    if _write_ranks(found, Path(copy)):
        with contextlib.suppress(ValueError):
            tokenizer = build_tokenizer("tiktoken", copy)
            theirs = _library("tokenizers").Tokenizer.from_str(json.dumps(found))
            if _is_alike(found, tokenizer) and all(
                theirs.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in AWKWARD_TEXTS
            ):
                return TokenizerArgs("tiktoken", copy)
        Path(copy).unlink()
    return None


def _is_alike(found: dict[str, Any], tokenizer: ByteLevelTokenizer) -> bool:
    """Whether a tokenizer.json has the parts that our tokenizer's would have; merges may be listed otherwise."""
    ours = json.loads(_byte_level(tokenizer).to_str())
    ends = [token["id"] for token in found.get("added_tokens", ()) if token["content"] in (BOS, EOS)]
    return (
        all(found.get(part) == ours[part] for part in ("normalizer", "pre_tokenizer"))
        and found.get("model", {}).get("vocab") == ours["model"]["vocab"]
        and len(found.get("added_tokens", ())) == len(ours["added_tokens"])
        and ends == [tokenizer.bos_id, tokenizer.eos_id]
    )


def _write_ranks(found: dict[str, Any], file: Path) -> bool:
    """Writes the vocabulary of a byte-level tokenizer.json as a rank file; False where it is none.

    Nor is one without `ignore_merges`: with a rank file, a word that is a token is always that token.
    """
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    model = found.get("model", {})
    if model.get("type") != "BPE" or not model.get("ignore_merges"):
        return False
    if not all(byte_of.keys() >= set(token) for token in model["vocab"]):
        return False
    lines = (
        b"%s %d\n" % (base64.b64encode(bytes(byte_of[character] for character in token)), rank)
        for token, rank in sorted(model["vocab"].items(), key=lambda item: item[1])
    )
    file.write_bytes(b"".join(lines))
    return True


# --- small things ------------------------------------------------------------------------------------------------


def _library(name: str) -> ModuleType:
    """Imported when needed: whoever trains does without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"hf: needs {name} ({first_line(error)}); `pip install transformers` brings it") from None


def _fresh_folder(out_dir: str | Path) -> Path:
    if not str(out_dir):
        raise UserError("out_dir: not set; name a folder to write to")
    folder = Path(out_dir).absolute()
    check_writable("out_dir", folder, 2**16)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out_dir: '{folder}' is there already, and is no empty folder; name another one")
    return folder


@contextlib.contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` at the end, or is removed where something goes wrong."""
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**read_json(file), **values}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    init_logger()
    word = sys.argv[1] if len(sys.argv) > 1 else "nothing"
    if word == "export":
        args = parse_args(ExportArgs, sys.argv[2:])
        export_hf(args.ckpt_dir, args.out_dir, args.dtype)
    elif word == "import":
        args = parse_args(ImportArgs, sys.argv[2:])
        import_hf(args.hf_dir, args.out_dir, args.productkey_args, args.seed)
    else:
        raise UserError(
            f"the first word is {word}, wanted export or import: apps.main.hf export ckpt_dir=... out_dir=..."
        )


if __name__ == "__main__":
    run_main(main)
