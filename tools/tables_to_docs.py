"""The tables in the README and in docs/, written from the code's own: python tools/tables_to_docs.py, or `make docs`.

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`; what stands between is written here. A test
says when a block is stale.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from mopeq.alloc import ALLOCATORS, NO_BUDGET
from mopeq.cli import app
from mopeq.data import DATASETS
from mopeq.evaluate import METRICS
from mopeq.families import ADAPTERS, FAMILIES, NAMES, Family
from mopeq.options import Options
from mopeq.quant import QUANTIZERS
from mopeq.sense import SENSORS
from mopeq.tables import Row

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("commands", "families", "options", "python")))
TRIED = ROOT / "docs" / "families.json"  # written by tools/try_families.py


def methods() -> str:
    """Every sensitivity, allocator and quantizer, by the flag that chooses it."""
    lines = ["| flag | choice | what it is | shows data to the model |", "|---|---|---|---|"]
    for flag, table in (("--sensitivity", SENSORS), ("--allocate", ALLOCATORS), ("--method", QUANTIZERS)):
        lines += [row_line(flag, name, row) for name, row in table.items()]
    return "\n".join(lines)


def row_line(flag: str, name: str, row: Row) -> str:
    needs = "" if flag == "--allocate" else "yes" if row.needs_data else "no"
    budget = " (takes no budget)" if name in NO_BUDGET and "no budget" not in row.says else ""
    return f"| `{flag}` | `{name}` | {row.says.replace('|', '&#124;')}{budget} | {needs} |"


def tried() -> dict[str, Any]:
    """What tools/try_families.py recorded."""
    return dict(json.loads(TRIED.read_text(encoding="utf-8")))


def families() -> str:
    """How many families were tried with what result, and the known `model_type`s."""
    record = tried()
    results = record["families"].values()
    works, pictures = ([r for r in results if r.get(key) is not None] for key in ("text", "picture"))
    types = sorted(FAMILIES)
    return (
        f"{len(works)} of the {len(results)} MoE families of transformers {record['transformers']} work,"
        f" {len(pictures)} of them with pictures too ([each family's result](docs/families.md)). With mopeq's own ports"
        f" these are the `model_type`s: {', '.join(f'`{name}`' for name in types)}."
    )


def every_family() -> str:
    """One row a family: how its experts lie, whether it works, and what it was shown."""
    lines = ["| family | how its experts lie | result | shown | `--other-bits 8` |", "|---|---|---|---|---|"]
    for name, result in tried()["families"].items():
        if "failed" in result:
            lines.append(f"| `{name}` | | no: {result['failed'].replace('|', '&#124;')} | | |")
            continue
        lies = layout(FAMILIES[result["model_type"]])
        if result["adapter"]:
            lies += f"; adapter: {ADAPTERS[result['adapter']].says}"
        shown = "text" if result["picture"] is None else "text, picture"
        lines.append(
            f"| `{name}` | {lies} | works | {shown} | {'works' if result['other_bits_8'] == 'works' else 'no'} |"
        )
    return "\n".join(lines)


def layout(family: Family) -> str:
    """A row of FAMILIES in words."""
    if family.per_expert:
        lies = "one tensor per expert and projection"
        lies += f", called {', '.join(family.names)}" if family.names is not NAMES else ""
        lies += f"; a layer's {' and '.join(family.modules)} share one list" if family.modules else ""
        return lies + ("; some experts have none" if family.zero_experts else "")
    lies = "stacked, one expert after another" if family.flat else "stacked"
    if isinstance(family.transposed, tuple):
        lies += f", {' and '.join(family.transposed)} transposed"
    else:
        lies += {True: ", transposed", False: "", None: ", either way round"}[family.transposed]
    return lies + (", gate and up interleaved" if family.interleaved else "")


def plain(what: str, table: Mapping[str, Row]) -> str:
    """A table of two columns: the choice and its line."""
    lines = [f"| {what} | what it is |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {row.says.replace('|', '&#124;')} |" for name, row in table.items()])


def options() -> str:
    """Every verb of the command line: what it does, its arguments and options, its example."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n\n".join(verb_options(name, verb) for name, verb in verbs.items())


