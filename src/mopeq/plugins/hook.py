"""`import mopeq` stays light and yet makes `from_pretrained` work on what mopeq adds, in either import order.

If a registry of transformers is loaded already, mopeq registers at once; else as soon as it gets imported. The Auto
modules import one another, and what we register imports them too: so nothing is registered while one of them is still
being loaded, and the last to be done registers for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

AUTO = "transformers.models.auto."
ON_IMPORT = {
    # when transformers has loaded this module, these functions of ours register with it
    "transformers.quantizers.auto": ("mopeq.plugins.hf:register",),
    AUTO + "configuration_auto": (
        "mopeq.families.deepseek_vl2:register_config",
        "mopeq.families.molmo:register_config",
    ),
    AUTO + "processing_auto": (
        "mopeq.families.deepseek_vl2:register_processor",
        "mopeq.families.molmo:register_processor",
    ),
    AUTO + "modeling_auto": ("mopeq.families.deepseek_vl2:register_model", "mopeq.families.molmo:register_model"),
}
_loaded: set[str] = set()
_registered: list[str] = []
_busy: list[bool] = []


def install() -> None:
    """Register with transformers now or as soon as it is imported."""
    for theirs in ON_IMPORT:
        register_post_import_hook(loaded, theirs)


def loaded(module: Any) -> None:
    """transformers has loaded one of the modules above."""
    _loaded.add(module.__name__)
    if _busy:  # our own registering made it load: whoever is at it goes on with it
        return
    _busy.append(True)
    try:
        while ready := next(ready_names(), None):
            _registered.append(ready)
            for text in ON_IMPORT[ready]:
                ours, function = text.split(":")
                getattr(import_module(ours), function)()
    finally:
        _busy.pop()


def ready_names() -> Iterator[str]:
    """Modules that are loaded and not yet registered with, unless an Auto module is in the midst of being loaded
    (it will come to `loaded` itself)."""
    if not any(name in sys.modules and name not in _loaded for name in ON_IMPORT if name.startswith(AUTO)):
        yield from (name for name in ON_IMPORT if name in _loaded and name not in _registered)
