"""The report's pictures against obvious re-readings of them, its page against hostile text, its gathering against
real folders."""

from __future__ import annotations

import argparse
import ast
import base64
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import made
import numpy as np
import pytest
import report_sample as sample
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from mopeq.errors import BadInput
from mopeq.nouns import Format, LinearId, PrecisionMap, Sensitivity
from mopeq.packed import MANIFEST, json_bytes, write_manifest
from mopeq.report import charts, heat, scales
from mopeq.report.facts import ALL, Part, read_evaluation, senses_of, widths_of
from mopeq.report.render import render
from mopeq.report.study import minmax_product, rank_correlation
from mopeq.report.svg import significant
from mopeq.verbs import contrast as contrasting
from mopeq.verbs import report as reporting

SOURCE = Path(reporting.__file__).parents[1]
HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;"'`{{7*7}}{% raw %}"""


class Page(HTMLParser):
    """Tags, attributes and text of a page; ends that match nothing are kept."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.astray: list[str] = []
        self.text: dict[str, str] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.astray.append(tag)

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        self.text[where] = self.text.get(where, "") + data

    def count(self, tag: str) -> int:
        return sum(t == tag for t, _ in self.tags)

    @property
    def words(self) -> str:
        return " ".join(" ".join(text.split()) for tag, text in self.text.items() if tag not in ("script", "style"))


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="mopeq-data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1], parse_constant=lambda c: pytest.fail(f"{c} is no JSON")))


# ---------------------------------------------------------------------------------------------- heat map


def drawn_cells(svg: str, family: str, columns: int) -> dict[tuple[int, int], int]:
    """{(row, column): shade} by following the pen of each path, command by command."""
    w, h = heat.cell_size(columns)
    found = {}
    for shade, path in re.findall(rf'<path class="{family}(\d+)" d="([^"]*)"', svg):
        x = y = 0.0
        for command, arguments in re.findall(r"([Mmh])([-0-9. ]+)", path):
            numbers = [float(n) for n in arguments.split()]
            if command == "M":
                x, y = numbers
            elif command == "m":
                x, y = x + numbers[0], y + numbers[1]
            else:
                row, column = (y - heat.TOP) / h - 0.5, (x - heat.LEFT) / w
                assert row == int(row)
                assert column == int(column)
                assert (int(row), int(column)) not in found
                found[int(row), int(column)] = int(shade)
                x += numbers[0]
    return found


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_heat_map_draws_each_cell_once_in_its_place_and_shade(rows: int, columns: int, seed: int) -> None:
    shade_LE = np.random.default_rng(seed).integers(-1, 5, (rows, columns))
    svg = heat.heat_map(heat.Cells("w", shade_LE, list(range(rows))), "t")
    wanted = {(r, c): int(s) for (r, c), s in np.ndenumerate(shade_LE) if s >= 0}
    assert drawn_cells(svg, "w", columns) == wanted


def test_every_cell_of_a_map_carries_its_number() -> None:
    shade_LE = np.random.default_rng(3).integers(-1, 3, (7, 33))
    svg = heat.heat_map(heat.Cells("w", shade_LE, list(range(7)), {0: "2", 1: "3", 2: "4"}), "t")
    w, h = heat.cell_size(33)
    found = {}
    for shade, y, xs, characters in re.findall(r'<text class="w(\d)i" y="([^"]+)" x="([^"]+)">(\d+)</text>', svg):
        assert len(xs.split()) == len(characters)
        for x, character in zip(xs.split(), characters, strict=True):
            place = round((float(y) - heat.TOP) / h - 0.5), round((float(x) - heat.LEFT - (w - 1) / 2) / w)
            assert character == {"0": "2", "1": "3", "2": "4"}[shade]
            found[place] = int(shade)
    assert found == {at: int(s) for at, s in np.ndenumerate(shade_LE) if s >= 0}


def test_marks_lie_on_the_marked_cells() -> None:
    crossed = np.zeros((4, 9), dtype=bool)
    crossed[1, 3] = crossed[3, 8] = True
    svg = heat.heat_map(heat.Cells("s", np.zeros((4, 9), dtype=int), [0, 1, 2, 3], crossed=crossed), "t")
    w, h = heat.cell_size(9)
    path = re.search(r'<path class="mark" d="([^"]*)"', svg)
    assert path
    points = np.array([[float(v) for v in p.split()] for p in re.split("[ML]", path[1])[1:]])
    cells = {(int((y - heat.TOP) // h), int((x - heat.LEFT) // w)) for x, y in points}
    assert cells == {(1, 3), (3, 8)}
    assert len(points) == 8  # two strokes of two ends each


# ------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("family", scales.RAMPS)
def test_shades_go_one_way_in_lightness_and_their_ink_can_be_read(family: str, dark: bool) -> None:
    light = [scales.luminance(c) for c in scales.ramp(family, dark)]
    assert all((b > a) == dark for a, b in pairwise(light))
    for colour in scales.ramp(family, dark):
        a, b = sorted((scales.luminance(colour), scales.luminance(scales.ink_on(colour))))
        assert (b + 0.05) / (a + 0.05) >= 4.5  # WCAG AA


def test_mixing_meets_its_ends() -> None:
    assert scales.mix("#123456", "#fedcba", 0) == "#123456"
    assert scales.mix("#123456", "#fedcba", 1) == "#fedcba"


@pytest.mark.parametrize("count", range(1, 9))
def test_width_shades_are_distinct_and_rise(count: int) -> None:
    shades = scales.width_shades(count)
    assert len(shades) == count
    assert shades == sorted(set(shades))
    assert 0 <= shades[0] <= shades[-1] < scales.WIDTH_SHADES


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_more_is_never_a_lower_shade(values: list[float]) -> None:
    values_N = np.sort(np.array(values))
    shade_N = scales.scale_of(values_N).shade(values_N)
    assert (np.diff(shade_N) >= 0).all()
    assert 0 <= shade_N.min() <= shade_N.max() < scales.SHADES


def test_scale_is_logarithmic_only_across_decades() -> None:
    assert not scales.scale_of(np.array([2400.0, 2600.0])).log
    wide = scales.scale_of(np.array([1e-7, 1e-4, 1e-1, -3.0, 0.0, np.nan]))
    assert wide.log
    assert wide.shade(np.array([1e-7, 1e-1, -3.0, np.nan])).tolist() == [0, scales.SHADES - 1, 0, -1]
    assert scales.scale_of(np.array([np.nan])).shade(np.array([np.nan])).tolist() == [-1]
    assert scales.scale_of(np.array([5.0, 5.0])).shade(np.array([5.0])).tolist() == [scales.SHADES // 2]


def test_one_tiny_value_does_not_wash_out_a_log_scale() -> None:
    values = np.concatenate([[1e-30], np.geomspace(1e-3, 1, 500)])
    found = scales.scale_of(values)
    assert found.clipped
    assert found.low >= 1e-3


# ------------------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123456, "0.0123"),
        (190.67, "191"),
        (1234567.0, "1.23e6"),
        (54321.9, "54,322"),
        (7.6e-9, "7.60e-9"),
        (0.0, "0"),
        (-0.5, "-0.500"),
        (float("inf"), "∞"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_significant(value: float | None, text: str) -> None:
    assert significant(value) == text


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_frontier(points: list[tuple[int, int]]) -> None:
    for p, best in zip(points, charts.frontier([(float(x), float(y)) for x, y in points]), strict=True):
        beaten = [q for q in points if q[0] <= p[0] and q[1] <= p[1] and (q[0] < p[0] or q[1] < p[1])]
        assert best == (not beaten)


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_linear_ticks_lie_inside(low: float, width: float) -> None:
    high = low + width
    axis = charts.Axis(low, high, 0, 100)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-6 * width <= t <= high + 1e-6 * width for t in ticks)


def test_log_axis() -> None:
    axis = charts.Axis(-3, 1, 0, 400, log=True)
    assert [axis.at(v) for v in (1e-3, 1e-2, 10)] == pytest.approx([0, 100, 400])
    assert (axis.at(0), axis.at(-1), axis.at(1e9)) == (0, 0, 400)
    assert axis.ticks() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10]) and axis.words(0.01) == "0.01"


def test_a_log_axis_of_less_than_a_decade_has_ticks_enough() -> None:
    axis = charts.Axis(math.log10(0.0029), math.log10(0.006), 0, 100, log=True)
    ticks = axis.ticks()
    assert ticks == pytest.approx([0.003, 0.0035, 0.004, 0.0045, 0.005, 0.0055, 0.006])
    assert [axis.words(t) for t in ticks[:3]] == ["0.003", "0.0035", "0.004"]


def test_labels_of_a_scatter_do_not_touch() -> None:
    rng = np.random.default_rng(5)
    points = [(float(x), float(y)) for x, y in rng.uniform((60, 30), (500, 340), (14, 2))]
    names = ["q" * int(n) for n in rng.integers(4, 14, 14)]
    spots = charts.label_places(points, names, 760)
    boxes = [charts.label_box(*s, 7.0 * len(n)) for s, n in zip(spots, names, strict=True)]
    for i, a in enumerate(boxes):
        assert not any(charts.touches(a, b) for b in boxes[i + 1 :])
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in points)


# ------------------------------------------------------------------------------------------------- facts


def test_a_tied_map_has_one_panel_and_the_summed_sensitivity() -> None:
    widths = widths_of(sample.precision_map(3, 8, 1, tied=True))
    assert list(widths.grids) == [ALL]
    s = sample.sensitivity(3, 8, 1)
    found = senses_of(s, widths, "")
    by_expert: dict[tuple[int, int], float] = {}
    for linear, cost in zip(s.linears, s.cost_IF[:, 0], strict=True):
        by_expert[linear.layer, linear.expert] = by_expert.get((linear.layer, linear.expert), 0) + cost
    for row, layer in enumerate(widths.layers):
        assert found.grids[ALL][row] == pytest.approx([by_expert[layer, e] for e in range(8)])
    assert "2g64a" in found.shows
    assert found.reached is not None
    assert np.argwhere(~found.reached).tolist() == [[1, 3]]


def test_a_map_by_projection_has_a_panel_each_and_uneven_layers_are_filled_up() -> None:
    formats = {LinearId(4, e, p): Format(2 + e % 2) for e in range(2) for p in ("up", "down")}
    formats |= {LinearId(7, e, "up"): Format(4, 128) for e in range(3)}
    formats |= {LinearId(7, e, "down"): Format(4, 64) for e in range(3)}
    widths = widths_of(PrecisionMap(formats, {4: "a", 7: "b"}))
    assert [f.name for f in widths.formats] == ["2g64a", "3g64a", "4g128a", "4g64a"]  # by bytes, not by name
    assert {p: g.tolist() for p, g in widths.grids.items()} == {
        "up": [[0, 1, -1], [2, 2, 2]],
        "down": [[0, 1, -1], [3, 3, 3]],
    }


def test_scores_that_do_not_tell_projections_apart_are_one_picture() -> None:
    s = replace(sample.sensitivity(2, 8, 0), score_I=np.repeat(np.arange(16.0), 3))
    found = senses_of(s, widths_of(sample.precision_map(2, 8, 0)), "")
    assert found.grids[ALL].tolist() == np.arange(16.0).reshape(2, 8).tolist()
    assert "the same for each" in found.shows


def test_standard_errors_are_told() -> None:
    widths = widths_of(sample.precision_map(1, 2, 0))
    s = Sensitivity(
        method="hutchinson",
        linears=tuple(sample.linears(1, 2)),
        formats=sample.FORMATS,
        cost_IF=np.zeros((6, 3)),
        score_I=np.array([1.0, -1, 2, 3, 4, 5]),
        stderr_I=np.ones(6),
    )
    assert "3 of 6 matrices" in senses_of(s, widths, "").notes[0]
    assert "no spread" in senses_of(replace(s, stderr_I=np.full(6, np.inf)), widths, "").notes[0]


def test_what_was_not_measured_is_none_and_nonsense_is_refused() -> None:
    found = read_evaluation({"ppl": 7.5, "kl": None, "top1_agreement": float("nan"), "tokens": "many"})
    assert (found.losses[0].ppl, found.losses[0].kl, found.losses[0].top1, found.losses[0].tokens) == (7.5, *[None] * 3)
    with pytest.raises(TypeError):
        read_evaluation({"by_modality": ["text"]})
    one = read_evaluation({"kl": 1.0, "by_modality": {"text": {"kl": 1.0}}})
    assert [loss.name for loss in one.losses] == ["text"]


# -------------------------------------------------------------------------------------------------- page


def test_page_is_well_formed_and_asks_nobody() -> None:
    page = render([sample.subject("a"), sample.subject("b", seed=1, tied=True), sample.bare("c")])
    found = Page(page)
    assert (found.astray, found.open) == ([], [])
    assert found.count("script") == 2
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|\bsrc=", page)
    assert all(not name.startswith("on") for _, attributes in found.tags for name in attributes)
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {str(a["href"])[1:] for tag, a in found.tags if tag == "a"} <= set(map(str, ids))
    pictures = [a for tag, a in found.tags if tag == "svg"]
    assert len(pictures) > 10
    assert all(a.get("aria-label") for a in pictures)
    assert all(a.get("scope") in ("col", "row") for tag, a in found.tags if tag == "th")


def test_every_text_of_a_file_is_escaped() -> None:
    evaluation = sample.evaluation() | {
        "against": HOSTILE,
        "data": [HOSTILE],
        "tasks": {HOSTILE: {HOSTILE: 1.0, "score": 0.5}},
    }
    evaluation["by_modality"] |= {HOSTILE: evaluation["by_modality"]["text"]}
    senses = sample.subject().senses
    assert senses
    bad = sample.subject(
        HOSTILE,
        source=HOSTILE,
        model_type=HOSTILE,
        recipe=HOSTILE,
        command=HOSTILE,
        notes=(HOSTILE,),
        made=((HOSTILE, ((HOSTILE, HOSTILE),)),),
        parts=(Part("routed expert", 9000, 900, {HOSTILE: 900}), Part(HOSTILE, 90000, 90000)),
        bytes_by_bits={HOSTILE: 1},
        evaluation=read_evaluation(evaluation),
        senses=replace(senses, method=HOSTILE, says=HOSTILE, shows=HOSTILE, notes=(HOSTILE,)),
    )
    drawn = sample.subject(HOSTILE)  # measured like the other, so that the scatter names it
    other = sample.subject("b", seed=1)
    pages = [render([bad]), render([bad, other]), render([drawn, other])]
    for page in pages:
        found = Page(page)
        assert (found.astray, found.open) == ([], [])
        assert found.count("script") == 2
        assert found.count("img") == 0
        assert page is pages[2] or any(a.get("aria-label") == f"{HOSTILE}: 0.500" for _, a in found.tags)
        assert data_of(page)["checkpoints"][0]["name"] == HOSTILE
        assert "{{7*7}}" in found.words  # shown as it is, not worked out


def test_data_block_holds_what_is_drawn() -> None:
    s = sample.subject(layers=3, experts=8)
    assert s.widths
    assert s.senses
    data = data_of(render([s]))["checkpoints"][0]
    for panel, grid_LE in s.widths.grids.items():
        assert [[int(c) for c in row] for row in data["map"][panel]] == grid_LE.tolist()
        assert np.allclose(data["sensitivity"]["values"][panel], s.senses.grids[panel], rtol=1e-3)
    assert data["tokens"]["image"] == s.senses.tokens["image"].tolist()
    assert (data["layers"], data["experts"], data["bytes_weights"]) == ([1, 2, 3], [8, 8, 8], s.bytes_weights)
    assert data["evaluation"]["losses"][0]["kl"] == 0.04


def test_numbers_that_are_not_finite_stay_valid_json() -> None:
    body = sample.evaluation() | {"ppl": float("inf"), "kl_max": float("inf")}
    page = render([sample.subject(evaluation=read_evaluation(body))])
    assert data_of(page)["checkpoints"][0]["evaluation"]["losses"][0]["ppl"] is None
    assert "∞" in Page(page).words


def test_the_same_data_gives_the_same_bytes() -> None:
    assert render([sample.subject("a"), sample.bare()]) == render([sample.subject("a"), sample.bare()])


def test_what_is_missing_is_said_with_its_command() -> None:
    page = Page(render([sample.bare()])).words
    for m in sample.bare().missing.values():
        assert m.line in page
        assert m.command in page
    assert "KL to the original" not in page
    assert "perplexity" not in page.split("How it was made")[0].lower().replace("kl and perplexity", "")


def test_unreached_experts_are_marked_and_explained() -> None:
    page = render([sample.subject()])
    assert "no calibration token reached it" in page
    assert page.count('class="mark"') == 3 + 2  # a sensitivity map each projection, a token map each modality


def test_losses_measured_otherwise_are_not_drawn_together() -> None:
    other = read_evaluation(sample.evaluation(0.02) | {"window": 256})
    subjects = [sample.subject("a"), sample.subject("b", seed=1), sample.subject("odd", seed=2, evaluation=other)]
    page = Page(render(subjects))
    assert "odd was measured otherwise" in page.words
    names = re.findall(r'class="nm [a-z]"[^>]*>([^<]*)<', render(subjects))
    assert names == ["a", "b"] * 4  # bytes against KL, the mean of the tasks, and each of the two tasks
    assert "odd was measured otherwise" not in Page(render(subjects[:2])).words


def test_large_model_stays_small_and_quick() -> None:
    s = sample.subject(layers=48, experts=128)
    started = time.monotonic()
    page = render([s])
    assert time.monotonic() - started < 20  # 0.5 s on an idle core
    assert len(page) < 1_500_000
    assert len(re.findall(r'<svg class="heat"', page)) == 3 + 3 + 2


def test_report_stands_low_and_wakes_no_torch() -> None:
    for path in (SOURCE / "report").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mopeq"):
                assert node.module.startswith(("mopeq.report", "mopeq.nouns", "mopeq.errors")), f"{path}: {node.module}"
    code = "import sys, mopeq.verbs.report, mopeq.report.render; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip() == "False"


# --------------------------------------------------------------------------------------------- gathering


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_vl_moe", "gpt_oss", "deepseek_v2", "mixtral"])
def test_bytes_by_part_add_up(kind: str) -> None:
    out, facts = made.packed(kind)
    found = reporting.gather(out, "x")
    assert sum(p.after or 0 for p in found.parts) == facts["bytes_weights"] == found.bytes_weights == made.payload(out)
    assert sum(p.before or 0 for p in found.parts) == facts["bytes_source"]
    assert found.parts[0].role == "routed expert"
    assert sum(found.parts[0].kinds.values()) == found.parts[0].after
    assert {"codes", "scales", "zero points"} <= set(found.parts[0].kinds)
    for part in (p for p in found.parts[1:] if p.role != "padding"):
        assert part.before == part.after, part  # --other-bits 16 keeps a bf16 source as it is


def test_other_bits_shrink_their_own_parts() -> None:
    out, facts = made.packed("deepseek_v2", other_bits=8)
    found = {p.role: p for p in reporting.gather(out, "x").parts}
    assert sum(p.after or 0 for p in found.values()) == facts["bytes_weights"]
    assert found["router"].after == found["router"].before
    assert (found["attention"].after or 0) < 0.7 * (found["attention"].before or 0)
    assert set(found) == {p.role for p in reporting.gather(made.packed("deepseek_v2")[0], "x").parts}


def test_gathers_map_and_sensitivity_of_a_real_checkpoint(tmp_path: Path) -> None:
    from mopeq.packed import read_map
    from mopeq.rundir import read_sensitivity

    out, _ = made.packed("olmoe")
    found = reporting.gather(out, "x")
    assert found.widths
    assert found.senses
    map_ = read_map(out)
    for linear, fmt in map_.formats.items():
        grid = found.widths.grids.get(linear.projection, found.widths.grids.get(ALL))
        assert grid is not None
        assert found.widths.formats[grid[found.widths.layers.index(linear.layer), linear.expert]] == fmt
    saved = read_sensitivity(next((out / ".mopeq" / "sensitivity").glob("*.npz")))
    assert found.senses.method == saved.method == "hessian"
    if ALL in found.senses.grids:
        assert saved.score_I is not None
        assert found.senses.grids[ALL].sum() == pytest.approx(saved.score_I.sum())
    assert set(found.missing) == {"tokens", "evaluation"}
    result = reporting.write([out], tmp_path / "r.html")
    assert result == {
        "output": str(tmp_path / "r.html"),
        "checkpoints": 1,
        "bytes": (tmp_path / "r.html").stat().st_size,
    }
    assert reporting.write([out], tmp_path / "again.html")["bytes"] == result["bytes"]
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "r.html").read_bytes()


def test_the_commands_it_prints_work(tmp_path: Path) -> None:
    from mopeq.cli import run_command

    def run(command: str, **words: str) -> int:
        parts = [words.get(word, word) for word in shlex.split(command)]
        assert parts[0] == "mopeq"
        return run_command(parts[1:], debug=True)

    out, _ = made.packed("olmoe", avg_bits=2.5, per="projection")
    spoilt = made.copy(out, tmp_path / "out")
    text = made.tiny.write_text(tmp_path / "text.txt")
    found = reporting.gather(spoilt, "x")
    assert run(found.command.replace(str(spoilt), str(tmp_path / "again"))) == 0
    assert made.digests(tmp_path / "again") == made.digests(out)
    assert run(found.missing["tokens"].command, NEW=str(tmp_path / "new")) == 0
    counted = reporting.gather(tmp_path / "new", "x")
    assert counted.senses
    assert counted.senses.method == "frequency"
    assert int(counted.senses.tokens["text"].sum()) > 0
    assert "tokens" not in counted.missing
    assert run(found.missing["evaluation"].command, DATA=str(text)) == 0
    measured = reporting.gather(spoilt, "x")
    assert measured.evaluation
    assert measured.evaluation.losses[0].kl is not None
    assert set(measured.missing) == {"tokens", "tasks"}
    assert "was not evaluated" in found.missing["evaluation"].line


def test_a_uniform_checkpoint_has_no_sensitivity_and_says_so() -> None:
    out, _ = made.packed("olmoe", allocate="uniform", avg_bits=3)
    found = reporting.gather(out, "x")
    assert found.senses is None
    assert "--allocate uniform asks for none" in found.missing["sensitivity"].line
    assert "--allocate knapsack" in found.missing["sensitivity"].command


def test_losses_of_another_checkpoint_are_said(tmp_path: Path, capsys: Any) -> None:
    """A folder made anew, or a map swapped, keeps the old measurement beside it."""
    from mopeq.packed import content_digest
    from mopeq.verbs.evaluate import evaluate

    out = made.copy(made.packed("olmoe")[0], tmp_path / "out")
    text = made.tiny.write_text(tmp_path / "text.txt", lines=1)
    measured = evaluate(out, data=[text], window=64, limit=1)
    assert measured["digest"] == content_digest(out)
    assert json.loads((out / ".mopeq" / "eval.json").read_text())["digest"] == content_digest(out)
    assert not any("another checkpoint" in note for note in reporting.gather(out, "x").notes)
    other = made.copy(made.packed("olmoe", avg_bits=2)[0], tmp_path / "other")
    (out / ".mopeq" / "eval.json").rename(other / ".mopeq" / "eval.json")
    capsys.readouterr()
    found = reporting.gather(other, "x")
    (note,) = [note for note in found.notes if "another checkpoint" in note]
    assert content_digest(out) in note and content_digest(other) in note and note in capsys.readouterr().err
    assert note in Page(render([found])).words


def test_two_checkpoints_are_compared_item_by_item_without_running_again(tmp_path: Path) -> None:
    from mopeq.verbs.evaluate import evaluate

    folder, text = made.source("olmoe"), made.tiny.write_text(tmp_path / "text.txt", lines=12)
    outs = [made.copy(made.packed("olmoe", avg_bits=b)[0], tmp_path / f"b{b}") for b in (2, 4)]
    results = [evaluate(out, against=folder, data=[text], window=32) for out in outs]
    (found,) = contrasting.contrasts({"two": outs[0], "four": outs[1]})
    assert (found.name, found.against, found.note) == ("four", "two", "")
    rows = {what: (less, change) for what, _, less, change in found.rows}
    assert list(rows) == ["KL", "perplexity"]
    less, change = rows["KL"]
    assert less
    assert change.mean == pytest.approx(results[1]["kl"] - results[0]["kl"], rel=1e-6)
    assert change.low < change.mean < change.high < 0
    assert change.n == results[0]["rows"]
    assert rows["perplexity"][1].mean == pytest.approx(results[1]["ppl"] / results[0]["ppl"] - 1, rel=1e-6)
    reporting.write(outs, tmp_path / "r.html")
    words = Page((tmp_path / "r.html").read_text()).words
    assert "b4 against b2, item by item" in words and "better" in words
    evaluate(outs[1], against=folder, data=[text], window=16)  # now other windows
    (found,) = contrasting.contrasts({"two": outs[0], "four": outs[1]})
    assert found.rows == () and "not measured on the same items" in found.note
    (outs[1] / ".mopeq" / "eval_items.json").write_text('{"digest": "another"}')
    assert contrasting.contrasts({"two": outs[0], "four": outs[1]}) == []
    assert contrasting.contrasts({"two": outs[0]}) == [] == contrasting.contrasts({})


def test_tasks_are_compared_only_over_the_same_items() -> None:
    def kept(scores: list[float], first: int = 0) -> dict[str, Any]:
        answers = [{"task": "chart", "index": str(first + n), "source": "t:1"} for n in range(len(scores))]
        return {"rows": [], "answers": answers, "units": {"chart": scores}}

    a, b = kept([1.0, 0.0, 0.0, 1.0, 0.0]), kept([1.0, 1.0, 0.0, 1.0, 1.0])
    ((what, unit, less, change),) = contrasting.task_changes(b, a)
    assert (what, unit, less, change.mean, change.n) == ("chart", "score", False, pytest.approx(0.4), 5)
    assert change.low <= 0.4 <= change.high
    assert list(contrasting.task_changes(b, kept([1.0] * 5, first=3))) == []
    assert list(contrasting.task_changes(b, kept([1.0] * 4))) == []
    with pytest.raises(BadInput, match="cannot be read"):
        contrasting.contrast("b", {"rows": [{}]}, "a", {"rows": [{}]})


def test_bytes_are_drawn_against_every_task_with_baselines_marked() -> None:
    def told(low: float, high: float) -> Any:
        tasks = {"chart": {"score": low, "n": 40, "ci95": [low - 0.1, low + 0.1], "original": 0.9}}
        return read_evaluation(sample.evaluation() | {"tasks": tasks | {"yesno": {"score": high, "n": 10}}})

    subjects = [
        sample.subject("flat2", uniform=True, evaluation=told(0.3, 0.6)),
        sample.subject("mixed", seed=1, evaluation=told(0.7, 0.5)),
        sample.subject("flat3", seed=2, uniform=True, evaluation=told(0.6, 0.9)),
    ]
    page = render(subjects)
    charts_ = re.findall(r'<svg class="scatter".*?</svg>', page, re.DOTALL)
    assert len(charts_) == 1 + 1 + 2  # KL, the mean, each task
    assert [len(re.findall(r'<rect class="dot', c)) for c in charts_] == [2, 2, 2, 2]  # squares
    filled = [re.findall(r'<(rect|circle) class="dot" [^>]*/?>(?:</rect>)?<text[^>]*>([^<]*)<', c) for c in charts_]
    assert [[name for _, name in row] for row in filled[2:]] == [["flat2", "mixed"], ["flat2", "flat3"]]
    assert "original" in charts_[2] and "original" not in charts_[3]
    assert 'class="flat"' in charts_[0] and "Squares are checkpoints of one width" in page
    assert "Squares" not in render([sample.subject("a"), sample.subject("b", seed=1)])


# ---------------------------------------------------------------------------------- sensitivity against frequency


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=30), st.integers(0, 2**32 - 1))
def test_rank_correlation_is_spearmans(values: list[int], seed: int) -> None:
    a, b = np.array(values, dtype=float), np.random.default_rng(seed).integers(0, 6, len(values)).astype(float)
    found = rank_correlation(a, b)
    if len(set(values)) == 1 or len(set(b.tolist())) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert rank_correlation(np.append(a, np.nan), np.append(b, 3.0)) == pytest.approx(found, nan_ok=True)


def test_the_hybrid_of_the_study_is_the_sensors() -> None:
    from mopeq.sense.hybrid import minmax

    rng = np.random.default_rng(0)
    a, b = rng.random((3, 8)), rng.integers(0, 90, (3, 8)).astype(float)
    wanted = [x * y for x, y in zip(minmax(list(a), "model"), minmax(list(b), "model"), strict=True)]
    assert np.array_equal(minmax_product(a, b), np.array(wanted))


def test_sensitivity_against_frequency_and_measured_losses(tmp_path: Path) -> None:
    """Two methods of one run directory; then the losses of single experts, measured by the benchmark."""
    import importlib.util

    from made import quantize

    text = made.tiny.write_text(tmp_path / "text.txt", lines=20)
    shared: dict[str, Any] = {"avg_bits": 2.5, "calib": (text,), "calib_tokens": 256, "run": str(tmp_path / "run")}
    for method in ("hessian", "fisher"):
        quantize(made.source("olmoe"), tmp_path / method, sensitivity=method, **shared)
    found = reporting.gather(tmp_path / "fisher", "x").study
    assert found and found.measured is None
    others = {o.name: o for o in found.others}
    assert set(others) == {"frequency", "hessian", "hybrid"}  # text alone: no apart
    assert found.value_LE.shape == found.tokens_LE.shape
    assert others["hessian"].rank_L == tuple(
        rank_correlation(*pair)
        for pair in zip(found.value_LE, reporting_grid(tmp_path / "run", "hessian"), strict=True)
    )
    assert all(o.changed is not None and 0 <= o.changed <= found.matrices for o in found.others)
    assert any(o.changed for o in found.others)
    hessian = reporting.gather(tmp_path / "hessian", "x").study  # counts no tokens itself: fisher's are taken
    assert hessian
    assert np.array_equal(hessian.tokens_LE, found.tokens_LE)

    path = SOURCE.parents[1] / "bench" / "one_in.py"
    spec = importlib.util.spec_from_file_location("one_in", path)
    assert spec and spec.loader
    one_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one_in)
    body = one_in.measure(tmp_path / "fisher", [text], experts=8, limit=2, window=32, seed=0, on="cpu")
    assert len(body["rows"]) == len({(r["layer"], r["expert"]) for r in body["rows"]}) >= 6
    assert all(r["kl"] > 0 for r in body["rows"])
    (tmp_path / "fisher" / ".mopeq" / "one_in.json").write_bytes(json_bytes(body))
    subject = reporting.gather(tmp_path / "fisher", "x")
    assert subject.study and subject.study.measured == (len(body["rows"]), "2g64a")
    assert subject.study.own is not None
    page = render([subject])
    assert (Page(page).open, Page(page).astray) == ([], [])
    assert "storing one expert alone at 2g64a" in page
    assert set(data_of(page)["checkpoints"][0]["study"]) == set(others)
    (tmp_path / "fisher" / ".mopeq" / "one_in.json").write_text('{"rows": [{}]}')
    with pytest.raises(BadInput, match="one_in.json cannot be read"):
        reporting.gather(tmp_path / "fisher", "x")


def reporting_grid(run: Path, method: str) -> np.ndarray:
    """[L, E] of a saved method's scores, summed over projections, by a loop."""
    s = next(s for s in reporting.saved_sensitivities(run) if s.method == method)
    assert s.score_I is not None
    layers = sorted({i.layer for i in s.linears})
    grid_LE = np.zeros((len(layers), 1 + max(i.expert for i in s.linears)))
    for linear, score in zip(s.linears, s.score_I, strict=True):
        grid_LE[layers.index(linear.layer), linear.expert] += score
    return grid_LE


