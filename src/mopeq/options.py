"""What the user asked for, checked before anything is done: the options that `plan` and `quantize` share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mopeq.alloc import ALLOCATORS, NO_BUDGET
from mopeq.errors import BadInput
from mopeq.nouns import BASE36, Budget, Format, MoESpec, parse_size
from mopeq.plan import PER, other_format
from mopeq.quant import QUANTIZERS, sensed_as
from mopeq.sense import SENSORS
from mopeq.tables import row

DEFAULT_AVG_BITS = 3.0
TUNE = ("none", "scales")


@dataclass(frozen=True)
class Options:
    """One field per flag of `mopeq quantize`; see docs/commands.md for what each means."""

    bits: str | tuple[int, ...] = (2, 3, 4)
    avg_bits: float | None = None
    fit: str | int | None = None
    sensitivity: str = "fisher"
    scope: str = "model"
    allocate: str = "knapsack"
    per: str = "projection"
    method: str = "gptq"
    group_size: str | int | tuple[int, ...] = 64
    other_bits: int = 16
    map: str | Path | None = None
    tune: str = "none"
    calib: tuple[str | Path, ...] = ()  # or one path alone, or a list
    calib_tokens: int = 65536
    seed: int = 0
    max_memory: str | int | None = None
    device: str = "auto"
    run: str | Path | None = None
    shard_size: str | int = "5GB"
    ray: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "calib", several(self.calib))
        for name, kind, like in (
            ("avg_bits", Real, DEFAULT_AVG_BITS), ("other_bits", Integral, 16), ("calib_tokens", Integral, 65536),
            ("seed", Integral, 0),
        ):  # fmt: skip
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if not isinstance(value, kind) and not (value is None and name == "avg_bits"):
                raise BadInput(
                    f"{flag} {value!r} is no {'number' if kind is Real else 'whole number'}", f"try {flag} {like}"
                )
        row(SENSORS, self.sensitivity, "sensitivity")
        row(ALLOCATORS, self.allocate, "allocator")
        row(QUANTIZERS, self.method, "quantization method")
        if self.tune not in TUNE:
            raise BadInput(f"--tune {self.tune} is not offered", f"choose from: {', '.join(TUNE)}")
        if self.per not in PER:
            raise BadInput(f"--per {self.per} is not offered", f"choose from: {', '.join(PER)}")
        if self.scope not in ("model", "layer"):
            raise BadInput(f"--scope {self.scope} is not offered", "choose model or layer")
        if self.scope == "layer" and self.allocate != "kmeans" and self.sensitivity != "hybrid":
            raise BadInput("--scope layer is for kmeans and hybrid", "leave it out, or add --allocate kmeans")
        if self.avg_bits is not None and self.fit is not None:
            raise BadInput("--avg-bits and --fit are two ways to write one budget", "give one of them")
        if self.allocate in NO_BUDGET and (self.avg_bits is not None or self.fit is not None):
            raise BadInput(
                f"--allocate {self.allocate} has no budget: its clusters decide the size",
                "leave out --avg-bits and --fit, or use --allocate knapsack",
            )
        if self.map is not None and (self.avg_bits is not None or self.fit is not None):
            raise BadInput("--map gives every width itself; a budget beside it has no meaning", "leave one of them out")
        if self.allocate == "kmeans" and len(self.groups) > 1:
            raise BadInput("--allocate kmeans takes one group size", "give a single --group-size")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"--seed {self.seed} lies outside 0 to 2^32 - 1", "try --seed 0")
        if self.device not in ("auto", "cpu", "cuda"):
            raise BadInput(f"--device {self.device} is not offered", "choose auto, cpu or cuda")
        if self.calib_tokens < 1:
            raise BadInput(f"--calib-tokens {self.calib_tokens} is not positive", "try --calib-tokens 65536")
        if parse_size(self.shard_size) < 1:
            raise BadInput("--shard-size must be positive", "try --shard-size 5GB")
        if len(self.formats) > len(BASE36):
            raise BadInput(
                f"{len(self.formats)} formats are too many: a map has a digit for each of {len(BASE36)}",
                "give fewer widths or group sizes",
            )
        _ = self.other, self.memory_bytes

    @property
    def widths(self) -> tuple[int, ...]:
        return numbers(self.bits, "--bits", "2,3,4")

    @property
    def groups(self) -> tuple[int, ...]:
        return numbers(self.group_size, "--group-size", "64")

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats an allocator may choose among: fewest bits first."""
        return tuple(Format(bits, group) for bits in self.widths for group in self.groups)

    @property
    def other(self) -> Format | None:
        return other_format(self.other_bits, self.groups[0])

    @property
    def memory_bytes(self) -> int | None:
        return None if self.max_memory is None else parse_size(self.max_memory)

    def budget(self, spec: MoESpec) -> Budget | None:
        """The budget in force, or None for what has none. `--fit 25%` is a fraction of the source in bf16."""
        if self.allocate in NO_BUDGET or self.map is not None:
            return None
        if self.fit is None:
            return Budget(avg_bits=DEFAULT_AVG_BITS if self.avg_bits is None else self.avg_bits)
        text = str(self.fit).strip()
        if text.endswith("%"):
            share = re.fullmatch(r"(\d{1,4}(?:\.\d{1,9})?)\s*%", text)
            if not share:
                raise BadInput(f"--fit {text} is no fraction", "write it like 25%")
            return Budget(fit_bytes=int(2 * spec.params * Fraction(share[1]) / 100))
        return Budget(fit_bytes=parse_size(self.fit))

    def check_scores(self) -> None:
        """BadInput where clusters of scores are asked for, and the sensitivity is a cost of each format."""
        if self.allocate == "kmeans" and self.map is None and SENSORS[self.sensitivity].by_method:
            scores = [name for name, row in SENSORS.items() if not row.by_method]
            raise BadInput(
                f"--allocate kmeans clusters scores, and --sensitivity {self.sensitivity} has none",
                f"choose from: {', '.join(f'--sensitivity {name}' for name in scores)}",
            )

    @property
    def senses(self) -> bool:
        """Whether a sensitivity is asked for."""
        return self.map is None and self.allocate not in ("uniform", "random")

    @property
    def tries_quantizers(self) -> bool:
        """Whether sensing quantizes, to see what it costs."""
        return self.senses and SENSORS[self.sensitivity].by_method and SENSORS[self.sensitivity].needs_data

    @property
    def judges(self) -> bool:
        """Whether what sensing quantizes is fitted to data, so that other data must tell what it costs."""
        return self.tries_quantizers and QUANTIZERS[sensed_as(self.method)].needs_data

    @property
    def needs_data(self) -> list[str]:
        """The flags that show calibration data to the model."""
        return [
            flag
            for flag, needs in (
                (f"--sensitivity {self.sensitivity}", self.senses and SENSORS[self.sensitivity].needs_data),
                (f"--method {self.method}", QUANTIZERS[self.method].needs_data),
                (f"--tune {self.tune}", self.tune != "none"),
            )
            if needs
        ]


def several(value: Any) -> tuple[Any, ...]:
    """What may be given alone, or several together: paths, names of tasks."""
    return (value,) if isinstance(value, str | Path) else tuple(value)


def numbers(value: Any, flag: str, example: str) -> tuple[int, ...]:
    """ "2,3,4", 3 or (2, 3) -> ascending distinct integers."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, tuple | list) else [value]
    try:
        found = tuple(sorted({int(str(part)) for part in parts}))  # by str: no half is cut off
    except (TypeError, ValueError):
        raise BadInput(f"{flag} {value} is no list of whole numbers", f"write it like {flag} {example}") from None
    if not found:
        raise BadInput(f"{flag} is empty", f"write it like {flag} {example}")
    return found
