"""What waits at a model's layer borders, for its turn or for the way back: in memory as far as it is allowed to, beyond
that on disk.

A border's tensors are handed over (`keep`, `take`). What a batch holds in its own thread while it stands still, in
variables of the model's code and in autograd's graphs, cannot be: there the storages are emptied, and filled again
before the batch moves (`Luggage`).
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mopeq.errors import MopeqError

LEAST = 1 << 16  # bytes that are worth a file
HOLES = 1 << 30  # freed bytes that a C library may keep; where it kept them, 0.7 GiB were measured, and growing
LARGE = 1 << 22  # bytes of a tensor whose memory goes back to the system as soon as it is freed
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
# whose users' changes no version counts
UNCOUNTED = (Tensor.data.__get__, Tensor.data_ptr, Tensor.__dlpack__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Ticket:
    """What a shelf gives for a tensor: the tensor itself, or the file it was written to."""

    held: Tensor | Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Item:
    """A storage that a batch made. It is `counted` as waiting in memory, `empty` with its bytes in `file`, or at work.

    `changes` shares the version counter of the storage's tensors and none of its memory; `file` was written at version
    `written`. `stays`: it is needed on the way back, when the batch has ended.
    """

    nbytes: int
    changes: Tensor
    counted: bool = False
    empty: bool = False
    file: Path | None = None
    written: int = 0
    stays: bool = False

    @property
    def is_written(self) -> bool:
        return self.file is not None and self.written == self.changes._version


class Shelf:
    """Keeps tensors until they are taken back. `memory_bytes` of them stay in memory, all without folder."""

    def __init__(self, folder: Path | None = None, memory_bytes: int = 1 << 62):
        self.folder, self.free, self.written = folder, memory_bytes, 0
        self.owners: weakref.WeakKeyDictionary[UntypedStorage, Luggage] = weakref.WeakKeyDictionary()

    def keep(self, tensor: Tensor) -> Ticket:
        storage = tensor.untyped_storage()
        owner = self.owners.get(storage)
        item = None if owner is None else owner.items[storage]
        place: Tensor | Path = tensor
        if self.folder is None or tensor.nbytes <= self.free or (item is not None and item.counted):
            if owner is not None:
                owner.forget(storage)  # from now on it counts as the ticket's
            self.free -= tensor.nbytes
        elif item is not None and item.is_written and tensor.nbytes == item.nbytes and tensor.is_contiguous():
            place, item.file = item.file, None  # type: ignore[assignment]
        else:
            place = self.write(tensor.detach().cpu().contiguous())
        return Ticket(place, tensor.shape, tensor.dtype, tensor.device)

    def look(self, ticket: Ticket) -> Tensor:
        """The tensor, which stays here: not to be changed."""
        if isinstance(ticket.held, Tensor):
            return ticket.held
        tensor = torch.empty(ticket.shape, dtype=ticket.dtype)
        read_into(ticket.held, tensor.data_ptr(), tensor.nbytes)
        return tensor.to(ticket.device)

    def drop(self, ticket: Ticket) -> None:
        if isinstance(ticket.held, Tensor):
            self.free += ticket.held.nbytes
        else:
            ticket.held.unlink()

    def take(self, ticket: Ticket) -> Tensor:
        """The tensor, for good."""
        tensor = self.look(ticket)
        self.drop(ticket)
        return tensor

    def trim(self) -> None:
        """Give the system back what was freed, where memory is short."""
        if self.folder is not None and self.free < HOLES:
            lay_large_apart()
            return_freed()

    def write(self, what: Tensor | UntypedStorage) -> Path:
        assert self.folder is not None
        place = self.folder / f"{self.written}.border"
        self.written += 1
        nbytes = what.nbytes if isinstance(what, Tensor) else what.nbytes()
        try:
            place.write_bytes(memory_at(what.data_ptr(), nbytes))
        except OSError as problem:
            problem.filename = problem.filename or str(place)
            raise
        return place


class Luggage(TorchFunctionMode):
    """What a batch has made and still holds, in variables and graphs that nobody sees: known, by storage, since torch's
    functions returned it while this mode was on, or a part did. Without a folder nothing is looked at.

    It is for what the batch alone uses. What another one is seen to use too (a table that a model makes once), there or
    in a part (`using`), is filled again and then left alone. Until the batch has ended (`end`), nobody else must use
    what it made.
    """

    def __init__(self, shelf: Shelf):
        super().__init__()
        self.shelf = shelf
        self.items: weakref.WeakKeyDictionary[UntypedStorage, Item] = weakref.WeakKeyDictionary()

    def watching(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.shelf.folder is None else self

    def using(self) -> AbstractContextManager[Any]:
        """For the time that a part runs for the batch: what is made there is the part's."""
        return nullcontext() if self.shelf.folder is None else Using(self)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.use(func, (args, kwargs))
        made = func(*args, **(kwargs or {}))
        self.see(made, given)
        return made

    def use(self, func: Any, given: Any) -> set[UntypedStorage]:
        """See to it that a function finds what it is given, a tree with tensors: their storages."""
        found = {storage for storage, _ in storages(given)}
        for storage in found:
            if func in UNCOUNTED:
                self.leave(storage)
            self.share(storage)
        return found

    def see(self, made: Any, besides: Iterable[UntypedStorage] = ()) -> None:
        """Count what was made, a tree with tensors, as the batch's, except what shares its memory with others."""
        if self.shelf.folder is None:
            return
        for storage, tensor in storages(made):
            if storage in besides or storage.nbytes() < LEAST or not storage.resizable() or tensor.is_inference():
                continue
            if storage in self.shelf.owners:
                self.share(storage)
                continue
            changes = tensor.detach()
            changes.data = tensor.new_empty(0)
            item = self.items[storage] = Item(storage.nbytes(), changes)
            self.shelf.owners[storage] = self
            weakref.finalize(storage, self.release, item).atexit = False

    def share(self, storage: UntypedStorage) -> None:
        """Leave alone what another batch made and this one uses."""
        if self.shelf.owners.get(storage) is not self:
            self.leave(storage)

    def leave(self, storage: UntypedStorage) -> None:
        """Have a storage, whoever made it, filled and nobody's from now on."""
        owner = self.shelf.owners.get(storage)
        if owner is not None:
            owner.fill(storage, owner.items[storage])
            owner.forget(storage)

    def release(self, item: Item) -> None:
        """Give back what an item takes in memory allowed, and on disk."""
        if item.counted:
            self.shelf.free += item.nbytes
        if item.file is not None:
            item.file.unlink(missing_ok=True)
        item.counted, item.file = False, None

    def forget(self, storage: UntypedStorage) -> None:
        del self.shelf.owners[storage]
        self.release(self.items.pop(storage))

    def lay_down(self) -> None:
        """The batch stands still: what there is no memory for goes to disk, once where it does not change."""
        for storage, item in list(self.items.items()):
            if item.counted or item.empty or not storage.resizable() or storage.nbytes() != item.nbytes:
                continue
            if item.nbytes <= self.shelf.free:
                self.shelf.free -= item.nbytes
                item.counted = True
                continue
            if not item.is_written:
                if item.file is not None:
                    item.file.unlink()
                item.file, item.written = self.shelf.write(storage), item.changes._version
            item.empty = True  # before it is so: where a signal comes between, it is filled again
            storage.resize_(0)
        self.shelf.trim()

    def pick_up(self) -> None:
        """Before the batch moves, or somebody else uses what it has made."""
        for storage, item in list(self.items.items()):
            self.fill(storage, item)

    def fill(self, storage: UntypedStorage, item: Item) -> None:
        if item.empty:
            assert item.file is not None
            storage.resize_(item.nbytes)
            read_into(item.file, storage.data_ptr(), item.nbytes)
            item.empty = False

    def stay(self, tree: Any) -> None:
        """What is needed on the way back."""
        for storage, _ in storages(tree):
            if (item := self.items.get(storage)) is not None:
                item.stays = True

    def end(self) -> None:
        """The batch has come to its end: what it leaves is others', but for what stays."""
        for storage, item in list(self.items.items()):
            if not item.stays:
                self.fill(storage, item)
                self.forget(storage)


