"""Kill mopeq at random moments, give the same command again, and count what was lost: python tools/kill_points.py

Every line (commands on a tiny model) is disturbed again and again at seeded moments: half of them by the clock, half at
a step of its work chosen evenly, just before or after a result appears. Then the same command runs to its end. Shown:

    same      final digests (or answers) equal to those of an undisturbed run
    twice     units of work done again though the item they belong to was finished: there must be none
    in hand   units done again because their item was in hand when the process was killed
    passes    batches shown to the model again, for items that were not finished

An item is what is kept at once: a layer's candidates, a batch's gradients, a quantized layer, a shard. `--json FILE`
keeps the counts; `--kills 20` is a quick look.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import tiny  # noqa: E402
import traced  # noqa: E402
from made import copy, digests, room, source  # noqa: E402
from warm import Ended, mopeq, server  # noqa: E402

from mopeq.checkpoint import open_checkpoint  # noqa: E402
from mopeq.families.standard import read_spec  # noqa: E402
from mopeq.memory import layer_bytes, whole_bytes  # noqa: E402
from mopeq.options import Options  # noqa: E402

TOKENS = 6144  # calibration: three batches
MODEL = {"num_hidden_layers": 3}
SIZES = ("--avg-bits", "2.6", "--shard-size", "60kB")
SIGNALS = {"kill": signal.SIGKILL, "int": signal.SIGINT, "term": signal.SIGTERM}


def place(name: str) -> Path:
    """A folder that is not there yet, in a room of its own."""
    return Path(tempfile.mkdtemp(dir=room())) / name


def text() -> Path:
    path = room() / "calibration.txt"
    return path if path.exists() else tiny.write_text(path)


def walked_memory(more: tuple[str, ...]) -> str:
    """A --max-memory that holds one layer and not the whole model."""
    spec = read_spec(open_checkpoint(source("olmoe", **MODEL)))
    asked = dict(zip((a.removeprefix("--").replace("-", "_") for a in more[::2]), more[1::2], strict=True))
    options = Options(sensitivity=asked["sensitivity"], method=asked["method"], calib=(text(),))
    least = layer_bytes(spec, options)
    assert least < whole_bytes(spec, options)
    return str(least)


@dataclass
class Line:
    """A command, and how its result is looked at. `out` is made by it, or read by it."""

    name: str
    command: Callable[[Path], tuple[object, ...]]
    result: Callable[[Path, Ended], Any]
    prepare: Callable[[Path], object] = lambda out: None

    @cached_property
    def undisturbed(self) -> Undisturbed:
        out = room() / "undisturbed" / self.name
        self.prepare(out)
        log, started = out.with_suffix(".log"), time.monotonic()
        out.parent.mkdir(exist_ok=True)
        ended = mopeq(*self.command(out), trace={"path": str(log)})
        assert ended.code == 0, ended
        return Undisturbed(self.result(out, ended), time.monotonic() - started, traced.read(log), out)


@dataclass
class Undisturbed:
    result: Any
    seconds: float
    steps: list[tuple[str, str]]
    out: Path

    def some_step(self, rng: random.Random) -> dict[str, Any]:
        """A stage, each as likely, and a line of it."""
        lengths, stage = Counter[str](), ""
        for kind, what in self.steps:
            stage = what if kind == "stage" else stage
            lengths[stage] += 1
        stage = rng.choice(list(lengths))
        return {"within": stage, "at": rng.randint(1, lengths[stage])}

    @cached_property
    def item_of(self) -> dict[str, str]:
        """The commit (relative to OUT) each unit of work belongs to: the next one, or the next of its layer's."""
        found: dict[str, str] = {}
        waiting: list[str] = []
        for kind, what in self.steps:
            if kind == "work":
                waiting.append(what)
            elif kind == "commit":
                item = os.path.relpath(what, self.out)
                for unit in [u for u in waiting if ends(item, u)]:
                    found[unit] = item
                    waiting.remove(unit)
        return found


def ends(item: str, unit: str) -> bool:
    """Whether a commit can be what finishes a unit: of a shard's tensors the note that follows the shard."""
    if unit.startswith("write:"):
        return not item.endswith(".safetensors")
    return unit.split(":")[1] not in ("moments", "expert") or belongs(unit, item)


def belongs(unit: str, item: str) -> bool:
    """Whether a unit ("sense:moments:LAYER:BATCH") is of the layer that a file is of."""
    return unit.split(":")[2] == Path(item).stem.rpartition("-")[2]


@dataclass
class Tally:
    """What came of a line's disturbances."""

    disturbances: int = 0
    by_stage: Counter[str] = field(default_factory=Counter)
    too_late: int = 0
    sequences: int = 0
    same: int = 0
    twice: list[str] = field(default_factory=list)
    in_hand: int = 0
    passes: int = 0
    units: int = 0
    wrong: list[str] = field(default_factory=list)


