"""The words of mopeq, as light data: what a checkpoint holds, how a matrix is stored, what may be spent.

numpy at most. Everything to the right of `allocate` sees only a `PrecisionMap`; everything to the left of
`sense` works from a `MoESpec` and never wakes torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from mopeq.errors import BadInput

PROJECTIONS = ("gate", "up", "down")  # the order used everywhere: on disk, in maps, in arrays
BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, order=True)
class ExpertId:
    """One routed expert: its decoder layer's number and its index in that layer."""

    layer: int
    expert: int


@dataclass(frozen=True, order=True)
class LinearId:
    """One projection ("gate", "up" or "down") of one routed expert."""

    layer: int
    expert: int
    projection: str


# ---------------------------------------------------------------------------------------------- formats

SCHEMES = {"a": "asymmetric: integer zero point per group, stored", "s": "symmetric: zero point 2^(bits-1), not stored"}


@dataclass(frozen=True, order=True)
class Format:
    """How a matrix [out, in] is stored: `bits` a code, one fp16 scale (and zero point) per `group_size` along `in`.

    w = (code - zero) * scale. Codes of a row are one little-endian bit stream along `in`; the last group may be
    shorter. Named like `3g64a`: 3 bits, group 64, asymmetric.
    """

    bits: int
    group_size: int = 64
    scheme: str = "a"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise BadInput(f"{self.bits} bits is no width of a code", "widths are 1 to 8, for example --bits 2,3,4")
        if self.group_size < 1:
            raise BadInput(f"group size {self.group_size} is not positive", "try --group-size 64")
        if self.scheme not in SCHEMES:
            raise BadInput(f"no scheme is called {self.scheme!r}", f"choose from: {', '.join(SCHEMES)}")

    @classmethod
    def parse(cls, name: str) -> Format:
        """`3g64a` -> Format(3, 64, "a")."""
        match = re.fullmatch(r"(\d+)g(\d+)([a-z])", name)
        if not match:
            raise BadInput(f"{name!r} is no format", "a format reads like 3g64a: bits, group size, scheme")
        return cls(int(match[1]), int(match[2]), match[3])

    @property
    def name(self) -> str:
        return f"{self.bits}g{self.group_size}{self.scheme}"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def groups(self, in_features: int) -> int:
        return -(-in_features // self.group_size)

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What is written for one matrix: {suffix: (safetensors dtype, shape)}."""
        groups = self.groups(in_features)
        stored: dict[str, tuple[str, tuple[int, ...]]] = {
            "qweight": ("U8", (out_features, -(-in_features * self.bits // 8))),
            "scales": ("F16", (out_features, groups)),
        }
        if self.scheme == "a":
            stored["zeros"] = ("U8", (groups, -(-out_features * self.bits // 8)))
        return stored

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Exact bytes of one stored matrix: codes, scales and zero points."""
        return sum(tensor_bytes(dtype, shape) for dtype, shape in self.shapes(out_features, in_features).values())


DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64,
    "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a safetensors tensor."""
    count = 1
    for size in shape:
        count *= size
    return -(-count * DTYPE_BITS[dtype] // 8)


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the packed checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


# ------------------------------------------------------------------------------------------------- spec


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a shard's header describes it; `offset` is from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class PackedTensor(TensorInfo):
    """A tensor that the source stores as codes with scales (sources.py): `dtype` and `shape` are of the values they
    stand for, `nbytes` is what both take on disk. `block`: the (rows, columns) that share a scale."""

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]


@dataclass(frozen=True)
class Place:
    """Where one projection of a layer's experts lies on disk.

    `tensor` names it, with `{e}` where each expert has a tensor of its own (else the experts are stacked first).
    `transposed`: stored [in, out]. `rows`: which of a fused tensor's outputs are ours. `first`: the number that the
    layer's expert 0 has on disk. `flat`: stacked experts follow one another along the first of two dimensions.
    """

    tensor: str
    transposed: bool = False
    rows: str = "all"  # all | first | second | even | odd
    first: int = 0
    flat: bool = False

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.tensor

    def name(self, e: int) -> str:
        """The tensor that holds the layer's expert e."""
        return self.tensor.format(e=self.first + e)

    def part(self, outputs: int) -> slice:
        """Which of the fused tensor's `outputs` are this projection's."""
        half = outputs // 2
        return {
            "all": slice(None),
            "first": slice(half),
            "second": slice(half, None),
            "even": slice(0, None, 2),
            "odd": slice(1, None, 2),
        }[self.rows]


@dataclass(frozen=True)
class MoELayer:
    """One layer's routed experts. `prefix` is their on-disk name up to and with `experts`."""

    layer: int
    prefix: str
    experts: int
    shapes: Mapping[str, tuple[int, int]]  # projection -> (out, in)
    places: Mapping[str, Place]
    bias_places: Mapping[str, Place] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        return tuple(p for p in PROJECTIONS if p in self.shapes)

    @property
    def params(self) -> int:
        """Weights of the layer's routed experts, biases not counted."""
        return self.experts * sum(out * n for out, n in self.shapes.values())


@dataclass(frozen=True)
class MoESpec:
    """What the headers tell of a checkpoint. `roles` maps each tensor to one of ROLES."""

    model_type: str
    layers: tuple[MoELayer, ...]
    tensors: Mapping[str, TensorInfo]
    roles: Mapping[str, str]
    config: Mapping[str, Any]
    digest: str  # of headers, sizes and modification times: the stages' notion of "the same source"
    adapted: bool = False  # whether the model's experts modules need an adapter of mopeq's (families.ADAPTERS)

    @property
    def linears(self) -> list[tuple[LinearId, tuple[int, int]]]:
        """Every routed matrix with its (out, in), in the one order used by maps, costs and files."""
        return [
            (LinearId(layer.layer, e, p), layer.shapes[p])
            for layer in self.layers
            for e in range(layer.experts)
            for p in layer.projections
        ]

    def layer(self, number: int) -> MoELayer:
        return next(layer for layer in self.layers if layer.layer == number)

    @property
    def expert_params(self) -> int:
        """Weights of routed experts, biases not counted."""
        return sum(layer.params for layer in self.layers)

    @property
    def params(self) -> int:
        """Stored values of the whole checkpoint, each tensor once."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Payload of the source."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


ROLES = ("routed expert", "shared expert", "router", "attention", "vision tower", "embedding", "other")


# ----------------------------------------------------------------------------------------------- budget

_UNITS = {"": 1, "b": 1} | {f"{p}b": 10 ** (3 * i) for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 2 ** (10 * i) for i, p in enumerate("kmgt", 1)}


def parse_size(text: str | int) -> int:
    """ "12GiB" -> bytes. A bare integer is bytes; kB, MB, GB, TB are 10^3n; KiB, MiB, GiB, TiB are 2^10n."""
    match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-zA-Z]*)\s*", str(text))
    if not match or match[2].lower() not in _UNITS:
        raise BadInput(f"{text!r} is no size", "write it like 12GiB, 500MB or 1073741824 (bytes)")
    return int(Fraction(match[1]) * _UNITS[match[2].lower()])


def size_text(nbytes: float) -> str:
    """Bytes for people, in the largest unit of which there is a tenth."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= 0.1 * size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"


@dataclass(frozen=True)
class Budget:
    """What may be spent: `fit_bytes` of finished tensor payload, or `avg_bits` of code bits a routed weight."""

    avg_bits: float | None = None
    fit_bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.avg_bits is None) == (self.fit_bytes is None):
            raise BadInput("a budget is either --avg-bits or --fit", "give exactly one of them")
        if self.avg_bits is not None and not 0 < self.avg_bits <= 8:
            raise BadInput(f"--avg-bits {self.avg_bits} lies outside 0 to 8", "try --avg-bits 3.0")

    @property
    def text(self) -> str:
        return f"--avg-bits {self.avg_bits:g}" if self.avg_bits is not None else f"--fit {self.fit_bytes}"


