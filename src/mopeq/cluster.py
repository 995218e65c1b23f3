"""`--ray`: sensing by data and quantization by layer, as tasks of a Ray cluster whose machines share a folder.

A task makes some of the items that a run directory keeps (a layer's candidates, a batch's gradients, a quantized layer)
by the very code that makes them on one machine; that code then finds them done, so the result is the same bytes. When a
machine dies Ray starts its task elsewhere, and the task goes on behind the items that lie there already.

MODEL, OUT, --run and the data must be at the same paths on every machine. Left out: sensors other than those by
gradients and errors, and models that must be walked layer by layer, are sensed by the machine that asks; within a layer
experts stay together, since a calibrated quantizer's rounding depends on what is multiplied together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.errors import BadInput, MopeqError, first_line
from mopeq.memory import allowed_bytes
from mopeq.nouns import PrecisionMap
from mopeq.options import Options
from mopeq.progress import progress, say, silence
from mopeq.rundir import RunDir

if TYPE_CHECKING:
    from mopeq.job import Job
    from mopeq.sense.scene import Scene

RETRIES = 5  # of a task whose machine is lost; what it threw itself is told at once
SHARED = ("fisher", "fisher-seq", "error")  # sensors whose batches are items of their own


@dataclass(frozen=True)
class Order:
    """What a task is to make, in words that travel. `digest` names the stage's folder in `run`."""

    model: Path
    options: Options
    source: str
    data: str | None
    run: Path
    digest: str
    threads: int
    layers: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    map: Any = None  # a PrecisionMap's JSON; without one the task senses


def order_of(job: Job, run: RunDir, digest: str, data: str | None) -> Order:
    import torch

    o = job.options
    memory = str(allowed_bytes(o))  # the same on every machine: whether a model is walked must not differ
    calib = tuple(Path(path).resolve() for path in o.calib)
    options = replace(o, max_memory=memory, calib=calib, run=None, map=None)
    folder = job.folder.resolve()
    return Order(folder, options, job.spec.digest, data, run.path.resolve(), digest, torch.get_num_threads())


def sense(job: Job, run: RunDir, digest: str, scene: Scene) -> None:
    """Have a cluster make what `sense` keeps: all candidates, then all batches."""
    if job.options.sensitivity not in SHARED or not job.runs_whole:
        say(f"ray: {job.options.sensitivity} is sensed by this machine alone")
        return
    order = order_of(job, run, digest, scene.data_digest)
    layers = [x.layer for x in job.spec.layers if not scene.kept.has(f"candidates-{x.layer}")]
    batches = [n for n in range(len(scene.batches)) if not scene.kept.has(f"batch-{n}")]
    if batches:
        hand_out("sense: candidates", [replace(order, layers=part) for part in parts(layers, slots(order))])
    hand_out("sense: batches", [replace(order, batches=part) for part in parts(batches, slots(order))])


def quantize(job: Job, run: RunDir, map_: PrecisionMap, files: Mapping[int, Path], data: str | None) -> None:
    """Have a cluster make the layers whose files are not there."""
    order = replace(order_of(job, run, next(iter(files.values())).parent.name, data), map=map_.to_json())
    todo = [layer for layer, file in files.items() if not file.exists()]
    hand_out(f"quantize: {job.options.method}", [replace(order, layers=part) for part in parts(todo, slots(order))])


# ------------------------------------------------------------------------------------------------ the cluster


def awake(address: str | None) -> Any:
    """The ray module, connected; BadInput where there is none, or no cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise BadInput("--ray needs Ray, which is not installed", "pip install 'mopeq[ray]'") from None
    if not ray.is_initialized():
        where = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **where)
        except (ConnectionError, ValueError, RuntimeError, OSError) as problem:
            raise BadInput(
                f"no Ray cluster answers at {address}: {first_line(problem)}",
                "start one with `ray start --head`, or give --ray local for this machine alone",
            ) from None
    return ray


def machines(order: Order) -> list[int]:
    """CPUs of each machine that is alive."""
    ray = awake(order.options.ray)
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


def width(order: Order) -> int:
    """CPUs a task asks for: its threads, or all that the smallest machine has."""
    return max(1, min([order.threads, *(n for n in machines(order) if n)]))


def slots(order: Order) -> int:
    """How many tasks run at a time."""
    one = width(order)
    return max(1, sum(n // one for n in machines(order)))


def parts(items: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The items in at most so many parts of about the same size, neighbours together."""
    count = min(count, len(items))
    return [tuple(items[i * len(items) // count : (i + 1) * len(items) // count]) for i in range(count)]


def hand_out(what: str, orders: Sequence[Order]) -> None:
    """Run tasks to their end. MopeqError with what the first of them said that failed."""
    if not orders:
        return
    ray = awake(orders[0].options.ray)
    task = ray.remote(work).options(num_cpus=width(orders[0]), max_retries=RETRIES)
    with progress(f"{what} by ray", len(orders), "tasks") as p:
        waiting = [task.remote(order) for order in orders]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                said = ray.get(ready[0])
            except ray.exceptions.RayError as problem:
                raise MopeqError(
                    f"a task of the cluster failed: {first_line(problem)}", "the same command goes on from there"
                ) from None
            if said is not None:
                raise (BadInput if said[0] == BadInput.exit_code else MopeqError)(*said[1:])
            p.step()


def work(order: Order) -> tuple[int, str, str] | None:
    """On some machine of the cluster: make what is ordered. What mopeq refuses is returned, to be told where it was
    asked."""
    import torch

    from mopeq.checks import load_calibration
    from mopeq.job import open_job, scene_of, sensed_digest
    from mopeq.making import quantize_files

    torch.set_num_threads(order.threads)
    try:
        with silence():
            job = open_job(order.model, order.options)
            calibration = load_calibration(job)
            if job.spec.digest != order.source:
                raise BadInput(f"{order.model} is not the same on all machines", "share one folder between them")
            senses = order.map is None
            data = sensed_digest(job, calibration) if senses else calibration and calibration.digest
            if order.data is not None and data != order.data:
                raise BadInput("the calibration data is not the same on all machines", "share one folder between them")
            run = RunDir(order.run)
            if senses:
                from mopeq.sense.quadratic import share

                scene = scene_of(job, run, order.digest, calibration)
                share(scene, job.options.sensitivity, order.layers, order.batches)
            else:
                files = {layer: run.layer_path(order.digest, layer) for layer in order.layers}
                quantize_files(job, run, PrecisionMap.from_json(order.map), files, calibration)
    except MopeqError as problem:
        return problem.exit_code, problem.line, problem.hint
    return None
