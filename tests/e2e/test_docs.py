"""Every command shown in the README and in docs/: run as it stands, or, where that takes a server, a GPU, a registry or
an hour, held to what the program knows: its verbs and options, make's words, files, extras.

Pages name their folders MODEL, OUT, packed, …; the tests lay such folders down, so nothing is replaced in a command.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import made
import pytest
import typer
from shared_files import shared
from vlmeval_kit import write_table

from mopeq.cli import app, run_command
from mopeq.embedded import heldout_text, model_dir
from mopeq.embedded.world import evaluation_tsv, items
from mopeq.progress import silence

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
PROGRAMS = ("mopeq", "make", "python", "pip", "vllm", "chromium", "mkdocs")
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LIGHT = ("plan", "map", "verify", "report")  # verbs that take a moment
NOT_RUN = ("serve",)  # runs until it is stopped: tests/e2e/test_vllm.py and test_transformers.py drive it
ELLIPSIS = ("…", "...")


@dataclass(frozen=True)
class Command:
    """A command as a page shows it; `output` is what the page says it prints; fenced: a block of its own, so whole."""

    page: str
    line: str
    output: tuple[str, ...] = ()
    fenced: bool = True

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands(page: Path) -> Iterator[Command]:
    """A page's commands: in fenced and indented blocks, and in the running text between backticks."""
    name, text = str(page.relative_to(ROOT)), re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    fence = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
    for language, block in fence.findall(text):
        if language in ("", "sh", "bash", "console"):
            yield from of_block(name, block)
    rest = fence.sub("", text)
    for line in re.findall(r"^    (\S.*)$", rest, re.MULTILINE):
        if line.split()[0] in PROGRAMS:
            yield Command(name, line)
    for line in re.findall(r"`([^`\n]+)`", rest):
        if line.split()[0:1] and line.split()[0] in PROGRAMS and " " in line.strip():
            yield Command(name, line, fenced=False)


def of_block(page: str, block: str) -> Iterator[Command]:
    """The lines after `$ ` and what stands below each; in a block without any, the lines that begin with a program."""
    lines = block.splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    at = [n for n, line in enumerate(lines) if (line[:2] == "$ " if prompted else first_word(line) in PROGRAMS)]
    for number, start in enumerate(at):
        below = lines[start + 1 : at[number + 1] if number + 1 < len(at) else len(lines)] if prompted else []
        output = tuple(line for line in below if line.strip())
        yield Command(page, lines[start].removeprefix("$ ").strip(), output)


def first_word(line: str) -> str:
    return (line.split() or [""])[0]


SHOWN = [command for page in PAGES for command in commands(page)]


def named(command: Command) -> str:
    return f"{command.page}: {command.line[:60]}"


def test_the_pages_show_commands_of_every_kind() -> None:
    programs = [first_word(command.line) for command in SHOWN]
    assert programs.count("mopeq") >= 60
    assert {"make", "python", "pip", "vllm", "chromium"} <= set(programs)
    shown = {command.words[1] for command in SHOWN if first_word(command.line) == "mopeq" and command.fenced}
    assert shown >= set(VERBS)  # each verb is shown at work


# --------------------------------------------------------------------------------------------- held to what is known


@pytest.mark.parametrize("command", [c for c in SHOWN if first_word(c.line) == "mopeq"], ids=named)
def test_every_mopeq_command_parses(command: Command) -> None:
    words = [word for word in command.words[1:] if word not in ELLIPSIS]
    while words and words[0].startswith("--"):  # --debug, --version, --help stand before the verb
        assert words.pop(0) in ("--debug", "--version", "--help")
    if not words or words[0] == "VERB":
        return
    assert words[0] in VERBS, command
    verb = VERBS[words[0]]
    options = {word for param in verb.params for word in param.opts if word.startswith("-")} | {"--help"}
    passed_on = verb.context_settings.get("ignore_unknown_options", False)
    for word in words[1:]:
        assert not word.startswith("--") or passed_on or word.partition("=")[0] in options, (command, word)
    if command.fenced:  # whole: types and the number of arguments too
        verb.make_context(words[0], given(words[1:]))


def given(words: list[str]) -> list[str]:
    """What a command is given: without a redirection, and `OUT…` as one OUT."""
    kept = words[: words.index(">")] if ">" in words else words
    return [word.rstrip(".…") if word.endswith(ELLIPSIS) else word for word in kept]