# ------------------------------------------------------------------------------------------ sensitivity


@dataclass(frozen=True)
class Sensitivity:
    """What storing each routed matrix in each format is expected to cost.

    `cost_IF` has the spec's linears by rows and `formats` by columns: loss in nats per token where the method gives
    one, else a score times 4^-bits. `score_I` is the raw score of methods that know no formats (else None),
    `stderr_I` its standard error where there is one (`stderr_IF` that of costs that were measured per format).
    `halves_HIF`: the costs by each half of the data alone, where there were halves.
    `tokens_LE`: calibration tokens seen per layer and expert (None without data); `tokens_by_modality` the same apart
    for "text" and "image".
    """

    method: str
    linears: tuple[LinearId, ...]
    formats: tuple[Format, ...]
    cost_IF: np.ndarray
    score_I: np.ndarray | None = None
    stderr_I: np.ndarray | None = None
    stderr_IF: np.ndarray | None = None
    halves_HIF: np.ndarray | None = None
    tokens_LE: np.ndarray | None = None
    tokens_by_modality: Mapping[str, np.ndarray] = field(default_factory=dict)
    unit: str = "score"
    data_digest: str = ""
    notes: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- map


def digest_of(value: Any) -> str:
    """sha256 (16 hex digits) of a JSON-able value, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


PADDING = "mopeq.padding"  # the stored tensor of a map's unused bytes


def guard_name(prefixes: Iterable[str]) -> str:
    """The stored tensor of no bytes that bears the name of a whole layer's experts in transformers' model: where mopeq
    is not imported its shape fits nothing, so that loading fails instead of leaving the experts random."""
    return f"{min(prefixes)}.down_proj"


@dataclass(frozen=True)
class PrecisionMap:
    """LinearId -> Format for every routed matrix. `prefixes` gives each layer's on-disk name of its experts.

    `padding` bytes are stored unused: what the forecast, made from headers, promised beyond what this map takes
    (`alloc/choose.py` says when that is).
    """

    formats: Mapping[LinearId, Format]
    prefixes: Mapping[int, str]
    padding: int = 0

    def __getitem__(self, linear: LinearId) -> Format:
        return self.formats[linear]

    def __iter__(self) -> Iterator[LinearId]:
        return iter(self.formats)

    @property
    def palette(self) -> list[Format]:
        """The formats used, fewest bits first; a digit in `digits` is an index into it."""
        return sorted(set(self.formats.values()))

    def digits(self) -> dict[str, dict[str, str]]:
        """{prefix: {projection: one base-36 digit an expert}}, as config.json carries it."""
        index = {fmt: BASE36[i] for i, fmt in enumerate(self.palette)}
        table: dict[str, dict[str, list[str]]] = {}
        for linear in sorted(self.formats, key=lambda x: (x.layer, PROJECTIONS.index(x.projection), x.expert)):
            row = table.setdefault(self.prefixes[linear.layer], {}).setdefault(linear.projection, [])
            row.append(index[self.formats[linear]])
        return {prefix: {p: "".join(row) for p, row in rows.items()} for prefix, rows in table.items()}

    def counts(self) -> dict[str, int]:
        """{format name: number of matrices}."""
        names = [fmt.name for fmt in self.formats.values()]
        return {fmt.name: names.count(fmt.name) for fmt in self.palette}

    def code_bits(self, spec: MoESpec) -> int:
        return sum(self.formats[i].bits * out * n for i, (out, n) in spec.linears)

    def nbytes(self, spec: MoESpec) -> int:
        """Stored bytes of the routed matrices, and of the padding."""
        return self.padding + self.matrix_bytes(spec)

    def matrix_bytes(self, spec: MoESpec) -> int:
        """Stored bytes of the routed matrices: codes, scales and zero points."""
        return sum(self.formats[i].nbytes(out, n) for i, (out, n) in spec.linears)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format_version": 1,
            "formats": [fmt.name for fmt in self.palette],
            "layers": {str(layer): prefix for layer, prefix in sorted(self.prefixes.items())},
            "experts": self.digits(),
        }
        if self.padding:
            body["padding"] = self.padding
        return body | {"counts": self.counts(), "digest": digest_of(body)}

    @property
    def digest(self) -> str:
        return str(self.to_json()["digest"])

    @classmethod
    def from_json(cls, body: Any, source: str = "the precision map") -> PrecisionMap:
        """The inverse of `to_json`; BadInput names what is wrong with a map that was edited or damaged."""
        hint = "a map is what `mopeq map --json` prints, or a checkpoint's precision_map.json"
        if not isinstance(body, dict) or not {"format_version", "formats", "layers", "experts"} <= body.keys():
            raise BadInput(f"{source} is no precision map", hint)
        try:
            if body["format_version"] != 1:
                raise BadInput(f"it has format version {body['format_version']}; this mopeq reads 1", "upgrade mopeq")
            palette = [Format.parse(name) for name in body["formats"]]
            prefixes = {int(layer): str(prefix) for layer, prefix in body["layers"].items()}
            numbers = {prefix: layer for layer, prefix in prefixes.items()}
            if stray := [prefix for prefix in body["experts"] if prefix not in numbers]:
                raise BadInput(f"its experts of {stray[0]} stand under no layer", hint)
            digits = set(BASE36[: len(palette)])
            used = {digit for rows in body["experts"].values() for row in rows.values() for digit in row}
            if odd := sorted(used - digits):
                raise BadInput(f"its digit {odd[0]!r} stands for none of its {len(palette)} formats", hint)
            formats = {
                LinearId(numbers[prefix], e, projection): palette[BASE36.index(digit)]
                for prefix, rows in body["experts"].items()
                for projection, row in rows.items()
                for e, digit in enumerate(row)
            }
            padding = body.get("padding", 0)
            if type(padding) is not int or not 0 <= padding < 2**48:
                raise BadInput(f"its padding is {padding!r}, no number of bytes", hint)
            made = cls(formats, prefixes, padding)
        except BadInput as problem:
            raise BadInput(f"{source}: {problem.line}", problem.hint) from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
            raise BadInput(f"{source} cannot be read: {type(problem).__name__} {problem}", hint) from None
        if any(linear.projection not in PROJECTIONS for linear in formats):
            raise BadInput(f"{source} names a projection other than gate, up, down", hint)
        return made

    def check_covers(self, spec: MoESpec, source: str = "the precision map") -> None:
        """BadInput unless this map gives a format to exactly the spec's routed matrices."""
        wanted, given = {i for i, _ in spec.linears}, set(self.formats)
        if wanted != given:
            odd = min(wanted ^ given)
            verb = "lacks" if odd in wanted else "has, and the model has not,"
            raise BadInput(
                f"{source} {verb} layer {odd.layer} expert {odd.expert} {odd.projection}"
                f" ({len(wanted ^ given)} such in all)",
                "a map fits only the model it was made for",
            )


def members_by_format(map_: PrecisionMap, layer: MoELayer, projection: str) -> dict[Format, list[int]]:
    """The layer's experts whose matrices have each format, in the order of the first of each."""
    members: dict[Format, list[int]] = {}
    for e in range(layer.experts):
        members.setdefault(map_[LinearId(layer.layer, e, projection)], []).append(e)
    return members


def make_map(spec: MoESpec, formats: list[Format], nbytes: int | None = None) -> PrecisionMap:
    """The map that gives the spec's i-th linear the i-th format, padded to `nbytes` where these are given."""
    linears = [linear for linear, _ in spec.linears]
    assert len(linears) == len(formats)
    made = PrecisionMap(dict(zip(linears, formats, strict=True)), {x.layer: x.prefix for x in spec.layers})
    return made if nbytes is None else replace(made, padding=nbytes - made.nbytes(spec))
