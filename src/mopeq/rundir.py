"""The run directory: each stage's file appears by one rename, carrying the digest of what it was made from.

    spec.json   sensitivity/<digest>.npz   maps/<digest>.json   quantized/<digest>/<layer>.safetensors   events.jsonl

A stage whose digest is there is skipped; one whose digest is not is done (again), and said. A stage of many items keeps
each as it is done (`Kept`), so that a run that was killed goes on behind the last of them. Nothing is pickled.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from mopeq.errors import BadInput
from mopeq.nouns import Format, LinearId, PrecisionMap, Sensitivity, digest_of
from mopeq.packed import appearing, json_bytes, write_atomic

CANDIDATES = "candidates-"  # before a layer's number: what sensing's quantizer made of it; waits for the map
REMAKE = "delete it; it is made again"


@dataclass(frozen=True)
class Kept:
    """A stage's items that are done, each a file of arrays, until the stage's own file is there. Without a folder
    nothing is kept, and nothing is found."""

    folder: Path | None = None

    def save(self, item: str, arrays: Mapping[str, np.ndarray]) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with appearing(self.folder / f"{item}.npz") as file:
                np.savez(file, **dict(arrays))  # type: ignore[arg-type]

    def has(self, item: str) -> bool:
        return self.folder is not None and (self.folder / f"{item}.npz").exists()

    def load(self, item: str) -> dict[str, np.ndarray] | None:
        """An item's arrays, or None where it is not done; BadInput if its file is damaged."""
        path = None if self.folder is None else self.folder / f"{item}.npz"
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as problem:
            raise BadInput(f"{path} cannot be read: {problem}", REMAKE) from None

    @property
    def room(self) -> int:
        """Bytes that are free where items are kept; nothing takes room where nothing is."""
        return 1 << 62 if self.folder is None else free_bytes(self.folder)

    def drop(self, but: str = "") -> None:
        """Remove all items, or all but those whose names begin with `but`."""
        if self.folder is None:
            return
        if not but:
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.glob("*"):
            if not path.name.startswith(but):
                path.unlink(missing_ok=True)


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
            shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
            yield

    @property
    def scratch(self) -> Path:
        """Where activations wait that memory has no room for."""
        return self.path / "waiting"

    def has_done(self, digest: str) -> bool:
        """Whether a stage that leaves nothing to keep (a check) went well in an earlier run."""
        return (self.path / "done" / digest).exists()

    def set_done(self, digest: str) -> None:
        write_atomic(self.path / "done" / digest, b"")

    # --------------------------------------------------------------------------------- sensitivity

    def sensitivity_path(self, digest: str) -> Path:
        return self.path / "sensitivity" / f"{digest}.npz"

    def kept(self, digest: str) -> Kept:
        """What a sensor has done of this sensitivity so far."""
        return Kept(self.path / "sensitivity" / f"{digest}.parts")

    def save_sensitivity(self, digest: str, s: Sensitivity) -> None:
        arrays: dict[str, Any] = {"cost_IF": s.cost_IF}
        optional = ("score_I", "stderr_I", "stderr_IF", "halves_HIF", "tokens_LE")
        arrays |= {k: v for k in optional if (v := getattr(s, k)) is not None}
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
                arrays.get("halves_HIF"),
                arrays.get("tokens_LE"),
                {name: arrays[f"tokens_{name}"] for name in facts["modalities"]},
                facts["unit"],
                facts["data_digest"],
                tuple(facts["notes"]),
            )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as problem:
        raise BadInput(f"{path} cannot be read: {problem}", REMAKE) from None


def stage_digest(stage: str, **inputs: Any) -> str:
    """The digest of all a stage's inputs; change the version here when a stage's result changes meaning."""
    return digest_of({"stage": stage, "version": 2, **inputs})


def free_bytes(path: Path) -> int:
    """Free disk below a path that may not exist yet."""
    while not path.exists():
        path = path.parent
    stats = os.statvfs(path)
    return stats.f_bavail * stats.f_frsize
