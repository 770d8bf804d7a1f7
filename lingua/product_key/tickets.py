"""How a backward pass finds, through autograd and a compiler, whom to report it to.

Both know tensors only. A *ticket* is a number on the CPU, a tensor that autograd takes for an input; its gradient is
worth nothing, but has to be computed, by an operator that looks up whose ticket it is and tells them. (What for:
row_gradients.py, slot_use.py.)
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

_numbers = itertools.count(1)
_holders: WeakValueDictionary[int, Any] = WeakValueDictionary()


def new_ticket(holder: Any) -> torch.Tensor:
    """A ticket for `holder`, which it does not keep alive."""
    number = next(_numbers)
    _holders[number] = holder
    # In a list: the compiler takes a scalar for a number of the program's, and starts anew to make it a constant.
    return torch.tensor([float(number)], dtype=torch.float64, device="cpu", requires_grad=True)


def holder_of(ticket: torch.Tensor) -> Any:
    return _holders[int(ticket)]
