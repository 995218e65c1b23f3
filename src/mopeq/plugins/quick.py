"""What models write as many small operators, on a GPU in one kernel each: RMS norms and routers.

At one token each operator is a launch, which takes as long as a packed matrix. What a module computes is found by
trying it, never by its name, and where it is anything else, or runs anywhere else, its own forward does.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import rms_norm

from mopeq.kernels import routers

FAILS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # of modules that take something else


def quicken(model: nn.Module) -> None:
    """Have a model's RMS norms and routers run so. Results differ from the modules' own in their last bits."""
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if has_a_norms_parts(module):
            if is_rms_norm(module):  # each is tried: one class may hold several kinds
                module.forward = partial(norm, module)  # and no method, which could not be pickled
        elif has_a_routers_parts(module):
            rule = rule_of(module)
            if rule is not None:
                module.__dict__["_rule"] = astuple(rule)
                module.forward = partial(route, module)


def parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


# ------------------------------------------------------------------------------------------------ norms


def has_a_norms_parts(module: Any) -> bool:
    """A vector of weights, a small constant, and nothing else."""
    return parameters(module) == ["weight"] and module.weight.dim() == 1 and eps_of(module) > 0


def eps_of(module: Any) -> float:
    """The constant that a norm adds to the variance; 0 where none is found."""
    found = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    return found if isinstance(found, float) else 0.0


def is_rms_norm(module: Any) -> bool:
    """Whether it computes what `rms_norm` does, of loud inputs and of some so quiet that the constant makes a
    difference."""
    g, eps, size = torch.Generator().manual_seed(0), eps_of(module), module.weight.shape[0]
    weight = torch.randn(size, generator=g)
    x = torch.randn(2, 3, size, generator=g) * torch.tensor([eps**0.5, 1.0, 30.0])[:, None]
    try:
        found = functional_call(module, {"weight": weight}, (x,))
        wanted = rms_norm(x, (size,), weight, eps)
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    except FAILS:
        return False


def norm(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm's forward. torch.compile makes one kernel of the module's own."""
    if args or kwargs or not x.is_cuda or torch.compiler.is_compiling() or x.dtype != self.weight.dtype:
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    return rms_norm(x, self.weight.shape, self.weight, eps_of(self))


# ------------------------------------------------------------------------------------------------ routers

CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True)
class Rule:
    """How a router chooses (`kernels.routers.formula`), and what it answers in if activations are bf16."""

    k: int
    softmax: bool
    normalized: bool
    scale: float
    logits: torch.dtype
    weights: torch.dtype


def has_a_routers_parts(module: Any) -> bool:
    """A matrix, perhaps a correction of the scores, and a number of choices."""
    names = set(parameters(module)) - {CORRECTION}
    return names == {"weight"} and module.weight.dim() == 2 and isinstance(getattr(module, "top_k", None), int)


def rule_of(module: Any) -> Rule | None:
    """The rule by which a router chooses for 64 random tokens, in float32; None if it is none of `formula`'s."""
    g, (experts, hidden) = torch.Generator().manual_seed(0), module.weight.shape
    given = {"weight": torch.randn(experts, hidden, generator=g) * 2 / hidden**0.5}
    if getattr(module, CORRECTION, None) is not None:
        given[CORRECTION] = torch.randn(experts, generator=g) * 0.1
    x = torch.randn(64, hidden, generator=g)
    low = given | {"weight": given["weight"].bfloat16()}
    try:
        logits, weights, index = functional_call(module, given, (x,))
        kinds = [t.dtype for t in functional_call(module, low, (x.bfloat16(),))[:2]]
    except FAILS:
        return None
    if index.shape != (64, module.top_k) or not torch.allclose(logits, x @ given["weight"].T, rtol=1e-4, atol=1e-4):
        return None
    index, order = index.sort(-1)
    for softmax, normalized in product((True, False), (True, False)):
        wanted, at = routers.formula(logits, given.get(CORRECTION), module.top_k, softmax, normalized, 1.0)
        at, places = at.sort(-1)
        found, wanted = weights.gather(-1, order), wanted.gather(-1, places)
        scale = float(f"{(found.sum() / wanted.sum()).item():.6g}")
        if torch.equal(index, at) and torch.allclose(found, wanted * scale, rtol=1e-4, atol=1e-6):
            return Rule(module.top_k, softmax, normalized, scale, *kinds)
    return None


def route(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A router's forward."""
    rows, weight = x.reshape(-1, x.shape[-1]), self.weight
    known = not (args or kwargs or self.training) and x.dtype == torch.bfloat16 and weight.dtype in KEPT
    if not known or routers.refuses(rows):
        return type(self).forward(self, x, *args, **kwargs)
    way = routers.opaque if torch.compiler.is_compiling() else routers.route
    return way(rows, weight, getattr(self, CORRECTION, None), *self._rule)


KEPT = (torch.bfloat16, torch.float32)  # what a router's matrix is held in
