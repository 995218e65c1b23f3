"""A quantized matrix, and the bit stream it is stored as.

Codes of a row are one little-endian bit stream along the last axis: value j holds bits j*b … j*b+b-1, so eight codes
fill b bytes exactly. Packing works on those blocks of eight with uint8 shifts, whose overflow drops just the bits
that belong to a neighbouring byte.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from mopeq.errors import BadInput
from mopeq.nouns import Format, TensorInfo

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> uint8 [..., ceil(n*bits/8)]."""
    if bits == 8:
        return codes.contiguous()
    n = codes.shape[-1]
    blocks = pad(codes, (0, -n % 8)).unflatten(-1, (-1, 8))
    packed = torch.zeros(*blocks.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        packed[..., byte] |= blocks[..., j] << shift
        if shift + bits > 8:
            packed[..., byte + 1] |= blocks[..., j] >> (8 - shift)
    return packed.flatten(-2)[..., : -(-n * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack_bits`: uint8 [..., ceil(n*bits/8)] -> codes uint8 [..., n]."""
    if bits == 8:
        return packed
    blocks = pad(packed, (0, -(-n // 8) * bits - packed.shape[-1])).unflatten(-1, (-1, bits))
    codes = torch.empty(*blocks.shape[:-1], 8, dtype=torch.uint8, device=packed.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        value = blocks[..., byte] >> shift
        if shift + bits > 8:
            value = value | (blocks[..., byte + 1] << (8 - shift))
        codes[..., j] = value & (2**bits - 1)
    return codes.flatten(-2)[..., :n]


def unpack_some(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """`unpack_bits(packed, bits, n)[..., index]`, index [m], without unpacking the others."""
    first, shift = index * bits // 8, index * bits % 8
    second = (first + 1).clamp(max=packed.shape[-1] - 1)  # of a code that ends in its first byte nothing is taken
    both = packed[..., first].to(torch.int32) | packed[..., second].to(torch.int32) << 8
    return (both >> shift & (2**bits - 1)).to(torch.uint8)


def per_input(group_values: Tensor, group_size: int, n: int) -> Tensor:
    """Values of each group [..., G] spread over the inputs of the group [..., n]; the last group may be shorter."""
    return group_values.repeat_interleave(group_size, dim=-1)[..., :n]


@dataclass(frozen=True)
class QWeight:
    """Matrices [..., out, in] as codes uint8 [..., out, in], scales fp16 and zeros uint8 [..., out, groups].

    `zeros` is None for symmetric formats, whose zero point is 2^(bits-1).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Format

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(code - zero) * scale, computed in float32 (float64 if asked for), returned as `dtype`."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        value, n, size = self.codes.to(exact), self.codes.shape[-1], self.format.group_size
        scale = self.scales.to(exact)[..., None]
        zero = None if self.zeros is None else self.zeros.to(exact)[..., None]
        whole = n // size  # groups; what is left over is a shorter one
        for groups, inputs in ((slice(0, whole), slice(0, whole * size)), (slice(whole, None), slice(whole * size, n))):
            if inputs.start < inputs.stop:  # in place, group by group: the spread scales would cost ten times as much
                part = value[..., inputs].unflatten(-1, (-1, min(size, inputs.stop - inputs.start)))
                part.sub_(2 ** (self.format.bits - 1) if zero is None else zero[..., groups, :])
                part.mul_(scale[..., groups, :])
        return value.to(dtype)

    def levels(self) -> Tensor:
        """code - zero, int16: the weight in steps of its scale."""
        if self.zeros is None:
            return self.codes.short() - 2 ** (self.format.bits - 1)
        return self.codes.short() - per_input(self.zeros.short(), self.format.group_size, self.codes.shape[-1])

    def pack(self) -> dict[str, Tensor]:
        """The tensors that are stored: qweight, scales and, unless symmetric, zeros packed along `out`."""
        stored = {"qweight": pack_bits(self.codes, self.format.bits), "scales": self.scales.contiguous()}
        if self.zeros is not None:
            stored["zeros"] = pack_bits(self.zeros.transpose(-1, -2).contiguous(), self.format.bits)
        return stored

    @classmethod
    def unpack(cls, stored: dict[str, Tensor], fmt: Format, out_features: int, in_features: int) -> QWeight:
        """The inverse of `pack`."""
        zeros = stored.get("zeros")
        return cls(
            unpack_bits(stored["qweight"], fmt.bits, in_features),
            stored["scales"],
            None if zeros is None else unpack_bits(zeros, fmt.bits, out_features).transpose(-1, -2),
            fmt,
        )

    @classmethod
    def empty(cls, experts: int, out: int, n: int, fmt: Format, device: torch.device) -> QWeight:
        """Room for a batch of matrices, to be filled a few at a time."""
        codes = torch.empty(experts, out, n, dtype=torch.uint8, device=device)
        scales = torch.empty(experts, out, fmt.groups(n), dtype=torch.float16, device=device)
        return cls(codes, scales, None if fmt.scheme == "s" else torch.empty_like(scales, dtype=torch.uint8), fmt)

    def __setitem__(self, some: slice, q: QWeight) -> None:
        self.codes[some], self.scales[some] = q.codes, q.scales
        if self.zeros is not None and q.zeros is not None:
            self.zeros[some] = q.zeros

    @classmethod
    def join(cls, parts: list[QWeight]) -> QWeight:
        """Batches of matrices of one format put together."""
        zeros = None if parts[0].zeros is None else torch.cat([q.zeros for q in parts if q.zeros is not None])
        return cls(torch.cat([q.codes for q in parts]), torch.cat([q.scales for q in parts]), zeros, parts[0].format)

    def __getitem__(self, index: int | slice | list[int]) -> QWeight:
        """One matrix of a batch, or some of the batch (of the rows, where it is one matrix)."""
        zeros = None if self.zeros is None else self.zeros[index]
        return QWeight(self.codes[index], self.scales[index], zeros, self.format)


Place = tuple[int, str]  # layer, projection
Members = list[int]  # experts of a layer
Pieces = dict[Place, list[tuple[Members, QWeight]]]  # projections' matrices, those of a format together


def read_stored(folder: Path, info: TensorInfo, dtypes: Mapping[str, torch.dtype] = TORCH_DTYPE) -> Tensor:
    """A tensor as it lies on disk, read and not mapped, so that what is resident is what is held."""
    if info.dtype not in dtypes:
        raise BadInput(f"{info.name} has dtype {info.dtype}", "give a checkpoint in bf16, fp16 or float32")
    tensor = torch.empty(info.shape, dtype=dtypes[info.dtype])
    if tensor.nbytes != info.nbytes:
        raise BadInput(f"{info.name} has {info.nbytes} bytes for {tensor.nbytes}", "the file is damaged")
    if tensor.numel():
        with open(folder / info.file, "rb", buffering=0) as file:
            file.seek(info.offset)
            data, at = tensor_data(tensor), 0
            while at < len(data):  # one call of the system's reads at most 2 GiB
                got = file.readinto(data[at:])
                if not got:
                    raise BadInput(f"{info.file} ends inside {info.name}", "the file changed or was cut short")
                at += got
    return tensor


def read_ahead(path: Path, start: int, count: int) -> None:
    """Tell the system that these bytes of a file will be read soon; where it cannot be told, they are read when they
    are."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError), open(path, "rb", buffering=0) as file:  # what is wrong with it, its reader says
        os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_WILLNEED)


def tensor_data(tensor: Tensor) -> memoryview:
    """A tensor's bytes as a file holds them."""
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
