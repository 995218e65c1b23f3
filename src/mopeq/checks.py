"""What is asked before any work: whether OUT may be written, whether source, memory and disk are fit for the job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.checkpoint import change_between, fingerprint, read_json, same_bytes
from mopeq.errors import BadInput
from mopeq.job import Job, sense_digest
from mopeq.memory import available_memory, layer_bytes, shelf_bytes, whole_bytes
from mopeq.nouns import size_text
from mopeq.packed import MANIFEST, RUN, check_sizes, json_bytes, read_manifest, write_atomic
from mopeq.plan import uniform_bytes
from mopeq.progress import progress, say
from mopeq.quant import QUANTIZERS
from mopeq.rundir import CANDIDATES, RunDir, free_bytes
from mopeq.sense import SENSORS

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration
    from mopeq.options import Options

SOURCE = ".mopeq/source.json"  # in OUT: the folder it is made from, and what lay there
TRIAL_TOKENS = 8192  # of calibration beyond what was shown, on which a map is tried against one width


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


def asking(options: Options) -> str:
    """The options that show data to the model, as who takes something."""
    return f"{' and '.join(options.needs_data)} take{'s' if len(options.needs_data) == 1 else ''}"


def check_memory(job: Job) -> None:
    """BadInput where the memory allowed (or free) cannot hold one layer and what is done with it."""
    o, need = job.options, layer_bytes(job.spec, job.options, walked=not job.runs_whole)
    limit = available_memory() if o.memory_bytes is None else o.memory_bytes
    if o.tune != "none":  # not layer by layer
        need = whole_bytes(job.spec, o)
    if need > limit:
        allows = "the machine has free" if o.memory_bytes is None else "--max-memory allows"
        what = asking(o) if o.needs_data else "one layer at a time, making it takes"
        less = ", or --sensitivity hessian --method rtn, which take least" if o.needs_data else ""
        takes, has = size_text(need), size_text(limit)
        if takes == has:
            takes, has = f"{need:,} bytes", f"{limit:,}"
        raise BadInput(f"{what} {takes}, {allows} {has}", f"try --max-memory {need}{less}")


def check_weights(job: Job) -> None:
    """BadInput naming a tensor that holds NaN or infinity, before any work goes into the others.

    The routed experts are read again layer by layer, and are looked at then, unless a model of all of it runs first.
    """
    from mopeq.assemble import kept_tensor
    from mopeq.stream import WIDEST, read_tensor, refuse_sick

    spec = job.spec
    routed = {n for n in spec.tensors if spec.roles[n] == "routed expert"}
    names = [n for n in spec.tensors if n not in routed or job.checks_experts]
    with progress("check", sum(spec.tensors[n].nbytes for n in names), "bytes") as p:
        for name in names:
            if name in routed:
                refuse_sick(name, read_tensor(job.folder, spec.tensors[name]), WIDEST)
            else:
                kept_tensor(job.folder, spec, name, job.options.other)
            p.step(spec.tensors[name].nbytes)


def check_room(job: Job, run: RunDir, calibration: Calibration | None) -> None:
    """BadInput where there is no room for what a walk leaves on disk for a while: hidden states that memory has no room
    for, and what it quantizes on the way forward, to be judged on the way back."""
    if calibration is None or job.runs_whole:
        return
    from mopeq.data.calibration import count
    from mopeq.sense.quadratic import candidate_bytes

    o, digest, spare, needs = job.options, sense_digest(job, calibration), job.work_memory, [0]
    shown = count(calibration.batches)
    if not job.skips_sense and run.load_sensitivity(digest) is None:
        kept = run.kept(digest)
        todo = [layer for layer in job.spec.layers if o.judges and not kept.has(f"{CANDIDATES}{layer.layer}")]
        judges = count(calibration.judges) if o.tries_quantizers else shown
        sensor = SENSORS[o.sensitivity]
        waits = shelf_bytes(job.spec, judges, shown if todo else 0, sensor.needs_gradients, sensor.probes)
        needs.append(candidate_bytes(todo, o.formats) + max(0, waits - spare))
    if QUANTIZERS[o.method].needs_data and not job.sensing_quantizes:
        needs.append(max(0, shelf_bytes(job.spec, shown, 0, QUANTIZERS[o.method].needs_gradients) - spare))
    if (need := max(needs)) > free_bytes(run.path):
        raise BadInput(
            f"{run.path} has {size_text(free_bytes(run.path))} free; layer by layer {asking(o)}"
            f" {size_text(need)} of it for a while",
            "free some disk, choose a --run elsewhere, or give fewer --calib-tokens or more --max-memory",
        )
