"""The command line, thin: one verb a stage; results on stdout, progress on stderr; an error is one line and a hint."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from mopeq import __version__
from mopeq.alloc import ALLOCATORS
from mopeq.errors import MopeqError
from mopeq.evaluate.text import KIT, RULES
from mopeq.export import EXPORTERS
from mopeq.quant import QUANTIZERS
from mopeq.sense import SENSORS
from mopeq.tables import Row
from mopeq.verbs.serve import ENGINES

INTERRUPTED = ("interrupted", "nothing is lost: the same command goes on where this one stopped", 1)
PATIENCE = 10  # seconds that what is at work has to end

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Fit a Mixture-of-Experts model into a memory budget by giving each expert its own bit width.\n\n"
    "Start with `mopeq plan MODEL`, then `mopeq quantize MODEL -o OUT --fit 12GiB`.",
)


def choices(table: dict[str, Row]) -> str:
    return "; ".join(f"**{name}**: {row.says}" for name, row in table.items())


def example(*lines: str) -> str:
    return "Example:\n\n" + "\n\n".join(f"    {line}" for line in lines)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="checkpoint folder, or a hub id like org/name")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="a packed checkpoint made by `mopeq quantize`")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, for machines")]
Bits = Annotated[str, typer.Option(help="widths an expert may have, 1 to 8, like 2,3,4")]
AvgBits = Annotated[float | None, typer.Option(help="budget: average code bits of routed experts [default: 3.0]")]
Fit = Annotated[str | None, typer.Option(help="budget: bytes of all weights, like 12GiB, 500MB, or 25% of bf16")]
Sens = Annotated[str, typer.Option("--sensitivity", help=choices(SENSORS))]
Scope = Annotated[str, typer.Option(help="scores compared over the model or within each layer (kmeans, hybrid)")]
Allocate = Annotated[str, typer.Option(help=choices(ALLOCATORS))]
Per = Annotated[str, typer.Option(help="what shares a width: projection, gate-up, expert, layer-projection, layer")]
Method = Annotated[str, typer.Option(help=choices(QUANTIZERS))]
Tune = Annotated[str, typer.Option(help="none, or scales: tuned end to end on the calibration data, in memory")]
Groups = Annotated[str, typer.Option("--group-size", help="weights that share a scale, like 64 or 64,128")]
Other = Annotated[int, typer.Option("--other-bits", help="width of all other 2-D weights but routers: 4, 8 or 16")]
MapFile = Annotated[Path | None, typer.Option("--map", help="a precision map to use instead of allocating")]
Calib = Annotated[list[Path] | None, typer.Option(help="calibration data: .jsonl, .tsv or .txt; may be repeated")]
CalibTokens = Annotated[
    int, typer.Option(help="calibration tokens that quantizers are fitted to; as many others judge")
]
Seed = Annotated[int, typer.Option(help="same inputs and seed, same bytes")]
Device = Annotated[str, typer.Option(help="auto (cuda where present), cpu or cuda")]
Memory = Annotated[str | None, typer.Option("--max-memory", help="memory to stay within, like 8GiB")]


def emit(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        show(result)


@app.command(epilog=example("mopeq plan ./OLMoE-1B-7B --avg-bits 3", "mopeq plan ./OLMoE-1B-7B --fit 3.2GiB --json"))
def plan(
    model: Model,
    bits: Bits = "2,3,4",
    avg_bits: AvgBits = None,
    fit: Fit = None,
    scope: Scope = "model",
    allocate: Allocate = "knapsack",
    per: Per = "projection",
    group_size: Groups = "64",
    other_bits: Other = 16,
    map_: MapFile = None,
    as_json: AsJson = False,
) -> None:
    """Sizes from headers, before any weight is read."""
    from mopeq import stages
    from mopeq.show import show_plan

    result = stages.plan(
        model,
        bits=bits,
        avg_bits=avg_bits,
        fit=fit,
        scope=scope,
        allocate=allocate,
        per=per,
        group_size=group_size,
        other_bits=other_bits,
        map=map_,
    )
    emit(result, as_json, show_plan)


@app.command(
    epilog=example(
        "mopeq quantize ./OLMoE-1B-7B -o ./packed --fit 3.2GiB",
        "mopeq quantize ./OLMoE-1B-7B -o ./paper --sensitivity hessian --allocate kmeans --per expert"
        " --method signround",
    )
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the packed checkpoint")],
    bits: Bits = "2,3,4",
    avg_bits: AvgBits = None,
    fit: Fit = None,
    sensitivity: Sens = "fisher",
    scope: Scope = "model",
    allocate: Allocate = "knapsack",
    per: Per = "projection",
    method: Method = "gptq",
    group_size: Groups = "64",
    other_bits: Other = 16,
    map_: MapFile = None,
    tune: Tune = "none",
    calib: Calib = None,
    calib_tokens: CalibTokens = 65536,
    seed: Seed = 0,
    max_memory: Memory = None,
    device: Device = "auto",
    run: Annotated[Path | None, typer.Option(help="run directory to share between outputs")] = None,
    shard_size: Annotated[str, typer.Option(help="largest weight file, like 5GB")] = "5GB",
    ray: Annotated[
        str | None, typer.Option(help="address of a Ray cluster that shares the work, `auto`, or `local` for one here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The whole line: MODEL to a packed checkpoint. Give the same command again to resume."""
    from mopeq import stages
    from mopeq.show import show_quantized

    result = stages.quantize(
        model,
        out,
        bits=bits,
        avg_bits=avg_bits,
        fit=fit,
        sensitivity=sensitivity,
        scope=scope,
        allocate=allocate,
        per=per,
        method=method,
        group_size=group_size,
        other_bits=other_bits,
        map=map_,
        tune=tune,
        calib=tuple(calib or ()),
        calib_tokens=calib_tokens,
        seed=seed,
        max_memory=max_memory,
        device=device,
        run=run,
        shard_size=shard_size,
        ray=ray,
    )
    emit(result, as_json, show_quantized)


