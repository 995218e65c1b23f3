"""Files that only some machines have beside the repository: a test that needs one asks here, and is skipped without.

The folder is $MOPEQ_SHARED, else `shared` beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("MOPEQ_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared(path: str) -> Path:
    """The file or folder `path` below the shared folder; the test is skipped if it is absent."""
    found = ROOT / path
    if not found.exists():
        pytest.skip(f"needs {path} in the shared folder (set MOPEQ_SHARED)")
    return found