def count_again(tally: Tally, line: Line, runs: list[list[tuple[str, str]]], out: Path) -> None:
    """Add up what later runs of a sequence did again."""
    item_of, done, begun = line.undisturbed.item_of, set[str](), set[str]()
    walked = "layer by layer" in line.name
    for steps in runs:
        for kind, what in steps:
            if kind == "commit":
                done.add(os.path.relpath(what, out))
            if kind != "work":
                continue
            tally.units += 1
            shows = ":moments:" in what or (walked and ":gradients:" in what)
            if item_of.get(what) in done and not (shows and ":gradients:" in what):
                tally.twice.append(what)
            elif what in begun:
                tally.passes += shows
                tally.in_hand += not shows
            begun.add(what)


def disturb(line: Line, how: str, rng: random.Random, tally: Tally, most: int) -> None:
    """One sequence: up to `most` disturbances of one folder, then the command to its end."""
    tally.sequences += 1
    out = place("out")
    line.prepare(out)
    calm, runs = line.undisturbed, []
    for number in range(most):
        log = out.with_suffix(f".{number}.log")
        trace: dict[str, Any] = {"path": str(log)}
        by_step = rng.random() < 0.5
        if by_step:
            trace |= calm.some_step(rng) | {"happens": how}
            if number and rng.random() < 0.5:
                trace["at"] = 1  # what was done before is not done again: a stage may have no other line left
        running = server().start(*line.command(out), trace=trace)
        if not by_step:
            end = time.monotonic() + rng.random() * 0.9 * calm.seconds
            running.wait_until(lambda end=end: time.monotonic() > end)  # type: ignore[misc]
            if server().ask({"alive": running.pid})["alive"]:
                running.signal(SIGNALS[how])
        ended, steps = running.wait(), traced.read(log)
        runs.append(steps)
        if ended.code == 0:
            tally.too_late += 1
            break
        tally.disturbances += 1
        tally.by_stage[next((what for kind, what in reversed(steps) if kind == "stage"), "start")] += 1
        if how == "kill" or len(steps) < 2:  # before it has begun nobody answers but the system
            fine = ended.code in (-SIGNALS[how], 1)
        else:
            fine = ended.code == 1 and ended.err.splitlines()[-2:][0] == "error: interrupted" and not ended.out
        if not fine:
            tally.wrong.append(f"{how} ended with {ended.code}: {ended.err[-300:]}")
        sealed = (out / "mopeq_manifest.json").exists() and line.name not in ("eval", "plan")
        if sealed and ("stage", "seal") not in steps:
            tally.wrong.append("a folder was sealed though its making was interrupted before")
    log = out.with_suffix(".last.log")
    ended = mopeq(*line.command(out), trace={"path": str(log)})
    runs.append(traced.read(log))
    count_again(tally, line, runs, out)
    if ended.code == 0 and line.result(out, ended) == calm.result:
        tally.same += 1
    else:
        tally.wrong.append(f"then {ended.code}: {ended.err[-300:] if ended.code else 'another result'}")
    shutil.rmtree(out, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- the lines


def quantized(name: str, *more: str, walked: bool = False) -> Line:
    def command(out: Path) -> tuple[object, ...]:
        memory = ("--max-memory", walked_memory(more) if walked else "8GiB")  # never by what is free just then
        data = ("--calib", text(), "--calib-tokens", TOKENS) if "fisher" in more else ()
        return ("quantize", source("olmoe", **MODEL), "-o", out, *SIZES, *more, *data, *memory)

    return Line(name, command, lambda out, _: digests(out))


def packed() -> Path:
    out = room() / "read"
    if not out.exists():
        assert mopeq("quantize", source("olmoe", **MODEL), "-o", out, *SIZES).code == 0
    return out


def measured(out: Path, ended: Ended) -> Any:
    beside = [out / ".mopeq" / name for name in ("eval.json", "eval_items.json")]
    stored = [hashlib.sha256(path.read_text().replace(str(out), "").encode()).hexdigest() for path in beside]
    return [{k: v for k, v in json.loads(ended.out).items() if k != "out"}, stored, digests(out)]


LINES = {
    line.name: line
    for line in (
        quantized("rtn", "--sensitivity", "hessian", "--method", "rtn"),
        quantized("fisher+gptq", "--sensitivity", "fisher", "--method", "gptq"),
        quantized("fisher+gptq, layer by layer", "--sensitivity", "fisher", "--method", "gptq", walked=True),
        Line(
            "eval",
            lambda out: (
                "eval",
                out,
                "--against",
                source("olmoe", **MODEL),
                "--data",
                text(),
                "--window",
                64,
                "--max-memory",
                "8GiB",
                "--json",
            ),
            measured,
            lambda out: copy(packed(), out),
        ),
        Line(
            "plan",
            lambda out: ("plan", source("olmoe", **MODEL), "--avg-bits", 2.6, "--json"),
            lambda out, ended: json.loads(ended.out),
        ),
    )
}
SHARES = {"rtn": 0.25, "fisher+gptq": 0.3, "fisher+gptq, layer by layer": 0.25, "eval": 0.15, "plan": 0.05}


# ------------------------------------------------------------------------------------------- other misfortunes


@contextmanager
def small_disk(nbytes: int) -> Any:
    """A disk of that size, or None where mounting is not allowed."""
    folder = Path(tempfile.mkdtemp(prefix="mopeq-disk-"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "mopeq", folder], capture_output=True)
    try:
        yield folder if mounted.returncode == 0 else None
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def full_disk(line: Line, rng: random.Random, tally: Tally) -> None:
    """Others fill the disk at some step of a run; once they have made room, the same command ends well."""
    calm = line.undisturbed
    tally.sequences += 1
    with small_disk(64 << 20) as disk:
        if disk is None:
            tally.wrong.append("no disk can be mounted here")
            return
        out, log = disk / "out", place("log")
        trace = {"path": str(log), "happens": "fill", "target": str(disk)} | calm.some_step(rng)
        ended = mopeq(*line.command(out), trace=trace)
        tally.by_stage[next(what for kind, what in reversed(traced.read(log)) if kind == "stage")] += 1
        if ended.code != 0:
            tally.disturbances += 1
            error, refused = ended.err.splitlines()[-2], ended.code == 2  # refused: before anything was begun
            if (" free; " if refused else "No space left") not in error or ended.code not in (1, 2):
                tally.wrong.append(f"full disk: {ended.err[-200:]}")
            if list(out.rglob("*.part")) or (out / "mopeq_manifest.json").exists():
                tally.wrong.append("full disk: something half-written was left")
        else:
            tally.too_late += 1
        (disk / "filler").unlink(missing_ok=True)
        again = mopeq(*line.command(out))
        if again.code == 0 and line.result(out, again) == calm.result:
            tally.same += 1
        else:
            tally.wrong.append(f"full disk, then {again.code}: {again.err[-300:]}")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a weight": lambda folder: poke(sorted(folder.glob("*.safetensors"))[0]),
    "config.json": lambda folder: edit(folder / "config.json"),
    "the tokenizer": lambda folder: edit(folder / "tokenizer_config.json"),
    "a new file": lambda folder: (folder / "chat_template.jinja").write_text("x"),
    "a file gone": lambda folder: (folder / "LICENSE").unlink(),
}