def test_a_report_says_no_path_of_the_source(tmp_path: Path, monkeypatch: Any) -> None:
    out, _ = made.packed("olmoe")
    folder = made.source("olmoe")
    monkeypatch.chdir(folder.parent)
    found = reporting.gather(out, "x")
    assert found.source == folder.name and f"quantize {folder.name} " in found.command
    assert str(folder) not in render([replace(found, command="", missing={})])
    for told, shown in (("/a/b/model", "b/model"), ("org/name", "org/name"), ("/model", "/model"), ("x/y/z", "x/y/z")):
        assert dict(read_evaluation({"against": told}).setting)["against"] == shown


def test_other_budgets_are_solved_from_what_the_allocator_sees(tmp_path: Path) -> None:
    """Costs to the last bit, and all the bytes there are."""
    from mopeq.deciding import item_costs
    from mopeq.verbs.map import job_of, run_of, saved_sensitivity

    for options in ({"per": "projection"}, {"per": "expert", "other_bits": 8}):
        out, facts = made.packed("qwen3_vl_moe", avg_bits=2.5, **options)
        found = reporting.gather(out, "x")
        assert found.explorer
        run = json.loads((out / "mopeq_run.json").read_text())
        job = job_of(run, None, None)
        sensitivity = saved_sensitivity(run_of(out, run), run, job)
        assert sensitivity
        data = data_of(render([found]))["checkpoints"][0]["explorer"]
        kind = {"float32": "<f4", "float64": "<f8"}[data["costs"]["type"]]
        costs = np.frombuffer(base64.b64decode(data["costs"]["data"]), kind).astype(np.float64)
        assert np.array_equal(costs, item_costs(job.problem, sensitivity).ravel())
        assert sum(n for _, n in data["other"]) == job.fixed
        assert data["start"] == facts["bytes_weights"]
        assert found.explorer.panels == (("gate", "up", "down") if options["per"] == "projection" else (ALL,))


