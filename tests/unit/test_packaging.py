"""What holds the package together: pins, pages, the wheel, the rooms and the words of make agree with one another."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mopeq
from mopeq.options import DEFAULT_AVG_BITS, Options
from mopeq.tensors import unpack_bits

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "mopeq"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # what a CUDA build of torch brings, in versions of its choice
WORDS = ("check", "test", "demo", "ci-full", "fault", "e2e", "bench", "large", "vllm", "docs", "site", "clean")


# ---------------------------------------------------------------------------------------------------- pins


def needed(names: list[str]) -> set[str]:
    """Every distribution that installing these requirements brings, by what is installed here."""
    found: set[str] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in found or name.startswith(PINNED_BY_TORCH):
            continue
        found.add(name)
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            extras = [{"extra": extra} for extra in ("", *wanted.extras)]
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in extras):
                todo.append(inner)
    return found


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = PYPROJECT["project"]
    direct = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    pinned = {canonicalize_name(name): version for name, version in PINS.items()}
    assert needed(direct) - set(pinned) == set()
    for requirement in map(Requirement, direct):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in PINS.values()), "a pin names a local build"


# --------------------------------------------------------------------------------------------- files and pages


def test_version_stands_alike_everywhere() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert mopeq.__version__ == PYPROJECT["project"]["version"] == headings[0]


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PYPROJECT["project"]["license"] == "Apache-2.0"
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert "9. Accepting Warranty or Additional Liability." in text


def tables_to_docs() -> object:
    spec = importlib.util.spec_from_file_location("tables_to_docs", ROOT / "tools" / "tables_to_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_in_the_docs_are_fresh() -> None:
    tool = tables_to_docs()
    for page in tool.PAGES:
        text = page.read_text()
        assert "<!-- table: " in text, page
        assert tool.refreshed(text) == text, f"{page.name} is stale: make docs"
    edited = tool.refreshed("<!-- table: methods -->\n| an old row |\n<!-- end -->\nrest")
    assert "old row" not in edited
    assert "| `--method` | `rtn` | round to nearest" in edited
    assert edited.endswith("<!-- end -->\nrest")


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_flags_in_the_docs_exist() -> None:
    source = (PACKAGE / "cli.py").read_text()
    known = {f"--{name}" for name in re.findall(r'"--([a-z-]+)"', source)} | {"--help"}
    known |= {f"--{name.strip('_').replace('_', '-')}" for name in re.findall(r"^    (\w+): ", source, re.MULTILINE)}
    for page in (ROOT / "README.md", ROOT / "docs" / "commands.md", ROOT / "docs" / "methods.md"):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())) - known == set(), page.name


def test_the_format_page_reads_what_mopeq_packs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    rng = np.random.default_rng(0)
    for bits in range(1, 9):
        for count in (1, 5, 40, 77):
            row = rng.integers(0, 256, -(-count * bits // 8), dtype=np.uint8)
            ours = unpack_bits(torch.from_numpy(row)[None], bits, count)[0].tolist()
            assert names["unpack"](row.tobytes(), bits, count) == ours


# ----------------------------------------------------------------------------------------------- make and CI


def test_make_knows_its_words_and_no_others() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [phony] = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert sorted(phony.split()) == sorted(WORDS)
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"):
        said = re.findall(r"(?:`|^#? *|  )make ([a-z][a-z0-9-]*)", page.read_text(), re.MULTILINE)
        assert "test" in said
        assert set(said) <= set(WORDS), page.name
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for word in WORDS:
        done = subprocess.run(["make", "-n", word], cwd=ROOT, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_ci_runs_the_readme_s_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


# ------------------------------------------------------------------------------------------------------ wheel


def tracked() -> set[str]:
    """Files below src/mopeq that belong to the package, as the wheel names them."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "src/mopeq"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    return {line.removeprefix("src/") for line in listed.stdout.splitlines() if (ROOT / line).exists()}


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    wanted = tracked()
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    copy = tmp_path / "copy"  # building writes beside the sources
    for name in ("pyproject.toml", "README.md", "LICENSE", *(f"src/{w}" for w in wanted)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    made = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(next(tmp_path.glob("mopeq-*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        facts = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    assert wanted - held == set()
    assert held - wanted == set()
    assert "License-Expression: Apache-2.0" in facts


# ------------------------------------------------------------------------------------------- rooms and floors


def imports(path: Path, everywhere: bool = False) -> Iterator[str]:
    """The rooms of mopeq that a file imports at its head, or anywhere. What only types need is not counted."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if not typing and (everywhere or not inside):
                yield child
                yield from walk(child)

    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "mopeq":
            yield from (alias.name for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mopeq."):
            yield str(node.module).split(".")[1]


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return found


def test_imports_run_downhill() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    floor = {room: int(number) for number, text in rows for room in re.findall(r"`(\w+)/?`", text)}
    assert set(floor) == set(rooms())
    for room, paths in rooms().items():
        for path in paths:
            uphill = {other for other in imports(path) if other != room and floor[other] >= floor[room]}
            assert not uphill, f"{path.relative_to(PACKAGE)} imports {uphill}"


def test_serving_never_imports_making() -> None:
    making = {"plan", "sense", "alloc", "quant", "data", "evaluate", "report", "stream", "assemble", "verbs"}
    making |= {"stages", "job", "checks", "deciding", "making", "harness"}
    reached, todo = set(), ["plugins", "kernels"]
    while todo:
        room = todo.pop()
        reached.add(room)
        todo += {other for path in rooms()[room] for other in imports(path, everywhere=True)} - reached
    assert reached & making == set()


# ------------------------------------------------------------------------------------------------- the Python API


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_mopeq_is_light() -> None:
    loaded = python("import sys, mopeq, mopeq.cli; print(*sys.modules)").split()
    assert {"torch", "transformers", "scipy", "PIL", "jinja2"} & set(loaded) == set()


def test_verbs_stay_callable_when_a_room_of_their_name_is_imported() -> None:
    code = """
import sys, mopeq, mopeq.errors
first = mopeq.plan  # before any room is imported
import mopeq.plan, mopeq.evaluate
from mopeq.plan import make_problem
from mopeq.evaluate import METRICS
assert "torch" not in sys.modules
for verb in (first, mopeq.plan):
    try:
        verb("no/such folder here")
    except mopeq.errors.BadInput as error:
        print(error.line)
assert callable(mopeq.evaluate) and callable(mopeq.quantize)
"""
    lines = python(code).splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_defaults_in_the_docs_are_the_options() -> None:
    defaults = vars(Options())
    for page in ("README.md", "CHANGELOG.md"):
        [text] = re.findall(r"Defaults: `([^`]*)`", (ROOT / page).read_text())
        given = re.findall(r"--([a-z-]+)\s+(\S+)", text)
        assert given
        for flag, value in given:
            known = DEFAULT_AVG_BITS if flag == "avg-bits" else defaults[flag.replace("-", "_")]
            told = ",".join(map(str, known)) if isinstance(known, tuple) else str(known)
            assert told == value, f"{page}: --{flag} is {told}"
