"""What the report says of one checkpoint, as plain data: no file is opened here.

Grids are arrays [L, E]: MoE layers by rows, experts by columns; layers with fewer experts than the widest are filled
up with -1 (formats) or NaN (numbers). A grid belongs to a panel: one a projection, or "all" where one tells it all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from mopeq.nouns import PROJECTIONS, Format, LinearId, PrecisionMap, Sensitivity

if TYPE_CHECKING:
    from mopeq.report.explore import Explorer
    from mopeq.report.study import Study

ALL = "all"  # the panel that stands for every projection
MODALITIES = ("text", "image")


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model, before (None where not known) and after. `kinds` splits the routed experts'."""

    role: str
    before: int | None
    after: int | None
    kinds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """What the report cannot show, why, and the command that would add it."""

    line: str
    command: str = ""


@dataclass(frozen=True)
class Widths:
    """The precision map as pictures: `grids` holds indices into `formats` (fewest stored bits first)."""

    formats: tuple[Format, ...]
    layers: tuple[int, ...]
    grids: Mapping[str, np.ndarray]
    counts: Mapping[str, int]
    digest: str


@dataclass(frozen=True)
class Senses:
    """The sensitivity as pictures. `shows` says in words what a value is; `tokens` are grids by modality."""

    method: str
    says: str
    shows: str
    layers: tuple[int, ...]
    grids: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    reached: np.ndarray | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Loss:
    """What was measured over some positions; KL in nats per token, None where it was not measured."""

    name: str
    kl: float | None
    low: float | None
    high: float | None
    median: float | None
    p99: float | None
    maximum: float | None
    ppl: float | None
    ppl_against: float | None
    top1: float | None
    tokens: int | None
    rows: int | None
    ppl_change: tuple[float | None, float | None] = (None, None)  # 95 % interval of ppl / ppl_against - 1
    top1_interval: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True)
class Task:
    """One task's score between 0 and 1 with its 95 % interval, and the metric's own values by name.

    original: the original's score; change: of the score from it, with its paired 95 % interval; agreement: the share of
    items answered in the same words.
    """

    name: str
    score: float | None
    low: float | None
    high: float | None
    n: int | None
    metrics: tuple[tuple[str, float], ...]
    original: float | None = None
    change: Change | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Change:
    """A difference with its paired 95 % interval over n items."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Agreement:
    """How often both models answer in the same words, over all items or those of a modality."""

    name: str
    share: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Contrast:
    """One checkpoint against another, over the items both were measured on.

    rows: (what, unit, whether less is better, the change). `note` says why there is none.
    """

    name: str
    against: str
    rows: tuple[tuple[str, str, bool, Change], ...]
    note: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What `mopeq eval` found. `losses` starts with the whole; by modality only where there is more than one.

    `setting` (original, data, window, limit, benchmarks' rules and wording) must be equal for two to be compared.
    """

    setting: tuple[tuple[str, str], ...]
    losses: tuple[Loss, ...]
    tasks: tuple[Task, ...]
    answers: tuple[Agreement, ...] = ()

    @property
    def words(self) -> str:
        said = dict(self.setting)
        limit = "" if said["limit"] == "none" else f", at most {said['limit']} rows of each kind"
        rules = f", benchmarks by the rules of {said['rules']}" if "rules" in said else ""
        return f"against {said['against']} on {said['data']}, windows of {said['window']} tokens{limit}{rules}"


@dataclass(frozen=True)
class Subject:
    """One checkpoint, or a run directory that has none yet (then `bytes_weights` is the plan's)."""

    name: str
    source: str
    model_type: str
    params: int | None
    expert_params: int | None
    bytes_source: int | None
    bytes_weights: int | None
    code_bits: float | None
    effective_bits: float | None
    bytes_by_bits: Mapping[str, int]
    parts: tuple[Part, ...]
    widths: Widths | None
    senses: Senses | None
    evaluation: Evaluation | None
    recipe: str  # a few words: how it was made
    made: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # (heading, rows of name and value)
    notes: tuple[str, ...]
    command: str
    missing: Mapping[str, Missing]  # by section: sizes, map, explorer, sensitivity, tokens, evaluation, kl, tasks
    finished: bool = True
    explorer: Explorer | None = None
    study: Study | None = None
    uniform: bool = False  # every routed expert in one format, by choice


