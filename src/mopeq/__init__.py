"""mopeq makes a Mixture-of-Experts model fit a memory budget by giving each expert its own bit width."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mopeq.plugins.hook import install

__version__ = "0.1.0"
__all__ = ["evaluate", "plan", "quantize"]

install()


def __getattr__(name: str) -> Any:
    """`mopeq.plan`, `mopeq.quantize` and `mopeq.evaluate` are imported when asked for: `import mopeq` stays light."""
    if name in __all__:
        return verb(name)
    raise AttributeError(f"module 'mopeq' has no attribute {name!r}")


def verb(name: str) -> Any:
    if name == "evaluate":
        from mopeq.verbs.evaluate import evaluate

        return evaluate
    from mopeq import stages

    return getattr(stages, name)


class Verb(ModuleType):
    """A room that bears a verb's name: importing `mopeq.plan` puts the module where the function is looked up, so
    the module can be called as the verb."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return verb(self.__name__.rpartition(".")[2])(*args, **kwargs)


class Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and type(value) is ModuleType:
            value.__class__ = Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
