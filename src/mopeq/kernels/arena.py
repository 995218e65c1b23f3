"""One layer's packed experts in one flat buffer, their codes re-ordered for the GPU kernels, and back again.

A matrix's codes lie in tiles of S slots of W inputs: input kt*S*W + s*W + w is slot s of word w of tile kt. Words are
16 bits, and what does not fit into them lies in a second plane. Two neighbouring inputs of one slot come out of a
32-bit register by one shift and one mask, and one slot's W inputs share a scale:

    width        slots S   word                              second plane, for each word
    1, 2         8         halves of 8 bits: slots 0, 2, 4,  nothing
                           6 in one, 1, 3, 5, 7 in the other
    3            8         halves of 8 bits: slots 0, 2 and  a byte, halves of 4 bits: slot 1
                           2 bits of 3; 4, 6 and 2 of 7      and a bit of 3; slot 5 and one of 7
    4            4         halves: slots 0, 2; slots 1, 3    nothing
    5, 6         4         slots 0, 2 and 4 bits of slot 3   a byte: slot 1 and 2 bits of slot 3
    7, 8         4         4 bits of each slot, as 4 bits    16 bits: the other 4 bits

So slots 0 and 1, 2 and 3, …, which mostly share a scale, lie equally far from the lowest bit of a half: there a kernel
may leave them (`triton_kernels.left_at`), which saves it shifts.

Planes are [tile, out, W], scales and zero points [group, out], so what a program reads lies together. In a plane of
bytes those of words w and w + W/2 are neighbours: read as 16 bits, they come to where both words are by one shift. Rows
are padded to 16, inputs to whole tiles. Odd widths are kept as the next of these; otherwise bytes are those of the
checkpoint, but for zero points, which take a byte each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.tensors import QWeight

STORED = {1: 2, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8}  # bits -> bits in the arena
SLOTS = {2: 8, 3: 8, 4: 4, 6: 4, 8: 4}
SECOND = {2: 0, 3: 1, 4: 0, 6: 1, 8: 2}  # bytes of the second plane for each word
PLANE = {0: torch.uint8, 1: torch.uint8, 2: torch.int16}  # what it is then
ROWS = 16  # rows of a matrix are padded to a multiple
WASTE = 1.05  # wider words may pad the inputs by this much
COLUMNS = ("words", "second", "scales", "zeros", "bits", "group")  # of the table; offsets in units of what is read
AT_A_TIME = 1 << 24  # codes unpacked at a time while an arena is made


def pieces(bits, slot):  # type: ignore[no-untyped-def]
    """Where a slot's code lies: (plane, first bit there, number of bits, first bit of the code) for each piece.

    Also Triton's, so without annotations.
    """
    if bits == 2 or bits == 4:
        return [(0, slot % 2 * 8 + slot // 2 * bits, bits, 0)]
    if bits == 8:
        return [(plane, slot % 2 * 8 + slot // 2 * 4, 4, 4 * plane) for plane in (0, 1)]
    word, byte, third = slot // 4 * 8, slot // 4 * 4, bits // 3
    if slot % 4 == 3:
        return [(1, byte + bits, third, 0), (0, word + 2 * bits, 2 * third, third)]
    return [(1, byte, bits, 0)] if slot % 4 == 1 else [(0, word + slot % 4 // 2 * bits, bits, 0)]


def refuses(formats: Mapping[str, list[Format]]) -> str:
    """Why these formats have no arena, or ""."""
    sizes = {fmt.group_size for row in formats.values() for fmt in row}
    if any(size < 32 or size & (size - 1) for size in sizes):
        return f"group sizes {sorted(sizes)}: they must be powers of two from 32 on"
    return ""


def word_count(in_features: int, group: int) -> int:
    """W: 32 where that divides the group and pads the inputs little, else 16."""
    least = math.ceil(in_features / 128) * 128
    return 32 if group % 32 == 0 and math.ceil(in_features / 256) * 256 <= WASTE * least else 16


@dataclass(frozen=True)
class Layout:
    """How one projection's matrices lie: out, in, words a tile row (W), smallest group."""

    out_features: int
    in_features: int
    words: int
    group: int

    @property
    def rows(self) -> int:
        return math.ceil(self.out_features / ROWS) * ROWS

    def tiles(self, bits: int) -> int:
        return math.ceil(self.in_features / (SLOTS[bits] * self.words))

    def sizes(self, fmt: Format) -> tuple[int, int, int, int]:
        """Bytes of words, second plane, scales and zero points of one matrix."""
        bits = STORED[fmt.bits]
        plane, groups = self.tiles(bits) * self.rows * self.words, fmt.groups(self.in_features)
        return 2 * plane, SECOND[bits] * plane, 2 * groups * self.rows, groups * self.rows


