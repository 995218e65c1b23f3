"""Kill it anywhere, start it again with the same command: the result is byte for byte that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextvars import copy_context
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
from made import copy, digests, room, source, stored
from warm import Running, mopeq, server

ASKED = ("--avg-bits", "2.6", "--per", "projection", "--shard-size", "60kB")
STEPS = [  # where a signal meets the run: before the call of this function that follows so many
    ("mopeq.stages:sense", 0),
    ("mopeq.stages:allocate", 0),
    ("mopeq.stages:quantize_layers", 0),
    ("mopeq.assemble:write_layer", 0),
    ("mopeq.assemble:write_layer", 1),
    ("mopeq.assemble:tensor_data", 25),
    ("mopeq.assemble:read_tensor", 8),
    ("mopeq.assemble:write_around", 0),
    ("mopeq.readback:read_back", 0),
    ("mopeq.stages:seal", 0),
    ("mopeq.stages:write_manifest", 0),
]
POLITE = [(signal.SIGINT, 0), (signal.SIGTERM, 4), (signal.SIGINT, 5), (signal.SIGTERM, 8), (signal.SIGINT, 10)]
MEETINGS = [(signal.SIGKILL, *step) for step in STEPS] + [(number, *STEPS[at]) for number, at in POLITE]


@cache
def undisturbed(*more: object) -> dict[str, str]:
    """Digests of a run that nothing disturbed, made by a process of its own."""
    out = room() / "undisturbed" / str(abs(hash(more)))
    assert mopeq("quantize", source("olmoe"), "-o", out, *ASKED, *more).code == 0
    found = digests(out)
    assert len([name for name in found if name.endswith(".safetensors")]) > 2
    return found


def start(out: Path, *more: object, **limits: Any) -> Running:
    return server().start("quantize", source("olmoe"), "-o", out, *ASKED, *more, **limits)


def interrupt_at(where: str, out: Path) -> None:
    """A run that Ctrl-C ends before the function `where`."""
    running = start(out, pause=where)
    assert running.wait_until(running.stem.with_suffix(".paused").exists)
    running.signal(signal.SIGINT)
    running.wait()


def check_unsealed(out: Path) -> None:
    """What an interrupted run leaves never loads; a polite end leaves no half-written file."""
    assert not (out / "mopeq_manifest.json").exists()
    if out.exists():
        for verb in (("verify", out), ("run", out, "--prompt", "x")):
            mopeq(*verb).refused()


def ended_by(running: Running, number: int) -> None:
    """The run ended as that signal should end it."""
    if number == signal.SIGKILL:
        assert running.wait().code == -signal.SIGKILL
    else:
        error, hint = running.wait().refused(1)
        assert error == "interrupted" and "same command" in hint


@pytest.mark.parametrize(("number", "where", "after"), MEETINGS)
def test_killed_anywhere_and_resumed(number: int, where: str, after: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = start(out, pause=where, after=after)
    assert running.wait_until(running.stem.with_suffix(".paused").exists), "it never came there: " + running.err()
    running.signal(number)
    ended_by(running, number)
    if number != signal.SIGKILL:
        assert not list(out.rglob("*.part"))
    check_unsealed(out)
    again = start(out).wait()
    assert again.code == 0, again
    assert digests(out) == undisturbed()
    assert mopeq("verify", out).code == 0
    assert not list(out.rglob("*.part")) and not (out / ".mopeq" / "quantized").exists()


def test_killed_again_and_again(tmp_path: Path) -> None:
    """Eight ends at whatever place the clock finds, all on one folder."""
    out, kinds = tmp_path / "out", [signal.SIGKILL, signal.SIGINT]
    for n in range(8):
        running = start(out)
        time.sleep(0.05 + 0.07 * n)
        if server().ask({"alive": running.pid})["alive"]:
            running.signal(kinds[n % 2])
        assert running.wait().code in (0, 1, -signal.SIGKILL, -signal.SIGINT)
    assert start(out).wait().code == 0
    assert digests(out) == undisturbed() and mopeq("verify", out).code == 0


def stuck(out: Path) -> Running:
    """A run told to end by Ctrl-C, which waits for ever for a thread of its own."""
    running = start(out, pause="mopeq.quant.apart:rounded")
    assert running.wait_until(running.stem.with_suffix(".paused").exists)
    running.signal(signal.SIGINT)
    time.sleep(0.3)
    assert server().ask({"alive": running.pid})["alive"]
    return running


def test_asked_twice_it_ends_at_once(tmp_path: Path) -> None:
    running = stuck(tmp_path / "out")
    running.signal(signal.SIGINT)
    ended_by(running, signal.SIGINT)
    assert start(tmp_path / "out").wait().code == 0
    assert digests(tmp_path / "out") == undisturbed()


@pytest.mark.slow
def test_what_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    ended_by(stuck(tmp_path / "out"), signal.SIGINT)


def test_finished_work_is_taken_up_again(tmp_path: Path) -> None:
    """Not merely done once more: the layers and the sensitivity that were ready are said to be taken."""
    out = tmp_path / "out"
    running = start(out, pause="mopeq.assemble:write_layer", after=1)
    assert running.wait_until(running.stem.with_suffix(".paused").exists)
    running.signal(signal.SIGKILL)
    running.wait()
    layers = list((out / ".mopeq" / "quantized").rglob("*.safetensors"))
    assert len(layers) == 1
    before = layers[0].stat().st_mtime_ns
    moved = start(out, pause="mopeq.stages:seal", release=True)
    assert moved.wait_until(moved.stem.with_suffix(".paused").exists)
    assert layers[0].stat().st_mtime_ns == before
    moved.stem.with_suffix(".go").touch()
    err = moved.wait().err
    assert "sense: hessian taken from" in err and "1 of 2 layers taken from" in err
    once_more = start(out).wait()
    assert once_more.code == 0 and "already made" in once_more.err
    assert digests(out) == undisturbed()


def test_a_method_with_data_resumes_too(tmp_path: Path) -> None:
    """Learned rounding on calibration data, killed after its first layer."""
    text = tiny.write_text(room() / "calib.txt")
    more = ("--sensitivity", "frequency", "--method", "signround", "--calib", text, "--calib-tokens", "256")
    out = tmp_path / "out"
    running = start(out, *more, pause="mopeq.assemble:write_layer", after=1)
    assert running.wait_until(running.stem.with_suffix(".paused").exists, 120), running.err()
    running.signal(signal.SIGKILL)
    running.wait()
    assert start(out, *more).wait().code == 0
    assert digests(out) == undisturbed(*more) != undisturbed()


# -------------------------------------------------------------------------------------------- two at once


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    """The second is refused, whichever directory they share; the first goes on unharmed."""
    out, run = tmp_path / "out", tmp_path / "run"
    first = start(out, "--run", run, pause="mopeq.stages:write_checkpoint", release=True)
    assert first.wait_until(first.stem.with_suffix(".paused").exists)
    for more in (("--run", run), ("--run", tmp_path / "other"), ()):
        error, _ = start(out, *more).wait().refused()
        assert "another run is at work" in error
    error, _ = start(tmp_path / "out2", "--run", run).wait().refused()
    assert "another run is at work" in error
    first.stem.with_suffix(".go").touch()
    assert first.wait().code == 0
    assert digests(out) == undisturbed()
    assert start(tmp_path / "out2", "--run", run).wait().code == 0
    assert digests(tmp_path / "out2") == undisturbed()


def test_four_started_together(tmp_path: Path) -> None:
    """One wins or all wait their turn; nobody breaks anything."""
    out = tmp_path / "out"
    together = [start(out) for _ in range(4)]
    codes = sorted(running.wait().code for running in together)
    assert codes[0] == 0 and set(codes) <= {0, 2}
    assert digests(out) == undisturbed() and mopeq("verify", out).code == 0


# ------------------------------------------------------------------------------------------------ other inputs


def test_another_budget_takes_the_saved_sensitivity(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = source("olmoe")
    assert mopeq("quantize", folder, "-o", tmp_path / "a", "--run", run, "--avg-bits", "2.5").code == 0
    second = mopeq("quantize", folder, "-o", tmp_path / "b", "--run", run, "--avg-bits", "3.5")
    assert second.code == 0 and "sense: hessian taken from" in second.err
    assert (run / "quantized").exists()  # kept, since --run was given
    alone = mopeq("quantize", folder, "-o", tmp_path / "c", "--avg-bits", "3.5")
    assert alone.code == 0 and digests(tmp_path / "b") == digests(tmp_path / "c")


SHOWN = ("--sensitivity", "error", "--method", "gptq", "--calib-tokens", 300)


def run_line(out: Path, *more: object) -> tuple[dict[str, str], list[str], str]:
    """Digests of the files, the notes, and what was said."""
    ended = mopeq("quantize", source("olmoe"), "-o", out, *more, "--json")
    assert ended.code == 0, ended.err
    return digests(out), json.loads(ended.out)["notes"], ended.err


def test_another_budget_of_a_shared_run_is_what_it_is_alone(tmp_path: Path) -> None:
    """Its map is tried too, and what sensing quantized serves it."""
    run = ("--run", tmp_path / "run")
    run_line(tmp_path / "a", *SHOWN, *run, "--avg-bits", "2.5")
    after, alone = run_line(tmp_path / "b", *SHOWN, *run), run_line(tmp_path / "c", *SHOWN)
    assert after[:2] == alone[:2] and any("the map's KL is" in note for note in after[1])
    assert "sense: error taken from" in after[2] and "as sensed" in after[2]
    twosided = [
        run_line(tmp_path / out, *SHOWN, "--method", "twosided", *more) for out, more in (("d", run), ("e", ()))
    ]
    assert twosided[0][:2] == twosided[1][:2]


def test_a_trial_is_of_the_data_at_hand(tmp_path: Path) -> None:
    """Data that grew where neither quantizers nor judges look."""
    data, run, found = tmp_path / "data.txt", ("--run", tmp_path / "run"), []
    for lines in (4, 9):
        tiny.write_text(data, lines=lines)
        found.append(run_line(tmp_path / str(lines), *SHOWN, "--calib", data, *run)[1])
        solved = mopeq("map", tmp_path / str(lines), "--avg-bits", 3)
        assert solved.code == 0 and found[-1][-1][:40] in solved.err
    assert found[-1] == run_line(tmp_path / "alone", *SHOWN, "--calib", data)[1] != found[0]


def test_a_map_is_solved_again_from_its_own_sensitivity(tmp_path: Path) -> None:
    """Of two in one run directory, by different quantizers on the same data."""
    run = ("--run", tmp_path / "run")
    for method in ("rtn", "hqq"):
        run_line(tmp_path / method, *SHOWN, "--method", method, "--avg-bits", "2.5", *run)
    solved = json.loads(mopeq("map", tmp_path / "rtn", "--avg-bits", "2.7", "--json").out)
    run_line(tmp_path / "alone", *SHOWN, "--method", "rtn", "--avg-bits", "2.7")
    assert solved["digest"] == json.loads(mopeq("map", tmp_path / "alone", "--json").out)["digest"]


def test_the_same_job_in_other_words_is_already_made(tmp_path: Path) -> None:
    folder, out = source("olmoe"), tmp_path / "out"
    assert mopeq("quantize", folder, "-o", out).code == 0
    words = ("--avg-bits", "3", "--bits", "4,3,2", "--shard-size", "5000MB", "--group-size", "64")
    again = mopeq("quantize", folder, "-o", out, *words)
    assert again.code == 0 and "already made" in again.err
    assert "another finished" in mopeq("quantize", folder, "-o", out, "--avg-bits", "2.9").refused()[0]


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    """By name; in another OUT it is welcome, and nothing of the old source is taken."""
    folder, out = copy(source("olmoe"), tmp_path / "model"), tmp_path / "out"
    run = ("--run", tmp_path / "run")
    running = server().start("quantize", folder, "-o", out, *ASKED, *run, pause="mopeq.stages:write_checkpoint")
    assert running.wait_until(running.stem.with_suffix(".paused").exists)
    running.signal(signal.SIGINT)
    running.wait()
    shard = sorted(folder.glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-2:] = b"\x40\x40"  # the last weight is now 3.0
    shard.write_bytes(raw)
    os.utime(shard, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns + 10**9))
    error, hint = mopeq("quantize", folder, "-o", out, *ASKED, *run).refused()
    assert "the source changed" in error and shard.name in error and str(out) in hint
    other = mopeq("quantize", folder, "-o", tmp_path / "other", *ASKED, *run)
    assert other.code == 0 and "taken from" not in other.err
    clean = mopeq("quantize", folder, "-o", tmp_path / "clean", *ASKED)
    assert clean.code == 0 and stored(tmp_path / "other") == stored(tmp_path / "clean")
    assert digests(tmp_path / "other") != undisturbed()


def test_another_model_does_not_go_on_where_one_was_interrupted(tmp_path: Path) -> None:
    """What is left of the first (a tokenizer, a licence) would be sealed as the second's."""
    out = tmp_path / "out"
    interrupt_at("mopeq.readback:read_back", out)
    error, _ = mopeq("quantize", source("mixtral"), "-o", out).refused()
    assert "unfinished checkpoint" in error and str(source("olmoe")) in error
    other = mopeq("quantize", source("olmoe"), "-o", out, "--avg-bits", "3.5", "--shard-size", "60kB")
    assert other.code == 0  # another budget of the same model is welcome
    assert (
        mopeq("quantize", source("olmoe"), "-o", tmp_path / "clean", "--avg-bits", "3.5", "--shard-size", "60kB").code
        == 0
    )
    assert digests(out) == digests(tmp_path / "clean")


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert start(out).wait().code == 0
    next(out.glob("model-00002*.safetensors")).unlink()
    again = start(out).wait()
    assert again.code == 0 and "is missing" in again.err and "made again" in again.err
    assert digests(out) == undisturbed()


