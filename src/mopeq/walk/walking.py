"""Leads all batches through a model together, part by part, so that each part's weights are read once for all of them.

    for visit in walk.forward(runs):        a part has its weights
        visit.run()                         every batch passes it

A batch runs the model's own forward, in a thread of its own that stands still wherever a streamed part is called; the
part itself runs in the caller's thread. Only one thread ever moves, and batches pass a part in their order, so sums
and random draws come in the order of a plain loop. Whatever a model does between its layers is thus its own code.

Backward (`walk.gradients`) a decoder layer is recomputed from the inputs kept at its border, with its weights read for
the second time, and its part of the chain rule is applied: the gradients are of the whole loss, exact, and no more
than one layer's graph exists. What lies between the parts keeps its (small) graph.

Without streamed parts the same calls run the whole model batch by batch: the plain loop that all else must equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mopeq.nouns import MoELayer
from mopeq.walk.parts import HEAD, CannotWalk, Part, Parts, Resident
from mopeq.walk.shelf import Luggage, Shelf, Ticket, storages

Run = Callable[[], Tensor | None]  # one batch through the model; on the way back, the loss it returns is differentiated
_here = threading.local()  # .job: the job whose thread this is


class Dropped(BaseException):
    """Ends the thread of a job that nobody waits for any more."""


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


class Job:
    """One batch's way through the model. `go` lets it move until it comes to a part (`call`) or ends."""

    def __init__(self, number: int, run: Run, luggage: Luggage, differentiable: bool, ahead: bool = False):
        self.number, self.run, self.differentiable, self.ahead = number, run, differentiable, ahead
        self.luggage = luggage
        self.call: Call | None = None
        self.loss: Tensor | None = None
        self.error: BaseException | None = None
        self.given: Any = None
        self.dropped = False
        self.thread: threading.Thread | None = None
        # not semaphores: a signal within their release, which is Python, can lose a wake-up, and all stands still
        self.may_move, self.has_stopped = SimpleQueue[None](), SimpleQueue[None]()

    def go(self, given: Any = None) -> None:
        self.given, self.call = given, None
        if self.thread is None:
            self.thread = threading.Thread(target=self.live, daemon=True, name=f"batch {self.number}")
            self.thread.start()
        else:
            self.may_move.put(None)
        self.has_stopped.get()
        if self.call is None:
            self.thread.join()
            if self.error is not None:
                if isinstance(self.error, NotImplementedError | RuntimeError) and "meta" in str(self.error):
                    raise CannotWalk("it uses a layer's weights outside of that layer") from self.error
                raise self.error

    def live(self) -> None:
        _here.job = self
        try:
            with torch.set_grad_enabled(self.differentiable), self.luggage.watching():
                self.loss = self.run()
        except Dropped:
            return
        except BaseException as error:
            self.error = error
        self.has_stopped.put(None)

    def stop_at(self, call: Call) -> Any:
        """In the job's own thread: wait at a part for what it gives."""
        self.call = call
        self.has_stopped.put(None)
        self.may_move.get()
        if self.dropped:
            raise Dropped
        given, self.given = self.given, None
        return given

    def drop(self) -> None:
        self.call = None
        if self.thread is not None and self.thread.is_alive():
            self.dropped = True
            self.may_move.put(None)
            self.thread.join()


@dataclass
class Visit:
    """A part with its weights. `run()` takes every batch that waits there through it, or back through it; `each()`
    does so one after another, as it is iterated.

    `layers`: its MoE layers and their experts modules; `backward`: gradients flow (outputs of those modules are
    differentiable, and their hooks run). `ahead()` takes the batches that go ahead through, as it is iterated: before
    the others, and in every visit on the way forward.
    """

    layers: tuple[tuple[MoELayer, Any], ...]
    backward: bool
    each: Callable[[], Iterator[None]]
    ahead: Callable[[], Iterator[None]]

    def run(self) -> None:
        for _ in self.each():
            pass