@pytest.mark.parametrize("command", [c for c in SHOWN if first_word(c.line) != "mopeq"], ids=named)
def test_every_other_command_names_what_exists(command: Command) -> None:
    program, *words = command.words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
        assert words[0] in phony.split()
    elif program == "python" and words[0] == "-c":
        compile(words[1], "docs", "exec")
    elif program == "python" and words[0] != "-m":
        script = ROOT / words[0]
        assert script.is_file(), command
        source = script.read_text(encoding="utf-8")
        for word in words[1:]:
            assert not word.startswith("--") or f'"{word}"' in source, (command, word)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for group in re.findall(r"(?:mopeq|\.)\[([\w,-]+)\]", command.line):
            assert set(group.split(",")) <= set(extras)
    elif program == "vllm":
        assert words[0] == "serve"


# --------------------------------------------------------------------------------------------------- run as they stand


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and files that pages name, small."""
    room = tmp_path_factory.mktemp("pages")
    (room / "MODEL").symlink_to(model_dir())
    olmoe(room / "OLMoE-1B-7B")
    with silence():
        made.quantize(model_dir(), room / "packed", avg_bits=2.5)
    for name in ("OUT", "uniform", "UNIFORM"):
        made.copy(room / "packed", room / name)
    (room / "RUN").symlink_to(room / "packed" / ".mopeq")
    return room


def olmoe(folder: Path) -> None:
    """A checkpoint with the headers of OLMoE-1B-7B and holes for weights: its file takes no room on the disk."""
    hidden, inner, layers, experts, vocab = 2048, 1024, 16, 64, 50304
    shapes: dict[str, list[int]] = {f"{name}.weight": [vocab, hidden] for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = [hidden]
    for n in range(layers):
        stem = f"model.layers.{n}"
        shapes |= {f"{stem}.self_attn.{p}_proj.weight": [hidden, hidden] for p in "qkvo"}
        shapes |= {f"{stem}.self_attn.{p}_norm.weight": [hidden] for p in "qk"}
        shapes |= {f"{stem}.{p}_layernorm.weight": [hidden] for p in ("input", "post_attention")}
        shapes[f"{stem}.mlp.gate.weight"] = [experts, hidden]
        for e in range(experts):
            shapes |= {f"{stem}.mlp.experts.{e}.{p}_proj.weight": [inner, hidden] for p in ("gate", "up")}
            shapes[f"{stem}.mlp.experts.{e}.down_proj.weight"] = [hidden, inner]
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    config = {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": hidden}
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_experts_per_tok": 8}
    (folder / "config.json").write_text(json.dumps(config))


def light(command: Command) -> bool:
    """Whether it is run in the normal suite: a moment's work, and no shell needed."""
    words = command.words
    return words[0] == "mopeq" and command.fenced and words[1] in LIGHT and not {">", "$MODEL"} & set(words)


@pytest.mark.parametrize("command", [c for c in SHOWN if light(c)], ids=named)
def test_light_commands_run(command: Command, place: Path, monkeypatch: Any, capfd: Any) -> None:
    """In a folder that has what they name; of the README's sizes every line printed is the one shown."""
    monkeypatch.chdir(place)
    words = given(command.words[1:])
    code = run_command(words, False)
    caught = capfd.readouterr()
    refused = any(line.startswith("error: ") for line in command.output)
    assert code == (2 if refused else 0), caught.err
    if command.page == "README.md" and words[0] == "plan":
        printed = [line.rstrip() for line in (caught.err if refused else caught.out).splitlines()]
        assert [line.rstrip() for line in command.output] == printed


# ------------------------------------------------------------------------------------------------- whole pages, slow


def script_of(page: str) -> list[Command]:
    """A page's fenced commands in order, but for those that do not end."""
    return [c for c in SHOWN if c.page == page and c.fenced and c.words[1:2] != list(NOT_RUN)]


def run_script(script: list[Command], room: Path) -> list[str]:
    """What each command prints, one after another in one shell; stops at the first that fails."""
    mark = "--- next ---"
    lines = ["set -e", *(f"{command.line}\necho '{mark}'" for command in script)]
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], cwd=room, env=environment, capture_output=True, text=True, timeout=3000
    )
    printed = done.stdout.split(mark)
    assert done.returncode == 0, f"{script[len(printed) - 1].line}\n{done.stderr[-2000:]}"
    assert len(printed) == len(script) + 1
    return printed[:-1]