def poke(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def edit(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"edited": True}))


def changed_source(what: str, rng: random.Random, tally: Tally) -> None:
    """The source changes after a run was killed: the same command is refused, and the hint's way out works."""
    tally.sequences += 1
    folder, out = copy(source("olmoe", **MODEL), place("model")), place("out")
    command = ("quantize", folder, "-o", out, *SIZES)
    begun = rng.choice(["check_weights", "sense", "quantize_layers", "write_checkpoint", "seal"])
    mopeq(*command, trace={"path": str(out.with_suffix(".log")), "within": begun, "at": 1})
    CHANGES[what](folder)
    error, hint = mopeq(*command).refused(2)
    name = {"a weight": ".safetensors", "config.json": "config.json", "the tokenizer": "tokenizer_config.json"}
    fine = "the source changed" in error and name.get(what, "") in error and "start anew" in hint
    shutil.rmtree(out)
    tally.disturbances += 1
    if fine and mopeq(*command).code == 0:
        tally.same += 1
    else:
        tally.wrong.append(f"{what} changed: {error}")


def changed_while_read(rng: random.Random, tally: Tally) -> None:
    """A shard is written anew while a run reads it: the run does not seal."""
    tally.sequences += 1
    folder, out = copy(source("olmoe", **MODEL), place("model")), place("out")
    shard = sorted(folder.glob("*.safetensors"))[0]
    stage = rng.choice(["check_weights", "sense", "quantize_layers", "write_checkpoint", "check"])
    trace = {"path": str(out.with_suffix(".log")), "within": stage, "at": 1, "happens": "touch", "target": str(shard)}
    error, _ = mopeq("quantize", folder, "-o", out, *SIZES, trace=trace).refused(2)
    tally.disturbances += 1
    if "the source changed" in error and shard.name in error and not (out / "mopeq_manifest.json").exists():
        tally.same += 1
    else:
        tally.wrong.append(f"changed while read: {error}")


