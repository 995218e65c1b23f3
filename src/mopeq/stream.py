"""Weights from the shards, one layer at a time, every projection as [experts, out, in] whatever the source's layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mopeq.errors import BadInput
from mopeq.kernels.extent import largest
from mopeq.nouns import MoELayer, MoESpec, PackedTensor, Place, TensorInfo
from mopeq.tensors import TORCH_DTYPE, read_ahead, read_stored

PACKED_DTYPE = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # what a 4-bit float (E2M1) can be; the fourth bit is the sign
WIDEST = 65504.0 * 255  # the largest scale, the most steps
E2M1 = (*POSITIVE, *(-value for value in POSITIVE))
AHEAD = 16  # results that a thread may have ready for whoever takes them
Item = TypeVar("Item")
Made = TypeVar("Made")


def read_tensor(folder: Path, info: TensorInfo) -> Tensor:
    """One stored tensor, read (not mapped, so that what is resident is what is held); a packed one is dequantized."""
    if isinstance(info, PackedTensor):
        codes = read_stored(folder, info.codes, TORCH_DTYPE | PACKED_DTYPE)
        scales = read_stored(folder, info.scales, TORCH_DTYPE | PACKED_DTYPE)
        dtype = TORCH_DTYPE[info.dtype]
        if info.codes.dtype == "U8":
            return dequantize_mxfp4(codes, scales, dtype)
        return dequantize_float8(codes, scales, info.block, dtype)
    return read_stored(folder, info, TORCH_DTYPE)


def dequantize_float8(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """codes [..., N, C] in float8, scales [..., ceil(N/rows), ceil(C/columns)] -> code * scale [..., N, C], taken in
    float32 and rounded once; the last blocks may be shorter. A row of blocks is in float32 at a time."""
    (rows, columns), (n, c) = block, codes.shape[-2:]
    value = torch.empty(codes.shape, dtype=dtype)
    scales = scales.float().reshape(*codes.shape[:-2], -(-n // rows), -(-c // columns))
    for i, at in enumerate(range(0, n, rows)):
        scale = scales[..., i, :].repeat_interleave(columns, -1)[..., None, :c]
        value[..., at : at + rows, :] = codes[..., at : at + rows, :].float() * scale
    return value


def dequantize_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """blocks uint8 [E, N, G, 16], the low half of a byte first, scales uint8 [E, N, G] -> [E, 32 G, N], the transpose
    of code * 2^(scale - 127) (the OCP microscaling formats). 255 as a scale means NaN. Exact in bf16."""
    e, n, g, _ = blocks.shape
    table, value = torch.tensor(E2M1), torch.empty(e, 32 * g, n, dtype=dtype)
    for expert in range(e):  # one at a time: the steps between take 12 bytes a value
        halves = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], -1).flatten(-2).int()
        exponent = scales[expert].int() - 127
        power = torch.ldexp(torch.ones(exponent.shape), exponent).masked_fill(exponent == 128, torch.nan)
        value[expert] = (table[halves] * power[..., None]).flatten(-2).T
    return value


def refuse_sick(name: str, tensor: Tensor, widest: float = math.inf) -> Tensor:
    """The tensor itself; BadInput if it holds NaN, infinity, or a weight further from 0 than `widest`."""
    if not tensor.is_floating_point():
        return tensor
    if not math.isfinite(most := largest(tensor)):
        kind = "NaN" if math.isnan(most) else "infinite"
        raise BadInput(f"{name} holds {kind} weights", "the source is damaged; no quantizer can mend it")
    if most > widest:
        raise BadInput(
            f"{name} holds a weight of {most:.3g}, which needs a scale beyond fp16",
            "the checkpoint holds outliers no fp16 scale can express; it is probably damaged",
        )
    return tensor


@contextmanager
def naming(layer: MoELayer, projection: str, members: Sequence[int], w_ENC: Tensor) -> Iterator[None]:
    """A quantizer's BadInput, of a range too wide, names the matrix among these: the largest weight is in it."""
    try:
        yield
    except BadInput as problem:
        widest = members[int(w_ENC.abs().flatten(1).amax(1).argmax())]
        raise BadInput(f"{layer.prefix}.{widest}.{projection}_proj: {problem.line}", problem.hint) from None


def read_layer(folder: Path, spec: MoESpec, layer: MoELayer) -> dict[str, Tensor]:
    """{projection: [E, out, in]} of one layer in the source's dtype, each stored byte read once."""
    cache: dict[str, Tensor] = {}
    return {p: read_place(folder, spec, place, layer.experts, cache) for p, place in layer.places.items()}


def read_biases(folder: Path, spec: MoESpec, layer: MoELayer) -> dict[str, Tensor]:
    """{projection: [E, out]} of the layers that have biases, else {}."""
    cache: dict[str, Tensor] = {}
    return {p: read_place(folder, spec, place, layer.experts, cache) for p, place in layer.bias_places.items()}


