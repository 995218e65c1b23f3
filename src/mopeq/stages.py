"""The whole line on one page: each stage reads from the run directory, calls a pure function, commits.

headers -> MoESpec -> plan -> sense -> allocate -> PrecisionMap -> quantize -> packed checkpoint
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mopeq.alloc.reach import largest_code_total
from mopeq.checks import (
    check_out,
    check_room,
    check_ties,
    check_weights,
    claim,
    finished,
    load_calibration,
    refuse_changed,
)
from mopeq.deciding import decide, tried
from mopeq.job import Job, by_layers_or_whole, open_job, scene_of, sense_digest, sensed_digest
from mopeq.making import quantize_layers, refuse_overflow, tune_layers, write_checkpoint
from mopeq.memory import allowed_bytes, layer_bytes, loaded_bytes
from mopeq.nouns import MoESpec, PrecisionMap, Sensitivity, parse_size, size_text
from mopeq.options import Options
from mopeq.packed import RUN, WRITTEN, json_bytes, write_atomic, write_manifest
from mopeq.plan import cluster_bounds, kv_bytes_per_token, largest_layer_bytes, uniform_bytes
from mopeq.progress import say
from mopeq.rundir import CANDIDATES, RunDir, stage_digest
from mopeq.sense import SENSORS
from mopeq.tables import pick

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration

NEAR = 0.4  # of the way from all experts at 2 bits to all at 3
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


def near_narrowest(spec: MoESpec, options: Options, expert_bytes: int) -> bool:
    """Whether a budget for widths of 2, 3 and more bits is one at which a width of 1 paid too (docs/accuracy.md)."""
    by_bits = {f.bits: uniform_bytes(spec, f, 0) for f in options.formats}
    return sorted(by_bits)[:2] == [2, 3] and expert_bytes < by_bits[2] + NEAR * (by_bits[3] - by_bits[2])


def plan_notes(job: Job) -> list[str]:
    """What a user should know before starting."""
    notes = []
    target, options = job.target, job.options
    if target is not None and options.tries_quantizers and near_narrowest(job.spec, options, target.expert_bytes):
        more = ",".join(["1", *map(str, sorted({f.bits for f in options.formats}))])
        notes.append(
            f"the budget is near the narrowest width: --bits {more} may lose less (compare both with mopeq eval; on"
            " answers about pictures it lost more)"
        )
    if target is not None and target.code_bits is not None and options.allocate != "uniform":
        least = -largest_code_total(job.problem.code_JF, -job.problem.bytes_JF, target.code_bits)[1]
        if least < target.expert_bytes:
            notes.append(
                "a code bit costs more bytes in some matrices than in others here: maps of this average differ by up"
                f" to {target.expert_bytes - least:,} bytes; the plan counts the most, and what a map leaves is padding"
            )
            if len(options.groups) > 1:
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
    beforehand = [*plan_notes(job), *check_model(job.folder, job.spec, job.options.other)]
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
            "check", source=job.spec.digest, experts=job.checks_experts, other=job.options.other_bits
        )
        if not run.has_done(checked):
            check_weights(job)
            run.set_done(checked)
        sensitivity = None if job.skips_sense else sense(job, run, calibration)
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
            "avg_expert_bits_effective": 8 * map_.matrix_bytes(job.spec) / job.spec.expert_params,
            "map": map_.digest,
            "counts": map_.counts(),
            "read_back": difference,
            "notes": [*beforehand, *(calibration.notes if calibration else ()), *checked_map, *notes, *tuned],
            "seconds": round(time.monotonic() - started, 3),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        refuse_changed(job, out)
        seal(job, out, digest, facts, calibration, sensitivity)
        run.event("done", job=digest)
    if not job.options.run:
        shutil.rmtree(out / ".mopeq" / "quantized", ignore_errors=True)
    shutil.rmtree(out / WRITTEN, ignore_errors=True)
    for note in (*beforehand, *notes):  # the calibration's were said when it was read
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
        "sense": None if job.skips_sense else sense_digest(job, calibration),
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


def check(job: Job, out: Path, map_: PrecisionMap) -> float:
    """Read OUT back and compare its logits with the dequantized reference."""
    from mopeq.readback import read_back

    loads = loaded_bytes(job.spec, map_.nbytes(job.spec), job.options.other) <= allowed_bytes(job.options)
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