def verb_options(name: str, verb: Any) -> str:
    words = [param.metavar or param.name.upper() for param in verb.params if param.param_type_name == "argument"]
    lines = [f"## `mopeq {' '.join([name, *words])}`", "", verb.help.split("\f")[0].strip(), ""]
    lines += ["| | what it is | default |", "|---|---|---|"]
    for param in verb.params:
        shown = ", ".join(f"`{word}`" for word in (param.opts if param.param_type_name == "option" else words))
        known = param.default not in (None, "", False, ())
        default = "" if not known or param.required else f"`{param.default}`"
        said = param.help.replace("|", "&#124;")
        lines.append(f"| {shown} | {said}{'; may be repeated' * repeats(param)} | {default} |")
    example = [line.strip() for line in (verb.epilog or "").splitlines() if line.strip() and line.strip() != "Example:"]
    return "\n".join([*lines, "", "```", *example, "```"])


def repeats(param: Any) -> bool:
    """Whether an option may be given again, and its own words do not say so."""
    return bool(param.multiple) and "repeated" not in param.help


def python_api() -> str:
    """The functions that stand for verbs, with their docstrings, and the options of `plan` and `quantize`."""
    from mopeq import stages
    from mopeq.data.processor import load_processor
    from mopeq.harness.lm_eval import language_model
    from mopeq.harness.vlmevalkit import PackedVLM
    from mopeq.verbs.evaluate import evaluate
    from mopeq.verbs.map import show as show_map
    from mopeq.verbs.report import write as write_report
    from mopeq.verbs.run import answer
    from mopeq.verbs.verify import verify

    shown: dict[str, Callable[..., Any]] = {
        "mopeq.plan": stages.plan,
        "mopeq.quantize": stages.quantize,
        "mopeq.evaluate": evaluate,
        "mopeq.verbs.map.show": show_map,
        "mopeq.verbs.run.answer": answer,
        "mopeq.verbs.verify.verify": verify,
        "mopeq.verbs.report.write": write_report,
        "mopeq.data.processor.load_processor": load_processor,
        "mopeq.harness.lm_eval.language_model": language_model,
        "mopeq.harness.vlmevalkit.PackedVLM": PackedVLM,
    }
    parts = [described(name, function) for name, function in shown.items()]
    lines = ["## Options of `plan` and `quantize`", "", "| keyword | default |", "|---|---|"]
    lines += [f"| `{field.name}` | `{field.default!r}` |" for field in fields(Options)]
    return "\n\n".join([*parts, "\n".join(lines)])


def described(name: str, function: Callable[..., Any]) -> str:
    """A heading, the call, and what its docstring says."""
    text = inspect.getdoc(function) or ""
    if isinstance(function, type):
        text += "\n\nMethods: " + ", ".join(
            m for m, f in vars(function).items() if not m.startswith("_") and callable(f)
        )
    call = call_of(name.rpartition(".")[2], function)
    return f"## `{name}`\n\n```python\n{call}\n```\n\n```text\n{text}\n```"


def call_of(name: str, function: Callable[..., Any]) -> str:
    """The call as it is written, a parameter a line where one line is too long."""
    signature = inspect.signature(function)
    words = []
    for parameter in signature.parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
    result = "" if isinstance(function, type) else f" -> {signature.return_annotation}"
    line = f"{name}({', '.join(words)}){result}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(words) + f",\n){result}"


BLOCKS = {
    "options": options,
    "python": python_api,
    "methods": methods,
    "families": families,
    "every_family": every_family,
    "datasets": lambda: plain("file", DATASETS),
    "metrics": lambda: plain("metric", METRICS),
}


def refreshed(text: str) -> str:
    """The page with every block written anew. KeyError for a block that nothing here writes."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.DOTALL)


def main() -> None:
    for page in PAGES:
        page.write_text(refreshed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
