"""`import mopeq` stays light and yet makes `from_pretrained(OUT)` work, in either import order.

If transformers' registries are loaded already, mopeq registers at once; else when they get imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

ON_IMPORT = {
    # when transformers loads this module, that module of ours registers itself
    "transformers.quantizers.auto": "mopeq.plugins.hf",
}


def install() -> None:
    """Register with transformers now or as soon as it is imported."""
    for theirs, ours in ON_IMPORT.items():

        def register(_: Any, ours: str = ours) -> None:
            import_module(ours)

        register_post_import_hook(register, theirs)
