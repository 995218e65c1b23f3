"""`mopeq report`: gather what lies in finished checkpoints or run directories, and write one HTML file about it.

Only headers and JSON are read; no model is loaded. What is not there is named with the command that would add it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mopeq.alloc import NO_BUDGET
from mopeq.checkpoint import open_checkpoint, read_json
from mopeq.errors import BadInput
from mopeq.families.standard import roles
from mopeq.job import NO_SENSE
from mopeq.nouns import PADDING, MoELayer, PrecisionMap, TensorInfo, size_text
from mopeq.options import DEFAULT_AVG_BITS
from mopeq.packed import MANIFEST, RUN, check_sizes, content_digest, read_map, write_atomic
from mopeq.progress import say
from mopeq.report.facts import (
    Evaluation,
    Missing,
    Part,
    Senses,
    Subject,
    Widths,
    read_evaluation,
    real,
    senses_of,
    whole_number,
    widths_of,
)
from mopeq.sense import SENSORS
from mopeq.verbs.budgets import BYTES, gather_explorer, gather_study
from mopeq.verbs.contrast import contrasts
from mopeq.verbs.map import saved_sensitivities

KINDS = {"qweight": "codes", "scales": "scales", "zeros": "zero points", "bias": "biases"}


def write(out_or_run: list[Path], output: Path) -> dict[str, Any]:
    """Write the report on these checkpoints or run directories; returns {"output", "checkpoints", "bytes"}.

    BadInput where a folder is neither, or damaged, or given twice.
    """
    from mopeq.report.render import render  # jinja2 is not needed for `--help`

    output, paths = Path(output), [Path(p) for p in out_or_run]
    if not paths:
        raise BadInput("no checkpoint was given", "mopeq report OUT -o report.html")
    if output.is_dir():
        raise BadInput(f"{output} is a folder", "-o names the HTML file to write, like report.html")
    double = next((p for i, p in enumerate(paths) if p.resolve() in [q.resolve() for q in paths[:i]]), None)
    if double is not None:
        raise BadInput(f"{double} was given twice", "give each checkpoint once")
    names = short_names(paths)
    subjects = [gather(p, name) for p, name in zip(paths, names, strict=True)]
    page = render(subjects, contrasts(dict(zip(names, paths, strict=True)))).encode()
    write_atomic(output, page)
    return {"output": str(output), "checkpoints": len(paths), "bytes": len(page)}


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; a hidden folder's name needs its parent's."""
    parts = [p.resolve().parts for p in paths]
    least = 2 if any(p[-1].startswith(".") for p in parts) else 1
    for n in range(least, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(p) for p in paths]


def gather(path: Path, name: str) -> Subject:
    """Everything known of one folder."""
    if not path.is_dir():
        raise BadInput(f"{path} is no folder", "give a packed checkpoint made by `mopeq quantize`, or a run directory")
    if (path / MANIFEST).exists() or (path / "config.json").exists():
        return gather_checkpoint(path, name)
    if (path / "spec.json").exists():
        return gather_run(path, name)
    raise BadInput(
        f"{path} is neither a packed checkpoint nor a run directory", "make one with `mopeq quantize MODEL -o OUT`"
    )


# ----------------------------------------------------------------------------------------- a checkpoint