def test_damaged_stage_files(tmp_path: Path) -> None:
    """A saved sensitivity cut short is named, not believed."""
    out = tmp_path / "out"
    interrupt_at("mopeq.stages:allocate", out)
    path = next((out / ".mopeq" / "sensitivity").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:200])
    error, hint = start(out).wait().refused()
    assert path.name in error and "delete" in hint
    path.unlink()
    assert start(out).wait().code == 0 and digests(out) == undisturbed()


def test_a_handover_interrupted_at_any_line_leaves_nobody_waiting() -> None:
    """A walked batch has a thread of its own: wherever a signal meets whoever leads it, the thread can be ended."""
    from mopeq.walk.shelf import Luggage, Shelf
    from mopeq.walk.walking import Call, Job

    nothing: Any = None
    for line in range(1, 1000):
        call, left = Call(nothing, lambda: None, (), {}, copy_context()), line

        def interrupt(frame: Any, event: str, arg: Any) -> Any:
            nonlocal left
            left -= event == "line"
            if left == 0:
                raise KeyboardInterrupt
            return interrupt

        def run() -> None:
            for _ in range(2):
                job.stop_at(call)  # noqa: B023 - of this very round

        job = Job(0, run, Luggage(Shelf()), False)
        job.go()
        sys.settrace(interrupt)
        try:
            job.go()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        ending = threading.Thread(target=job.drop, daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive(), f"interrupted at line {line}"
        if left > 0:  # it came to its end: all lines were tried
            return


# ------------------------------------------------------------------------------------------------- determinism


def test_two_runs_are_the_same_bytes(tmp_path: Path) -> None:
    """Another folder, another process with another hash seed, another place of the source."""
    from made import quantize

    from mopeq.progress import silence

    with silence():
        quantize(source("olmoe"), tmp_path / "here", avg_bits=2.6, per="projection", shard_size="60kB")
    assert digests(tmp_path / "here") == undisturbed()
    moved = copy(source("olmoe"), tmp_path / "moved")
    assert mopeq("quantize", moved, "-o", tmp_path / "there", *ASKED).code == 0
    assert digests(tmp_path / "there") == undisturbed()


def test_only_the_card_and_the_run_file_hold_times_and_paths(tmp_path: Path) -> None:
    out = tmp_path / "a-telling-name"
    assert start(out).wait().code == 0
    run = json.loads((out / "mopeq_run.json").read_text())
    assert run["source"] == str(source("olmoe").resolve()) and "finished" in run and run["options"]["avg_bits"] == 2.6
    for path in out.iterdir():
        if path.is_file() and path.name not in ("mopeq_run.json", "README.md"):
            data = path.read_bytes()
            assert b"a-telling-name" not in data and str(source("olmoe")).encode() not in data, path.name
            assert run["finished"].encode() not in data
