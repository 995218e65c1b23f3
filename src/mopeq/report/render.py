"""Subjects -> one HTML page: no network, no dates, the same bytes for the same data.

Jinja escapes every value; what charts return is escaped there. A content policy allows no script but the page's own,
by its hash. `data_block` is the page's JSON: what the pictures show, for the script and for whoever wants the numbers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mopeq.nouns import BASE36, Format, size_text
from mopeq.report import charts
from mopeq.report.charts import Dot
from mopeq.report.explore import explorer_data, first_map
from mopeq.report.facts import ALL, Contrast, Evaluation, Loss, Senses, Subject, Task, Widths, stored_bits
from mopeq.report.heat import Cells, colour_bar, heat_map, heat_width
from mopeq.report.scales import Scale, scale_of, variables, width_shades
from mopeq.report.study import Study
from mopeq.report.svg import significant

HERE = Path(__file__).parent
ROLE_WORDS = {
    "routed expert": "routed experts",
    "shared expert": "shared experts",
    "embedding": "embeddings",
    "other": "norms, dense layers, the rest",
}
KIND_SHADE = {"codes": "w6", "scales": "w3", "zero points": "w1", "biases": "w1"}


def render(subjects: Sequence[Subject], contrasts: Sequence[Contrast] = ()) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size,
        "sig": significant,
        "percent": percent,
        "count": count_words,
        "signed": signed,
        "ranked": ranked,
    }
    environment.globals |= {"role_words": lambda role: ROLE_WORDS.get(role, role)}
    names = ["script.js", *(["solve.js", "explore.js"] if any(s.explorer for s in subjects) else [])]
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)
    used = {f for s in subjects if s.widths for f in s.widths.formats}
    formats = sorted(used | {f for s in subjects if s.explorer for f in s.explorer.formats}, key=format_order)
    shades = dict(zip(formats, width_shades(len(formats)), strict=True)) if formats else {}
    return environment.get_template("template.html").render(
        title=title(subjects),
        subjects=subjects,
        views=[view(i, subject, shades) for i, subject in enumerate(subjects)],
        comparison=compare(subjects) if len(subjects) > 1 else None,
        contrasts=contrasts,
        style=Markup((HERE / "style.css").read_text(encoding="utf-8") + shade_rules()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=data_block(subjects, shades),
    )


def title(subjects: Sequence[Subject]) -> str:
    return subjects[0].name if len(subjects) == 1 else f"{len(subjects)} checkpoints compared"


def format_order(fmt: Format) -> tuple[float, Format]:
    return stored_bits(fmt), fmt


def size(nbytes: float | None) -> str:
    return "–" if nbytes is None else size_text(nbytes)


def percent(x: float | None, digits: int = 1) -> str:
    return "–" if x is None else f"{100 * x:.{digits}f} %"


def signed(x: float, unit: str = "") -> str:
    """A difference, its sign said unless it is written as 0."""
    text = f"{100 * abs(x):.1f} %" if unit == "%" else significant(abs(x))
    if text == "0.0 %":
        return text
    return ("−" if x < 0 else "+" if x > 0 else "") + text


def ranked(x: float | None) -> str:
    """A correlation."""
    return "–" if x is None or x != x else f"{x:.2f}".replace("-", "−")


def count_words(parameters: float) -> str:
    """A number of parameters for people."""
    return f"{significant(parameters / 1e9)} B" if parameters >= 1e9 else f"{significant(parameters / 1e6)} M"


def shade_rules() -> str:
    """Each shade as fill, stroke and ink, light and dark; paper is light."""
    rules = []
    for family, count in (("w", 8), ("s", 12), ("t", 12)):
        for i in range(count):
            name = f"{family}{i}"
            rules.append(
                f".{name}{{fill:var(--{name});background:var(--{name});color:var(--{name}i)}}"
                f".cells .{name}{{stroke:var(--{name})}}.{name}i{{fill:var(--{name}i)}}"
            )
    rules.append(".k0{fill:var(--k0)}.k0i{fill:var(--k0i)}")
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(True)}}}}}"
    return f":root{{{variables(False)}}}{dark}{''.join(rules)}"


# -------------------------------------------------------------------------------------------- one subject


def view(index: int, s: Subject, shades: dict[Format, int]) -> dict[str, Any]:
    """The pictures of one checkpoint, ready for the template."""
    return {
        "id": f"c{index + 1}",
        "index": index,
        "stats": stats(s),
        "bytes": byte_bars(s),
        "maps": width_panels(s.widths, shades) if s.widths else None,
        "layers": layer_rows(s.widths) if s.widths else [],
        "explorer": width_panels(first_map(s.explorer, s.widths), shades) if s.explorer and s.widths else None,
        "senses": sense_panels(s.senses) if s.senses else None,
        "tokens": token_panels(s.senses) if s.senses and s.senses.tokens else None,
        "study": study_view(s.study) if s.study else None,
        "against": any(t.original is not None for t in s.evaluation.tasks) if s.evaluation else False,
        "quantiles": kl_strips(s.evaluation) if s.evaluation else "",
        "tasks": [
            (
                t,
                charts.interval_strip(t.score, t.low, t.high, f"{t.name}: {t.score:.3f}")
                if t.score is not None
                else "",
            )
            for t in (s.evaluation.tasks if s.evaluation else ())
        ],
    }


def stats(s: Subject) -> list[tuple[str, str, str]]:
    """The few numbers at the top: (what, value, a line below)."""
    rows = []
    if s.bytes_weights is not None:
        of = f"{percent(s.bytes_weights / s.bytes_source)} of {size(s.bytes_source)}" if s.bytes_source else ""
        rows.append(("weights" if s.finished else "weights, planned", size(s.bytes_weights), of))
    if s.code_bits is not None:
        with_scales = "" if s.effective_bits is None else f"{s.effective_bits:.3f} with scales and zero points"
        rows.append(("code bits a routed weight", f"{s.code_bits:.3f}", with_scales))
    if s.evaluation is None:
        return rows
    whole = s.evaluation.losses[0]
    if whole.kl is not None:
        rows.append(("KL to the original", significant(whole.kl), "nats per token" + interval_words(whole)))
    if whole.ppl is not None:
        rows.append(("perplexity", significant(whole.ppl, 4), ppl_words(whole)))
    if whole.top1 is not None:
        rows.append(("top-1 agreement", percent(whole.top1), "positions with the same first choice"))
    if scores := [t.score for t in s.evaluation.tasks if t.score is not None]:
        kinds = "task" if len(scores) == 1 else "tasks"
        rows.append(("mean task score", f"{math.fsum(scores) / len(scores):.3f}", f"over {len(scores)} {kinds}"))
    return rows


def interval_words(loss: Loss) -> str:
    if loss.low is None or loss.high is None:
        return ""
    return f"; 95 %: {significant(loss.low)} to {significant(loss.high)}"


def ppl_words(loss: Loss) -> str:
    if loss.ppl is None or not loss.ppl_against:
        return "the original's was not measured"
    return f"original {significant(loss.ppl_against, 4)} ({100 * (loss.ppl / loss.ppl_against - 1):+.1f} %)"


def byte_bars(s: Subject) -> Markup | str:
    """Source and packed checkpoint as two bars on one scale."""
    before, after = [], []
    for part in s.parts:
        words = ROLE_WORDS.get(part.role, part.role)
        routed = part.role == "routed expert"
        if part.before is not None:
            before.append(("w6" if routed else "k0", words, part.before))
        if routed and part.kinds:
            after += [(KIND_SHADE.get(kind, "w1"), kind, n) for kind, n in part.kinds.items()]
        elif part.after is not None:
            after.append(("k0", words, part.after))
    rows = [(label, segments) for label, segments in (("source", before), ("packed", after)) if segments]
    return charts.stacked(rows, "bytes by part, source above, packed below; the table has the numbers") if rows else ""


@dataclass(frozen=True)
class Panel:
    """One heat map: the words above it, how it is spoken of, and its natural width in px."""

    words: str
    picture: Markup
    spoken: str
    width: int


def panel_words(panel: str) -> str:
    return "" if panel == ALL else panel


def width_panels(widths: Widths, shades: dict[Format, int]) -> dict[str, Any]:
    """The precision map: the paper's layer x expert heat map, and its legend."""
    lookup = np.array([*(shades[f] for f in widths.formats), -1])  # -1, no such expert, stays -1
    written = {shades[f]: BASE36[f.bits] for f in widths.formats}
    bits = np.array([*(float(f.bits) for f in widths.formats), np.nan])
    panels = []
    for panel, grid_LE in widths.grids.items():
        mean_L = np.nanmean(bits[grid_LE], axis=1) + 1e-9  # 2.125 is 2.13, as the page's script writes it
        cells = Cells(
            "w", lookup[grid_LE], widths.layers, written, margin=[f"{m:.2f}" for m in mean_L], margin_title="mean"
        )
        name = "precision map" + (f", {panel}" if panel != ALL else "")
        panels.append(
            Panel(
                panel_words(panel),
                heat_map(cells, f"{name}: bits by layer and expert"),
                name,
                heat_width(cells),
            )
        )
    legend = [
        (f"w{shades[f]}", f.bits, f"group {f.group_size}, {scheme_words(f)}", widths.counts[f.name], f.name)
        for f in widths.formats
    ]
    return {"panels": panels, "legend": legend}


