"""The README's tables, written from the code's own: python tools/tables_to_docs.py (or `make docs`).

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`; what stands between is written here. A test
says when a block is stale.
"""

from __future__ import annotations

import re
from pathlib import Path

from mopeq.alloc import ALLOCATORS, NO_BUDGET
from mopeq.families import FAMILIES
from mopeq.quant import QUANTIZERS
from mopeq.sense import SENSORS
from mopeq.tables import Row

README = Path(__file__).resolve().parents[1] / "README.md"


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


BLOCKS = {"methods": methods, "families": families}


def refreshed(text: str) -> str:
    """The page with every block written anew. KeyError for a block that nothing here writes."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", block, text, flags=re.DOTALL)


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(refreshed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
