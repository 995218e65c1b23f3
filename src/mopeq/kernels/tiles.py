"""Matrices in the order that cpu.c reads, and back: 16 rows side by side, so that a lane of a vector is a row.

A matrix [out, in] is cut into tiles of 16 rows, the last filled up with zeros, as inputs are to a multiple of 64. A
tile is, one after another: its codes, its scales fp16 [groups, 16], its zero points [groups, 16 * bits / 8] as one
stream of 16 codes a group. So what is read together lies together, and no byte more is held than the checkpoint has
(but for that filling up, which the shapes of real models do not need).

Codes go by chunks of 32 inputs, which are `bits` words of 32 bits for each row, [bits, 16] in memory. Four neighbouring
inputs are a vector: a code in each byte. 8 // bits of the chunk's eight vectors lie whole in a word, one above the
other; the bits that this leaves free at the upper end of each byte, taken word by word, are the rest of the vectors:

    width     whole vectors in a word    free bits    vectors made of them
    1, 2, 4   8, 4, 2                    0            none
    3         2                          2            2
    5, 6, 7   1                          3, 2, 1      3, 2, 1
    8         1                          0            none

One shift and one mask give a vector; at 3 bits two of the eight take two of each.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from mopeq.kernels.build import library
from mopeq.nouns import Format
from mopeq.tensors import QWeight, unpack_bits

ROWS, BLOCK = 16, 64  # as in cpu.c
INTO, BACK, OUT = range(3)  # ways of mopeq_order
Shape = tuple[int, int]  # out, in
LOCK = threading.RLock()  # held while a module's buffers change their order


def parts(fmt: Format, in_features: int) -> tuple[int, int, int]:
    """Bytes of codes, scales and zero points in a tile."""
    groups = fmt.groups(in_features)
    zeros = groups * 2 * fmt.bits if fmt.scheme == "a" else 0
    return -(-in_features // BLOCK) * BLOCK * 2 * fmt.bits, groups * 2 * ROWS, zeros


def size(fmt: Format, shape: Shape) -> int:
    """Bytes of a matrix."""
    return -(-shape[0] // ROWS) * sum(parts(fmt, shape[1]))


def fill(
    tiles: Tensor, fmt: Format, shape: Shape, codes: Tensor, scale_bits: Tensor, zeros: Tensor | None = None
) -> None:
    """Put a matrix, given as it is stored, into uint8 [size]."""
    order(INTO, tiles, fmt, shape, slice(0, shape[0]), codes, scale_bits, zeros)


def take_out(
    tiles: Tensor, fmt: Format, shape: Shape, codes: Tensor, scale_bits: Tensor, zeros: Tensor | None = None
) -> None:
    """Undo `fill`."""
    if in_c(tiles):
        order(BACK, tiles, fmt, shape, slice(0, shape[0]), codes, scale_bits, zeros)
        return
    packed = read(tiles, fmt, shape, torch.arange(shape[0], device=tiles.device)).pack()
    codes.copy_(packed["qweight"])
    scale_bits.copy_(packed["scales"].view(torch.int16))
    if zeros is not None:
        zeros.copy_(packed["zeros"])


def rows(tiles: Tensor, fmt: Format, shape: Shape, index: Tensor | slice) -> QWeight:
    """Some rows of a matrix, unpacked: codes [n, in], scales and zero points [n, groups]."""
    if isinstance(index, Tensor) or not in_c(tiles):
        if isinstance(index, slice):
            index = torch.arange(shape[0], device=tiles.device)[index]
        return read(tiles, fmt, shape, index)
    some = slice(*index.indices(shape[0]))
    n, groups = max(0, some.stop - some.start), fmt.groups(shape[1])
    assert some.step == 1
    codes = torch.empty(n, shape[1], dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=torch.float16)
    zeros = torch.empty(n, groups, dtype=torch.uint8) if fmt.scheme == "a" else None
    order(OUT, tiles, fmt, shape, some, codes, scales, zeros)
    return QWeight(codes, scales, zeros, fmt)


def in_c(tiles: Tensor) -> bool:
    return tiles.is_cpu and library()[0] is not None


def order(
    way: int, tiles: Tensor, fmt: Format, shape: Shape, some: slice, codes: Tensor, scales: Tensor, zeros: Any
) -> None:
    """Rows `some` of a matrix between tiles and other tensors: see mopeq_order in cpu.c."""
    lib = library()[0]
    given = [t for t in (tiles, codes, scales, zeros) if t is not None]
    assert lib is not None and all(t.is_cpu and t.is_contiguous() for t in given) and tiles.numel() == size(fmt, shape)
    lib.mopeq_order(
        way, tiles.data_ptr(), fmt.bits, fmt.group_size, shape[1], shape[0], some.start, some.stop,
        codes.data_ptr(), scales.data_ptr(), None if zeros is None else zeros.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def place(bits: int, vector: int, bit: int) -> tuple[int, int]:
    """Where a bit of a chunk's vector lies: (word, bit of each byte)."""
    whole = 8 // bits * bits  # vectors that lie whole in words, and bits of a byte that these take
    if vector < whole:
        return vector // (8 // bits), vector % (8 // bits) * bits + bit
    at = (vector - whole) * bits + bit
    return at // (8 - whole), whole + at % (8 - whole)


def read(tiles: Tensor, fmt: Format, shape: Shape, index: Tensor) -> QWeight:
    """`rows` in torch, on any device: what C is tested against."""
    bits, (codes_end, of_scales, of_zeros) = fmt.bits, parts(fmt, shape[1])
    scales_end, groups = codes_end + of_scales, fmt.groups(shape[1])
    tile, row = tiles.view(-1, scales_end + of_zeros), (index // ROWS, slice(None), index % ROWS)
    words = tile[:, :codes_end].unflatten(1, (-1, ROWS, 4))[row].unflatten(1, (-1, bits))  # [m, chunks, bits, 4]
    codes = torch.zeros(*words.shape[:2], 8, 4, dtype=torch.uint8, device=tiles.device)
    for vector in range(8):
        for bit in range(bits):
            word, of_byte = place(bits, vector, bit)
            codes[:, :, vector] |= (words[:, :, word] >> of_byte & 1) << bit
    scales = tile[:, codes_end:scales_end].unflatten(1, (groups, ROWS, 2))[row].contiguous().view(torch.float16)
    zeros = None
    if of_zeros:
        zeros = unpack_bits(tile[:, scales_end : scales_end + of_zeros].unflatten(1, (groups, 2 * bits)), bits, ROWS)
        zeros = zeros[row]
    return QWeight(codes.flatten(1)[:, : shape[1]], scales.squeeze(-1), zeros, fmt)
