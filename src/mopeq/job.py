"""A checkpoint and what was asked of it: what every stage of the line is given.

Known from headers: sizes, the budget's exact totals. Made of it: the model that data is shown to, whole or layer by
layer, and what a sensor is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.checkpoint import Checkpoint, find_folder, open_checkpoint, read_json
from mopeq.errors import BadInput
from mopeq.families.standard import read_spec
from mopeq.memory import allowed_bytes, available_memory, layer_bytes, whole_bytes
from mopeq.nouns import Budget, MoESpec, PrecisionMap, size_text
from mopeq.options import Options
from mopeq.plan import Problem, Target, fixed_bytes, make_problem, target, uniform_target
from mopeq.progress import say
from mopeq.quant import sensed_as
from mopeq.rundir import RunDir, stage_digest
from mopeq.sense import SENSORS

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration
    from mopeq.sense.scene import Scene

NO_SENSE = ("uniform", "random")  # allocators that ask for no sensitivity


@dataclass(frozen=True)
class Job:
    """A checkpoint and what was asked of it; everything here is known from headers."""

    checkpoint: Checkpoint
    revision: str
    spec: MoESpec
    options: Options
    hub_id: str = ""

    @property
    def name(self) -> str:
        """What people know the source by: its id on the hub, or its folder's own name."""
        return self.hub_id or self.folder.resolve().name

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @cached_property
    def fixed(self) -> int:
        return fixed_bytes(self.spec, self.options.other)

    @cached_property
    def problem(self) -> Problem:
        return make_problem(self.spec, self.options.formats, self.options.per)

    @cached_property
    def budget(self) -> Budget | None:
        return self.options.budget(self.spec)

    @cached_property
    def target(self) -> Target | None:
        """The exact totals to be met, or None for what has no budget. BadInput if they cannot be."""
        if self.budget is None:
            return None
        find = uniform_target if self.options.allocate == "uniform" else target
        return find(self.spec, self.problem, self.budget, self.fixed)

    @cached_property
    def given_map(self) -> PrecisionMap | None:
        """The map of `--map FILE`, checked against the checkpoint."""
        if self.options.map is None:
            return None
        map_ = PrecisionMap.from_json(read_json(Path(self.options.map)), str(self.options.map))
        map_.check_covers(self.spec, str(self.options.map))
        return replace(map_, prefixes={layer.layer: layer.prefix for layer in self.spec.layers})

    @cached_property
    def predicted_bytes(self) -> int | None:
        """Payload of the finished checkpoint; None where only the scores decide (kmeans)."""
        if self.given_map is not None:
            return self.fixed + self.given_map.nbytes(self.spec)
        return None if self.target is None else self.fixed + self.target.expert_bytes

    @property
    def skips_sense(self) -> bool:
        return self.given_map is not None or self.options.allocate in NO_SENSE

    @property
    def sensing_quantizes(self) -> bool:
        """Whether sensing tries the very quantizer that is asked for, on all the data it is shown."""
        method = self.options.method
        return self.options.judges and sensed_as(method) == method

    @property
    def runs_whole(self) -> bool:
        """Whether methods that show data to the model have all of it in memory, which is faster and gives the same."""
        return whole_bytes(self.spec, self.options) <= allowed_bytes(self.options)

    @property
    def checks_experts(self) -> bool:
        """Whether the weights of routed experts are looked at before all else."""
        return bool(self.options.needs_data) and self.runs_whole

    @property
    def work_memory(self) -> int:
        """What moments, or activations that wait, may take at a time; of these the rest goes to disk."""
        return max(allowed_bytes(self.options) - layer_bytes(self.spec, self.options), 1 << 20)


def open_job(model: str | Path, options: Options) -> Job:
    folder, revision = find_folder(model)
    checkpoint = open_checkpoint(folder)
    return Job(checkpoint, revision, read_spec(checkpoint), options, hub_id=str(model) if revision else "")


def source_model(job: Job, attention: str | None) -> Any:
    import torch

    from mopeq.models import load_model, pick_device

    return load_model(job.folder, torch.float32, pick_device(job.options.device), attention)


def source_parts(job: Job, exact: bool, attention: str | None = None) -> Any:
    """The source's model for a walk layer by layer (walk/parts.py)."""
    from mopeq.models import pick_device
    from mopeq.walk import parts

    return parts.source_parts(job.folder, job.spec, pick_device(job.options.device), attention, exact=exact)


def by_layers_or_whole(job: Job, work: Callable[[Any], Any]) -> Any:
    """`work(parts)` where the model is to be walked, `work(None)` where it is to be in memory.

    A model that cannot be walked is loaded whole if the memory allows as much, else refused.
    """
    if not job.options.needs_data or job.runs_whole:
        return work(None)
    from mopeq.walk.parts import CannotWalk

    try:
        return work(partial(source_parts, job))
    except CannotWalk as problem:
        need, limit = whole_bytes(job.spec, job.options), job.options.memory_bytes or available_memory()
        if need > limit:
            raise BadInput(
                f"this model cannot run layer by layer ({problem.why}), and whole it takes {size_text(need)}",
                f"try --max-memory {need}, or --sensitivity hessian --method rtn",
            ) from None
        say(f"with the whole model in memory, since {problem.why}")
        return work(None)


def sense_digest(job: Job, calibration: Calibration | None) -> str:
    o, needs_data = job.options, SENSORS[job.options.sensitivity].needs_data
    return stage_digest(
        "sense",
        source=job.spec.digest,
        method=o.sensitivity,
        formats=[f.name for f in o.formats],
        scope=o.scope if o.sensitivity == "hybrid" else None,
        seed=o.seed if needs_data else None,
        data=sensed_digest(job, calibration) if needs_data else None,
        quantizer=sensed_as(o.method) if SENSORS[o.sensitivity].by_method else None,
    )


def sensed_digest(job: Job, calibration: Calibration | None) -> str | None:
    """Of the data that a sensor sees, and quantizers that it tries."""
    if calibration is None:
        return None
    return calibration.judged_digest if job.options.tries_quantizers else calibration.digest


def scene_of(job: Job, run: RunDir, digest: str, calibration: Calibration | None) -> Scene:
    """What the job's sensor is given; what it keeps lies in the run directory by the digest."""
    from mopeq.sense.scene import Scene

    o = job.options
    shown = calibration if SENSORS[o.sensitivity].needs_data else None
    tries = o.tries_quantizers
    return Scene(
        job.folder,
        job.spec,
        o.formats,
        o.seed,
        o.scope,
        model=lambda attention: source_model(job, attention),
        batches=() if shown is None else shown.judges if tries else shown.batches,
        fitted=shown.batches if shown and tries else None,
        data_digest=sensed_digest(job, shown) or "",
        quantizer=sensed_as(o.method),
        memory_bytes=job.work_memory,
        scratch=run.scratch,
        kept=run.kept(digest),
    )