@dataclass(frozen=True)
class Arena:
    """`data` uint8 holds everything; `table` int64 [projections, E, COLUMNS] says where."""

    data: Tensor
    table: Tensor
    layouts: dict[str, Layout]
    formats: dict[str, list[Format]]

    def matrices(self, p: str, chosen: list[int]) -> QWeight:
        """Codes, scales and zero points [len(chosen), …] of some experts of one format, as they were stored."""
        at, lay = list(self.layouts).index(p), self.layouts[p]
        fmt = self.formats[p][chosen[0]]
        assert all(self.formats[p][e] == fmt for e in chosen)
        places, every = self.table[at].tolist(), slice(lay.out_features)
        found = [read_rows(self.data, places[e], lay, fmt, every) for e in chosen]
        zeros = None if fmt.scheme == "s" else torch.stack([q.zeros for q in found if q.zeros is not None])
        return QWeight(torch.stack([q.codes for q in found]), torch.stack([q.scales for q in found]), zeros, fmt)


def layouts(experts: Any) -> dict[str, Layout]:
    """{projection: how its matrices lie}; gate and up alike, since one launch reads both."""
    found = {}
    for p in experts.projections:
        alike = [p] if p == "down" else [name for name in experts.projections if name != "down"]
        group = min(fmt.group_size for name in alike for fmt in experts.formats[name])
        out_features, in_features = experts.shapes[p]
        found[p] = Layout(out_features, in_features, word_count(in_features, group), group)
    return found