def gather_checkpoint(out: Path, name: str) -> Subject:
    check_sizes(out)
    map_ = read_map(out)
    facts = read_object(out / RUN)
    options, result = table(facts, "options"), table(facts, "result")
    source = source_typed(facts)
    run = Path(options["run"]) if isinstance(options.get("run"), str) else out / ".mopeq"
    spec = read_object(run / "spec.json") if (run / "spec.json").exists() else {}
    if spec.get("bytes_source") != result.get("bytes_source"):
        spec = {}  # a shared run directory holds the forecast of the job that used it last, here of another source
    elif spec.get("predicted_bytes") not in (None, result.get("bytes_weights")):
        spec.pop("bytes_by_bits", None)  # and here of another budget or width of the rest
    widths = widths_of(map_)
    again = quantize_command(source, out, options)
    missing: dict[str, Missing] = {}
    if not spec:
        missing["sizes"] = Missing(
            "The source's bytes by part are not known: its forecast is not beside the checkpoint.", again
        )
    senses = gather_senses(run, map_, widths, facts, again, missing)
    by_bytes = again_with(options, facts, avg_bits=None, fit=BYTES, run=str(run))
    explorer = gather_explorer(out, facts, by_bytes, missing)
    study = gather_study(out, facts, map_)
    evaluation, warnings = gather_evaluation(out, source, missing)
    seen = set(senses.notes) if senses else set()
    notes = [str(n) for n in (*listed(result, "notes"), *listed(facts, "sensitivity_notes")) if str(n) not in seen]
    notes += warnings
    return Subject(
        name=name,
        source=source_name(facts),
        model_type=str(spec.get("model_type") or read_json(out / "config.json").get("model_type", "")),
        params=whole_number(spec.get("params")),
        expert_params=whole_number(spec.get("expert_params")),
        bytes_source=whole_number(result.get("bytes_source")),
        bytes_weights=whole_number(result.get("bytes_weights")),
        code_bits=real(result.get("avg_expert_bits")),
        effective_bits=real(result.get("avg_expert_bits_effective")),
        bytes_by_bits=by_bits(spec),
        parts=parts(counts(table(spec, "bytes_by_role")), packed_parts(out, map_)),
        widths=widths,
        senses=senses,
        evaluation=evaluation,
        recipe=recipe(options),
        made=made(facts, options, result, widths),
        notes=tuple(dict.fromkeys(notes)),
        command=again,
        missing=missing,
        explorer=explorer,
        study=study,
        uniform=options.get("allocate") == "uniform",
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; BadInput otherwise."""
    body = read_json(path)
    if not isinstance(body, dict):
        raise BadInput(f"{path} holds no JSON object", "the file is damaged; make the checkpoint again")
    return body


def table(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    return body[key] if isinstance(body.get(key), dict) else {}


def counts(body: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers of an object."""
    return {k: v for k, v in body.items() if type(v) is int}


def listed(body: Mapping[str, Any], key: str) -> list[Any]:
    return body[key] if isinstance(body.get(key), list) else []


def by_bits(spec: Mapping[str, Any]) -> dict[str, int]:
    """Uniform sizes of the forecast, fewest bits first."""
    return dict(sorted(counts(table(spec, "bytes_by_bits")).items(), key=lambda kv: (len(kv[0]), kv[0])))


def packed_parts(out: Path, map_: PrecisionMap) -> dict[str, dict[str, int]]:
    """{role: {kind: bytes}} of the packed tensors, by the shards' headers."""
    prefixes = set(map_.prefixes.values())
    found: dict[str, dict[str, int]] = {}
    others: dict[str, TensorInfo] = {}
    for name, tensor in open_checkpoint(out).tensors.items():
        stem, *rest = name.rsplit(".", 3)  # <prefix>.<expert>.<projection>_proj.<suffix>
        if not tensor.nbytes:
            continue
        if stem in prefixes and rest[0].isdigit():
            add(found, "routed expert", KINDS.get(rest[-1], "other"), tensor.nbytes)
        elif name == PADDING:
            add(found, "padding", "all", tensor.nbytes)
        else:
            others[name] = tensor
    experts = {i.layer: i.expert + 1 for i in sorted(map_)}
    layers = tuple(MoELayer(n, prefix, experts[n], {}, {}) for n, prefix in map_.prefixes.items())
    for name, role in roles(others, layers).items():
        add(found, role, "all", others[name].nbytes)
    return found


def add(found: dict[str, dict[str, int]], role: str, kind: str, nbytes: int) -> None:
    kinds = found.setdefault(role, {})
    kinds[kind] = kinds.get(kind, 0) + nbytes


def parts(before: Mapping[str, int], after: Mapping[str, dict[str, int]]) -> tuple[Part, ...]:
    """Routed experts first, then by size."""
    order = sorted({*before, *after}, key=lambda r: (r != "routed expert", -(before.get(r) or 0), r))
    rows = []
    for role in order:
        kinds = after.get(role, {})
        split = {k: kinds[k] for k in (*KINDS.values(), "other") if k in kinds} if role == "routed expert" else {}
        rows.append(Part(role, before.get(role) if before else None, sum(kinds.values()) if after else None, split))
    return tuple(rows)


# ------------------------------------------------------------------------------------------ sensitivity


def gather_senses(
    run: Path, map_: PrecisionMap, widths: Widths, facts: Mapping[str, Any], again: str, missing: dict[str, Missing]
) -> Senses | None:
    """The sensitivity the map was made from, if it is beside it."""
    options = table(facts, "options")
    method = str(options.get("sensitivity"))
    if options.get("map") is not None:
        missing["sensitivity"] = Missing("The map was given with --map; no sensitivity was taken for it.")
        return None
    if options.get("allocate") in NO_SENSE:
        other = again_with(options, facts, allocate="knapsack")
        missing["sensitivity"] = Missing(
            f"No sensitivity was taken: --allocate {options['allocate']} asks for none.", other
        )
        return None
    data = table(facts, "calibration").get("sensed") if needs_data(method) else None
    wanted = set(map_)
    found = next(
        (
            s
            for s in saved_sensitivities(run, facts.get("sense"))
            if s.method == method and set(s.linears) == wanted and (data is None or s.data_digest == data)
        ),
        None,
    )
    if found is None:
        missing["sensitivity"] = Missing(f"The {method} sensitivity it was made from is no longer in {run}.", again)
        return None
    if found.tokens_LE is None:
        missing["tokens"] = Missing(
            f"How many tokens each expert sees is not known: {method} shows the model no data.",
            again_with(options, facts, sensitivity="frequency"),
        )
    return senses_of(found, widths, says_of(method))


def needs_data(method: str) -> bool:
    return method in SENSORS and SENSORS[method].needs_data


def says_of(method: str) -> str:
    return SENSORS[method].says if method in SENSORS else "a method this mopeq does not know"


# ------------------------------------------------------------------------------------------- evaluation


def gather_evaluation(out: Path, source: str, missing: dict[str, Missing]) -> tuple[Evaluation | None, list[str]]:
    """What `mopeq eval` left beside the checkpoint, and a warning where it was another checkpoint's."""
    path = out / ".mopeq" / "eval.json"
    command = shlex.join(["mopeq", "eval", str(out), "--against", source]) + " --data DATA"
    if not path.exists():
        missing["evaluation"] = Missing(f"{out.name} was not evaluated: its loss is not known.", command)
        return None, []
    try:
        body = read_object(path)
        found = read_evaluation(body)
    except (TypeError, AttributeError) as problem:
        raise BadInput(f"{path} cannot be read: {problem}", f"delete it and evaluate again: {command}") from None
    if found.losses[0].kl is None:
        missing["kl"] = Missing(f"{out.name} was evaluated without the original: KL and top-1 are not known.", command)
    if not found.tasks:
        missing["tasks"] = Missing(
            "No task was scored: the data held no questions with answers.", command.replace("DATA", "QUESTIONS.tsv")
        )
    measured, here = body.get("digest"), content_digest(out)
    if measured in (None, here):
        return found, []
    warning = f"the losses were measured on another checkpoint ({measured}) than this one ({here}): evaluate again"
    say(f"warning: {out}: {warning}")
    return found, [warning]


# ----------------------------------------------------------------------------------------- how it was made


def quantize_command(source: str, out: Path | str, options: Mapping[str, Any]) -> str:
    """The `mopeq quantize` command of these options, every one that matters for the bytes written out."""
    words = ["mopeq", "quantize", source, "-o", str(out)]
    given = dict(options)
    budgeted = given.get("allocate") not in NO_BUDGET and given.get("map") is None
    if budgeted and given.get("avg_bits") is None and given.get("fit") is None:
        given["avg_bits"] = DEFAULT_AVG_BITS
    for key, value in given.items():
        if value is None or value == [] or key == "device":
            continue
        flag = "--" + key.replace("_", "-")
        if key == "calib" and isinstance(value, list):
            words += [word for path in value for word in (flag, str(path))]
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else plain(value)]
    return shlex.join(words)