def exact(line: str) -> bool:
    """Whether a line of output is the same on every machine: sizes and counts, no losses, no times."""
    return bool(re.search(r"\d,\d{3}", line)) and " s, peak" not in line and "tokens" not in line


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_as_it_stands(tmp_path: Path) -> None:
    """Its commands in order in an empty folder; every size in its outputs is what is printed."""
    script = script_of("docs/tutorial.md")
    printed = run_script(script, tmp_path)
    sizes = 0
    for command, said in zip(script, printed, strict=True):
        found = [line.rstrip() for line in said.splitlines()]
        for line in filter(exact, command.output):
            sizes += 1
            assert line.rstrip() in found, command
    assert sizes >= 10
    assert (tmp_path / "report.html").stat().st_size > 100_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_how_to_pack_a_real_checkpoint_as_it_stands(tmp_path: Path) -> None:
    """On the embedded model: MODEL, the data and the picture that the page names are laid beside."""
    (tmp_path / "MODEL").symlink_to(model_dir())
    rows = heldout_text().read_text(encoding="utf-8").splitlines()
    (tmp_path / "calib.jsonl").write_text("\n".join(rows[:6]) + "\n", encoding="utf-8")
    (tmp_path / "heldout.jsonl").write_text("\n".join(rows[6:9]) + "\n", encoding="utf-8")
    (tmp_path / "sign.png").write_bytes(next(items(1, 1)).png())
    chart_questions(tmp_path / "ChartQA_TEST.tsv")
    run_script(script_of("docs/howto.md"), tmp_path)
    assert (tmp_path / "report.html").is_file()


def chart_questions(path: Path) -> None:
    """Six of the embedded world's questions under a benchmark's name."""
    rows = []
    for number, item in enumerate(items(2, 6, ("chart",))):
        row = {"index": number, "image": base64.b64encode(item.png()).decode(), "split": "test_human"}
        rows.append(row | {"question": item.question.text, "answer": item.question.answer})
    write_table(path, rows)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readme_s_example_as_it_stands(tmp_path: Path) -> None:
    """After `mopeq demo` (what `make demo` runs), whose picture and questions it uses."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    olmoe(tmp_path / "OLMoE-1B-7B")
    shown = [c for c in script_of("README.md") if c.words[0] == "mopeq" and "2GiB" not in c.words]
    run_script([Command("README.md", "mopeq demo"), *shown], tmp_path)
    assert (tmp_path / "demo-out" / "report.html").is_file()


WHOLE = ("README.md", "docs/tutorial.md", "docs/howto.md")  # run above
OTHERS = ("quantize", "map", "run", "eval", "bench", "export")


def worth_running(command: Command) -> bool:
    """Whether a command of the remaining pages is run: not what needs a harness, a server, or minutes of timings."""
    words = set(command.words)
    return command.words[:1] == ["mopeq"] and command.words[1] in OTHERS and not words & {"--lm-eval", "--shapes"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", sorted({c.page for c in SHOWN if c.fenced and worth_running(c)} - set(WHOLE)))
def test_the_other_pages_examples_as_they_stand(page: str, tmp_path: Path) -> None:
    """A page's commands in order; every model that it names is the embedded one, packed where the page does not, but
    for bench-lm."""
    script = [command for command in script_of(page) if worth_running(command)]
    if any("bench-lm" in command.words for command in script):
        for name in ("models/bench-lm", "data/text_calib.jsonl", "data/text_eval.jsonl"):
            (tmp_path / Path(name).name).symlink_to(shared(name))
    for name in ("MODEL", "OLMoE-1B-7B", "original"):
        (tmp_path / name).symlink_to(model_dir())
    (tmp_path / "src").symlink_to(ROOT / "src")
    with silence():
        made.quantize(model_dir(), tmp_path / "OUT-before", avg_bits=3.0)
    made_here = {Path(after).name for c in script for word, after in pairwise(c.words) if word == "-o"}
    for name in {"OUT", "packed"} - made_here:
        made.copy(tmp_path / "OUT-before", tmp_path / name)
    rows = heldout_text().read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.jsonl").write_text("\n".join(rows[:3]) + "\n", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(next(items(1, 1)).png())
    chart_questions(tmp_path / "ChartQA_TEST.tsv")
    evaluation_tsv(tmp_path / "evaluation.tsv", per_task=4)
    run_script(script, tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="needs mkdocs-material (pip install '.[docs]')"
)
def test_the_site_is_built_and_asks_nobody(tmp_path: Path) -> None:
    """Strictly: a broken link or anchor stops it. No page takes a script, a style or a font from elsewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(ROOT / "mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) >= 15
    for page in pages:
        asked = re.findall(r'<(?:script|img|link[^>]*stylesheet)[^>]*(?:src|href)="?(https?:[^" >]+)', page.read_text())
        assert asked == [], page.name
