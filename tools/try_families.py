"""Try every MoE family of the installed transformers, and record the results: python tools/try_families.py

Writes docs/families.json, from which tools/tables_to_docs.py makes the tables. A minute or two on one core; names as
arguments try only those, print the result and write nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import transformers  # noqa: E402
from family_trial import TOLERANCE, WIDTHS, other_bits, try_family  # noqa: E402
from tiny_families import families  # noqa: E402

from mopeq.errors import first_line  # noqa: E402
from mopeq.models import quiet_transformers  # noqa: E402


def result_of(family: str) -> dict[str, Any]:
    """A trial's facts, or {"failed": why}."""
    with tempfile.TemporaryDirectory(prefix="mopeq-family-") as room:
        try:
            facts = asdict(try_family(family, Path(room)))
        except Exception as problem:  # whatever transformers or mopeq raise is the result
            return {"failed": f"{type(problem).__name__}: {first_line(problem)}"}
    worst = max(facts["text"], facts["watched"], facts["picture"] or 0.0)
    if worst > TOLERANCE:
        return {"failed": f"logits differ from the reference by {worst:.1g} of their spread"}
    for key in ("text", "watched", "picture", "moved"):
        facts[key] = None if facts[key] is None else float(f"{facts[key]:.1g}")
    with tempfile.TemporaryDirectory(prefix="mopeq-family-") as room:
        try:
            other_bits(family, Path(room))
        except Exception as problem:  # as above
            facts["other_bits_8"] = first_line(problem).replace(f"{room}/", "").replace(f"{family}-other-packed", "OUT")
        else:
            facts["other_bits_8"] = "works"
    return {key: value for key, value in facts.items() if key != "family"}


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    quiet_transformers()
    results = {}
    for family in names or families():
        results[family] = result_of(family)
        print(f"{family}: {results[family].get('failed', 'works')}", flush=True)
    record = {
        "made_by": "python tools/try_families.py",
        "transformers": transformers.__version__,
        "widths": list(WIDTHS),
        "tolerance": TOLERANCE,
        "families": results,
    }
    if names:
        print(json.dumps(results, indent=1))
    else:
        (ROOT / "docs" / "families.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