def again_with(options: Mapping[str, Any], facts: Mapping[str, Any], **changes: Any) -> str:
    """The command with some options changed, into a folder of its own."""
    return quantize_command(source_typed(facts), "NEW", {**options, **changes})


def source_name(facts: Mapping[str, Any]) -> str:
    """What the source is called."""
    return str(facts.get("source_name") or Path(str(facts.get("source", "MODEL"))).name)


def source_typed(facts: Mapping[str, Any]) -> str:
    """The source as a command names it: its id on the hub, or the shortest path that works from here."""
    path = Path(str(facts.get("source", "MODEL")))
    if facts.get("source_revision"):
        return source_name(facts)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def recipe(options: Mapping[str, Any]) -> str:
    """How it was made, in a few words."""
    if options.get("map") is not None:
        chosen = "a given map"
    elif options.get("allocate") in NO_SENSE:
        chosen = str(options.get("allocate"))
    else:
        chosen = f"{options.get('sensitivity')} and {options.get('allocate')} per {options.get('per')}"
    other = options.get("other_bits")
    rest = f", all else at {other} bits" if other not in (16, None) else ""
    return f"{chosen}, {options.get('method')}{rest}"


def made(
    facts: Mapping[str, Any], options: Mapping[str, Any], result: Mapping[str, Any], widths: Widths
) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Options, inputs, versions and outcome as tables."""
    asked = [
        ("--" + k.replace("_", "-"), ", ".join(map(str, v)) if isinstance(v, list) else plain(v))
        for k, v in options.items()
        if v is not None and v != []
    ]
    calibration = table(facts, "calibration")
    inputs = [
        ("source", source_name(facts)),
        ("revision", facts.get("source_revision")),
        ("source digest", facts.get("source_digest")),
        ("calibration digest", calibration.get("digest") or "no data was shown"),
        ("calibration tokens", f"{calibration['tokens']:,}" if type(calibration.get("tokens")) is int else None),
    ]
    seconds, memory, difference = (real(result.get(k)) for k in ("seconds", "peak_rss_bytes", "read_back"))
    outcome = [
        ("finished", facts.get("finished")),
        ("time", None if seconds is None else duration(seconds)),
        ("peak memory", None if memory is None else size_text(memory)),
        ("map digest", widths.digest),
        ("job digest", facts.get("job")),
        ("logits read back", None if difference is None else f"within {difference:.1e} of their spread"),
    ]
    versions = [(str(k), str(v)) for k, v in sorted(table(facts, "versions").items())]
    tables = (("Options", asked), ("Made from", inputs), ("Outcome", outcome), ("Versions", versions))
    return tuple((words, tuple((k, str(v)) for k, v in rows if v not in (None, ""))) for words, rows in tables)


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


# ----------------------------------------------------------------------------------------- a run directory


def gather_run(run: Path, name: str) -> Subject:
    """What a run directory knows before (or without) a checkpoint: the forecast, its newest map and sensitivity."""
    spec = read_object(run / "spec.json")
    again = shlex.join(["mopeq", "quantize", "MODEL", "-o", "OUT", "--run", str(run)])
    missing = {"checkpoint": Missing("This is a run directory; its checkpoint is not made, or lies elsewhere.", again)}
    command = "mopeq eval OUT --against MODEL --data DATA"
    missing["evaluation"] = Missing("Only a finished checkpoint can be evaluated.", command)
    maps = sorted((run / "maps").glob("*.json"), key=lambda p: p.stat().st_mtime)
    widths = senses = None
    method = ""
    if maps:
        body = read_object(maps[-1])
        map_ = PrecisionMap.from_json(body, str(maps[-1]))
        widths, method = widths_of(map_), str(table(body, "made_from").get("sensitivity") or "")
        found = saved_sensitivities(run, table(body, "made_from").get("sense"))
        saved = next((s for s in found if s.method == method and set(s.linears) == set(map_)), None)
        senses = None if saved is None else senses_of(saved, widths, says_of(method))
    else:
        missing["map"] = Missing("No map was chosen yet.", again)
    if senses is None:
        missing["sensitivity"] = Missing("No sensitivity that its newest map was made from is here.", again)
    elif not senses.tokens:
        missing["tokens"] = Missing(
            f"How many tokens each expert sees is not known: {method} shows the model no data.",
            f"{again} --sensitivity frequency",
        )
    return Subject(
        name=name,
        source=f"a {spec.get('model_type', 'model')} checkpoint",
        model_type="",
        params=whole_number(spec.get("params")),
        expert_params=whole_number(spec.get("expert_params")),
        bytes_source=whole_number(spec.get("bytes_source")),
        bytes_weights=whole_number(spec.get("predicted_bytes")),
        code_bits=None,
        effective_bits=None,
        bytes_by_bits=by_bits(spec),
        parts=parts(counts(table(spec, "bytes_by_role")), {}),
        widths=widths,
        senses=senses,
        evaluation=None,
        recipe="",
        made=(),
        notes=tuple(str(n) for n in listed(spec, "notes")),
        command="",
        missing=missing,
        finished=False,
    )