def two_at_once(rng: random.Random, tally: Tally) -> None:
    """A second run on the same folder is refused, at whatever step the first is; the first ends well."""
    line = LINES["rtn"]
    tally.sequences += 1
    out = place("out")
    where = rng.choice(["sense", "allocate", "quantize_layers", "write_checkpoint", "check", "seal"])
    first = server().start(*line.command(out), pause=f"mopeq.stages:{where}", release=True)
    assert first.wait_until(first.stem.with_suffix(".paused").exists)
    error, _ = mopeq(*line.command(out)).refused(2)
    first.stem.with_suffix(".go").touch()
    ended = first.wait()
    tally.disturbances += 1
    if "another run is at work" in error and ended.code == 0 and digests(out) == line.undisturbed.result:
        tally.same += 1
    else:
        tally.wrong.append(f"two at once: {error}; {ended.err[-200:]}")


def read_only_source(tally: Tally) -> None:
    """A source that cannot be written (a mount that forbids it) gives the same, and nothing in it changes."""
    line, folder = LINES["fisher+gptq"], source("olmoe", **MODEL)
    tally.sequences += 1
    there = Path(tempfile.mkdtemp(prefix="mopeq-read-only-"))
    if subprocess.run(["mount", "--bind", "-o", "ro", folder, there], capture_output=True).returncode:
        tally.wrong.append("nothing can be mounted here")
        return
    out = place("out")
    try:
        before = [(p.name, p.stat().st_mtime_ns) for p in sorted(there.iterdir())]
        command = [there if x == folder else x for x in line.command(out)]
        ended = mopeq(*command)
        same = before == [(p.name, p.stat().st_mtime_ns) for p in sorted(there.iterdir())]
    finally:
        subprocess.run(["umount", there], check=True)
        there.rmdir()
    tally.disturbances += 1
    if ended.code == 0 and same and digests(out) == line.undisturbed.result:
        tally.same += 1
    else:
        tally.wrong.append(f"read-only source: {ended.err[-300:]}")


# ------------------------------------------------------------------------------------------------------ all of it


def survey(kills: int, seed: int, lines: list[str]) -> dict[str, Tally]:
    """Disturb all lines; {what was done: its tally}."""
    rng, tallies = random.Random(seed), {}

    def told(name: str) -> Tally:
        tallies[name] = Tally()
        return tallies[name]

    for name in lines:
        for how, share in (("kill", 1.0), ("int", 0.1), ("term", 0.1)):
            tally, wanted = told(f"{how}: {name}"), max(1, round(kills * SHARES[name] * share))
            while tally.disturbances < wanted and tally.sequences < 10 * wanted:
                disturb(LINES[name], how, rng, tally, min(rng.randint(1, 6), wanted - tally.disturbances))
            if tally.disturbances < wanted:
                tally.wrong.append(f"{wanted} disturbances were wanted")
            print(told_of(f"{how}: {name}", tally), flush=True)
    few = max(1, kills // 20)
    for name in [name for name in lines if name not in ("eval", "plan")]:
        tally = told(f"full disk: {name}")
        for _ in range(few):
            full_disk(LINES[name], rng, tally)
        print(told_of(f"full disk: {name}", tally), flush=True)
    if "rtn" in lines:
        tally = told("source changed between runs")
        for what in CHANGES:
            changed_source(what, rng, tally)
        tally = told("source changed while it was read")
        for _ in range(few):
            changed_while_read(rng, tally)
        tally = told("two runs at once")
        for _ in range(few):
            two_at_once(rng, tally)
    if "fisher+gptq" in lines:
        read_only_source(told("read-only source"))
    return tallies


def told_of(name: str, t: Tally) -> str:
    stages = " ".join(f"{stage} {count}" for stage, count in t.by_stage.most_common())
    again = f"twice {len(t.twice)}, in hand {t.in_hand}, passes {t.passes} of {t.units} units"
    same = f"same {t.same} of {t.sequences}"
    return f"{name}: {t.disturbances} (and {t.too_late} too late), {same}, {again}; {stages} {' | '.join(t.wrong)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=240, help="SIGKILLs over all lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", nargs="*", choices=list(LINES), default=list(LINES))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    started, tallies = time.monotonic(), survey(asked.kills, asked.seed, asked.lines)
    for name, tally in tallies.items():
        print(told_of(name, tally))
    killed = sum(t.disturbances for name, t in tallies.items() if name.startswith("kill"))
    bad = [f"{name}: {line}" for name, t in tallies.items() for line in (*t.wrong, *t.twice)]
    seconds = time.monotonic() - started
    print(f"{killed} kills, {len(bad)} faults, {seconds:.0f} s, seed {asked.seed}")
    if asked.json:
        rows = {name: vars(t) | {"twice": len(t.twice)} for name, t in tallies.items()}
        asked.json.write_text(
            json.dumps({"seed": asked.seed, "seconds": round(seconds), "rows": rows}, indent=1) + "\n"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
