"""The whole line on one page: each stage reads from the run directory, calls a pure function, commits.

headers -> MoESpec -> plan -> sense -> allocate -> PrecisionMap -> quantize -> packed checkpoint
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mopeq.alloc import ALLOCATORS
from mopeq.alloc.reach import largest_code_total
from mopeq.checkpoint import (
    Checkpoint,
    change_between,
    find_folder,
    fingerprint,
    open_checkpoint,
    read_json,
    same_bytes,
)
from mopeq.errors import BadInput
from mopeq.families.standard import read_spec
from mopeq.memory import allowed_bytes, available_memory, layer_bytes, loaded_bytes, shelf_bytes, whole_bytes
from mopeq.nouns import (
    Budget,
    Format,
    LinearId,
    MoELayer,
    MoESpec,
    PrecisionMap,
    Sensitivity,
    make_map,
    members_by_format,
    parse_size,
    size_text,
)
from mopeq.options import Options
from mopeq.packed import MANIFEST, RUN, WRITTEN, check_sizes, json_bytes, read_manifest, write_atomic, write_manifest
from mopeq.plan import (
    Problem,
    Target,
    cluster_bounds,
    fixed_bytes,
    kv_bytes_per_token,
    largest_layer_bytes,
    make_problem,
    target,
    uniform_bytes,
    uniform_target,
)
from mopeq.progress import progress, say
from mopeq.quant import QUANTIZERS, sensed_as
from mopeq.rundir import CANDIDATES, Kept, RunDir, free_bytes, stage_digest
from mopeq.sense import SENSORS
from mopeq.tables import pick

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration
    from mopeq.sense.scene import Scene
    from mopeq.sense.trial import Trial
    from mopeq.tensors import QWeight
    from mopeq.tune import Tuned

SOURCE = ".mopeq/source.json"  # in OUT: the folder it is made from, and what lay there
NO_BYTES = (
    "run",
    "device",
    "max_memory",
    "map",
    "calib",
    "avg_bits",
    "fit",
    "ray",
)  # options that change none, or are told apart
AT_A_TIME = 1 << 24  # weights that are quantized together, in float32
SURE = 2.0  # standard errors by which a map must beat one width where they are tried
TRIAL_TOKENS = 8192  # of calibration beyond what was shown, on which a map is tried against one width
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


def open_job(model: str | Path, options: Options) -> Job:
    folder, revision = find_folder(model)
    checkpoint = open_checkpoint(folder)
    return Job(checkpoint, revision, read_spec(checkpoint), options, hub_id=str(model) if revision else "")


# -------------------------------------------------------------------------------------------------- plan


def plan(model: str | Path, **options: Any) -> dict[str, Any]:
    """Sizes from headers alone, before any weight is read: what `mopeq plan --json` prints (docs/commands.md)."""
    job = open_job(model, Options(**options))
    return forecast(job)


def forecast(job: Job) -> dict[str, Any]:
    spec, options = job.spec, job.options
    by_bits = {str(f.bits): uniform_bytes(spec, f, job.fixed) for f in reversed(options.formats)}
    predicted = job.predicted_bytes
    shown = {
        "model_type": spec.model_type,
        "params": spec.params,
        "expert_params": spec.expert_params,
        "layers": len(spec.layers),
        "experts": sum(layer.experts for layer in spec.layers),
        "bytes_bf16": 2 * spec.params,
        "bytes_source": spec.nbytes,
        "header_bytes_source": job.checkpoint.header_bytes,
        "bytes_by_bits": by_bits,
        "bytes_other": job.fixed,
        "bytes_by_role": bytes_by_role(spec),
        "budget_bytes": predicted if job.budget is None or job.budget.fit_bytes is None else job.budget.fit_bytes,
        "predicted_bytes": predicted,
    }
    if predicted is None:
        least, most = cluster_bounds(job.problem, options.scope)
        shown |= {"minimum_bytes": job.fixed + least, "maximum_bytes": job.fixed + most}
    kv = kv_bytes_per_token(spec.config)
    return shown | {
        "run": {
            "weights_bytes": predicted,
            "kv_cache_bytes_per_1000_tokens": None if kv is None else 1000 * kv,
            "largest_layer_bytes": largest_layer_bytes(spec),
            "make_bytes": layer_bytes(spec, options),
        },
        "notes": plan_notes(job),
    }


def bytes_by_role(spec: MoESpec) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, tensor in spec.tensors.items():
        sizes[spec.roles[name]] = sizes.get(spec.roles[name], 0) + tensor.nbytes
    return dict(sorted(sizes.items(), key=lambda kv: -kv[1]))


def plan_notes(job: Job) -> list[str]:
    """What a user should know before starting."""
    notes = []
    target = job.target
    if target is not None and target.code_bits is not None and job.options.allocate != "uniform":
        least = -largest_code_total(job.problem.code_JF, -job.problem.bytes_JF, target.code_bits)[1]
        if least < target.expert_bytes:
            notes.append(
                "a code bit costs more bytes in some matrices than in others here: maps of this average differ by up"
                f" to {target.expert_bytes - least:,} bytes; the plan counts the most, and what a map leaves is padding"
            )
            if len(job.options.groups) > 1:
                notes.append(
                    "--avg-bits counts codes, not scales: only a budget by --fit makes group sizes pay their way"
                )
    return notes


# ---------------------------------------------------------------------------------------------- quantize


def quantize(model: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """The whole line, resumable: MODEL to a packed checkpoint. Returns what `--json` prints (docs/commands.md)."""
    started = time.monotonic()
    job, out = open_job(model, Options(**options)), Path(out)
    job.options.check_scores()
    predicted = job.predicted_bytes  # whether the budget can be met is checked before anything else
    digest = job_digest(job)
    before = refuse_changed(job, out)
    if (done := finished(out, digest)) is not None:
        say(f"{out} is already made, by the same command from the same source")
        return done
    check_out(job, out)
    check_ties(job)
    from mopeq.models import pick_device
    from mopeq.readback import check_model

    pick_device(job.options.device)  # refused where there is none, also by what does not need it
    check_model(job.folder, job.spec, job.options.other)
    if job.options.ray:
        from mopeq import cluster

        cluster.awake(job.options.ray)
    calibration = load_calibration(job)
    run = RunDir(Path(job.options.run) if job.options.run else out / ".mopeq")
    source = job.spec.nbytes
    ahead = "its size is decided by the clusters" if predicted is None else size_text(predicted)
    say(f"{job.name}: {size_text(source)} -> {ahead}")
    with ExitStack() as held:
        for place in sorted({run.path.resolve(), (out / ".mopeq").resolve()}):  # --run may be shared, and OUT too
            held.enter_context(RunDir(place).locked())
        if (done := finished(out, digest)) is not None:  # by another process, between the look above and the lock
            return done
        claim(job, out, before)
        check_room(job, run, calibration)
        run.event("start", job=digest)
        write_atomic(run.path / "spec.json", json_bytes(forecast(job) | made_from(job, calibration)))
        checked = stage_digest(
            "check", source=job.spec.digest, experts=checks_experts(job), other=job.options.other_bits
        )
        if not run.has_done(checked):
            check_weights(job)
            run.set_done(checked)
        sensitivity = None if skips_sense(job) else sense(job, run, calibration)
        map_, checked_map = allocate(job, run, sensitivity, calibration)
        files, notes = quantize_layers(job, run, map_, calibration)
        files, tuned = tune_layers(job, run, map_, files, calibration)
        payload = write_checkpoint(job, out, map_, files)
        assert predicted is None or payload == predicted, f"planned {predicted} bytes, wrote {payload}"
        difference = check(job, out, map_)
        facts: dict[str, Any] = {
            "out": str(out),
            "bytes_weights": payload,
            "predicted_bytes": payload if predicted is None else predicted,
            "bytes_source": source,
            "avg_expert_bits": map_.code_bits(job.spec) / job.spec.expert_params,
            "avg_expert_bits_effective": 8 * map_.nbytes(job.spec) / job.spec.expert_params,
            "map": map_.digest,
            "counts": map_.counts(),
            "read_back": difference,
            "notes": [*plan_notes(job), *(calibration.notes if calibration else ()), *checked_map, *notes, *tuned],
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        refuse_changed(job, out)
        seal(job, out, digest, facts, calibration, sensitivity)
        run.event("done", job=digest)
    if not job.options.run:
        shutil.rmtree(out / ".mopeq" / "quantized", ignore_errors=True)
    shutil.rmtree(out / WRITTEN, ignore_errors=True)
    for note in (*plan_notes(job), *notes):  # the calibration's were said when it was read
        say(f"note: {note}")
    say(f"{size_text(source)} -> {size_text(payload)} in {out}")
    return facts


def made_from(job: Job, calibration: Calibration | None) -> dict[str, Any]:
    """The source, the options, the data and the sensitivity's digest, as JSON: all that another budget is solved from
    beside that sensitivity."""
    kept_at = str(Path(job.options.run).resolve()) if job.options.run else None  # found from any folder
    options = {
        k: (list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v)
        for k, v in vars(job.options).items()
    }
    return {
        "source": str(job.folder.resolve()),
        "source_name": job.name,
        "source_revision": job.revision,
        "source_digest": job.spec.digest,
        "options": options | {"calib": [str(p) for p in job.options.calib], "run": kept_at},
        "calibration": calibration
        and {
            "digest": calibration.digest,
            "sensed": sensed_digest(job, calibration),
            "tried": calibration.tried_digest,
            "tokens": calibration.tokens,
        },
        "sense": None if skips_sense(job) else sense_digest(job, calibration),
    }


def job_digest(job: Job) -> str:
    """What a finished folder was made from: source and every option that changes its bytes."""
    o = job.options
    asked = {k: v for k, v in vars(o).items() if k not in NO_BYTES}
    asked |= {"bits": o.widths, "group_size": o.groups, "shard_size": parse_size(o.shard_size)}
    asked |= {
        "map": job.given_map.digest if job.given_map else None,
        "budget": vars(job.budget) if job.budget else None,
    }
    asked["calib"] = [
        [str(p), [Path(p).stat().st_size, Path(p).stat().st_mtime_ns]] for p in o.calib if Path(p).exists()
    ]
    return stage_digest("job", source=job.spec.digest, options=asked)


def finished(out: Path, digest: str) -> dict[str, Any] | None:
    """The facts of a sealed OUT made by the same job; BadInput if OUT is sealed and was made by another."""
    if not (out / MANIFEST).exists():
        return None
    read_manifest(out)
    body = read_json(out / RUN)
    if not isinstance(body, dict) or body.get("job") != digest:
        raise BadInput(f"{out} holds another finished checkpoint", "choose another -o, or delete that folder")
    try:
        check_sizes(out)
    except BadInput as problem:
        say(f"{problem.line}: made again")
        (out / MANIFEST).unlink()
        return None
    return dict(body["result"])


def check_out(job: Job, out: Path) -> None:
    """BadInput if OUT cannot or must not be written."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"{out} is a file", "-o OUT is a folder")
    if out.resolve() == job.folder.resolve() or job.folder.resolve() in out.resolve().parents:
        raise BadInput(f"{out} lies in the source folder", "choose an -o outside it")
    if job.options.run:
        run, seen = Path(job.options.run).resolve(), out.resolve()
        if run.exists() and not run.is_dir():
            raise BadInput(f"--run {job.options.run} is a file", "--run DIR is a folder")
        if run == job.folder.resolve() or job.folder.resolve() in run.parents:
            raise BadInput(f"--run {job.options.run} lies in the source folder", "choose a --run outside it")
        if run == seen or (seen in run.parents and seen / ".mopeq" not in (run, *run.parents)):
            raise BadInput(f"--run {job.options.run} lies in {out}, which gets sealed", "choose a --run beside it")
    if out.exists() and not (out / ".mopeq").exists() and any(out.iterdir()) and not (job.options.run and is_ours(out)):
        raise BadInput(f"{out} is not empty and not mopeq's", "choose another -o, or empty that folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".mopeq").mkdir(exist_ok=True)
    except OSError as problem:
        raise BadInput(f"{out} cannot be written: {problem.strerror}", "choose another -o") from None
    need = 2 * (job.predicted_bytes or max(uniform_bytes(job.spec, f, job.fixed) for f in job.options.formats))
    if free_bytes(out) < need:
        raise BadInput(
            f"{out} has {size_text(free_bytes(out))} free; the packed layers and shards take {size_text(need)}",
            "free some disk, or choose an -o elsewhere",
        )


def refuse_changed(job: Job, out: Path) -> dict[str, str]:
    """What the source is now, file by file. BadInput naming what changed in it since OUT was begun from it."""
    now = fingerprint(job.folder, {t.file for t in job.checkpoint.tensors.values()})
    there, files = begun_from(out)
    if there == str(job.folder.resolve()) and (change := change_between(files, now)):
        raise BadInput(
            f"the source changed since {out} was begun: {change}",
            f"put it back as it was, or delete {out} to start anew from what it is",
        )
    return now


def begun_from(out: Path) -> tuple[str | None, dict[str, str]]:
    """The folder that OUT was begun from, and its files then; (None, {}) where it was not."""
    if not (out / SOURCE).exists():
        return None, {}
    body = read_json(out / SOURCE)
    files = body.get("files") if isinstance(body, dict) else None
    if not isinstance(files, dict) or not all(isinstance(x, str) for x in (body.get("source"), *files.values())):
        raise BadInput(f"{out / SOURCE} is damaged", f"delete {out} to start anew")
    return body["source"], files


def claim(job: Job, out: Path, files: dict[str, str]) -> None:
    """BadInput where OUT was begun from another source, whose tokenizer and licence would be sealed as this one's."""
    here, (there, _) = str(job.folder.resolve()), begun_from(out)
    if there not in (None, here):
        raise BadInput(f"{out} holds an unfinished checkpoint of {there}", "choose another -o, or delete that folder")
    write_atomic(out / SOURCE, json_bytes({"source": here, "files": files}))


def check_ties(job: Job) -> None:
    """BadInput where the config ties matrices that are stored twice and differ: one of them would be lost."""
    for name in job.checkpoint.tensors.keys() - job.spec.tensors.keys():
        head = job.checkpoint.tensors[name]
        for other in job.spec.tensors.values():
            if other.name.endswith("embed_tokens.weight") and other.shape == head.shape:
                if not same_bytes(job.folder, head, job.folder, other):
                    raise BadInput(
                        f"config.json ties {name} and {other.name}, and they differ",
                        'if they are meant to, set "tie_word_embeddings": false in config.json',
                    )
                break


def is_ours(out: Path) -> bool:
    return (out / MANIFEST).exists() or (out / "precision_map.json").exists()


def skips_sense(job: Job) -> bool:
    return job.given_map is not None or job.options.allocate in NO_SENSE


def load_calibration(job: Job) -> Calibration | None:
    """Calibration data, if some method of the job shows any to the model. Refusals come before any work."""
    check_memory(job)
    if not job.options.needs_data:
        return None
    from mopeq.data.calibration import calibrate_with
    from mopeq.models import check_reads_text, load_config

    o, config = job.options, load_config(job.folder)
    check_reads_text(config)
    trying = TRIAL_TOKENS if o.tries_quantizers else 0
    calibration = calibrate_with(job.folder, config, o.calib, o.calib_tokens, o.seed, o.judges, trying)
    for note in calibration.notes:
        say(f"note: {note}")
    return calibration


def check_memory(job: Job) -> None:
    """BadInput where the memory allowed (or free) cannot hold one layer and what is done with it."""
    o, need = job.options, layer_bytes(job.spec, job.options, walked=not runs_whole(job))
    limit = available_memory() if o.memory_bytes is None else o.memory_bytes
    if (o.senses and o.sensitivity == "hutchinson") or o.tune != "none":  # not layer by layer
        need = whole_bytes(job.spec, o)
    if need > limit:
        allows = "the machine has free" if o.memory_bytes is None else "--max-memory allows"
        what = f"{' and '.join(o.needs_data)} take" if o.needs_data else "one layer at a time, making it takes"
        less = ", or --sensitivity hessian --method rtn, which take least" if o.needs_data else ""
        raise BadInput(f"{what} {size_text(need)}, {allows} {size_text(limit)}", f"try --max-memory {need}{less}")


def check_weights(job: Job) -> None:
    """BadInput naming a tensor that holds NaN or infinity, before any work goes into the others.

    The routed experts are read again layer by layer, and are looked at then, unless a model of all of it runs first.
    """
    from mopeq.assemble import kept_tensor
    from mopeq.stream import WIDEST, read_tensor, refuse_sick

    spec = job.spec
    routed = {n for n in spec.tensors if spec.roles[n] == "routed expert"}
    names = [n for n in spec.tensors if n not in routed or checks_experts(job)]
    with progress("check", sum(spec.tensors[n].nbytes for n in names), "bytes") as p:
        for name in names:
            if name in routed:
                refuse_sick(name, read_tensor(job.folder, spec.tensors[name]), WIDEST)
            else:
                kept_tensor(job.folder, spec, name, job.options.other)
            p.step(spec.tensors[name].nbytes)


def checks_experts(job: Job) -> bool:
    """Whether the weights of routed experts are looked at before all else."""
    return bool(job.options.needs_data) and runs_whole(job)


def check_room(job: Job, run: RunDir, calibration: Calibration | None) -> None:
    """BadInput where there is no room for what a walk leaves on disk for a while: hidden states that memory has no room
    for, and what it quantizes on the way forward, to be judged on the way back."""
    if calibration is None or runs_whole(job):
        return
    from mopeq.data.calibration import count
    from mopeq.sense.quadratic import candidate_bytes

    o, digest, spare, needs = job.options, sense_digest(job, calibration), work_memory(job), [0]
    shown = count(calibration.batches)
    if not skips_sense(job) and run.load_sensitivity(digest) is None:
        kept = run.kept(digest)
        todo = [layer for layer in job.spec.layers if o.judges and not kept.has(f"{CANDIDATES}{layer.layer}")]
        judges = count(calibration.judges) if o.tries_quantizers else shown
        waits = shelf_bytes(job.spec, judges, shown if todo else 0, SENSORS[o.sensitivity].needs_gradients)
        needs.append(candidate_bytes(todo, o.formats) + max(0, waits - spare))
    if QUANTIZERS[o.method].needs_data and not sensing_quantizes(job):
        needs.append(max(0, shelf_bytes(job.spec, shown, 0, QUANTIZERS[o.method].needs_gradients) - spare))
    if (need := max(needs)) > free_bytes(run.path):
        raise BadInput(
            f"{run.path} has {size_text(free_bytes(run.path))} free; layer by layer {' and '.join(o.needs_data)} take"
            f" {size_text(need)} of it for a while",
            "free some disk, choose a --run elsewhere, or give fewer --calib-tokens or more --max-memory",
        )


# ------------------------------------------------------------------------------------------------ stages


def sense(job: Job, run: RunDir, calibration: Calibration | None) -> Sensitivity:
    """The sensitivity, from the run directory or made now."""
    o = job.options
    digest = sense_digest(job, calibration)
    serves = CANDIDATES if o.tries_quantizers else ""  # for a trial of the map, and perhaps for quantizing
    if (saved := run.load_sensitivity(digest)) is not None:
        say(f"sense: {o.sensitivity} taken from {run.sensitivity_path(digest)}")
        run.kept(digest).drop(but=serves)  # of a run that was killed when it was saved
        return saved
    scene = scene_of(job, run, digest, calibration)
    if o.ray:
        from mopeq import cluster

        cluster.sense(job, run, digest, scene)
    sensor = pick(SENSORS, o.sensitivity, "sensitivity")
    sensitivity: Sensitivity = by_layers_or_whole(job, lambda parts: sensor(replace(scene, parts=parts)))
    if not (finite_I := np.isfinite(sensitivity.cost_IF).all(1)).all():
        refuse_overflow(sensitivity.linears[int(finite_I.argmin())].layer)
    run.save_sensitivity(digest, sensitivity)
    scene.kept.drop(but=serves)
    run.event("sense", digest=digest)
    return sensitivity


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


def sensing_quantizes(job: Job) -> bool:
    """Whether sensing tries the very quantizer that is asked for, on all the data it is shown."""
    method = job.options.method
    return job.options.judges and sensed_as(method) == method


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
        memory_bytes=work_memory(job),
        scratch=run.scratch,
        kept=run.kept(digest),
    )