def test_why_no_other_budget_can_be_tried_is_said(tmp_path: Path) -> None:
    out, _ = made.packed("olmoe", avg_bits=2.5)
    assert reporting.gather(out, "x").explorer
    moved = made.copy(out, tmp_path / "out")
    run = json.loads((moved / "mopeq_run.json").read_text())
    (moved / "mopeq_run.json").write_bytes(json_bytes(run | {"source": str(tmp_path / "gone")}))
    write_manifest(moved)
    found = reporting.gather(moved, "x")
    assert found.explorer is None
    assert "the source is no longer where it was" in found.missing["explorer"].line
    page = render([found])
    assert "Other budgets cannot be tried here" in page
    assert "MopeqSolver" not in page
    assert "MopeqSolver" in render([reporting.gather(out, "x")])
    for options in ({"allocate": "uniform", "avg_bits": 3}, {"allocate": "kmeans"}):
        assert reporting.gather(made.packed("olmoe", **options)[0], "x").explorer is None


def test_a_lost_run_directory_is_said(tmp_path: Path) -> None:
    import shutil

    out = made.copy(made.packed("olmoe")[0], tmp_path / "out")
    shutil.rmtree(out / ".mopeq")
    found = reporting.gather(out, "x")
    assert set(found.missing) == {"sizes", "sensitivity", "evaluation"}
    assert sum(p.after or 0 for p in found.parts) == found.bytes_weights
    assert all(p.before is None for p in found.parts)
    assert Page(render([found])).open == []


