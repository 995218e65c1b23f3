"""Leads all batches through a model together, part by part, so that each part's weights are read once for all of them.

    for visit in walk.forward(runs):        a part has its weights
        visit.run()                         every batch passes it

A batch runs the model's own forward, in a thread of its own that stands still wherever a streamed part is called; the
part itself runs in the caller's thread. Only one thread ever moves, and batches pass a part in their order, so sums
and random draws come in the order of a plain loop. Whatever a model does between its layers is thus its own code.

Backward (`walk.gradients`) a decoder layer is recomputed from the inputs kept at its border, with its weights read for
the second time, and its part of the chain rule is applied: the gradients are of the whole loss, exact, and no more
than one layer's graph exists. What lies between the parts keeps its (small) graph. `walk.curvatures` does so to second
order (curving.py).

Without streamed parts the same calls run the whole model batch by batch: the plain loop that all else must equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

from mopeq.nouns import MoELayer
from mopeq.walk.borders import Call, Chain, Record
from mopeq.walk.curving import Curve, Probes, bend_probes
from mopeq.walk.parts import HEAD, CannotWalk, Part, Parts, Resident
from mopeq.walk.shelf import Luggage, Shelf, storages

Run = Callable[[], Tensor | None]  # one batch through the model; on the way back, the loss it returns is differentiated
_here = threading.local()  # .job: the job whose thread this is


class Dropped(BaseException):
    """Ends the thread of a job that nobody waits for any more."""


class Staying(TorchFunctionMode):
    """A model that moves a tensor to where it sees some weight, on meta while that is not loaded, lets it stay."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is Tensor.to and made.is_meta and not args[0].is_meta:
            return args[0].to(made.dtype)
        return made


class Job:
    """One batch's way through the model. `go` lets it move until it comes to a part (`call`) or ends."""

    def __init__(self, number: int, run: Run, luggage: Luggage, chain: Chain | None = None, ahead: bool = False):
        """`chain`: for the way back, where there is one."""
        self.number, self.run, self.chain, self.ahead = number, run, chain, ahead
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
            with torch.set_grad_enabled(self.chain is not None), Staying(), self.luggage.watching():
                self.loss = self.run()
        except Dropped:
            return
        except BaseException as error:
            self.error = error
        self.has_stopped.put(None)

    def stop_at(self, call: Call) -> Any:
        """In the job's own thread: wait at a part for what it gives. CannotWalk where it is given no numbers."""
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((call.args, call.kwargs))):
            raise CannotWalk(f"{call.part.name} is given what was made where another layer's weights seemed to be")
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


class Walk:
    """A model's parts, and the batch that moves: `now` is its number, for those who watch.

    `probes`: those of the run, or part, that ran last (`curvatures`). CannotWalk (from every kind of walk) where layers
    are entered twice or share state that changes.
    """

    def __init__(self, parts: Parts | Resident, shelf: Shelf | None = None):
        self.parts, self.model, self.shelf = parts, parts.model, shelf or Shelf()
        self.now = 0
        self.probes: Probes = {}

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
            yield self.plainly(runs, None, ahead)
            return
        for visit, more in self.onward(runs, None, ahead, []):
            yield visit
            if layers_only and not more:
                return

    def gradients(self, runs: Sequence[Run], ahead: Sequence[Run] = ()) -> Iterator[Visit]:
        """As `forward`, and then back: each run's loss is differentiated. Visits with `backward` are where gradients
        flow; the order of the batches is the same there."""
        if self.whole:
            yield self.plainly(runs, Tensor.backward, ahead)
            return
        yield from self.there_and_back(runs, Chain, ahead)

    def curvatures(self, runs: Sequence[Run]) -> Iterator[Visit]:
        """As `gradients`, of second order: watchers put probes into the parts (`probes[key] = leaf`, zeros that require
        a gradient), and as each batch has passed a visit with `backward`, these have as `grad` the sums of their rows
        in the matrix of second derivatives by all of the run's probes."""
        if self.whole:
            yield self.plainly(runs, partial(bend_probes, self.probes))
            return
        yield from self.there_and_back(runs, partial(Curve, probes=self.probes))

    def there_and_back(
        self, runs: Sequence[Run], chain: Callable[[Luggage], Chain], ahead: Sequence[Run] = ()
    ) -> Iterator[Visit]:
        trail: list[tuple[Part, list[Record]]] = []
        for visit, _ in self.onward(runs, chain, ahead, trail):
            yield visit
        while trail:
            part, records = trail.pop()
            with self.loaded(part):
                yield Visit(part.layers, True, partial(self.back, records), lambda: iter(()))

    @contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """Within the block a part has its weights; the holes are trimmed that reading and the part before left."""
        with self.parts.loaded(part):
            self.shelf.trim()
            yield

    def plainly(self, runs: Sequence[Run], end: Callable[[Tensor], None] | None, ahead: Sequence[Run] = ()) -> Visit:
        """One visit for the whole model, batch by batch; `end` differentiates a loss."""
        backward = end is not None

        def each() -> Iterator[None]:
            for number, one in enumerate(runs):
                self.now = number
                self.probes.clear()
                with torch.set_grad_enabled(backward):
                    loss = one()
                if end is not None and loss is not None:
                    end(loss)
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
        self,
        runs: Sequence[Run],
        chain: Callable[[Luggage], Chain] | None,
        ahead: Sequence[Run],
        trail: list[tuple[Part, list[Record]]],
    ) -> Iterator[tuple[Visit, bool]]:
        """Visits, and whether MoE layers are to come: after the last, those that go ahead go no further."""
        jobs = [Job(number, run, Luggage(self.shelf), ahead=True) for number, run in enumerate(ahead)]
        for number, run in enumerate(runs):
            luggage = Luggage(self.shelf)
            jobs.append(Job(number, run, luggage, None if chain is None else chain(luggage)))
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
                with self.loaded(part):
                    here = [job for job in waiting if job.call and job.call.part is part]
                    each = partial(self.pass_part, part, [job for job in here if not job.ahead], records)
                    first = partial(self.pass_part, part, [job for job in here if job.ahead], records, ends)
                    yield Visit(part.layers, False, each, first), bool(left)
                if records:
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
            if job.chain is None or not (part.layers or needs_gradient(call)):
                with torch.no_grad(), job.luggage.using():
                    made = call.run()
            elif part.order[0] == HEAD:  # its graph is short-lived: the loss follows at once
                with torch.enable_grad(), job.luggage.using():
                    made = call.run()
            else:
                records.append(job.chain.record(job.number, call))
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
            with torch.set_grad_enabled(job.chain is not None), job.luggage.watching():
                given = job.call.run()
            job.go(given)
        del given
        if job.call is None:
            loss, job.loss = job.loss, None
            if job.chain is not None and loss is not None:
                job.chain.end(loss)
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