def refuse_overflow(layer: int) -> None:
    raise BadInput(
        f"layer {layer}: what calibration sends through its experts is not finite in float32",
        "the source is damaged, or the data is; data-free: --sensitivity hessian --method rtn",
    )


def source_model(job: Job, attention: str | None) -> Any:
    import torch

    from mopeq.models import load_model, pick_device

    return load_model(job.folder, torch.float32, pick_device(job.options.device), attention)


def source_parts(job: Job, exact: bool) -> Any:
    """The source's model for a walk layer by layer (walk/parts.py)."""
    from mopeq.models import pick_device
    from mopeq.walk import parts

    return parts.source_parts(job.folder, job.spec, pick_device(job.options.device), exact=exact)


def runs_whole(job: Job) -> bool:
    """Whether methods that show data to the model have all of it in memory, which is faster and gives the same."""
    return whole_bytes(job.spec, job.options) <= allowed_bytes(job.options)


def by_layers_or_whole(job: Job, work: Callable[[Any], Any]) -> Any:
    """`work(parts)` where the model is to be walked, `work(None)` where it is to be in memory.

    A model that cannot be walked is loaded whole if the memory allows as much, else refused.
    """
    if not job.options.needs_data or runs_whole(job):
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


def allocate(
    job: Job, run: RunDir, sensitivity: Sensitivity | None, calibration: Calibration | None
) -> tuple[PrecisionMap, list[str]]:
    """The precision map, by the allocator asked for, at exactly the budget; and what a user should know of it."""
    if job.given_map is not None:
        return job.given_map, []
    on = calibration.tried_digest if calibration else None
    map_, notes = decide(job, sensitivity, partial(tried, job, run, sensitivity, calibration, on))
    facts = {"sensitivity": job.options.sensitivity if sensitivity else None, "allocate": job.options.allocate}
    facts |= {"sense": sense_digest(job, calibration) if sensitivity else None}
    budget = vars(job.budget) if job.budget else None
    run.save_map(map_.digest, map_, facts | {"per": job.options.per, "scope": job.options.scope, "budget": budget})
    run.event("allocate", map=map_.digest)
    for note in notes:
        say(f"allocate: {note}")
    return map_, notes