def test_a_run_directory_by_itself(tmp_path: Path) -> None:
    out, facts = made.packed("olmoe")
    found = reporting.gather(out / ".mopeq", "x")
    assert not found.finished
    assert found.bytes_weights == facts["predicted_bytes"]
    assert found.widths
    assert found.senses
    assert "checkpoint" in found.missing
    page = Page(render([found]))
    assert (page.open, page.astray) == ([], [])
    assert "weights, planned" in page.words


def test_names_are_as_short_as_they_may_be(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/out", "b/out", "b/other")]
    assert reporting.short_names(paths[1:]) == ["out", "other"]
    assert reporting.short_names(paths) == ["a/out", "b/out", "b/other"]
    assert reporting.short_names([tmp_path / "x/.mopeq"]) == ["x/.mopeq"]


def test_hostile_checkpoint_files(tmp_path: Path) -> None:
    out = made.copy(made.packed("olmoe")[0], tmp_path / "<img src=x onerror=alert(1)>")
    facts = json.loads((out / "mopeq_run.json").read_text())
    facts["options"] |= {"method": HOSTILE, HOSTILE: HOSTILE, "per": [HOSTILE]}
    facts["result"] |= {"notes": [HOSTILE, 3], "seconds": "long", "bytes_source": HOSTILE, "avg_expert_bits": None}
    facts |= {"versions": {HOSTILE: HOSTILE}, "finished": {"a": 1}, "calibration": [], "source": f"/x/{HOSTILE}"}
    (out / "mopeq_run.json").write_bytes(json_bytes(facts))
    write_manifest(out)
    (out / ".mopeq" / "eval.json").write_bytes(json_bytes({"kl": HOSTILE, "tasks": {HOSTILE: {"score": HOSTILE}}}))
    reporting.write([out], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert (page.astray, page.open, page.count("script"), page.count("img")) == ([], [], 2, 0)


# ------------------------------------------------------------------------- the benchmark's picture, of the same parts


BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(scope="module")
def accuracy() -> Any:
    spec = importlib.util.spec_from_file_location("accuracy", BENCH / "accuracy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmarks_picture(accuracy: Any) -> None:
    """A panel a quantizer; every mean where its axes say, lower the less is lost; a bar where seeds differ."""
    rows = [
        {
            "arm": arm,
            "average": bits,
            "method": method,
            "seed": seed,
            "bytes": int(bits * 2**20),
            "kl": loss + seed / 99,
        }
        for method in ("gptq", "<rtn>")
        for arm, bits, loss in (("uniform", 2.0, 0.5), ("uniform", 3.0, 0.1), ("a", 2.5, 0.3), ("b", 2.5, 0.2))
        for seed in (0, 1)
    ]
    rows.append({"arm": "kmeans", "average": None, "method": "gptq", "bytes": 2**21, "kl": 0.4})
    root = ElementTree.fromstring(accuracy.picture(rows))
    svg = "{http://www.w3.org/2000/svg}"
    first, second = root.findall(f"{svg}g")
    words = [t.text for t in first.iter(f"{svg}text")]
    assert words[0] == "gptq" and next(t.text for t in second.iter(f"{svg}text")) == "<rtn>"
    assert words[-4:] == ["uniform", "kmeans", "a", "b"]
    at = [
        (float(c.get("cx")), float(c.get("cy"))) for c in first.iter(f"{svg}circle")
    ]  # kmeans, a, b; 2 of each legend
    (kx, ky), (ax, ay), (bx, by) = at[0], at[3], at[6]
    assert kx < ax == bx and ky < ay < by
    assert len(list(first.iter(f"{svg}rect"))) == 4
    rows.append(rows[-1] | {"arm": "fisher, projection, kmeans' bytes"})
    words = list(ElementTree.fromstring(accuracy.picture(rows)).iter(f"{svg}text"))
    ends = {t.text: float(t.get("x")) + 6.6 * len(t.text) for t in words if t.get("x")}
    assert 780 < ends["fisher, projection, kmeans' bytes"] < 800 > ends["uniform"]


def test_arms_are_asked_for_by_name(accuracy: Any) -> None:
    def asked(only: str) -> set[str]:
        args = argparse.Namespace(averages="2.25,3.0", only=only, fit="")
        return {name for _, name, _ in accuracy.asked_arms(args)}

    assert asked("fisher, projection;uniform") == {"fisher, projection", "uniform"}
    assert asked("fisher-seq") == {"fisher-seq, expert", "fisher-seq, projection"}
    assert len(asked("")) > 15


def test_arms_at_another_tools_bytes(accuracy: Any, capsys: Any) -> None:
    args = argparse.Namespace(averages="", only="fisher, projection", fit="900,1000")
    options = {"sensitivity": "fisher", "per": "projection"}
    assert accuracy.asked_arms(args) == [(None, "fisher, projection", options | {"fit": b}) for b in (900, 1000)]
    common = {"arm": "a", "average": None, "method": "gptq", "seed": 0, "code_bits": 2.0}
    rows = [common | {"fit": b, "bytes": b, "kl": b / 1e4} for b in (900, 1000)]
    accuracy.tables(rows)
    printed = capsys.readouterr().out
    assert "| a | 900 | 2.000 | 0.0900 |" in printed and "| a | 1,000 | 2.000 | 0.1000 |" in printed
    assert [(x, y) for x, y, *_ in accuracy.arm_points(rows, 1)["a"]] == [(900, 0.09), (1000, 0.1)]


def test_tables_show_two_digits_of_the_least_loss(accuracy: Any, capsys: Any) -> None:
    common = {"arm": "a", "average": 2.5, "method": "gptq", "bytes": 9, "code_bits": 2.5, "ppl": 9.0}
    accuracy.tables([common | {"seed": seed, "kl": kl} for seed, kl in enumerate((0.00074, 0.00078))])
    assert "| a | 0.00076 ± 0.00002 |" in capsys.readouterr().out
    assert [accuracy.digits([{"kl": kl}]) for kl in (0.3, 0.0011, 0.00099, 0.0)] == [4, 4, 5, 4]


def test_refusals(tmp_path: Path) -> None:
    out = made.copy(made.packed("olmoe")[0], tmp_path / "out")
    target = tmp_path / "r.html"
    cases: list[tuple[list[Path], Path, str]] = [
        ([], target, "no checkpoint"),
        ([out, tmp_path / "out" / ".." / "out"], target, "given twice"),
        ([out], tmp_path, "is a folder"),
        ([tmp_path / "nowhere"], target, "is no folder"),
        ([tmp_path], target, "neither a packed checkpoint nor a run directory"),
        ([made.source("olmoe")], target, "no finished mopeq checkpoint"),
    ]
    for paths, output, line in cases:
        with pytest.raises(BadInput, match=line):
            reporting.write(paths, output)
    (out / ".mopeq" / "eval.json").write_text('{"tasks": []}')
    reporting.write([out], target)  # an empty list of tasks is none
    (out / ".mopeq" / "eval.json").write_text('{"tasks": {"a": 3}}')
    with pytest.raises(BadInput, match=r"eval\.json cannot be read"):
        reporting.write([out], target)
    (out / MANIFEST).unlink()
    with pytest.raises(BadInput, match="no finished mopeq checkpoint"):
        reporting.write([out], target)