def scheme_words(fmt: Format) -> str:
    return {"a": "asymmetric", "s": "symmetric"}.get(fmt.scheme, fmt.scheme)


def layer_rows(widths: Widths) -> list[tuple[str, list[int], float]]:
    """(layer and panel, matrices of each format, mean bits): the map as a table, for readers and for print."""
    rows = []
    bits = np.array([f.bits for f in widths.formats])
    for i, layer in enumerate(widths.layers):
        for panel, grid_LE in widths.grids.items():
            known = grid_LE[i][grid_LE[i] >= 0]
            counts = [int((known == f).sum()) for f in range(len(widths.formats))]
            rows.append((f"{layer} {panel_words(panel)}".strip(), counts, float(bits[known].mean())))
    return rows


def sense_panels(senses: Senses) -> dict[str, Any]:
    """The sensitivity as the same picture; experts no token reached are crossed, zero and below dashed."""
    scale = scale_of(np.concatenate([g.ravel() for g in senses.grids.values()]))
    return panels_of(senses, senses.grids, scale, "s", "sensitivity")


def token_panels(senses: Senses) -> dict[str, Any]:
    scale = scale_of(np.concatenate([np.where(g > 0, g, np.nan).ravel() for g in senses.tokens.values()]))
    return panels_of(senses, senses.tokens, scale, "t", "tokens seen")