def decide(
    job: Job, sensitivity: Sensitivity | None, trial: Callable[[PrecisionMap, PrecisionMap], Trial | None]
) -> tuple[PrecisionMap, list[str]]:
    """The solved map, or one width for all where that spends the same and the map does no better on data it was not
    made from; with a note that says so."""
    map_ = solve(job, sensitivity)
    if sensitivity is None or (uniform := same_total(job)) is None:
        return map_, []
    nbytes = None if job.target is None else job.target.expert_bytes
    plain = make_map(job.spec, [uniform for _ in job.spec.linears], nbytes)
    ratio, agree = held_back(job, sensitivity, uniform)
    found = trial(map_, plain) if map_.digest != plain.digest else None
    better, notes = ratio is None or ratio < 1, []
    if found is not None:
        better = found.map_kl + SURE * found.error < found.uniform_kl and (found.fresh or better)
        kind = "that neither was made from" if found.fresh else "they were made from (there is no other)"
        notes.append(
            f"on {found.tokens:,} tokens of calibration {kind} the map's KL is {found.map_kl:.4g}, that of uniform"
            f" {uniform.name} {found.uniform_kl:.4g} (standard error of the difference {found.error:.2g})"
        )
    if ratio is not None and (found is None or not found.fresh):
        notes.append(
            f"on the half of the calibration it was not made from, a map costs {ratio:.2f} of uniform {uniform.name};"
            f" maps of both halves agree in {agree:.0%} of matrices"
        )
    if better or not notes:
        return map_, notes
    notes[-1] += f": every matrix gets {uniform.name}; more --calib-tokens would tell them apart"
    return plain, notes


