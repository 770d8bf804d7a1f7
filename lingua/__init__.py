"""Training of language models with memory layers: the library.

In a notebook:

    from lingua import HashingMemory, load_checkpoint
    model, tokenizer, config = load_checkpoint("dumps/debug/checkpoints/0000000600")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["HashingMemory", "LMTransformer", "load_checkpoint"]

# Loaded when they are first used: torch takes seconds to import, and most commands check their arguments before.
_HOMES = {
    "HashingMemory": ("lingua.product_key.memory", "HashingMemory"),
    "LMTransformer": ("apps.main.transformer", "LMTransformer"),
    "load_checkpoint": ("apps.main.generate", "load_consolidated_model_and_tokenizer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lingua' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
