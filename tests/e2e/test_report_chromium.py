"""The report in a real browser: opens from disk, asks nobody, fits every width, is read by pointer and by keys."""

from __future__ import annotations

import io
import re
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import report_sample as sample
from chromium import Chromium, find_chromium
from PIL import Image

from mopeq.report.render import render

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="needs chromium (apt-get install chromium)")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as page:
        yield page


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, one of them neither sensed nor evaluated."""
    path = tmp_path_factory.mktemp("report") / "r.html"
    subjects = [sample.subject("first"), sample.subject("second", seed=1, tied=True), sample.bare("third")]
    path.write_text(render(subjects), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Chromium, report: Path) -> Chromium:
    browser.window(1280, 900)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(report)
    return browser


def picture(browser: Chromium, path: Path) -> np.ndarray:
    browser.screenshot(path)
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"), dtype=np.float64)


def test_opens_from_disk_quietly(page: Chromium, report: Path) -> None:
    assert page.requests == [report.resolve().as_uri()]
    assert page.complaints == []
    assert page.evaluate("document.title") == "3 checkpoints compared · mopeq report"
    assert page.evaluate("document.querySelectorAll('.map svg').length") == (3 + 3 + 2) + (1 + 1 + 2) + 3


@pytest.mark.parametrize("width", [360, 390, 768, 1280, 1920])
def test_no_sideways_scrolling_at_any_width(page: Chromium, width: int) -> None:
    page.window(width, 800)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, .map') &&"
        " e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


def test_the_pointer_reads_the_cell_below_it(page: Chromium) -> None:
    data = page.evaluate("JSON.parse(document.getElementById('mopeq-data').textContent).checkpoints[0]")
    row, column = 2, 5
    x, y = page.evaluate(
        "(() => { const svg = document.querySelector('#c1 .map svg'); svg.scrollIntoView({block: 'center'});"
        " const b = svg.getBoundingClientRect(), k = b.width / svg.viewBox.baseVal.width, d = svg.dataset;"
        f" return [b.left + k * (+d.x + {column + 0.5} * d.w), b.top + k * (+d.y + {row + 0.5} * d.h)]; }})()"
    )
    page.point(x, y)
    said = page.evaluate("document.querySelector('#c1 .read').textContent")
    assert said.startswith("layer 3, expert 5 ·")
    for panel in ("gate", "up", "down"):
        assert f"{panel} {data['formats'][int(data['map'][panel][row][column])]}" in said
        shown = re.search(rf"sensitivity.*?{panel} ([-\d.e]+)", said)
        assert shown
        assert float(shown[1]) == pytest.approx(data["sensitivity"]["values"][panel][row][column], rel=1e-3)
    assert f"{data['tokens']['image'][row][column]} image tokens" in said
    cursors = "[...document.querySelectorAll('{} .cur')].map(c => c.getAttribute('visibility'))"
    assert set(page.evaluate(cursors.format("#c1"))) == {"visible"}  # the same cell in every map of this checkpoint
    assert set(page.evaluate(cursors.format("#c2"))) == {"hidden"}
    page.point(1, 1)
    assert set(page.evaluate(cursors.format("#c1"))) == {"hidden"}


def test_keys_walk_the_map(page: Chromium) -> None:
    page.evaluate("document.querySelector('#c2 .map').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown"):
        page.press(key)
    assert page.evaluate("document.querySelector('#c2 .read').textContent").startswith("layer 2, expert 1 ·")
    for _ in range(12):
        page.press("ArrowDown")
        page.press("ArrowRight")
    assert page.evaluate("document.querySelector('#c2 .read').textContent").startswith("layer 3, expert 7 ·")


def test_everything_can_be_reached_and_has_a_name(page: Chromium) -> None:
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    seen = [n for n in tree if not n.get("ignored")]
    roles = [n["role"]["value"] for n in seen]
    assert roles.count("main") == 1
    assert {"table", "columnheader", "rowheader", "heading", "navigation", "article"} <= set(roles)
    for n in seen:
        if n["role"]["value"] in ("image", "img", "link", "region", "article"):
            assert n.get("name", {}).get("value"), n
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_dark_and_light(page: Chromium, tmp_path: Path) -> None:
    light = picture(page, tmp_path / "light.png")
    page.window(1280, 900, dark=True)
    dark = picture(page, tmp_path / "dark.png")
    assert np.median(light) > 230
    assert np.median(dark) < 40
    assert page.evaluate(CONTRAST)[0] >= 4.5, page.evaluate(CONTRAST)
    page.window(1280, 900)
    assert page.evaluate(CONTRAST)[0] >= 4.5, page.evaluate(CONTRAST)


CONTRAST = """(() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const page = light(getComputedStyle(document.body).backgroundColor);
  let least = [99, ""];
  for (const e of document.querySelectorAll("main *:not(title), header *, footer *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), text = e.closest("svg");
    if (text && e.parentNode.classList.contains("dg")) continue;  // on its cell, not on the page; tested by its shade
    if (text && /^[wk]\\d+i$/.test(e.getAttribute("class"))) continue;
    let back = page;
    for (let p = e; p; p = p.parentElement) {
      const c = getComputedStyle(p).backgroundColor;
      if (!/, 0\\)$/.test(c)) { back = light(c); break; }
    }
    const front = light(text ? style.fill : style.color), [a, b] = [front, back].sort((x, y) => x - y);
    const found = (b + 0.05) / (a + 0.05);
    if (found < least[0]) least = [found, e.outerHTML.slice(0, 120)];
  }
  return least;
})()"""


def test_prints_to_paper(page: Chromium, tmp_path: Path) -> None:
    page.window(1280, 900, dark=True)  # paper is white whatever the screen is
    page.pdf(tmp_path / "r.pdf")
    raw = (tmp_path / "r.pdf").read_bytes()
    assert raw.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", raw)) <= 16
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.read')).display") == "none"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()") == "#1b1e24"
    page.call("Emulation.setEmulatedMedia", media="")


def test_hostile_names_run_nothing(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text(render([sample.subject(HOSTILE, source=HOSTILE), sample.subject("b", seed=1)]), encoding="utf-8")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(path)
    assert browser.evaluate("document.title") == "2 checkpoints compared · mopeq report"
    assert browser.evaluate("document.images.length") == 0
    assert browser.evaluate("document.querySelector('article h2').textContent") == HOSTILE
    assert browser.requests == [path.resolve().as_uri()]
    # and what slipped through would not run: the page's policy knows one script by its hash
    script = "Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'})"
    browser.evaluate(f"document.body.append({script})")
    assert browser.evaluate("window.ran === undefined")


def test_a_large_model_opens_and_follows_the_pointer(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(render([sample.subject(layers=48, experts=128)]), encoding="utf-8")
    browser.window(1280, 900)
    browser.complaints.clear()
    started = time.monotonic()
    browser.open(path)
    assert time.monotonic() - started < 30  # 1 s on an idle core
    move = browser.evaluate(
        "(() => { const svg = document.querySelector('.map svg'), b = svg.getBoundingClientRect();"
        " const t = performance.now();"
        " for (let i = 0; i < 50; i++) svg.dispatchEvent(new PointerEvent('pointermove',"
        "  {clientX: b.left + 60 + 15 * i, clientY: b.top + 60 + 5 * i}));"
        " return (performance.now() - t) / 50; })()"
    )
    assert move < 50  # ms a move, the script's part; 1 ms on an idle core
    assert browser.complaints == []


def test_the_command_line_of_the_docs_takes_a_picture(report: Path, tmp_path: Path) -> None:
    """docs/report.md says how docs/report.png is made: the command there works."""
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    found = re.search(r"^chromium ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert found
    words = found[1].replace("\\\n", " ").replace("docs/report.png", str(tmp_path / "p.png")).split()
    program = find_chromium()
    assert program
    command = [program, *words[:-1], report.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert Image.open(tmp_path / "p.png").size[0] == 1280
