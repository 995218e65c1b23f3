"""`mopeq map`: the precision map shown, compared, or solved again for another budget from saved sensitivities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from mopeq.checkpoint import read_json
from mopeq.deciding import decide, tried
from mopeq.errors import BadInput
from mopeq.job import Job, open_job
from mopeq.nouns import PrecisionMap, Sensitivity
from mopeq.options import Options
from mopeq.packed import RUN, read_map
from mopeq.progress import say
from mopeq.rundir import RunDir, read_sensitivity
from mopeq.sense import SENSORS


def show(
    run_or_out: str | Path,
    avg_bits: float | None = None,
    fit: str | int | None = None,
    against: str | Path | None = None,
) -> dict[str, Any]:
    """The map as JSON (to_json's fields, so that it serves as `--map`), with bytes where it was solved again and the
    differences where it was compared."""
    path = Path(run_or_out)
    extra: dict[str, Any] = {}
    if avg_bits is None and fit is None:
        map_ = load_map(path)
    else:
        map_, extra = solve_again(path, avg_bits, fit)
    if against is not None:
        extra |= {"against": compare_maps(map_, load_map(Path(against)))}
    return map_.to_json() | extra


def load_map(path: Path) -> PrecisionMap:
    """From a packed checkpoint, a run directory (its newest map), or a map file."""
    if path.is_file():
        return PrecisionMap.from_json(read_json(path), str(path))
    if (path / "precision_map.json").exists():
        return read_map(path)
    maps = sorted((path / "maps").glob("*.json"), key=lambda p: p.stat().st_mtime)
    if not maps:
        raise BadInput(f"{path} holds no precision map", "give a packed checkpoint, a run directory or a map file")
    return PrecisionMap.from_json(read_json(maps[-1]), str(maps[-1]))


def solve_again(path: Path, avg_bits: float | None, fit: str | int | None) -> tuple[PrecisionMap, dict[str, Any]]:
    """The map of another budget, by the same options and the sensitivity saved beside the checkpoint or in the run
    directory."""
    record, run = recorded(path)
    facts = read_json(record)
    try:
        job = job_of(facts, avg_bits, fit)
        run = run or run_of(path, facts)
        on = (facts.get("calibration") or {}).get("tried")
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise BadInput(f"{record} is damaged: {problem}", "copy or make the checkpoint again") from None
    sensitivity = None
    if not job.skips_sense:
        sensitivity = saved_sensitivity(run, facts, job)
        if sensitivity is None:
            raise BadInput(f"{run.path} holds no {job.options.sensitivity} sensitivity", "quantize once with --run DIR")
    map_, notes = decide(job, sensitivity, partial(tried, job, run, sensitivity, None, on))
    for note in notes:
        say(f"note: {note}")
    total = job.fixed + map_.nbytes(job.spec)
    return map_, {
        "bytes_weights": total,
        "avg_expert_bits": map_.code_bits(job.spec) / job.spec.expert_params,
        "avg_expert_bits_effective": 8 * map_.matrix_bytes(job.spec) / job.spec.expert_params,
    }


def recorded(path: Path) -> tuple[Path, RunDir | None]:
    """(the file that tells what was asked, the run directory where `path` is one itself). A run directory that several
    jobs share tells of the last."""
    if (path / RUN).exists():
        return path / RUN, None
    record = path / "spec.json"
    if not record.exists():
        raise BadInput(
            f"{path} has no {RUN}", "another budget is solved for a checkpoint of `mopeq quantize`, or for its --run"
        )
    body = read_json(record)
    if not isinstance(body, dict) or "options" not in body:
        raise BadInput(f"{record} does not tell what was asked", "give the checkpoint that was made with it")
    say(f"note: by the options of the last job in {path}")
    return record, RunDir(path)


def run_of(out: Path, facts: dict[str, Any]) -> RunDir:
    """Where a checkpoint's sensitivities are saved."""
    return RunDir(Path(facts["options"]["run"]) if facts["options"].get("run") else out / ".mopeq")


def saved_sensitivity(run: RunDir, facts: dict[str, Any], job: Job) -> Sensitivity | None:
    """The one that the checkpoint's map was made from. Where that was none, the newest saved of the job's method,
    formats and matrices, and where it shows data, of the checkpoint's data."""
    method, linears = job.options.sensitivity, [linear for linear, _ in job.spec.linears]
    data = (facts.get("calibration") or {}).get("sensed") if SENSORS[method].needs_data else None
    return next(
        (
            s
            for s in saved_sensitivities(run.path, facts.get("sense"))
            if s.method == method
            and s.formats == job.options.formats
            and list(s.linears) == linears
            and data in (None, s.data_digest)
        ),
        None,
    )


def saved_sensitivities(run: Path, digest: Any = None) -> Iterator[Sensitivity]:
    """Newest first, or that of a digest alone."""
    for path in sorted((run / "sensitivity").glob("*.npz"), key=lambda p: p.stat().st_mtime, reverse=True):
        if digest in (None, path.stem):
            yield read_sensitivity(path)


def job_of(facts: dict[str, Any], avg_bits: float | None, fit: str | int | None) -> Job:
    """The job a checkpoint was made by, with another budget."""
    known = {f.name for f in fields(Options)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["options"].items() if k in known}
    changed: dict[str, Any] = given | {"avg_bits": avg_bits, "fit": fit, "map": None}
    options = Options(**changed)
    job = open_job(facts["source"], options)
    if job.spec.digest != facts.get("source_digest"):
        raise BadInput(f"{facts['source']} changed since the checkpoint was made", "quantize again")
    return job


def compare_maps(a: PrecisionMap, b: PrecisionMap) -> dict[str, Any]:
    """How many matrices differ, and the change of width by projection."""
    if set(a.formats) != set(b.formats):
        raise BadInput("the two maps are of different models", "compare maps of one model")
    differ = [i for i in a if a[i] != b[i]]
    change: dict[str, float] = {}
    for i in a:
        change[i.projection] = change.get(i.projection, 0.0) + a[i].bits - b[i].bits
    count = len(a.formats)
    return {
        "digest": b.digest,
        "matrices": count,
        "differ": len(differ),
        "mean_bits_change": {p: total / sum(i.projection == p for i in a) for p, total in change.items()},
    }
