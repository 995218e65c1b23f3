"""What one batch leaves at a layer's border: on the way forward the layer runs without a graph; on the way back it runs
again from what was kept, with one, and its part of the chain rule is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mopeq.walk.parts import CannotWalk, Part
from mopeq.walk.shelf import Luggage, Shelf, Ticket


@dataclass
class Call:
    """A part that a batch has come to, with what its forward was called with."""

    part: Part
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context  # transformers keeps what its hooks record in context variables

    def run(self) -> Any:
        return self.context.run(self.forward, *self.args, **self.kwargs)


class Border(torch.autograd.Function):
    """Ties a layer's outputs, computed without a graph, to the record that will take their gradients."""

    @staticmethod
    def forward(ctx: Any, record: Record | None, anchor: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.record = record
        ctx.mark_dirty(*outputs)  # they are ours: given on as they are, no views
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.record.receive(gradients)
        return (None, None, *[None for _ in gradients])


@dataclass
class Record:
    """What one batch leaves at a layer's border on the way forward, for the way back."""

    number: int
    call: Call
    luggage: Luggage
    leaves: list[Any] = field(default_factory=list)  # of the call's arguments; None where `kept` has them
    kept: dict[int, tuple[Ticket, Any]] = field(default_factory=dict)  # hidden states; their edge in the graph, if any
    shape: Any = None
    gradients: dict[int, Ticket] = field(default_factory=dict)  # by floating output

    def forward(self) -> Any:
        """Run the part without a graph; its outputs are differentiable."""
        from transformers.cache_utils import Cache

        self.leaves, self.shape = tree_flatten((self.call.args, self.call.kwargs))
        if any(isinstance(x, Cache) for x in self.leaves):
            raise CannotWalk(f"{self.call.part.name} fills a cache")
        before = [(id(x), x._version) if isinstance(x, Tensor) else id(x) for x in self.leaves]
        outputs, shape = self.first()
        after = tree_flatten((self.call.args, self.call.kwargs))[0]
        if before != [(id(x), x._version) if isinstance(x, Tensor) else id(x) for x in after]:
            raise self.changed
        floating = floats(outputs)
        alike = {outputs[i].shape for i in floating}  # of the first layer's inputs, which have no gradient
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and (leaf.requires_grad or (leaf.is_floating_point() and leaf.shape in alike)):
                edge = torch.autograd.graph.get_gradient_edge(leaf) if leaf.requires_grad else None
                self.kept[i] = (self.shelf.keep(leaf.detach()), edge)
                self.leaves[i] = None
        self.luggage.stay(self.leaves)
        self.call.args, self.call.kwargs = (), {}
        inputs = {t.untyped_storage().data_ptr() for t in after if isinstance(t, Tensor)}
        new = [
            t.clone() if t._is_view() or t.untyped_storage().data_ptr() in inputs else t
            for t in (outputs[i] for i in floating)
        ]
        anchor = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            tied = dict(zip(floating, Border.apply(self.receiver, anchor, *new), strict=True))
        self.leave(tied)
        for i, tensor in tied.items():
            outputs[i] = tensor
        return tree_unflatten(outputs, shape)

    @property
    def shelf(self) -> Shelf:
        return self.luggage.shelf

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        """A gradient of the outputs; several add up."""
        for i, g in enumerate(gradients):
            if g is not None:
                if i in self.gradients:
                    g = self.shelf.take(self.gradients[i]) + g
                self.gradients[i] = self.shelf.keep(g)

    @property
    def changed(self) -> CannotWalk:
        return CannotWalk(f"{self.call.part.name} changes what it is given")

    def first(self) -> tuple[list[Any], Any]:
        """What the part makes of the call, in leaves, and their shape."""
        with torch.no_grad(), self.luggage.using():
            return tree_flatten(self.call.run())

    @property
    def receiver(self) -> Record | None:
        """Who takes gradients as autograd brings them."""
        return self

    def leave(self, tied: dict[int, Tensor]) -> None:
        """Called with the outputs that are given on."""

    def again(self, leaves: list[Any]) -> tuple[list[Any], Any]:
        args, kwargs = tree_unflatten(leaves, self.shape)
        return tree_flatten(self.call.context.run(self.call.forward, *args, **kwargs))

    def inputs(self) -> list[Any]:
        """The call's leaves again, with what was kept, for good."""
        leaves = list(self.leaves)
        for i, (ticket, _) in self.kept.items():
            leaves[i] = self.shelf.take(ticket)
        return leaves

    def backward(self) -> None:
        """Run the part again, with a graph, and hand the gradients of its inputs on to what made them."""
        leaves = self.inputs()
        ins = {i: leaves[i].requires_grad_() for i, (_, edge) in self.kept.items() if edge is not None}
        with torch.enable_grad(), self.luggage.using():
            made, _ = self.again(leaves)
        outputs = [made[i] for i in floats(made)]
        found = {i: self.shelf.take(ticket) for i, ticket in self.gradients.items()}
        roots = [i for i in found if outputs[i].requires_grad]
        torch.autograd.backward([outputs[i] for i in roots], [found.pop(i) for i in roots])
        edges = [(self.kept[i][1], x.grad) for i, x in ins.items() if x.grad is not None]
        del made, outputs
        if edges:  # retained: a border's inputs may share what lies before them with other borders
            torch.autograd.backward([e for e, _ in edges], [g for _, g in edges], retain_graph=True)


def floats(leaves: list[Any]) -> list[int]:
    return [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]


class Chain:
    """What ties one batch's borders to each other: autograd."""

    def __init__(self, luggage: Luggage):
        self.luggage = luggage

    def record(self, number: int, call: Call) -> Record:
        """Of a border that the batch has come to."""
        return Record(number, call, self.luggage)

    def end(self, loss: Tensor) -> None:
        """The batch has come to its end: send its gradients back to the borders."""
        loss.backward(retain_graph=True)