def panels_of(senses: Senses, grids: Mapping[str, np.ndarray], scale: Scale, family: str, name: str) -> dict[str, Any]:
    panels, crossed_any, dashed_any = [], False, False
    for panel, grid_LE in grids.items():
        if family == "t":
            crossed, dashed = grid_LE == 0, None
        else:
            known = np.isfinite(grid_LE)
            crossed = None if senses.reached is None else ~senses.reached & known
            dashed = (grid_LE <= 0) & known & (~crossed if crossed is not None else True) if scale.log else None
        crossed_any |= crossed is not None and bool(crossed.any())
        dashed_any |= dashed is not None and bool(dashed.any())
        cells = Cells(family, scale.shade(grid_LE), senses.layers, crossed=crossed, dashed=dashed)
        words = panel_words(panel) if panel != "tokens" else ""
        spoken = name + (f", {words}" if words else "")
        panels.append(Panel(words, heat_map(cells, f"{spoken} by layer and expert"), spoken, heat_width(cells)))
    return {
        "panels": panels,
        "bar": colour_bar(scale, family),
        "log": scale.log,
        "crossed": crossed_any,
        "dashed": dashed_any,
    }


def study_view(study: Study) -> dict[str, Any]:
    """The sensitivity and the tokens side by side, and the rank correlations by layer."""
    panels = []
    for words, family, grid_LE in (("sensitivity", "s", study.value_LE), ("tokens", "t", study.tokens_LE)):
        scale = scale_of(np.where(grid_LE > 0, grid_LE, np.nan) if family == "t" else grid_LE)
        cells = Cells(family, scale.shade(grid_LE), study.layers, crossed=grid_LE == 0 if family == "t" else None)
        panels.append(Panel(words, heat_map(cells, f"{words} by layer and expert"), words, heat_width(cells)))
    lines = charts.rank_lines(
        study.layers, [(o.name, o.rank_L) for o in study.others], "rank correlation with the sensitivity, by layer"
    )
    return {"panels": panels, "lines": lines}


