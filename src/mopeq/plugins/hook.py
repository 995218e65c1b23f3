"""`import mopeq` stays light and yet makes `from_pretrained` work on what mopeq adds, in either import order.

The quantizer is registered as soon as transformers' registry of quantizers is imported, at once if it is already.
The model families that mopeq brings along import model code of transformers, which fails while any part of that is
still being loaded (say, by `from transformers import OlmoeForCausalLM`). So they are registered at the first
`AutoConfig.from_pretrained` (or `for_model`) or `AutoProcessor.from_pretrained`: every way to a model goes through one
of these, and no import does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

FAMILIES = ("mopeq.families.deepseek_vl2", "mopeq.families.molmo")
DOORS = {
    "transformers.models.auto.configuration_auto": ("AutoConfig", ("from_pretrained", "for_model")),
    "transformers.models.auto.processing_auto": ("AutoProcessor", ("from_pretrained",)),
}
_doors: list[tuple[type, str, Any]] = []  # class, method's name, what it was


def install() -> None:
    """Register with transformers as it gets imported, or now."""
    register_post_import_hook(register_quantizer, "transformers.quantizers.auto")
    for module in DOORS:
        register_post_import_hook(watch_doors, module)


def register_quantizer(_: Any) -> None:
    import_module("mopeq.plugins.hf")  # its decorators register; it may be what is being imported


def watch_doors(module: Any) -> None:
    """Have the first call of an Auto class's methods register our families before it goes on."""
    name, methods = DOORS[module.__name__]
    auto = getattr(module, name)
    for method in methods:
        _doors.append((auto, method, vars(auto)[method]))
        setattr(auto, method, classmethod(opener(vars(auto)[method].__func__)))


def opener(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def first(cls: type, *args: Any, **kwargs: Any) -> Any:
        register_families()
        return original(cls, *args, **kwargs)

    return first


def register_families() -> None:
    """Teach the Auto classes our model families, and put their methods back as they were."""
    close_doors()
    for family in FAMILIES:
        import_module(family).register()


def close_doors() -> None:
    """Leave the families out from now on, unless they were registered before: vLLM, which loads mopeq for every model,
    has its own classes of DeepSeek-VL2 and Molmo, and other models by the same model_type."""
    while _doors:
        auto, method, was = _doors.pop()
        setattr(auto, method, was)
    import_module("mopeq.mending").mend_torchvision()  # AutoProcessor needs one that can be imported
