"""The tables in the README and in docs/, written from the code's own: python tools/tables_to_docs.py, or `make docs`.

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`; what stands between is written here. A test
says when a block is stale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mopeq.alloc import ALLOCATORS, NO_BUDGET
from mopeq.data import DATASETS
from mopeq.evaluate import METRICS
from mopeq.families import FAMILIES
from mopeq.quant import QUANTIZERS
from mopeq.sense import SENSORS
from mopeq.tables import Row

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "commands.md")


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


def families() -> str:
    """The `model_type`s whose layout on disk is known, apart by whether experts are stacked."""
    each = sorted(name for name, family in FAMILIES.items() if family.per_expert)
    stacked = sorted(name for name, family in FAMILIES.items() if not family.per_expert)
    return "\n\n".join(
        f"{what} ({len(names)}): {', '.join(f'`{name}`' for name in names)}."
        for what, names in (("One tensor per expert and projection", each), ("Experts stacked in one tensor", stacked))
    )


def plain(what: str, table: Mapping[str, Row]) -> str:
    """A table of two columns: the choice and its line."""
    lines = [f"| {what} | what it is |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {row.says.replace('|', '&#124;')} |" for name, row in table.items()])


BLOCKS = {
    "methods": methods,
    "families": families,
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
