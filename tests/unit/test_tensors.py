"""Small facts of QWeight that the packing tests do not touch."""

from __future__ import annotations

import pytest
import torch

from mopeq.nouns import Format
from mopeq.tensors import QWeight, pack_bits, per_input, unpack_bits


def test_per_input_spreads_groups_and_shortens_the_last() -> None:
    groups = torch.tensor([[1.0, 2.0, 3.0]])
    assert per_input(groups, 3, 7).tolist() == [[1, 1, 1, 2, 2, 2, 3]]
    assert per_input(groups, 3, 9).tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3]]


def test_by_hand() -> None:
    """Three-bit codes 0 … 7 are the bytes 0x88 0xC6 0xFA, as the paragraph's stream gives them."""
    codes = torch.arange(8, dtype=torch.uint8)[None]
    assert pack_bits(codes, 3).tolist() == [[0b10001000, 0b11000110, 0b11111010]]
    assert unpack_bits(torch.tensor([[0x88, 0xC6, 0xFA]], dtype=torch.uint8), 3, 8).tolist() == [list(range(8))]
    assert pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_bits(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1).tolist() == [[13, 1]]


def test_symmetric_has_its_zero_in_the_middle() -> None:
    codes = torch.tensor([[0, 4, 7]], dtype=torch.uint8)
    q = QWeight(codes, torch.tensor([[0.5]], dtype=torch.float16), None, Format(3, 64, "s"))
    assert q.dequantize().tolist() == [[-2.0, 0.0, 1.5]]
    assert set(q.pack()) == {"qweight", "scales"} and q.shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dequantize_gives_the_dtype_asked_for(dtype: torch.dtype) -> None:
    zeros = torch.tensor([[1]], dtype=torch.uint8)
    q = QWeight(torch.tensor([[3, 1]], dtype=torch.uint8), torch.tensor([[0.1]], dtype=torch.float16), zeros, Format(2))
    tenth = float(torch.tensor(0.1, dtype=torch.float16))
    assert q.dequantize(dtype).dtype == dtype
    assert torch.equal(q.dequantize(dtype), torch.tensor([[2 * tenth, 0]], dtype=torch.float64).to(dtype))


def test_packing_leaves_its_input_alone() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[None] % 4
    kept = codes.clone()
    for bits in (2, 3, 8):
        pack_bits(codes, bits)
        assert torch.equal(codes, kept)