def tried(
    job: Job,
    run: RunDir,
    sensitivity: Sensitivity | None,
    calibration: Calibration | None,
    on: str | None,
    map_: PrecisionMap,
    uniform: PrecisionMap,
) -> Trial | None:
    """Both maps tried on data (of the digest `on`) that they were not made from, if there is more of it, with the
    matrices that sensing quantized; None where these are not at hand. Kept, since they may go once the layers are
    quantized."""
    o = job.options
    if sensitivity is None or not o.tries_quantizers:
        return None
    made_of = {"source": job.spec.digest, "data": sensitivity.data_digest, "method": sensed_as(o.method), "on": on}
    maps = {"map": map_.digest, "uniform": uniform.digest}
    digest = stage_digest("trial", sensed=o.sensitivity, seed=o.seed, **made_of, **maps)
    file = run.path / "trials" / f"{digest}.json"
    if file.exists():
        from mopeq.sense.trial import Trial

        return Trial(**read_json(file))
    if calibration is None:
        return None
    from mopeq.sense.trial import trial

    fresh, scene = calibration.tries, scene_of(job, run, sense_digest(job, calibration), calibration)
    found: Trial | None = by_layers_or_whole(
        job, lambda parts: trial(replace(scene, parts=parts), map_, uniform, fresh or calibration.batches, bool(fresh))
    )
    if found is not None:
        write_atomic(file, json_bytes(vars(found)))
    elif not job.spec.adapted:
        say("allocate: the map is not tried: of what sensing quantized not all is on disk, which lacked room for it")
    return found