# ------------------------------------------------------------------------------------------- gathering


def stored_bits(fmt: Format) -> float:
    """Bits a weight takes with its share of scale and zero point."""
    return fmt.bits + (16 + (fmt.bits if fmt.scheme == "a" else 0)) / fmt.group_size


def grid_of(linears: Iterable[LinearId], values: Iterable[float], layers: tuple[int, ...], empty: float) -> np.ndarray:
    """One projection's values as [L, E]."""
    rows = {layer: i for i, layer in enumerate(layers)}
    entries = [(rows[i.layer], i.expert, value) for i, value in zip(linears, values, strict=True)]
    grid_LE = np.full((len(layers), 1 + max(e for _, e, _ in entries)), empty, dtype=np.float64)
    for row, e, value in entries:
        grid_LE[row, e] = value
    return grid_LE


def widths_of(map_: PrecisionMap) -> Widths:
    """A panel a projection where projections differ, else one."""
    formats = tuple(sorted(map_.palette, key=lambda f: (stored_bits(f), f)))
    index = {fmt: i for i, fmt in enumerate(formats)}
    layers = tuple(sorted({i.layer for i in map_}))
    grids = {}
    for p in PROJECTIONS:
        if members := [i for i in map_ if i.projection == p]:
            grids[p] = grid_of(members, [index[map_[i]] for i in members], layers, -1).astype(np.int64)
    first = next(iter(grids.values()))
    if all(np.array_equal(first, grid) for grid in grids.values()):
        grids = {ALL: first}
    return Widths(formats, layers, grids, {f.name: map_.counts()[f.name] for f in formats}, map_.digest)


def senses_of(s: Sensitivity, widths: Widths, says: str) -> Senses:
    """The same panels as the map's: a map tied over projections was chosen by the sums over them."""
    if s.score_I is not None:
        value_I, stderr_I, shows = s.score_I, s.stderr_I, "score"
    else:
        f = min(range(len(s.formats)), key=lambda i: (stored_bits(s.formats[i]), s.formats[i]))
        unit = "nats per token" if "nat" in s.unit else s.unit
        value_I, shows = s.cost_IF[:, f], f"cost of {s.formats[f].name} in {unit}"
        stderr_I = None if s.stderr_IF is None else s.stderr_IF[:, f]
    grids = {}
    for p in PROJECTIONS:
        if places := [n for n, i in enumerate(s.linears) if i.projection == p]:
            grids[p] = grid_of([s.linears[n] for n in places], value_I[places], widths.layers, np.nan)
    if ALL in widths.grids:
        grids = {ALL: np.sum(list(grids.values()), axis=0)}
        shows += ", summed over an expert's projections"
    elif all(np.array_equal(next(iter(grids.values())), grid, equal_nan=True) for grid in grids.values()):
        grids = {ALL: next(iter(grids.values()))}
        shows += ", the same for each of an expert's projections"
    absent_LE = next(iter(widths.grids.values())) < 0

    def tokens(t_LE: np.ndarray) -> np.ndarray:
        return np.where(absent_LE, np.nan, t_LE.astype(np.float64))

    by_modality = {name: tokens(s.tokens_by_modality[name]) for name in MODALITIES if name in s.tokens_by_modality}
    if not by_modality and s.tokens_LE is not None:
        by_modality = {"tokens": tokens(s.tokens_LE)}
    reached = None if s.tokens_LE is None else s.tokens_LE > 0
    return Senses(
        s.method, says, shows, widths.layers, grids, by_modality, reached, (*s.notes, *error_note(value_I, stderr_I))
    )


def error_note(value_I: np.ndarray, stderr_I: np.ndarray | None) -> tuple[str, ...]:
    """How far the standard errors let the values be told apart from zero."""
    if stderr_I is None:
        return ()
    if not np.isfinite(stderr_I).all():
        return ("no standard error is known: one sample has no spread",)
    lost = int((np.abs(value_I) <= 2 * stderr_I).sum())
    return (f"{lost:,} of {len(value_I):,} matrices lie within two standard errors of zero",)


