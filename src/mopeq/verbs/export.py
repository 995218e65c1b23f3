"""`mopeq export`: a packed checkpoint written in another tool's format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mopeq.checkpoint import find_folder
from mopeq.export import EXPORTERS
from mopeq.export.folder import check_free
from mopeq.export.opened import Packed
from mopeq.nouns import size_text
from mopeq.show import out
from mopeq.tables import pick


def export(packed: str | Path, to: str, directory: str | Path) -> dict[str, Any]:
    """Write `packed` as the format `to` into a new folder; returns its bytes and what is to be said of it."""
    write = pick(EXPORTERS, to, "export format")
    folder, _ = find_folder(packed)
    directory = Path(directory)
    check_free(folder, directory)
    started = time.monotonic()
    facts = write(Packed(folder), directory)
    return (
        {"out": str(packed), "to": to, "directory": str(directory)}
        | facts
        | {"seconds": round(time.monotonic() - started, 3)}
    )


def show(r: dict[str, Any]) -> None:
    out(f"{r['directory']}: {r['to']}, {size_text(r['bytes_weights'])} of weights, {r['seconds']:.1f} s")
    for note in r["notes"]:
        out(f"  {note}")