class Border(torch.autograd.Function):
    """Ties a layer's outputs, computed without a graph, to the record that will take their gradients."""

    @staticmethod
    def forward(ctx: Any, record: Record, anchor: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
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
        with torch.no_grad(), self.luggage.using():
            made = self.call.run()
        after = tree_flatten((self.call.args, self.call.kwargs))[0]
        if before != [(id(x), x._version) if isinstance(x, Tensor) else id(x) for x in after]:
            raise CannotWalk(f"{self.call.part.name} changes what it is given")
        outputs, shape = tree_flatten(made)
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
            tied = Border.apply(self, anchor, *new)
        for i, tensor in zip(floating, tied, strict=True):
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

    def again(self, leaves: list[Any]) -> list[Any]:
        args, kwargs = tree_unflatten(leaves, self.shape)
        return tree_flatten(self.call.context.run(self.call.forward, *args, **kwargs))[0]

    def backward(self) -> None:
        """Run the part again, with a graph, and hand the gradients of its inputs on to what made them."""
        leaves = list(self.leaves)
        for i, (ticket, _) in self.kept.items():
            leaves[i] = self.shelf.take(ticket)
        ins = {i: leaves[i].requires_grad_() for i, (_, edge) in self.kept.items() if edge is not None}
        with torch.enable_grad(), self.luggage.using():
            made = self.again(leaves)
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


class Walk:
    """A model's parts, and the batch that moves: `now` is its number, for those who watch.

    CannotWalk (from `forward` and `gradients`) where layers are entered twice or share state that changes.
    """

    def __init__(self, parts: Parts | Resident, shelf: Shelf | None = None):
        self.parts, self.model, self.shelf = parts, parts.model, shelf or Shelf()
        self.now = 0

    @property
    def device(self) -> str:
        return self.parts.device

    @property
    def whole(self) -> bool:
        """Whether all weights are resident, so that nothing is walked."""
        return not any(part.streamed for part in self.parts.parts)

    def forward(self, runs: Sequence[Run], layers_only: bool = False, ahead: Sequence[Run] = ()) -> Iterator[Visit]:
        """Visits in the order that the batches need. Every visit's `run` must be called, once; before it `ahead`, where
        there are such runs: those that go ahead, for who must know all of a layer's inputs before it runs for others.

        layers_only=True: nobody asks for what the runs return, so the last MoE layer may be the end.
        """
        if self.whole:
            yield self.plainly(runs, False, ahead)
            return
        for visit, more in self.onward(runs, None, ahead):
            yield visit
            if layers_only and not more:
                return

    def gradients(self, runs: Sequence[Run], ahead: Sequence[Run] = ()) -> Iterator[Visit]:
        """As `forward`, and then back: each run's loss is differentiated. Visits with `backward` are where gradients
        flow; the order of the batches is the same there."""
        if self.whole:
            yield self.plainly(runs, True, ahead)
            return
        trail: list[tuple[Part, list[Record]]] = []
        for visit, _ in self.onward(runs, trail, ahead):
            yield visit
        while trail:
            part, records = trail.pop()
            with self.parts.loaded(part):
                yield Visit(part.layers, True, partial(self.back, records), lambda: iter(()))

    def plainly(self, runs: Sequence[Run], backward: bool, ahead: Sequence[Run]) -> Visit:
        """One visit for the whole model, batch by batch."""

        def each() -> Iterator[None]:
            for number, one in enumerate(runs):
                self.now = number
                with torch.set_grad_enabled(backward):
                    loss = one()
                if backward and loss is not None:
                    loss.backward()
                yield

        def first() -> Iterator[None]:
            for number, one in enumerate(ahead):
                self.now = number
                with torch.no_grad():
                    one()
                yield

        return Visit(tuple(pair for part in self.parts.parts for pair in part.layers), backward, each, first)

    def back(self, records: list[Record]) -> Iterator[None]:
        records.reverse()
        while records:
            record = records.pop()
            self.now, luggage = record.number, record.luggage
            luggage.pick_up()
            record.backward()
            del record
            luggage.lay_down()
            yield

    def onward(
        self, runs: Sequence[Run], trail: list[tuple[Part, list[Record]]] | None, ahead: Sequence[Run]
    ) -> Iterator[tuple[Visit, bool]]:
        """Visits, and whether MoE layers are to come: after the last, those that go ahead go no further."""
        jobs = [Job(number, run, Luggage(self.shelf), False, ahead=True) for number, run in enumerate(ahead)]
        jobs += [Job(number, run, Luggage(self.shelf), trail is not None) for number, run in enumerate(runs)]
        own = [(part.module, part.module.__dict__.get("forward")) for part in self.parts.parts]
        for part in self.parts.parts:
            part.module.forward = stopping(part, part.module.forward)
        seen: set[str] = set()
        left = {part.name for part in self.parts.parts if part.layers}
        try:
            for job in jobs:
                self.now = job.number
                self.advance(job)
            while waiting := [job for job in jobs if job.call is not None]:
                part = min((job.call.part for job in waiting if job.call), key=lambda part: part.order)
                if part.layers and part.name in seen:
                    raise CannotWalk(f"{part.name} is entered twice")
                seen.add(part.name)
                ends = left == {part.name}
                left.discard(part.name)
                records: list[Record] = []
                with self.parts.loaded(part):
                    here = [job for job in waiting if job.call and job.call.part is part]
                    each = partial(self.pass_part, part, [job for job in here if not job.ahead], records)
                    first = partial(self.pass_part, part, [job for job in here if job.ahead], records, ends)
                    yield Visit(part.layers, False, each, first), bool(left)
                if records and trail is not None:
                    trail.append((part, records))
                    records = []
        finally:
            for module, forward in own:
                del module.forward
                if forward is not None:
                    module.forward = forward
            for job in jobs:
                job.drop()
            for job in jobs:
                job.luggage.end()

    def pass_part(self, part: Part, here: list[Job], records: list[Record], ends: bool = False) -> Iterator[None]:
        """Take the jobs that wait at a part through it, each up to where it waits next; or to their end here."""
        for job in here:
            assert job.call is not None
            self.now = job.number
            job.luggage.pick_up()
            call, job.call = job.call, None
            if not job.differentiable or not (part.layers or needs_gradient(call)):
                with torch.no_grad(), job.luggage.using():
                    made = call.run()
            elif part.order[0] == HEAD:  # its graph is short-lived: the loss follows at once
                with torch.enable_grad(), job.luggage.using():
                    made = call.run()
            else:
                records.append(Record(job.number, call, job.luggage))
                made = records[-1].forward()
            job.luggage.see(made, whose(part, call))
            del call
            if ends:
                job.drop()
                job.luggage.end()
            else:
                self.advance(job, made)
            del made
            yield

    def advance(self, job: Job, given: Any = None) -> None:
        """Let a job move to the next streamed part, or to its end; resident parts run on the way."""
        job.go(given)
        while job.call is not None and not job.call.part.streamed:
            with torch.set_grad_enabled(job.differentiable), job.luggage.watching():
                given = job.call.run()
            job.go(given)
        del given
        if job.call is None:
            loss, job.loss = job.loss, None
            if job.differentiable and loss is not None:
                loss.backward(retain_graph=True)
            job.luggage.end()
        job.luggage.lay_down()


def stopping(part: Part, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A part's forward that hands the call to whoever leads the thread's job."""

    def stop(*args: Any, **kwargs: Any) -> Any:
        job = getattr(_here, "job", None)
        if job is None:
            return forward(*args, **kwargs)
        return job.stop_at(Call(part, forward, args, kwargs, copy_context()))

    return stop


def whose(part: Part, call: Call) -> set[Any]:
    """The storages that a part is called with, and its own."""
    state = (*part.module.parameters(), *part.module.buffers())
    return {storage for storage, _ in storages((call.args, call.kwargs, state))}


def needs_gradient(call: Call) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_flatten((call.args, call.kwargs))[0])