def same_total(job: Job) -> Format | None:
    """The one format which, given to every matrix, spends the same budget, if there is one."""
    if job.options.allocate != "knapsack" or job.target is None:
        return None
    problem, target = job.problem, job.target
    wanted = (
        (problem.bytes_JF, target.expert_bytes) if target.code_bits is None else (problem.code_JF, target.code_bits)
    )
    return next((fmt for fmt, total in zip(problem.formats, wanted[0].sum(0), strict=True) if total == wanted[1]), None)


def held_back(job: Job, sensitivity: Sensitivity, uniform: Format) -> tuple[float | None, float]:
    """A map's cost over uniform's, on the half of the data it was not made from (mean of both ways round; None where
    there are no halves, or nothing costs anything), and the share of matrices in which the halves' maps agree.

    A map is chosen for looking cheap, so on the data it was chosen by it always does.
    """
    if sensitivity.halves_HIF is None:
        return None, 0.0
    problem = job.problem
    maps = [solve(job, replace(sensitivity, cost_IF=half_IF)) for half_IF in sensitivity.halves_HIF]
    column = {fmt: f for f, fmt in enumerate(problem.formats)}
    choices = [np.array([column[m[i]] for i, _ in job.spec.linears]) for m in maps]
    ratios = []
    for half_IF, choice_I in zip(sensitivity.halves_HIF[::-1], choices, strict=True):
        whole = half_IF[:, column[uniform]].sum()
        if whole > 0:
            ratios.append(half_IF[np.arange(len(choice_I)), choice_I].sum() / whole)
    return (float(np.mean(ratios)) if ratios else None), float((choices[0] == choices[1]).mean())