def task_strip(t: Task) -> Markup | str:
    return "" if t.score is None else charts.interval_strip(t.score, t.low, t.high, f"{t.name}: {t.score:.3f}")


def kl_strips(e: Evaluation) -> Markup | str:
    rows = [
        (loss.name, {"median": loss.median, "mean": loss.kl, "99 %": loss.p99, "max": loss.maximum})
        for loss in e.losses
        if loss.kl is not None
    ]
    return charts.quantile_strips(rows, "KL by quantile; the table has the numbers") if rows else ""


# ------------------------------------------------------------------------------------------- comparison


def compare(subjects: Sequence[Subject]) -> dict[str, Any]:
    """The table at the top, and the scatter of those that were measured alike."""
    measured = [s for s in subjects if s.evaluation and s.evaluation.losses[0].kl is not None]
    settings = [s.evaluation.setting for s in (*measured, *subjects) if s.evaluation]
    first = settings[0] if settings else None
    alike = [s for s in measured if s.evaluation and s.evaluation.setting == first]
    names = list(dict.fromkeys(t.name for s in subjects if s.evaluation for t in s.evaluation.tasks))
    scores = {s.name: {t.name: t for t in s.evaluation.tasks} for s in subjects if s.evaluation}
    return {
        "scatter": compare_scatter(subjects, alike) if len(alike) > 1 else "",
        "pareto": [(name, p) for name in ("", *names) if (p := compare_tasks(subjects, first, name))],
        "uniform": any(s.uniform for s in subjects),
        "setting": measured[0].evaluation.words if measured and measured[0].evaluation else "",
        "apart": [s for s in measured if s not in alike],
        "unmeasured": [s for s in subjects if s not in measured],
        "sources": sorted({s.source for s in subjects}),
        "tasks": [(name, [scores.get(s.name, {}).get(name) for s in subjects]) for name in names],
    }


def compare_scatter(subjects: Sequence[Subject], alike: Sequence[Subject]) -> Markup | str:
    """Bytes against KL, each point named and linked to its section."""
    rows = [
        (subjects.index(s) + 1, s.name, s.bytes_weights, s.evaluation.losses[0])
        for s in alike
        if s.evaluation and s.bytes_weights
    ]
    found = [(i, name, nbytes, loss, loss.kl) for i, name, nbytes, loss in rows if loss.kl is not None and loss.kl > 0]
    if len(found) < 2:
        return ""
    unit, words = unit_of([nbytes for _, _, nbytes, _, _ in found])
    best = charts.frontier([(float(nbytes), kl) for _, _, nbytes, _, kl in found])
    dots = [
        Dot(name, nbytes / unit, kl, loss.low, loss.high, front, f"#c{i}", subjects[i - 1].uniform)
        for (i, name, nbytes, loss, kl), front in zip(found, best, strict=True)
    ]
    return charts.scatter(dots, words, "bytes of weights against KL, one point a checkpoint; the table has the numbers")


def unit_of(sizes: Sequence[int]) -> tuple[int, str]:
    """GiB from 0.1 GiB on, else MiB."""
    return (2**30, "GiB") if max(sizes) >= 0.1 * 2**30 else (2**20, "MiB")