def placed(formats: Mapping[str, list[Format]], lay_of: Mapping[str, Layout]) -> tuple[Tensor, int]:
    """The table of these matrices one after another, and their bytes."""
    table, end = torch.zeros(len(formats), len(formats["down"]), len(COLUMNS), dtype=torch.int64), 0
    for at, (p, row) in enumerate(formats.items()):
        for e, fmt in enumerate(row):
            starts = [end]
            for size in lay_of[p].sizes(fmt):
                starts.append(starts[-1] + size)
            end = math.ceil(starts.pop() / 16) * 16
            words, second, scales, zeros = starts
            bits = STORED[fmt.bits]
            second //= max(1, SECOND[bits])
            table[at, e] = torch.tensor([words // 2, second, scales // 2, zeros, bits, fmt.group_size])
    return table, end


def of_matrix(matrix: Any, data: Tensor | None = None) -> Arena:
    """The arena of one PackedMatrix, as the only expert's `down`; its bytes are made of the matrix unless given.

    The table stays on the CPU, where it is known without waiting for a GPU.
    """
    formats = {"down": [matrix.format]}
    out_features, in_features, group = matrix.out_features, matrix.in_features, matrix.format.group_size
    lay = Layout(out_features, in_features, word_count(in_features, group), group)
    table, end = placed(formats, {"down": lay})
    if data is None:
        data = torch.zeros(end, dtype=torch.uint8, device=matrix.qweight_.device)
        step = max(1, AT_A_TIME // in_features)
        for at in range(0, out_features, step):
            part = matrix.quantized(slice(at, min(at + step, out_features)))
            write_rows(data, table[0, 0].tolist(), lay, part, at)
    return Arena(data, table, {"down": lay}, formats)


def joined(arenas: list[Arena]) -> tuple[Arena, list[Tensor]]:
    """Lone matrices' arenas (tables on the CPU) as one, whose first matrix is `down`; and the bytes of each in it."""
    names = ["down", *(f"down {at}" for at in range(1, len(arenas)))]
    tables, end = [], 0
    for a in arenas:
        bits = int(a.table[0, 0, COLUMNS.index("bits")])
        units = torch.tensor([2, max(1, SECOND[bits]), 2, 1])
        tables.append(a.table.clone())
        tables[-1][0, 0, :4] += end // units
        end += len(a.data)
    data = torch.cat([a.data for a in arenas])
    lay_of = {name: a.layouts["down"] for name, a in zip(names, arenas, strict=True)}
    formats = {name: a.formats["down"] for name, a in zip(names, arenas, strict=True)}
    return Arena(data, torch.cat(tables), lay_of, formats), list(data.split([len(a.data) for a in arenas]))


def build(experts: Any) -> Arena:
    """The arena of a filled `QuantizedExperts`, on its device, a few experts unpacked at a time."""
    formats, lay_of = {p: experts.formats[p] for p in experts.projections}, layouts(experts)
    table, end = placed(formats, lay_of)
    first = experts.tiers(experts.projections[0])[0].codes
    data = torch.zeros(end, dtype=torch.uint8, device=first.device)
    places = table.tolist()
    for at, p in enumerate(formats):
        for tier in experts.tiers(p):
            step = max(1, AT_A_TIME // math.prod(tier.shape))
            members = list(tier.rows)
            for first_of in range(0, len(members), step):
                part = members[first_of : first_of + step]
                q = tier.qweight(part)
                for i, e in enumerate(part):
                    write_rows(data, places[at][e], lay_of[p], q[i])
    return Arena(data, table.to(data.device), lay_of, formats)


def spans(place: list[int], lay: Layout, fmt: Format) -> list[slice]:
    """Where words, second plane, scales and zero points of one matrix lie in the arena's bytes."""
    words, second, scales, zeros, bits, _ = place
    starts = (2 * words, second * max(1, SECOND[bits]), 2 * scales, zeros)
    return [slice(start, start + size) for start, size in zip(starts, lay.sizes(fmt), strict=True)]


def write_rows(data: Tensor, place: list[int], lay: Layout, q: QWeight, at: int = 0) -> None:
    """Put rows of one matrix, codes [n, in], into the arena, from row `at` on."""
    bits, n = STORED[q.format.bits], q.codes.shape[0]
    slots, tiles, w = SLOTS[bits], lay.tiles(bits), lay.words
    codes = q.codes.new_zeros(n, tiles * slots * w)
    codes[:, : lay.in_features] = q.codes
    codes_KNSW = codes.view(n, tiles, slots, w).transpose(0, 1).int()
    planes = [torch.zeros_like(codes_KNSW[:, :, 0]) for _ in range(2)]
    for slot in range(slots):
        for plane, first, width, of_code in pieces(bits, slot):
            planes[plane] |= (codes_KNSW[:, :, slot] >> of_code & 2**width - 1) << first
    words, second, scales, zeros = (data[span] for span in spans(place, lay, q.format))
    if SECOND[bits] == 1:
        planes[1] = planes[1].unflatten(-1, (2, w // 2)).mT.flatten(-2)
    for plane, part in zip((words.view(torch.int16), second.view(PLANE[SECOND[bits]])), planes, strict=True):
        if len(plane):
            plane.view(tiles, lay.rows, w)[:, at : at + n] = part.to(plane.dtype)
    scales.view(torch.float16).view(-1, lay.rows)[:, at : at + n] = q.scales.T
    zeros.view(-1, lay.rows)[:, at : at + n] = 2 ** (q.format.bits - 1) if q.zeros is None else q.zeros.T


def read_rows(data: Tensor, place: list[int], lay: Layout, fmt: Format, index: Tensor | slice) -> QWeight:
    """Some rows of a matrix as they were stored: codes [n, in], scales and zero points [n, groups]."""
    bits = STORED[fmt.bits]
    tiles, w = lay.tiles(bits), lay.words
    words, second, scales, zeros = (data[span] for span in spans(place, lay, fmt))
    planes = [words.view(torch.int16), second.view(PLANE[SECOND[bits]])]
    planes = [plane.view(tiles, lay.rows, w)[:, index].int() for plane in planes if len(plane)]
    if SECOND[bits] == 1:
        planes[1] = planes[1].unflatten(-1, (w // 2, 2)).mT.flatten(-2)
    codes = torch.zeros(*planes[0].shape[:2], SLOTS[bits], w, dtype=torch.int32, device=data.device)
    for slot in range(SLOTS[bits]):
        for plane, first, width, of_code in pieces(bits, slot):
            codes[:, :, slot] |= (planes[plane] >> first & 2**width - 1) << of_code
    codes = codes.transpose(0, 1).flatten(1)[:, : lay.in_features].to(torch.uint8)
    of_group = scales.view(torch.float16).view(-1, lay.rows)[:, index].T.contiguous()
    return QWeight(
        codes, of_group, None if fmt.scheme == "s" else zeros.view(-1, lay.rows)[:, index].T.contiguous(), fmt
    )