def solve(job: Job, sensitivity: Sensitivity | None) -> PrecisionMap:
    """Items' costs and scores from the sensitivity's, then the allocator."""
    from mopeq.alloc.choose import Question

    problem = job.problem
    cost_JF = score_J = None
    if sensitivity is not None:
        cost_JF = item_costs(problem, sensitivity)
        if sensitivity.score_I is not None:
            score_J = np.zeros(len(cost_JF))
            np.add.at(score_J, problem.item_of_I, sensitivity.score_I)
    question = Question(problem, cost_JF, score_J, job.target, job.options.scope, job.options.seed)
    choice_J = pick(ALLOCATORS, job.options.allocate, "allocator")(question)
    nbytes = None if job.target is None else job.target.expert_bytes
    return make_map(job.spec, [problem.formats[f] for f in choice_J[problem.item_of_I]], nbytes)


def item_costs(problem: Problem, sensitivity: Sensitivity) -> np.ndarray:
    """Items' costs by format, as the allocators take them: sums over an item's linears, and wider is never worse at one
    group size."""
    from mopeq.alloc.baselines import running_min

    assert sensitivity.formats == problem.formats
    cost_JF = np.zeros(problem.bytes_JF.shape)
    np.add.at(cost_JF, problem.item_of_I, sensitivity.cost_IF)
    groups = np.array([f.group_size for f in problem.formats])
    for group in np.unique(groups):
        cost_JF[:, groups == group] = running_min(cost_JF[:, groups == group])
    return cost_JF


def quantize_layers(
    job: Job, run: RunDir, map_: PrecisionMap, calibration: Calibration | None
) -> tuple[dict[int, Path], list[str]]:
    """Every layer's experts in the map's formats, each layer a file of the run directory; notes name fallbacks."""
    o = job.options
    shown = calibration if calibration and QUANTIZERS[o.method].needs_data else None
    data = shown.digest if shown else None
    digest = stage_digest("quantize", source=job.spec.digest, method=o.method, map=map_.digest, seed=o.seed, data=data)
    files = {layer.layer: run.layer_path(digest, layer.layer) for layer in job.spec.layers}
    if done := [file for file in files.values() if file.exists()]:
        say(f"quantize: {len(done)} of {len(files)} layers taken from {run.path}")
    sensed = run.kept(sense_digest(job, calibration)) if o.tries_quantizers else Kept()
    if sensing_quantizes(job):
        take_from_sensing(job, sensed, map_, files)
    if o.ray:
        from mopeq import cluster

        cluster.quantize(job, run, map_, files, data)
    quantize_files(job, run, map_, files, calibration)
    if not o.run:  # another budget is tried with these, and made of them
        sensed.drop()
    notes = [file.with_suffix(".txt") for file in files.values()]
    return files, [note.read_text() for note in notes if note.exists()]


