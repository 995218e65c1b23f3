"""What packed modules share: how stored tensors are held in memory, and the numbers by which operators name modules.

Scales are kept as int16 bit patterns, because `.to(torch.bfloat16)` would silently cast fp16 ones.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from mopeq.errors import MopeqError

TORCH = {"U8": torch.uint8, "F16": torch.float16}
HELD = {"U8": torch.uint8, "F16": torch.int16}  # in a tier; see above
LARGE = 1 << 20  # bytes from which a tensor's pages may be large


def check_stored(value: Tensor, dtype: str, shape: tuple[int, ...], what: str) -> None:
    """MopeqError unless a stored tensor arrived, in the shape its format says."""
    if value.is_meta or tuple(value.shape) != shape or value.dtype != TORCH[dtype]:
        raise MopeqError(
            f"{what} came as {value.dtype} {list(value.shape)} on {value.device}, not {dtype} {list(shape)}",
            "the checkpoint is damaged, or this version of transformers loads it differently",
        )


def as_bits(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).view(torch.int16)


def untouched(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor on the CPU, of which the kernel is asked to make large pages as it is written to.

    A token reads every chosen expert once: with pages of 4 KB a good part of that time is spent looking them up.
    """
    t = torch.empty(shape, dtype=dtype, device="cpu")
    advice, size = getattr(mmap, "MADV_HUGEPAGE", None), t.numel() * t.element_size()
    if advice is not None and size >= LARGE:  # Linux; where it is not granted, pages are small as ever
        first = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(t.data_ptr() + size - first), advice)
    return t


_live: WeakValueDictionary[int, Numbered] = WeakValueDictionary()
_numbers = count()


class Numbered(nn.Module):
    """A module that a custom operator can name (operators take tensors and numbers, and no modules), and whose
    `state_dict` has packed tensors under their names on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.enlist()

    def enlist(self) -> None:
        self.number = next(_numbers)
        _live[self.number] = self

    def packed_names(self) -> list[str]:
        """What of a `state_dict` is packed; nothing before the module is filled."""
        raise NotImplementedError

    def take_back(self, read: Callable[[str], Tensor]) -> None:
        """Fill the module anew with `read(name)` of each of `packed_names`."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """torch's, for whom the packed tensors are no parameters."""
        names = self.packed_names()
        here = {prefix + name for name in names} & state_dict.keys()
        rest = {name: value for name, value in state_dict.items() if name not in here}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        missing += [prefix + name for name in names if prefix + name not in here]
        if here and len(here) == len(names):
            try:
                self.take_back(lambda name: state_dict[prefix + name])
            except MopeqError as problem:
                errors.append(f"{prefix}{problem.line}")

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self.enlist()  # a copy is another module


def numbered(number: int) -> Any:
    return _live[number]
