"""The tables in the README and in docs/, written from the code's own: python tools/tables_to_docs.py, or `make docs`.

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`; what stands between is written here. A test
says when a block is stale.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopeq.alloc import ALLOCATORS, NO_BUDGET
from mopeq.data import DATASETS
from mopeq.evaluate import METRICS
from mopeq.families import ADAPTERS, FAMILIES, NAMES, Family
from mopeq.quant import QUANTIZERS
from mopeq.sense import SENSORS
from mopeq.tables import Row

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "commands.md", ROOT / "docs" / "families.md")
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


BLOCKS = {
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