def compare_tasks(subjects: Sequence[Subject], setting: tuple[tuple[str, str], ...] | None, task: str) -> Markup | str:
    """Bytes against a task's score, or where `task` is "" against the mean of all; for those measured alike."""
    found: list[tuple[int, Subject, Task]] = []
    for i, s in enumerate(subjects):
        tasks = s.evaluation.tasks if s.evaluation and s.evaluation.setting == setting else ()
        t = next((t for t in tasks if t.name == task), None) if task else mean_task(tasks)
        if t is not None and t.score is not None and s.bytes_weights:
            found.append((i, s, t))
    if len(found) < 2:
        return ""
    unit, words = unit_of([s.bytes_weights or 0 for _, s, _ in found])
    best = charts.frontier([(float(s.bytes_weights or 0), -(t.score or 0.0)) for _, s, t in found])
    dots = [
        Dot(s.name, (s.bytes_weights or 0) / unit, t.score or 0.0, t.low, t.high, front, f"#c{i + 1}", s.uniform)
        for (i, s, t), front in zip(found, best, strict=True)
    ]
    name = task or "mean of the tasks"
    original = next((t.original for _, _, t in found if t.original is not None), None)
    return charts.scatter(
        dots, words, f"bytes of weights against the score of {name}", name, log=False, size=(400, 290), line=original
    )


def mean_task(tasks: Sequence[Task]) -> Task | None:
    """The plain mean of several tasks' scores; no interval, since tasks are no sample of anything."""
    scores = [t.score for t in tasks if t.score is not None]
    if len(scores) < 2:
        return None
    originals = [t.original for t in tasks if t.score is not None and t.original is not None]
    original = math.fsum(originals) / len(scores) if len(originals) == len(scores) else None
    return Task("", math.fsum(scores) / len(scores), None, None, None, (), original)


# ------------------------------------------------------------------------------------------------- data


def data_block(subjects: Sequence[Subject], shades: Mapping[Format, int]) -> Markup:
    """The page's JSON, safe inside <script>: it holds no "<", and null where a number is not finite."""
    body = {"version": 1, "checkpoints": [subject_data(s, shades) for s in subjects]}
    text = json.dumps(body, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def subject_data(s: Subject, shades: Mapping[Format, int]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": s.name,
        "source": s.source,
        "bytes_source": s.bytes_source,
        "bytes_weights": s.bytes_weights,
        "avg_expert_bits": s.code_bits,
        "avg_expert_bits_effective": s.effective_bits,
        "parts": [{"role": p.role, "before": p.before, "after": p.after, **dict(p.kinds)} for p in s.parts],
    }
    if s.widths:
        w = s.widths
        data |= {
            "layers": list(w.layers),
            "experts": [int(n) for n in (next(iter(w.grids.values())) >= 0).sum(1)],
            "formats": [f.name for f in w.formats],
            "map": {p: ["".join(BASE36[i] if i >= 0 else "-" for i in row) for row in g] for p, g in w.grids.items()},
        }
    if s.senses:
        data["sensitivity"] = {
            "method": s.senses.method,
            "shows": s.senses.shows,
            "values": {p: short_numbers(g) for p, g in s.senses.grids.items()},
        }
        data["tokens"] = {name: short_numbers(g) for name, g in s.senses.tokens.items()}
    if s.explorer:
        data["explorer"] = explorer_data(s.explorer, shades, lambda role: ROLE_WORDS.get(role, role))
    if s.study:
        data["study"] = {o.name: [finite(r) for r in o.rank_L] for o in s.study.others}
    if s.evaluation:
        data["evaluation"] = evaluation_data(s.evaluation)
    return data


def evaluation_data(e: Evaluation) -> dict[str, Any]:
    losses = [{k: finite(v) if isinstance(v, float) else v for k, v in vars(loss).items()} for loss in e.losses]
    tasks = [
        {"name": t.name, "score": finite(t.score), "low": finite(t.low), "high": finite(t.high), "n": t.n}
        | {"original": finite(t.original), "agreement": finite(t.agreement)}
        for t in e.tasks
    ]
    return {"setting": dict(e.setting), "losses": losses, "tasks": tasks}


def finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def short_numbers(grid_LE: np.ndarray) -> list[list[float | int | None]]:
    """Rows of numbers with 4 significant digits; null where there is none."""

    def short(x: float) -> float | int | None:
        if not math.isfinite(x):
            return None
        return int(x) if float(x).is_integer() and abs(x) < 2**53 else float(f"{x:.4g}")

    return [[short(x) for x in row] for row in grid_LE.tolist()]
