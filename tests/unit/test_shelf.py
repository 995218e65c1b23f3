"""What a batch holds while it stands still: emptied, and filled again to the bit, whoever holds it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mopeq.errors import MopeqError
from mopeq.walk import shelf as shelf_module
from mopeq.walk.shelf import Luggage, Shelf

SIZE = 1 << 15  # numbers of a tensor that is worth a file


def made(luggage: Luggage, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """What a batch computes in its thread."""
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    with luggage.watching():
        return start.to(torch.float64).to(dtype)


def files(shelf: Shelf) -> int:
    assert shelf.folder is not None
    return len(list(shelf.folder.iterdir()))


def empty(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_laid_down_comes_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0)
    luggage = Luggage(shelf)
    tensor = made(luggage, dtype).view(2, -1)
    if dtype is torch.bool:
        assert not luggage.items, "too little for a file"
        return
    part, before = tensor[1:, 7:].T, tensor.clone()
    luggage.lay_down()
    assert empty(tensor) and empty(part) and files(shelf) == 1
    luggage.pick_up()
    assert torch.equal(tensor, before) and torch.equal(part, before[1:, 7:].T)
    luggage.lay_down()
    assert empty(tensor) and shelf.written == 1, "unchanged, it is not written again"
    luggage.pick_up()
    part.add_(1)
    luggage.lay_down()
    assert shelf.written == 2 and files(shelf) == 1, "changed in place, through a view"
    luggage.pick_up()
    assert torch.equal(part, before[1:, 7:].T + 1)
    del tensor, part
    assert not luggage.items and files(shelf) == 0


def test_what_only_a_graph_holds_is_laid_down_too(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0)
    luggage = Luggage(shelf)
    x = torch.randn(SIZE, requires_grad=True)
    with luggage.watching():
        loss = (x.exp() * 2).square().sum()
    luggage.lay_down()
    assert files(shelf) == 2  # exp and its double are what the gradient needs
    luggage.pick_up()
    loss.backward()
    assert x.grad is not None and torch.allclose(x.grad, 8 * (2 * x.detach()).exp())
    del loss
    assert files(shelf) == 0


def test_memory_comes_first_and_is_given_back(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 5 * SIZE)
    luggage = Luggage(shelf)
    first, second = made(luggage, seed=1), made(luggage, seed=2)
    luggage.lay_down()
    assert not empty(first) and empty(second) and shelf.free == SIZE
    luggage.pick_up()
    ticket = shelf.keep(second)
    assert shelf.take(ticket).equal(second) and files(shelf) == 0, "the ticket had the file that was there"
    assert shelf.written == 1
    ticket = shelf.keep(first)
    assert ticket.held is first and shelf.free == SIZE, "counted once"
    luggage.lay_down()
    assert not empty(first), "the ticket's now"
    assert shelf.take(ticket) is first and shelf.free == 5 * SIZE
    luggage.end()
    assert not empty(second) and not luggage.items and files(shelf) == 0


def test_what_others_use_is_left_alone(tmp_path: Path) -> None:
    """Inputs and weights, what another batch made before, what may not change its size, what stands on the shelf for
    good; and nothing is looked at without a folder."""
    shelf = Shelf(tmp_path, 0)
    one, other = Luggage(shelf), Luggage(shelf)
    weight = torch.randn(SIZE)
    table = made(one)
    before = table.clone()
    with one.watching():
        view = weight[1:].view(1, -1).detach()
        fixed = table * 2
        fixed.numpy()
    one.lay_down()
    assert not empty(view) and not empty(fixed) and empty(table)
    with other.watching():
        twice = table + table
    assert torch.equal(twice, before * 2)
    one.lay_down()
    other.lay_down()
    assert not empty(table) and empty(twice)
    other.end()
    assert torch.equal(twice, before * 2)
    plain = Luggage(Shelf())
    kept = made(plain)
    plain.lay_down()
    assert not plain.items and not empty(kept)


def test_what_may_change_uncounted_is_left_alone(tmp_path: Path) -> None:
    """Versions do not count what is done through `.data`, and nobody can empty what a pointer is held to."""
    shelf = Shelf(tmp_path, 0)
    luggage = Luggage(shelf)
    tensor, other = made(luggage, seed=1), made(luggage, seed=2)
    before = tensor.clone()
    luggage.lay_down()
    luggage.pick_up()
    with luggage.watching():
        tensor.data.add_(1)
        alias = torch.from_dlpack(other)
    luggage.lay_down()
    luggage.pick_up()
    assert torch.equal(tensor, before + 1)
    other.add_(1)
    assert torch.equal(alias, other) and files(shelf) == 0


def test_tensors_of_inference_mode_are_left_alone(tmp_path: Path) -> None:
    luggage = Luggage(Shelf(tmp_path, 0))
    with luggage.watching(), torch.inference_mode():
        tensor = torch.ones(SIZE) + 1
    luggage.lay_down()
    assert not empty(tensor) and bool((tensor == 2).all())


def test_a_part_fills_what_it_uses_of_another_batch(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0)
    one, other = Luggage(shelf), Luggage(shelf)
    table = made(one)
    before = table.clone()
    one.lay_down()
    with other.using():
        part = table * 2
    assert torch.equal(part, before * 2)
    one.lay_down()
    other.lay_down()
    assert not empty(table) and not empty(part)


def test_what_stays_outlives_its_batch(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, 0)
    luggage = Luggage(shelf)
    mask, answer = made(luggage, seed=1), made(luggage, seed=2)
    luggage.stay([mask])
    luggage.end()
    luggage.lay_down()
    assert empty(mask) and not empty(answer)


def test_within_vmap_nothing_has_a_storage(tmp_path: Path) -> None:
    luggage = Luggage(Shelf(tmp_path, 0))
    with luggage.watching():
        found = torch.vmap(lambda row: row * 2)(torch.ones(4, SIZE))
    assert bool((found == 2).all())


def test_a_full_disk_is_told_by_name_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path, 0)
    luggage = Luggage(shelf)
    tensor = made(luggage)
    before = tensor.clone()

    def full(path: Path, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.border'"):
            luggage.lay_down()
    assert torch.equal(tensor, before)
    luggage.lay_down()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"short")
    with pytest.raises(MopeqError, match="cut short"):
        luggage.pick_up()


def test_little_things_stay(tmp_path: Path) -> None:
    luggage = Luggage(Shelf(tmp_path, 0))
    with luggage.watching():
        small = torch.ones(shelf_module.LEAST // 4 - 1) + 1
    luggage.lay_down()
    assert not empty(small)
