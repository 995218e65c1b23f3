"""What waits at a model's layer borders for the way back: in memory as far as it is allowed to, beyond that on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mopeq.tensors import tensor_data


@dataclass(frozen=True)
class Ticket:
    """What a shelf gives for a tensor: the tensor itself, or the file it was written to."""

    held: Tensor | Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Shelf:
    """Keeps tensors until they are taken back, each once. `memory_bytes` of them stay in memory, all without folder."""

    def __init__(self, folder: Path | None = None, memory_bytes: int = 1 << 62):
        self.folder, self.free, self.written = folder, memory_bytes, 0

    def keep(self, tensor: Tensor) -> Ticket:
        place: Tensor | Path = tensor
        if self.folder is None or tensor.nbytes <= self.free:
            self.free -= tensor.nbytes
        else:
            place = self.folder / f"{self.written}.border"
            place.write_bytes(tensor_data(tensor.detach().cpu()))
            self.written += 1
        return Ticket(place, tensor.shape, tensor.dtype, tensor.device)

    def take(self, ticket: Ticket) -> Tensor:
        """The tensor, for good."""
        if isinstance(ticket.held, Tensor):
            self.free += ticket.held.nbytes
            return ticket.held
        data = bytearray(ticket.held.read_bytes())
        ticket.held.unlink()
        return torch.frombuffer(data, dtype=ticket.dtype).reshape(ticket.shape).to(ticket.device)


@contextmanager
def shelf(folder: Path | None, memory_bytes: int) -> Iterator[Shelf]:
    """A shelf whose files, in a folder of their own below `folder`, are gone afterwards."""
    if folder is None:
        yield Shelf()
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("borders-*"):  # of a run that was killed; the run directory is locked
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="borders-", dir=folder) as place:
        yield Shelf(Path(place), memory_bytes)