@app.command("map", epilog=example("mopeq map ./packed", "mopeq map ./packed --avg-bits 2.5 --json > map.json"))
def map_command(
    run_or_out: Annotated[Path, typer.Argument(metavar="RUN_OR_OUT", help="a packed checkpoint or a run directory")],
    avg_bits: Annotated[float | None, typer.Option(help="another budget: average code bits of routed experts")] = None,
    fit: Fit = None,
    against: Annotated[Path | None, typer.Option(help="another checkpoint or map file to compare with")] = None,
    as_json: AsJson = False,
) -> None:
    """The precision map: shown, compared, or solved again for another budget from the saved sensitivities."""
    from mopeq.show import show_map
    from mopeq.verbs import map as maps

    emit(maps.show(run_or_out, avg_bits, fit, against), as_json, show_map)


@app.command(epilog=example('mopeq run ./packed --prompt "What colour is the circle?" --image picture.png'))
def run(
    out: Out,
    prompt: Annotated[str, typer.Option(help="what to say to the model")],
    image: Annotated[list[Path] | None, typer.Option(help="a picture to show; may be repeated")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 128,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate from the packed checkpoint."""
    from mopeq.show import show_answer
    from mopeq.verbs import run as running

    emit(running.answer(out, prompt, image or [], max_new_tokens, device), as_json, show_answer)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=example("mopeq serve ./packed", "mopeq serve ./packed --engine vllm --port 8001 --max-model-len 4096"),
)
def serve(
    context: typer.Context,
    out: Out,
    engine: Annotated[str, typer.Option(help=choices(ENGINES))] = "auto",
    host: Annotated[str, typer.Option(help="address to listen at")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at")] = 8000,
) -> None:
    """An OpenAI endpoint for the packed checkpoint. Other options are passed on to the engine's own server."""
    from mopeq.verbs import serve as serving

    serving.serve(out, engine, host, port, context.args)


@app.command(
    "eval",
    epilog=example(
        "mopeq eval ./packed --against ./OLMoE-1B-7B --data text.jsonl",
        "mopeq eval ./packed --data ChartQA_TEST.tsv --rules paper --lm-eval ./my_tasks",
    ),
)
def eval_command(
    out: Out,
    against: Annotated[str | None, typer.Option(help="the original, for KL and agreement")] = None,
    data: Annotated[list[Path] | None, typer.Option(help=".jsonl, .tsv or .txt; may be repeated")] = None,
    window: Annotated[int, typer.Option(help="tokens a window of joined text holds")] = 2048,
    tasks: Annotated[
        str | None, typer.Option(help="task names to keep, comma-separated; all of the data's by default")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="at most this many items of each task, and windows of text")] = None,
    device: Device = "auto",
    save: Annotated[Path | None, typer.Option(help="write per-item records here (.jsonl)")] = None,
    max_memory: Memory = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="lm-evaluation-harness: a task, or a folder of task files")
    ] = None,
    rules: Annotated[str, typer.Option(help=f"of VLMEvalKit's benchmarks: {' or '.join(RULES)}")] = KIT,
    as_json: AsJson = False,
) -> None:
    """KL to the original, perplexity, top-1 agreement, and accuracy by task."""
    from mopeq.show import show_evaluation
    from mopeq.verbs import evaluate as evaluating

    result = evaluating.evaluate(
        out,
        against=against,
        data=data or [],
        window=window,
        tasks=tasks.split(",") if tasks else None,
        limit=limit,
        device=device,
        save=save,
        max_memory=max_memory,
        rules=rules,
        lm_eval=lm_eval or [],
    )
    emit(result, as_json, show_evaluation)


