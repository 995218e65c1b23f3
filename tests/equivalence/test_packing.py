"""Packing answers to a bit loop written from one paragraph of the format's description, at every width and odd shape.

"Codes of a row are one little-endian bit stream along `in`: value j holds bits j*b … j*b+b-1. Zeros are packed along
`out`. The last group may be shorter. w = (code - zero) * scale; symmetric: zero = 2^(bits-1), not stored."
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mopeq.nouns import Format
from mopeq.tensors import QWeight, pack_bits, unpack_bits

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (3, 5), (8, 64), (7, 65), (13, 127), (40, 64), (64, 40), (5, 200)]  # (out, in)


def bit_loop(codes: list[int], bits: int) -> list[int]:
    """The bytes of a row, one bit at a time."""
    stream = [0] * -(-len(codes) * bits // 8)
    for j, code in enumerate(codes):
        for i in range(bits):
            at = j * bits + i
            stream[at // 8] |= ((code >> i) & 1) << (at % 8)
    return stream


def random_codes(*shape: int, bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random_qweight(fmt: Format, *shape: int, seed: int = 0) -> QWeight:
    """Any codes, scales and zeros that the format allows, rounding aside."""
    *batch, out, n = shape
    generator = torch.Generator().manual_seed(seed)
    scales = (torch.rand(*batch, out, fmt.groups(n), generator=generator) + 0.01).half()
    zeros = random_codes(*batch, out, fmt.groups(n), bits=fmt.bits, seed=seed + 1) if fmt.scheme == "a" else None
    return QWeight(random_codes(*shape, bits=fmt.bits, seed=seed + 2), scales, zeros, fmt)


@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_is_the_bit_loop(bits: int) -> None:
    for n in (*range(1, 18), 31, 64, 65, 100, 127):
        codes = random_codes(3, n, bits=bits, seed=n)
        packed = pack_bits(codes, bits)
        assert packed.tolist() == [bit_loop(row, bits) for row in codes.tolist()]
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack_bits(packed, bits, n), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_reads_a_stream_it_did_not_write(bits: int) -> None:
    codes = random_codes(4, 37, bits=bits).tolist()
    stream = torch.tensor([bit_loop(row, bits) for row in codes], dtype=torch.uint8)
    assert unpack_bits(stream, bits, 37).tolist() == codes


@pytest.mark.parametrize("bits", WIDTHS)
def test_eight_codes_fill_bits_bytes_and_the_tail_is_zero(bits: int) -> None:
    assert pack_bits(random_codes(1, 16, bits=bits), bits).shape == (1, 2 * bits)
    full = torch.full((1, 9), 2**bits - 1, dtype=torch.uint8)
    assert int.from_bytes(bytes(pack_bits(full, bits)[0].tolist()), "little") == 2 ** (9 * bits) - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_does_not_mind_strides_or_batches(bits: int) -> None:
    codes = random_codes(2, 3, 11, bits=bits)
    turned = codes.transpose(0, 2)  # [11, 3, 2], not contiguous
    assert torch.equal(pack_bits(turned, bits), pack_bits(turned.contiguous(), bits))
    assert torch.equal(unpack_bits(pack_bits(turned, bits), bits, 2), turned)
    strided = pack_bits(codes, bits).repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(unpack_bits(strided, bits, 11), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_qweight_stores_what_the_format_says(bits: int, scheme: str) -> None:
    for out, n in SHAPES:
        for group_size in (1, 16, 64, 1000):
            fmt = Format(bits, group_size, scheme)
            q = random_qweight(fmt, out, n, seed=out * n)
            stored = q.pack()
            groups = -(-n // group_size)
            assert stored["qweight"].tolist() == [bit_loop(row, bits) for row in q.codes.tolist()]
            assert torch.equal(stored["scales"], q.scales)
            assert stored["scales"].dtype == torch.float16 and stored["scales"].shape == (out, groups)
            if scheme == "a":
                assert q.zeros is not None
                columns = q.zeros.T.tolist()  # one row a group, along `out`
                assert stored["zeros"].tolist() == [bit_loop(column, bits) for column in columns]
            else:
                assert "zeros" not in stored
            names = {"U8": torch.uint8, "F16": torch.float16}
            assert {k: (names[d], s) for k, (d, s) in fmt.shapes(out, n).items()} == {
                k: (v.dtype, tuple(v.shape)) for k, v in stored.items()
            }
            by_hand = out * -(-n * bits // 8) + 2 * out * groups + (scheme == "a") * groups * -(-out * bits // 8)
            assert fmt.nbytes(out, n) == by_hand == sum(v.numel() * v.element_size() for v in stored.values())
            again = QWeight.unpack(stored, fmt, out, n)
            assert torch.equal(again.codes, q.codes) and torch.equal(again.scales, q.scales)
            assert (again.zeros is None) if q.zeros is None else torch.equal(again.zeros, q.zeros)


def test_bytes_are_linear_in_bits_where_eight_divides_both_sides() -> None:
    one = Format(1, 64).nbytes(40, 64) - 2 * 40
    for bits in WIDTHS:
        assert Format(bits, 64).nbytes(40, 64) - 2 * 40 == bits * one


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_dequantize_is_the_formula(bits: int, scheme: str) -> None:
    for out, n in SHAPES:
        fmt = Format(bits, 48, scheme)
        q = random_qweight(fmt, out, n, seed=n)
        codes, scales = q.codes.numpy().astype(np.float64), q.scales.numpy().astype(np.float64)
        zeros = np.full((out, fmt.groups(n)), 2.0 ** (bits - 1)) if q.zeros is None else q.zeros.numpy()
        naive = np.empty((out, n))
        for i in range(out):
            for j in range(n):
                naive[i, j] = (codes[i, j] - float(zeros[i, j // 48])) * scales[i, j // 48]
        exact = q.dequantize(torch.float64).numpy()
        assert exact.dtype == np.float64 and np.array_equal(exact, naive)  # (8 bits) * (11 bits) is exact
        single = q.dequantize().numpy()
        assert single.dtype == np.float32 and np.array_equal(single, naive.astype(np.float32))
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(q.dequantize(dtype), torch.from_numpy(naive).float().to(dtype))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_a_batch_is_its_matrices(bits: int, scheme: str) -> None:
    fmt = Format(bits, 32, scheme)
    q = random_qweight(fmt, 4, 13, 50)
    stored = q.pack()
    for e in range(4):
        alone = q[e].pack()
        assert all(torch.equal(alone[k], stored[k][e]) for k in stored)
        assert torch.equal(q[e].dequantize(), q.dequantize()[e])
    again = QWeight.unpack(stored, fmt, 13, 50)
    assert again.shape == (4, 13, 50) and torch.equal(again.dequantize(), q.dequantize())
