"""The memories that a block may carry, by name. To add one: its file, and an entry here (lingua/README.md).

`model.productkey_args` describes the product-key memories, as published configs do; all others have a section of
`model.memories`, such as `model.memories.tokens.layers="1,3"`.
"""

from __future__ import annotations

import types
import typing
from typing import Any, NamedTuple

from lingua.config import BaseTransformerArgs
from lingua.errors import UserError
from lingua.memory_layer import MemoryLayer, parse_blocks
from lingua.product_key.args import ProductKeyArgs
from lingua.product_key.memory import HashingMemory, memory_layers
from lingua.token_memory import TokenMemory, TokenMemoryArgs

PRODUCT_KEY = "product_key"
MEMORIES: dict[str, tuple[type, type[MemoryLayer]]] = {
    PRODUCT_KEY: (ProductKeyArgs, HashingMemory),
    "tokens": (TokenMemoryArgs, TokenMemory),
}


class Chosen(NamedTuple):
    """A kind of memory that a model has, and the blocks that carry it, in order."""

    name: str
    layer: type[MemoryLayer]
    args: Any
    blocks: list[int]


def chosen_memories(args: BaseTransformerArgs) -> list[Chosen]:
    """Raises UserError, one line that names the key, for unknown names, keys and blocks, and two in one block."""
    chosen = []
    blocks = memory_layers(args.productkey_args, args.n_layers)
    if blocks:
        chosen.append(Chosen(PRODUCT_KEY, HashingMemory, args.productkey_args, blocks))
    for name, section in args.memories.items():
        if name not in MEMORIES or name == PRODUCT_KEY:
            known = ", ".join(other for other in MEMORIES if other != PRODUCT_KEY)
            raise UserError(f"model.memories.{name}: must be one of {known} (product keys: model.productkey_args)")
        kind, layer = MEMORIES[name]
        own = _parse(kind, section, f"model.memories.{name}")
        blocks = parse_blocks(own.layers, args.n_layers, f"model.memories.{name}.layers")
        for other in chosen:
            for block in set(blocks) & set(other.blocks):
                raise UserError(
                    f"model.memories.{name}.layers: block {block} has a memory of kind {other.name} already"
                )
        chosen.append(Chosen(name, layer, own, blocks))
    return chosen


def _parse(kind: type, section: Any, key: str) -> Any:
    if not isinstance(section, dict):
        raise UserError(f"{key}: '{section}' where a section of keys and values is wanted")
    wanted = typing.get_type_hints(kind)
    for name, value in section.items():
        if name not in wanted:
            raise UserError(f"{key}.{name}: unknown key; {key} has {', '.join(wanted)}")
        of_key = wanted[name]
        allowed = typing.get_args(of_key) if isinstance(of_key, types.UnionType) else (of_key,)
        if float in allowed and type(value) is int:
            section = {**section, name: float(value)}
        elif str in allowed and type(value) is int:  # layers=1
            section = {**section, name: str(value)}
        elif type(value) not in allowed:
            raise UserError(
                f"{key}.{name}: '{value}' must be of type {of_key if len(allowed) > 1 else of_key.__name__}"
            )
    return kind(**section)