def take_from_sensing(job: Job, kept: Kept, map_: PrecisionMap, files: Mapping[int, Path]) -> None:
    """Write the layers that the quantizer made when they were sensed: it need not make them again."""
    from mopeq.assemble import write_layer
    from mopeq.sense.quadratic import chosen_candidates

    todo = [x for x in job.spec.layers if not files[x.layer].exists() and kept.has(f"{CANDIDATES}{x.layer}")]
    if not todo:
        return
    with progress("quantize: as sensed", sum(layer.params for layer in todo), "weights") as p:
        for layer in todo:
            if (found := chosen_candidates(kept, layer, map_, job.options.formats)) is not None:
                packed, tokens_E = found
                note_starved(files[layer.layer], layer, [e for e, n in enumerate(tokens_E.tolist()) if n == 0])
                write_layer(files[layer.layer], job.spec, job.folder, layer, packed)
            p.step(layer.params)


def note_starved(file: Path, layer: MoELayer, experts: list[int]) -> None:
    """Beside a layer's file, to outlive a pause."""
    if experts:
        said = f"layer {layer.layer}: no calibration token reached experts {experts}; tuned on the layer's mean"
        write_atomic(file.with_suffix(".txt"), said.encode())


def quantize_files(
    job: Job, run: RunDir, map_: PrecisionMap, files: Mapping[int, Path], calibration: Calibration | None
) -> None:
    """Make those of some layers' files that are not there."""
    if calibration is None or not QUANTIZERS[job.options.method].needs_data:
        quantize_missing(job, run, map_, files, None, None)
    elif not all(file.exists() for file in files.values()):
        by_layers_or_whole(job, lambda parts: quantize_missing(job, run, map_, files, calibration, parts))


def quantize_missing(
    job: Job, run: RunDir, map_: PrecisionMap, files: Mapping[int, Path], shown: Calibration | None, parts: Any
) -> None:
    """Make the layers whose files are not there, and beside each a note where its experts saw no data."""
    from mopeq.assemble import write_layer
    from mopeq.quant.apart import quantize_apart

    todo = [layer for layer in job.spec.layers if layer.layer in files and not files[layer.layer].exists()]
    with progress(f"quantize: {job.options.method}", sum(layer.params for layer in todo), "weights") as p:
        if shown is None:
            o = job.options
            last_first = todo[::-1]  # scores were read in the other order: what memory still caches comes first
            for layer, apart in quantize_apart(job.folder, job.spec, last_first, map_, o.method, o.seed, p.step):
                write_layer(files[layer.layer], job.spec, job.folder, layer, apart)
            return
        for layer, weights, seen in layers_with_moments(job, run, todo, shown, parts):
            if seen is not None:
                if not seen.finite:
                    refuse_overflow(layer.layer)
                note_starved(files[layer.layer], layer, seen.starved)
                seen.fill_starved()
            else:  # a head for multi-token prediction, say
                unbuilt = f"layer {layer.layer}: the model does not build it, so its experts saw no data"
                write_atomic(files[layer.layer].with_suffix(".txt"), f"{unbuilt}; rounded to nearest".encode())
            packed: dict[LinearId, dict[str, Any]] = {}
            for projection in layer.projections:
                w = weights.pop(projection)
                packed |= quantize_projection(job, map_, layer.layer, projection, w, seen)
                p.step(w.numel())
            write_layer(files[layer.layer], job.spec, job.folder, layer, packed)


def layers_with_moments(
    job: Job, run: RunDir, todo: list[MoELayer], shown: Calibration | None, parts: Any
) -> Iterator[tuple[MoELayer, dict[str, Any], Any]]:
    """(layer, {projection: weights [E, out, in]}, moments or None) of each layer, in the order they come."""
    from mopeq.stream import read_layer

    left = {layer.layer: layer for layer in todo}
    if shown is not None and todo:
        from mopeq.seam import weights
        from mopeq.sense.moments import collect, gather
        from mopeq.walk.shelf import shelf
        from mopeq.walk.walking import Walk

        label_seed = job.options.seed if QUANTIZERS[job.options.method].needs_gradients else None
        if parts is None:
            model = source_model(job, None)
            for layer, seen in collect(model, job.spec, shown.batches, work_memory(job), set(left), label_seed):
                yield left.pop(layer.layer), read_layer(job.folder, job.spec, layer), seen
        else:
            with shelf(run.scratch, work_memory(job)) as kept:
                walking = Walk(parts(label_seed is not None), kept)
                for layer, module, seen in gather(walking, shown.batches, set(left), label_seed):
                    yield left.pop(layer.layer), weights(module), seen
    for layer in left.values():
        yield layer, read_layer(job.folder, job.spec, layer), None


