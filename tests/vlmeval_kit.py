"""What tests and tools share about VLMEvalKit: its tables as files, its scores in our names."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopeq.evaluate.text import KIT, PAPER

EXPECTED = {PAPER: "expected_seed2025.json", KIT: "expected_msvlmeval0020.json"}  # beside the fixtures' tables


def flat(said: Any) -> dict[str, float]:
    """The kit's table (rows of one or several splits, or a dict) in our names, without its empty cells."""
    found: dict[str, float] = {}
    for row in said if isinstance(said, list) else [said]:
        split = row.get("split", "none")
        prefix = "" if split in ("none", "Overall") else f"{split}/"
        for name, value in row.items():
            if name == "Bleu":
                found |= {f"Bleu_{n}": one for n, one in enumerate(value, 1)}
            elif name != "split" and value is not None and not math.isnan(value):
                found[prefix + name] = value
    return found


def run_kit(script: str, data: Path, *arguments: str, timeout: int) -> Any:
    """What a script in which the kit runs prints behind FOUND, with the kit's tables in `data`."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(
        command, env=os.environ | {"LMUData": str(data)}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A table in the kit's layout."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path