@app.command(
    epilog=example(
        "mopeq bench ./packed",
        "mopeq bench --shapes OLMoE-1B-7B,Qwen3-30B-A3B --tokens 1,16,64 --plot speed.svg",
    )
)
def bench(
    out: Annotated[
        Path | None, typer.Argument(metavar="[OUT]", help="a packed checkpoint made by `mopeq quantize`")
    ] = None,
    shapes: Annotated[str, typer.Option(help="instead: random layers in these models' shapes, or 2048x768x128x8")] = "",
    tokens: Annotated[str, typer.Option(help="tokens in a call, like 1,16,64,4096")] = "1,16,64",
    bits: Annotated[str, typer.Option(help="widths of the random layers' experts, in equal shares")] = "2,3,4",
    group_size: Annotated[int, typer.Option(help="group size of the random layers")] = 64,
    against: Annotated[str | None, typer.Option(help="the original, to generate with it too")] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate with a checkpoint")] = 64,
    device: Device = "auto",
    plot: Annotated[Path | None, typer.Option(help="write a picture here (.svg)")] = None,
    as_json: AsJson = False,
) -> None:
    """Speed and memory of packed experts against bf16 and the floor: what memory and arithmetic allow here."""
    from mopeq.verbs import bench as benching

    result = benching.bench(out, shapes, tokens, bits, group_size, against, new_tokens, device, plot)
    emit(result, as_json, benching.show)


@app.command(epilog=example("mopeq export ./packed --to dense -o ./dense"))
def export(
    out: Out,
    to: Annotated[str, typer.Option(help=choices(EXPORTERS))],
    directory: Annotated[Path, typer.Option("-o", "--output", help="new folder for the exported model")],
    as_json: AsJson = False,
) -> None:
    """The packed checkpoint in another tool's format."""
    from mopeq.verbs import export as exporting

    emit(exporting.export(out, to, directory), as_json, exporting.show)


@app.command(epilog=example("mopeq report ./packed -o report.html"))
def report(
    out_or_run: Annotated[list[Path], typer.Argument(metavar="OUT_OR_RUN...", help="checkpoints or run directories")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the HTML file to write")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One self-contained HTML file: sizes, precision map, sensitivity, loss by task, how it was made."""
    from mopeq.show import show_report
    from mopeq.verbs import report as reporting

    emit(reporting.write(out_or_run, output), as_json, show_report)


@app.command(epilog=example("mopeq verify ./packed"))
def verify(out: Out, as_json: AsJson = False) -> None:
    """Is this checkpoint whole? Digests, shapes, codes in range."""
    from mopeq.show import show_verified
    from mopeq.verbs import verify as verifying

    emit(verifying.verify(out), as_json, show_verified)


@app.command(epilog=example("mopeq demo", "mopeq demo -o /tmp/demo"))
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for checkpoints and report")] = Path(
        "demo-out"
    ),
    as_json: AsJson = False,
) -> None:
    """The whole line on the embedded model, then the report."""
    from mopeq.show import show_demo
    from mopeq.verbs import demo as demonstration

    emit(demonstration.demo(output), as_json, show_demo)


def version(wanted: bool) -> None:
    if wanted:
        print(f"mopeq {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="say the version")
    ] = False,
) -> None:
    """Options that stand before the verb."""


def interrupted(*_: Any) -> None:
    """Ctrl-C or SIGTERM: what is at work is told to end. Asked again, or not obeyed in time, the process ends at once:
    a signal in the midst of one of Python's own locks can leave it closed for ever, and killing loses nothing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, end_at_once)
        signal.alarm(PATIENCE)
    raise KeyboardInterrupt


def end_at_once(*_: Any) -> None:
    with suppress(BaseException):
        fail(*INTERRUPTED)
    os._exit(INTERRUPTED[2])


def fail(line: str, hint: str, code: int) -> int:
    for word, text in (("error", line), ("hint", hint)):
        print(f"{word}: {' '.join(text.split())}", file=sys.stderr)  # one line, whatever names a file holds
    return code


def main() -> None:
    """Run the command; every failure is one line and one hint on stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupted)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of ASCII gets a ? where it lacks a sign
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    code = run_command(arguments, debug)
    for number, handler in before.items():
        if signal.getsignal(number) is interrupted:
            signal.signal(number, handler)
    sys.exit(code)


def run_command(arguments: list[str], debug: bool) -> int:
    """Exit status of one command: 0, 2 for bad input, 1 for the rest."""
    try:
        code = app(args=arguments or ["--help"], standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return int(code or 0)
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return fail(*INTERRUPTED)
    except MopeqError as error:
        if debug:
            raise
        return fail(error.line, error.hint or "see --help", error.exit_code)
    except BrokenPipeError:
        return 1
    except MemoryError:
        return fail("out of memory", "use --sensitivity hessian --method rtn, which hold one layer at a time", 1)
    except OSError as error:
        if debug:
            raise
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno == errno.ENOSPC
        hint = "free some space and give the same command again" if full else "check the path and its permissions"
        return fail(f"{error.strerror or error}{where}", hint, 1)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown flag, a missing argument, a bad value
            known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
            verb = next((a for a in arguments if not a.startswith("-")), "")
            verb = verb if verb in known else ""
            return fail(" ".join(error.format_message().split()), " ".join(f"mopeq {verb} --help".split()), 2)
        if debug:
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        return fail(f"{type(error).__name__}: {line}", "this is a fault of mopeq's; --debug shows where", 1)


if __name__ == "__main__":
    main()