def short_path(text: str) -> str:
    """The last two parts of an absolute path; a hub id, or what was typed relative, as it is."""
    path = PurePath(text)
    return "/".join(path.parts[-2:]) if path.is_absolute() and len(path.parts) > 2 else text


def read_evaluation(body: Mapping[str, Any]) -> Evaluation:
    """From the JSON that `mopeq eval` prints; what is absent or no number is None. TypeError if it is none."""
    parts = body.get("by_modality") or {}
    if not isinstance(parts, dict) or not isinstance(body.get("tasks") or {}, dict):
        raise TypeError("by_modality and tasks are objects")
    whole = next(iter(parts)) if len(parts) == 1 else "all"
    losses = [read_loss(whole, body)]
    losses += [read_loss(name, part) for name, part in parts.items()] if len(parts) > 1 else []
    data = body.get("data")
    setting = (
        ("against", short_path(str(body.get("against") or "nothing"))),
        ("data", ", ".join(map(str, data)) if isinstance(data, list) and data else "mopeq's built-in text"),
        ("window", str(body.get("window"))),
        ("limit", "none" if body.get("limit") is None else str(body["limit"])),
        *((key, str(body[key])) for key in ("rules", "wording") if body.get(key) is not None),
    )
    tasks = [read_task(name, row) for name, row in (body.get("tasks") or {}).items()]
    answers = body.get("answers") or {}
    return Evaluation(setting, tuple(losses), tuple(tasks), read_answers(answers) if isinstance(answers, dict) else ())


def read_answers(body: Mapping[str, Any]) -> tuple[Agreement, ...]:
    """By modality only where there is more than one."""
    names = [name for name in body if name != "all"]
    shown = {"all": body.get("all"), **(body if len(names) > 1 else {})}
    return tuple(
        Agreement(str(name), share, *pair(row.get("ci95")), whole_number(row.get("n")))
        for name, row in shown.items()
        if isinstance(row, dict) and (share := real(row.get("agreement"))) is not None
    )


def read_loss(name: str, part: Mapping[str, Any]) -> Loss:
    low, high = pair(part.get("kl_ci95"))
    return Loss(
        name=str(name),
        kl=real(part.get("kl")),
        low=low,
        high=high,
        median=real(part.get("kl_median")),
        p99=real(part.get("kl_p99")),
        maximum=real(part.get("kl_max")),
        ppl=real(part.get("ppl")),
        ppl_against=real(part.get("ppl_against")),
        top1=real(part.get("top1_agreement")),
        tokens=whole_number(part.get("tokens")),
        rows=whole_number(part.get("rows")),
        ppl_change=pair(part.get("ppl_change_ci95")),
        top1_interval=pair(part.get("top1_ci95")),
    )


def read_task(name: str, row: Mapping[str, Any]) -> Task:
    low, high = pair(row.get("ci95"))
    ours = ("n", "ci95", "score", "original", "change", "agreement")
    own = [(str(k), v) for k in row if k not in ours and (v := real(row[k])) is not None]
    return Task(
        str(name),
        real(row.get("score")),
        low,
        high,
        whole_number(row.get("n")),
        tuple(own),
        real(row.get("original")),
        read_change(row.get("change")),
        real(row.get("agreement")),
    )


def read_change(found: Any) -> Change | None:
    """From what evaluate/paired.py gives."""
    mean = real(found.get("mean")) if isinstance(found, dict) else None
    return None if mean is None else Change(mean, *pair(found.get("ci95")), whole_number(found.get("n")) or 0)


def real(x: Any) -> float | None:
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) and x == x else None


def whole_number(x: Any) -> int | None:
    return x if type(x) is int else None


def pair(x: Any) -> tuple[float | None, float | None]:
    return (real(x[0]), real(x[1])) if isinstance(x, list | tuple) and len(x) == 2 else (None, None)