class Using(TorchFunctionMode):
    """Fills what other batches than `luggage`'s have made as it is used."""

    def __init__(self, luggage: Luggage):
        super().__init__()
        self.luggage = luggage

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.luggage.use(func, (args, kwargs))
        return func(*args, **(kwargs or {}))


def storages(tree: Any) -> Iterator[tuple[UntypedStorage, Tensor]]:
    """The storages in memory of a tree's tensors, each with one of them."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
            try:
                yield leaf.untyped_storage(), leaf
            except RuntimeError:  # it has none: one of many within torch.vmap
                continue


def memory_at(address: int, nbytes: int) -> memoryview:
    """Not through numpy, for which a storage may not change its size any more."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B") if nbytes else memoryview(b"")


def read_into(file: Path, address: int, nbytes: int) -> None:
    into, at = memory_at(address, nbytes), 0
    with open(file, "rb", buffering=0) as stream:
        while at < nbytes:  # one call of the system's reads at most 2 GiB
            got = stream.readinto(into[at:])
            if not got:
                raise MopeqError(f"{file} was cut short", "give the same command again")
            at += got


def return_freed() -> None:
    """Have the C library, where it is glibc, give the system back what lies free between what is in use."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def lay_large_apart() -> None:
    """Have it lay large tensors apart from now on, or the free places would be many and never of the size that is asked
    for. Each then takes fresh pages, which costs time: only where memory is short."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


@contextmanager
def shelf(folder: Path | None, memory_bytes: int) -> Iterator[Shelf]:
    """A shelf whose files, in a folder of their own below `folder`, are gone afterwards."""
    if folder is None:
        yield Shelf()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        yield Shelf(Path(place), memory_bytes)