def read_place(folder: Path, spec: MoESpec, place: Place, experts: int, cache: dict[str, Tensor]) -> Tensor:
    """One projection's (or bias's) stack over experts, oriented [E, out, in] ([E, out])."""
    if place.per_expert:
        names = [place.name(e) for e in range(experts)]
        rows = torch.stack([refuse_sick(n, read_tensor(folder, spec.tensors[n])) for n in names])
    else:
        if place.tensor not in cache:
            cache[place.tensor] = refuse_sick(place.tensor, read_tensor(folder, spec.tensors[place.tensor]))
        rows = cache[place.tensor]
        if place.flat:
            rows = rows.unflatten(0, (experts, -1))
    if place.transposed:
        rows = rows.transpose(1, 2)
    return rows[:, place.part(rows.shape[1])]


# ------------------------------------------------------------------------------------- expert by expert, on all cores


def read_expert(folder: Path, spec: MoESpec, layer: MoELayer, e: int) -> dict[str, Tensor]:
    """{projection: [out, in]} of one expert, each of its stored bytes read once. What is stored as a stack of all
    experts is read in part; `can_read_expert` says where that is possible."""
    found: dict[str, Tensor] = {}
    stored = {name: read_tensor(folder, info) for name, info in expert_tensors(spec, layer, e).items()}
    for name, tensor in stored.items():
        refuse_sick(name, tensor)
    for p, place in layer.places.items():
        tensor = stored[place.name(e)]
        one = tensor if place.per_expert or place.flat else tensor[0]
        rows = one.T if place.transposed else one
        found[p] = rows[place.part(rows.shape[0])]
    return found


def expert_tensors(spec: MoESpec, layer: MoELayer, e: int) -> dict[str, TensorInfo]:
    """{stored tensor: where one expert's part of it lies}."""
    infos = {place.name(e): (spec.tensors[place.name(e)], place) for place in layer.places.values()}
    return {n: info if place.per_expert else one_of(info, e, layer.experts) for n, (info, place) in infos.items()}


def can_read_expert(spec: MoESpec, layer: MoELayer) -> bool:
    """Whether each expert's bytes lie apart: packed stacks have scales that run across."""
    return all(place.per_expert or not isinstance(spec.tensors[place.name(0)], PackedTensor)
               for place in layer.places.values())  # fmt: skip


def one_of(info: TensorInfo, e: int, experts: int) -> TensorInfo:
    """Where the e-th of a stack's equal parts lies."""
    nbytes = info.nbytes // experts
    shape = (info.shape[0] // experts, *info.shape[1:])
    return replace(info, shape=shape, offset=info.offset + e * nbytes, nbytes=nbytes)


def each_expert(
    folder: Path, spec: MoESpec, layers: Sequence[MoELayer], work: Callable[[MoELayer, int, dict[str, Tensor]], Made]
) -> Iterator[tuple[MoELayer, int, Made]]:
    """(layer, expert, what `work(layer, expert, {projection: [out, in]})` made of it) in order, several at a time.

    Every expert is worked at by one thread, so results do not depend on their number.
    """
    if all(can_read_expert(spec, layer) for layer in layers):
        items = [(layer, e) for layer in layers for e in range(layer.experts)]
        made = in_order(lambda item: work(*item, read_expert(folder, spec, *item)), announced(folder, spec, items))
        yield from ((*item, one) for item, one in zip(items, made, strict=True))
        return
    for layer in layers:
        stacks = read_layer(folder, spec, layer)
        part = partial(work_on_part, work, layer, stacks)
        yield from ((layer, e, one) for e, one in enumerate(in_order(part, range(layer.experts))))


def announced(folder: Path, spec: MoESpec, items: Iterable[tuple[MoELayer, int]]) -> Iterator[tuple[MoELayer, int]]:
    """The same items, taken ahead of their time: the system is told to read what they need while others are worked at
    (a disk gave 1.4 GB/s so, and 1.1 to two threads that read when they need)."""
    for layer, e in items:
        for info in expert_tensors(spec, layer, e).values():
            for stored in (info.codes, info.scales) if isinstance(info, PackedTensor) else (info,):
                read_ahead(folder / stored.file, stored.offset, stored.nbytes)
        yield layer, e


def work_on_part(
    work: Callable[[MoELayer, int, dict[str, Tensor]], Made], layer: MoELayer, stacks: dict[str, Tensor], e: int
) -> Made:
    return work(layer, e, {p: w[e] for p, w in stacks.items()})


def in_order(work: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
    """`map(work, items)` by as many threads as torch is allowed, each of which has torch to itself; results wait in
    their order, and only a few of them."""
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        todo = iter(items)
        waiting: list[Future[Made]] = [pool.submit(work, item) for item in islice(todo, AHEAD * threads)]
        try:
            while waiting:
                made = waiting.pop(0).result()
                waiting += [pool.submit(work, item) for item in islice(todo, 1)]
                yield made
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def one_thread_each() -> Iterator[int]:
    """How many threads torch is allowed; within the block an operation takes one of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
