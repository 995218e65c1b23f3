"""The run directory: each stage's file appears by one rename, carrying the digest of what it was made from.

    spec.json   sensitivity/<digest>.npz   maps/<digest>.json   quantized/<digest>/<layer>.safetensors   events.jsonl

A stage whose digest is there is skipped; one whose digest is not is done (again), and said. Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mopeq.errors import BadInput
from mopeq.nouns import Format, LinearId, PrecisionMap, Sensitivity, digest_of
from mopeq.packed import json_bytes, write_atomic


@dataclass(frozen=True)
class RunDir:
    """A folder of stage results."""

    path: Path

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl; times live here and nowhere in what is compared."""
        self.path.mkdir(parents=True, exist_ok=True)
        row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, **facts}
        with open(self.path / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory: a second run on it at the same time is refused. The lock ends with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BadInput(
                    f"another run is at work in {self.path}", "wait for it, or choose another --run"
                ) from None
            yield

    # --------------------------------------------------------------------------------- sensitivity

    def sensitivity_path(self, digest: str) -> Path:
        return self.path / "sensitivity" / f"{digest}.npz"

    def save_sensitivity(self, digest: str, s: Sensitivity) -> None:
        arrays: dict[str, Any] = {"cost_IF": s.cost_IF}
        arrays |= {k: v for k in ("score_I", "stderr_I", "stderr_IF", "tokens_LE") if (v := getattr(s, k)) is not None}
        arrays |= {f"tokens_{name}": v for name, v in s.tokens_by_modality.items()}
        facts = {
            "method": s.method,
            "formats": [f.name for f in s.formats],
            "linears": [[i.layer, i.expert, i.projection] for i in s.linears],
            "unit": s.unit,
            "data_digest": s.data_digest,
            "notes": list(s.notes),
            "modalities": sorted(s.tokens_by_modality),
        }
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomic(self.sensitivity_path(digest), buffer.getvalue())

    def load_sensitivity(self, digest: str) -> Sensitivity | None:
        """The saved sensitivity, or None where there is none (or only a damaged one)."""
        path = self.sensitivity_path(digest)
        return read_sensitivity(path) if path.exists() else None

    # -------------------------------------------------------------------------------------- maps

    def map_path(self, digest: str) -> Path:
        return self.path / "maps" / f"{digest}.json"

    def save_map(self, digest: str, map_: PrecisionMap, facts: dict[str, Any]) -> None:
        write_atomic(self.map_path(digest), json_bytes(map_.to_json() | {"made_from": facts}))

    def load_map(self, digest: str) -> PrecisionMap | None:
        path = self.map_path(digest)
        return PrecisionMap.from_json(json.loads(path.read_text()), str(path)) if path.exists() else None

    # ------------------------------------------------------------------------------------ layers

    def layer_path(self, digest: str, layer: int) -> Path:
        return self.path / "quantized" / digest / f"{layer}.safetensors"


def read_sensitivity(path: Path) -> Sensitivity:
    """A saved sensitivity; BadInput if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            return Sensitivity(
                facts["method"],
                tuple(LinearId(layer, e, p) for layer, e, p in facts["linears"]),
                tuple(Format.parse(name) for name in facts["formats"]),
                arrays["cost_IF"],
                arrays.get("score_I"),
                arrays.get("stderr_I"),
                arrays.get("stderr_IF"),
                arrays.get("tokens_LE"),
                {name: arrays[f"tokens_{name}"] for name in facts["modalities"]},
                facts["unit"],
                facts["data_digest"],
                tuple(facts["notes"]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as problem:
        raise BadInput(f"{path} cannot be read: {problem}", "delete it; it is made again") from None


def stage_digest(stage: str, **inputs: Any) -> str:
    """The digest of all a stage's inputs; change the version here when a stage's result changes meaning."""
    return digest_of({"stage": stage, "version": 1, **inputs})


def free_bytes(path: Path) -> int:
    """Free disk below a path that may not exist yet."""
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
