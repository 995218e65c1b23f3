"""mopeq makes a Mixture-of-Experts model fit a memory budget by giving each expert its own bit width."""

from __future__ import annotations

from typing import Any

from mopeq.plugins.hook import install

__version__ = "0.1.0"
__all__ = ["evaluate", "plan", "quantize"]

install()


def __getattr__(name: str) -> Any:
    """`mopeq.plan`, `mopeq.quantize` and `mopeq.evaluate` are imported when asked for: `import mopeq` stays light."""
    if name in __all__:
        if name == "evaluate":
            from mopeq.verbs.evaluate import evaluate

            return evaluate
        from mopeq import stages

        return getattr(stages, name)
    raise AttributeError(f"module 'mopeq' has no attribute {name!r}")
