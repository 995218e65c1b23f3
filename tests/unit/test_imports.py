"""Which way imports run: no circle among files, and transformers may be entered by any door after `import mopeq`.

(That rooms lie on floors, and that serving never imports making, is in test_packaging.)
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from warm import SOURCES

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "mopeq"


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module of the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports while it is being imported itself (not within functions)."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names if alias.name in known)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                    for _ in range(child.level - 1):
                        package = package.rpartition(".")[0]
                    base = f"{package}.{base}" if base else package
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    found.update([whole] if whole in known else [base] if base in known else [])
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {name, "mopeq"}


def test_no_circles_among_files() -> None:
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items()}
    assert len(graph) > 40 and graph["mopeq.stages"] >= {"mopeq.plan", "mopeq.rundir"}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order.index("mopeq.errors") < order.index("mopeq.nouns") < order.index("mopeq.stages")


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    """The walk above, on two files that import each other, one of them relatively."""
    (tmp_path / "a.py").write_text("from . import b\n")
    (tmp_path / "b.py").write_text("from mopeq.a import x\ndef late():\n    import mopeq.c\n")
    known = {f"mopeq.{n}": tmp_path / f"{n}.py" for n in "abc"}
    assert imported("mopeq.a", known["mopeq.a"], known) == {"mopeq.b"}
    assert imported("mopeq.b", known["mopeq.b"], known) == {"mopeq.a"}


def test_left_of_sense_runs_without_torch() -> None:
    files = (
        "nouns checkpoint families.standard plan options packed rundir stages cli alloc.choose verbs.map verbs.verify"
    )
    code = f"import sys, {', '.join('mopeq.' + f for f in files.split())}\nprint('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (ran.returncode, ran.stdout.strip()) == (0, "False"), ran.stderr


MODEL_FIRST = "from transformers import OlmoeForCausalLM"  # our hooks run in the midst of its import
AUTO_FIRST = "from transformers import AutoModelForCausalLM"
CLOSED = "import mopeq\nfrom mopeq.plugins.hook import close_doors\nclose_doors()"  # as the plug-in of vLLM does
DOORS = [  # (what is run, whether our families are asked for too: that takes seconds; None if they must not be there)
    (f"import mopeq\n{MODEL_FIRST}", True),
    (f"import mopeq\n{AUTO_FIRST}", False),
    ("import mopeq\nfrom transformers import AutoProcessor", False),
    ("import mopeq\nimport transformers.quantizers", False),
    (f"{MODEL_FIRST}\nimport mopeq", True),
    (f"{AUTO_FIRST}\nimport mopeq", False),
    (f"{AUTO_FIRST}\n{CLOSED}", None),
]
TRY = """
import json, os, sys
import torch
for door, families in json.load(sys.stdin):
    pid = os.fork()
    if pid == 0:
        try:
            exec(door)
            from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as C, AUTO_QUANTIZER_MAPPING as Q
            from transformers import AutoConfig
            assert "mopeq" in Q and "mopeq" in C
            if families:
                config = AutoConfig.for_model("deepseek_vl_v2")
                from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as M
                from transformers.models.auto.processing_auto import PROCESSOR_MAPPING as P
                assert type(config) in M and type(config) in P
                for method in (AutoConfig.from_pretrained, AutoConfig.for_model):  # put back as they were
                    assert method.__func__.__code__.co_filename.endswith("configuration_auto.py")
            if families is None:
                for name in ("deepseek_vl_v2", "molmo"):
                    try:
                        AutoConfig.for_model(name)
                    except ValueError:
                        continue
                    raise AssertionError(name)
        except BaseException as problem:
            print(door, "FAILED", repr(problem)[:300], flush=True)
            os._exit(1)
        os._exit(0)
    os.waitpid(pid, 0)
print("done")
"""


def test_every_door_of_transformers_registers_mopeq() -> None:
    """Entered before or after mopeq, by an Auto class or a model's own; each in an interpreter that knows neither."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRY], input=json.dumps(DOORS), capture_output=True, text=True, env=environment
    )
    assert ran.stdout == "done\n", ran.stdout + ran.stderr
