"""Second derivatives along a direction, layer by layer: how the loss's gradient changes as probes move.

A probe is a leaf that a watcher puts into a layer's arithmetic; all of them move with speed 1. A layer f takes h, which
moves with speed h', to f(h), which moves with J h' (`speeds`). On the way back g, the loss's gradient at its outputs,
becomes J^T g at its inputs and probes, and g', its speed, becomes the gradient of <f, g'> + <J^T g, h'> (`bend`): at
the probes that is the matrix of second derivatives times ones. What a model does between its layers keeps its small
graph, and is taken through the same two functions. Both are reverse mode within reverse mode: whatever can be
differentiated twice in memory can be here, and comes out to the same bits where sums have the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mopeq.walk.borders import Call, Chain, Record, floats
from mopeq.walk.shelf import Luggage, Shelf, Ticket

Point = Any  # a tensor, or its edge in the graph
Probes = dict[int, Tensor]  # by layer


class Moving(NamedTuple):
    """What others are made of, and how to have its speed; None stands still."""

    at: Point
    speed: Callable[[], Tensor | None]


class Coming(NamedTuple):
    """What the loss is made of, the loss's gradient at it, and that gradient's speed."""

    at: Point
    gradient: Tensor
    speed: Tensor | None


Bent = tuple[Tensor | None, Tensor | None]  # a gradient and its speed, as far as there are


def speeds(made: Sequence[Point], like: Sequence[Tensor], of: Sequence[Moving]) -> list[Tensor | None]:
    """The speeds of what was made, of the shapes of `like`: u -> J^T u is linear, and its derivative is J."""
    u = [torch.zeros_like(x, requires_grad=True) for x in like]
    back = grad(made, [x.at for x in of], u, create_graph=True, allow_unused=True) if made and of else ()
    moving = [(b, x.speed()) for b, x in zip(back, of, strict=bool(back)) if b is not None and b.requires_grad]
    moving = [(b, speed) for b, speed in moving if speed is not None]
    if not moving:
        return [None for _ in made]
    return list(grad([b for b, _ in moving], u, [speed for _, speed in moving], allow_unused=True))


def bend(come: Sequence[Coming], of: Sequence[Moving], retain: bool = False) -> list[Bent]:
    """The gradient at each `of` and its speed, from those of what was made of them."""
    if not come or not of:
        return [(None, None) for _ in of]
    points = [x.at for x in of]
    first = grad([x.at for x in come], points, [x.gradient for x in come], create_graph=True, allow_unused=True)
    seeds = [(x.at, x.speed) for x in come]
    seeds += [(g, x.speed()) for g, x in zip(first, of, strict=True) if g is not None and g.requires_grad]
    seeds = [(at, speed) for at, speed in seeds if speed is not None]
    second: Sequence[Tensor | None] = [None for _ in of]
    if seeds:
        roots, along = zip(*seeds, strict=True)
        second = grad(roots, points, along, retain_graph=retain, allow_unused=True)
    return [(None if g is None else g.detach(), speed) for g, speed in zip(first, second, strict=True)]


def bend_probes(probes: Probes, loss: Tensor) -> None:
    """With the whole graph there: each probe's `grad` becomes the speed of the loss's gradient at it."""
    bent = bend([Coming(loss, torch.ones_like(loss), None)], moving_probes(probes))
    for probe, (_, speed) in zip(probes.values(), bent, strict=True):
        probe.grad = speed


def moving_probes(probes: Probes) -> list[Moving]:
    return [Moving(probe, partial(torch.ones_like, probe)) for probe in probes.values()]


@dataclass(eq=False)
class Mark:
    """An output of a layer, as what follows it knows it: its edge in the graph and its speed; and what comes back."""

    edge: GradientEdge
    speed: Ticket | None
    gradient: Ticket | None = None
    gradient_speed: Ticket | None = None


class Curve(Chain):
    """One batch's borders, by the marks that each has left. `probes` are the walk's."""

    def __init__(self, luggage: Luggage, probes: Probes):
        super().__init__(luggage)
        self.probes = probes
        self.marks: list[Mark] = []

    @property
    def shelf(self) -> Shelf:
        return self.luggage.shelf

    def record(self, number: int, call: Call) -> Record:
        return Curved(number, call, self.luggage, curve=self, before=len(self.marks))

    def end(self, loss: Tensor) -> None:
        self.hand_back([Coming(loss, torch.ones_like(loss), None)], len(self.marks))

    def until(self, before: int) -> list[Moving]:
        """The first marks: all that what comes behind them is made of."""

        def look(mark: Mark) -> Tensor | None:
            return None if mark.speed is None else self.shelf.look(mark.speed)

        return [Moving(mark.edge, partial(look, mark)) for mark in self.marks[:before]]

    def hand_back(self, come: Sequence[Coming], before: int) -> None:
        """Give the first marks what comes back of what was made of them between the layers."""
        for mark, (g, speed) in zip(self.marks, bend(come, self.until(before), retain=True), strict=False):
            mark.gradient = self.sum(mark.gradient, g)
            mark.gradient_speed = self.sum(mark.gradient_speed, speed)

    def sum(self, kept: Ticket | None, more: Tensor | None) -> Ticket | None:
        if more is None:
            return kept
        return self.shelf.keep(more if kept is None else self.shelf.take(kept) + more)

    def come(self, at: Tensor, mark: Mark) -> list[Coming]:
        """What has come back to a mark, for good."""
        if mark.gradient is None:
            return []
        speed = None if mark.gradient_speed is None else self.shelf.take(mark.gradient_speed)
        return [Coming(at, self.shelf.take(mark.gradient), speed)]

    def forget(self, before: int) -> None:
        """All marks but the first: what they are needed for is done."""
        for mark in self.marks[before:]:
            if mark.speed is not None:
                self.shelf.drop(mark.speed)
        del self.marks[before:]


@dataclass
class Curved(Record):
    """What one batch leaves at a layer's border, the `before` first marks of its curve ahead of it."""

    curve: Curve = None  # type: ignore[assignment]
    before: int = 0
    speeds: Mapping[int, Tensor | None] = field(default_factory=dict)  # of the outputs, until they have marks
    marks: dict[int, Mark] = field(default_factory=dict)  # by output

    def run(self, leaves: list[Any], edges: Mapping[int, GradientEdge]) -> tuple[list[Any], Any, list[Moving]]:
        """The part's outputs with a graph, their shape, and what they are made of: inputs that have edges, probes."""
        ins = {i: leaves[i].detach().requires_grad_() for i in edges}
        come = speeds(list(edges.values()), list(ins.values()), self.curve.until(self.before))
        self.curve.probes.clear()
        with torch.enable_grad(), self.luggage.using():
            try:
                made, shape = self.again([ins.get(i, leaf) for i, leaf in enumerate(leaves)])
            except RuntimeError as problem:
                if "in-place operation" in str(problem):  # torch refuses at once what a plain record sees afterwards
                    raise self.changed from problem
                raise
        return made, shape, [*map(moving, ins.values(), come), *moving_probes(self.curve.probes)]

    def first(self) -> tuple[list[Any], Any]:
        edges = {
            i: get_gradient_edge(x) for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.requires_grad
        }
        made, shape, of = self.run(self.leaves, edges)
        at = [i for i in floats(made) if made[i].requires_grad]
        outputs = [made[i] for i in at]
        self.speeds = dict(zip(at, speeds(outputs, outputs, of), strict=True))
        return [x.detach() if isinstance(x, Tensor) else x for x in made], shape

    @property
    def receiver(self) -> None:
        """Nobody: the curve asks for both kinds of gradients itself."""

    def leave(self, tied: dict[int, Tensor]) -> None:
        for i, speed in self.speeds.items():
            kept = None if speed is None else self.shelf.keep(speed)
            self.marks[i] = Mark(get_gradient_edge(tied[i]), kept)
        self.curve.marks += self.marks.values()
        self.speeds = {}

    def backward(self) -> None:
        """Run the part again, give the probes their gradients, and hand on those of the inputs."""
        edges = {i: edge for i, (_, edge) in self.kept.items() if edge is not None}
        made, _, of = self.run(self.inputs(), edges)
        come = [coming for i, mark in self.marks.items() for coming in self.curve.come(made[i], mark)]
        bent = bend(come, of)
        del made, come, of
        ins, probes = bent[: len(edges)], bent[len(edges) :]
        for probe, (_, speed) in zip(self.curve.probes.values(), probes, strict=True):
            probe.grad = speed
        back = [Coming(edge, g, speed) for edge, (g, speed) in zip(edges.values(), ins, strict=True) if g is not None]
        self.curve.hand_back(back, self.before)
        self.curve.forget(self.before)


def moving(at: Tensor, speed: Tensor | None) -> Moving:
    return Moving(at, lambda: speed)