def quantize_projection(
    job: Job, map_: PrecisionMap, layer: int, projection: str, w_ENC: Any, moments: Any
) -> dict[LinearId, dict[str, Any]]:
    """One projection of a layer's experts, those of a format together."""
    from mopeq.stream import naming

    method = pick(QUANTIZERS, job.options.method, "quantization method")
    by_format = members_by_format(map_, job.spec.layer(layer), projection)
    packed: dict[LinearId, dict[str, Any]] = {}
    size = max(1, AT_A_TIME // (w_ENC.shape[1] * w_ENC.shape[2]))
    parts = [(f, all_[at : at + size]) for f, all_ in by_format.items() for at in range(0, len(all_), size)]
    for fmt, members in parts:
        m = None if moments is None else moments.of(projection)[members]
        g = moments.gradients[projection][members] if moments is not None and moments.gradients else None
        w = w_ENC[members].float()
        w = w if m is None else w.to(m.device)
        with naming(job.spec.layer(layer), projection, members, w):
            made = method(w, fmt, moments=m, gradients=g, seed=job.options.seed)
        packed |= by_expert(layer, projection, members, made)
    return dict(sorted(packed.items()))


def by_expert(layer: int, projection: str, members: list[int], q: QWeight) -> dict[LinearId, dict[str, Any]]:
    """The stored tensors of each expert of a batch."""
    parts = {k: v.cpu() for k, v in q.pack().items()}
    return {LinearId(layer, e, projection): {k: v[i] for k, v in parts.items()} for i, e in enumerate(members)}


def tune_layers(
    job: Job, run: RunDir, map_: PrecisionMap, files: dict[int, Path], calibration: Calibration | None
) -> tuple[dict[int, Path], list[str]]:
    """The quantized layers with their scales tuned end to end, if that was asked for; as they are where it does not
    lower the KL on held-back calibration. A note says which."""
    if job.options.tune == "none":
        return files, []
    assert calibration is not None
    made_from = {n: path.parent.name for n, path in files.items()}
    digest = stage_digest("tune", layers=made_from, data=calibration.digest)
    tuned = {n: run.layer_path(digest, n) for n in files}
    said = run.layer_path(digest, 0).parent / "tuned.json"  # written last
    if said.exists():
        say(f"tune: taken from {said.parent}")
        facts = read_json(said)
    else:
        found = tune_files(job, map_, files, tuned, calibration)
        facts = {"before": found.before, "after": found.after}
        write_atomic(said, json_bytes(facts))
    better = facts["after"] < facts["before"]
    note = f"scales tuned end to end: KL on held-back calibration {facts['before']:.4g} -> {facts['after']:.4g}"
    return (tuned, [note]) if better else (files, [f"{note}, so they are left as they were"])


def tune_files(
    job: Job, map_: PrecisionMap, files: Mapping[int, Path], tuned: Mapping[int, Path], calibration: Calibration
) -> Tuned:
    from mopeq.assemble import read_layer_file, write_layer
    from mopeq.tensors import Pieces
    from mopeq.tune import hold_back, tune_scales

    pieces: Pieces = {}
    for layer in job.spec.layers:
        pieces |= read_layer_file(files[layer.layer], layer, map_)
    with progress("tune: scales", len(hold_back(calibration.batches)[0]), "batches") as p:
        found = tune_scales(source_model(job, None), job.spec, calibration.batches, pieces, p.step)
    for layer in job.spec.layers:
        packed: dict[LinearId, dict[str, Any]] = {}
        for projection in layer.projections:
            for members, q in found.pieces[layer.layer, projection]:
                packed |= by_expert(layer.layer, projection, members, q)
        write_layer(tuned[layer.layer], job.spec, job.folder, layer, dict(sorted(packed.items())))
    return found


def work_memory(job: Job) -> int:
    """What moments, or activations that wait, may take at a time; of these the rest goes to disk."""
    return max(allowed_bytes(job.options) - layer_bytes(job.spec, job.options), 1 << 20)


def write_checkpoint(job: Job, out: Path, map_: PrecisionMap, files: Mapping[int, Path]) -> int:
    """Shards and the files around them; the folder is not sealed yet. Returns the payload."""
    from mopeq.assemble import Supply, write_around, write_shards

    other = job.options.other
    supply = Supply(job.folder, job.spec, other, files)
    total = job.fixed + map_.nbytes(job.spec)
    with progress("write", total, "bytes") as p:
        digest = stage_digest("write", layers={n: path.parent.name for n, path in files.items()})
        size = parse_size(job.options.shard_size)
        payload = write_shards(out, job.spec, map_, other, supply, size, p.step, digest)
    write_around(job.folder, out, job.spec, map_, other, payload)
    return payload


def check(job: Job, out: Path, map_: PrecisionMap) -> float:
    """Read OUT back and compare its logits with the dequantized reference."""
    from mopeq.readback import read_back

    loads = loaded_bytes(job.spec, map_.nbytes(job.spec)) <= allowed_bytes(job.options)
    difference = read_back(job.folder, out, job.spec, map_, job.options.other, job.options.seed, loads)
    say(f"read back: logits agree with the dequantized reference to {difference:.1e} of their spread")
    return difference


def seal(
    job: Job, out: Path, digest: str, facts: dict[str, Any], calibration: Calibration | None, s: Sensitivity | None
) -> None:
    """The run's facts, the model card, and last the manifest."""
    from mopeq.card import model_card

    versions = {name: sys.modules[name].__version__ for name in ("numpy", "torch", "transformers", "mopeq")}
    body = {
        "job": digest,
        **made_from(job, calibration),
        "versions": versions,
        "threads": sys.modules["torch"].get_num_threads(),  # sums over calibration data are taken in their order
        "sensitivity_notes": list(s.notes) if s else [],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "result": facts,
    }
    write_atomic(out / RUN, json_bytes(body))
    write_atomic(out / "README.md", model_card(job.folder, job.spec, body).encode())
    write_manifest(out)
