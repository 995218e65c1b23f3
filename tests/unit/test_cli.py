"""The command line itself: exit status, what goes where, one line and one hint, whatever the verb fails with."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import pytest
import typer
from safetensors.torch import load_file, save_file

from mopeq import __version__, cli
from mopeq.cli import app, run_command
from mopeq.errors import BadInput, MopeqError
from mopeq.progress import silence

VERBS = ("plan", "quantize", "map", "run", "eval", "bench", "report", "verify", "demo")


def refused(capsys: Any, arguments: list[str], code: int = 2) -> tuple[str, str]:
    """(error, hint) of a command that fails with `code`: exactly these two lines, and nothing on stdout."""
    assert run_command(arguments, False) == code
    caught = capsys.readouterr()
    lines = [line for line in caught.err.splitlines() if line]  # an interrupted line is ended first
    assert caught.out == "" and len(lines) == 2, caught
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def test_every_verb_is_there_with_help_and_an_example(capsys: Any) -> None:
    assert run_command(["--help"], False) == 0
    top = capsys.readouterr().out
    for verb in VERBS:
        assert re.search(rf"\b{verb}\b", top)
        assert run_command([verb, "--help"], False) == 0
        shown = capsys.readouterr()
        assert "Example:" in shown.out and f"mopeq {verb}" in shown.out and "--json" in shown.out and shown.err == ""


def test_no_arguments_show_the_help(capsys: Any) -> None:
    assert run_command([], False) == 0
    assert "Usage" in capsys.readouterr().out


def test_version(capsys: Any) -> None:
    assert run_command(["--version"], False) == 0
    assert capsys.readouterr().out == f"mopeq {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["plan"],
        ["plan", "x", "--no-such-flag"],
        ["plan", "x", "y"],
        ["plan", "x", "--avg-bits", "many"],
        ["plan", "x", "--other-bits", "4.5"],
        ["quantize", "x"],
        ["quantize", "x", "-o"],
        ["run", "x"],
        ["run", "x", "--prompt"],
        ["quantize", "x", "-o", "y", "--seed", "one"],
        ["--nonsense"],
        ["eval"],
    ],
)
def test_what_typer_itself_refuses(arguments: list[str], capsys: Any) -> None:
    error, hint = refused(capsys, arguments)
    assert error and "--help" in hint
    assert "nonsense" not in hint  # a hint is a command that works


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "/nowhere"], "does not exist"),
        (["plan", "x", "--bits", "2,9"], "9 bits"),
        (["plan", "x", "--avg-bits", "3", "--fit", "1GB"], "two ways"),
        (["plan", "x", "--per", "weight"], "--per weight"),
        (["plan", "x", "--allocate", "magic"], "magic"),
        (["quantize", "x", "-o", "y", "--sensitivity", "magic"], "magic"),
        (["quantize", "x", "-o", "y", "--method", "magic"], "magic"),
        (["quantize", "x", "-o", "y", "--device", "tpu"], "--device tpu"),
        (["run", "x", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["eval", "x", "--limit", "-1"], "--limit -1"),
        (["eval", "x", "--save", "/"], "/ is a folder"),
        (["bench", "x", "--new-tokens", "0"], "--new-tokens 0"),
        (["bench", "x", "--plot", "/"], "/ is a folder"),
        (["bench", "x", "--shapes", "64x32x8x2"], "not both"),
        (["verify", "/nowhere"], "/nowhere is no folder"),
        (["map", "/nowhere"], "/nowhere"),
        (["run", "/nowhere", "--prompt", "x"], "/nowhere"),
        (["eval", "/nowhere"], "/nowhere"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: Any) -> None:
    error, _ = refused(capsys, arguments)
    assert said in error


@pytest.mark.parametrize("words", [["run", "--prompt", "x"], ["eval"]])
def test_a_folder_that_is_no_checkpoint(words: list[str], tmp_path: Path, capsys: Any) -> None:
    error, hint = refused(capsys, [words[0], str(tmp_path), *words[1:]])
    assert "no config.json" in error and "mopeq quantize" in hint


def test_an_answer_of_no_numbers_is_an_error(tmp_path: Path, capsys: Any) -> None:
    out = made.copy(made.packed("olmoe")[0], tmp_path / "out")
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors.keys() & {"model.norm.weight"}:
            tensors[name] = tensors[name] * float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    capsys.readouterr()  # what making the checkpoint said
    error, hint = refused(capsys, ["run", str(out), "--prompt", "the quick"], code=1)
    assert "not numbers" in error and "mopeq verify" in hint


def test_a_run_directory_solves_other_budgets_too(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Shared by --run, beside a checkpoint, or of a job that came no further than its sensitivity."""

    def solved(path: Path) -> dict[str, Any]:
        assert run_command(["map", str(path), "--fit", "75%", "--json"], False) == 0
        return dict(json.loads(capsys.readouterr().out))

    source, options = made.source("olmoe"), {"per": "projection", "avg_bits": 2.5}
    with silence(), monkeypatch.context() as here:
        here.chdir(tmp_path)
        made.quantize(source, tmp_path / "out", run="run", **options)  # and is found from elsewhere
        made.quantize(source, tmp_path / "alone", **options)
    wanted = solved(tmp_path / "out")
    assert (
        wanted["bytes_weights"]
        > json.loads((tmp_path / "out" / "mopeq_run.json").read_text())["result"]["bytes_weights"]
    )
    assert solved(tmp_path / "run") == solved(tmp_path / "alone" / ".mopeq") == wanted

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("mopeq.stages.quantize_layers", stop)
    with silence(), pytest.raises(KeyboardInterrupt):
        made.quantize(source, tmp_path / "stopped", **options)
    assert solved(tmp_path / "stopped" / ".mopeq") == wanted

    spec = tmp_path / "run" / "spec.json"
    spec.write_text(json.dumps({k: v for k, v in json.loads(spec.read_text()).items() if k != "options"}))
    assert "does not tell what was asked" in refused(capsys, ["map", str(tmp_path / "run"), "--fit", "75%"])[0]
    assert "has no mopeq_run.json" in refused(capsys, ["map", str(tmp_path), "--fit", "75%"])[0]


def fails_with(monkeypatch: Any, problem: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise problem

    monkeypatch.setattr("mopeq.stages.forecast", fail)
    monkeypatch.setattr("mopeq.stages.open_job", fail)


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        (BadInput("a\nb\tc", "d\ne"), 2, "a b c"),
        (MopeqError("broken"), 1, "broken"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 1, "No space left on device (/x)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "Permission denied (/x)"),
        (OSError("odd"), 1, "odd"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 1, "interrupted"),
        (ValueError("first line\nsecond line"), 1, "ValueError: first line"),
        (ValueError(""), 1, "ValueError"),
        (AssertionError("planned 5 bytes, wrote 6"), 1, "planned 5 bytes, wrote 6"),
        (RecursionError("too deep"), 1, "too deep"),
    ],
)
def test_whatever_goes_wrong_is_one_line_and_a_hint(
    problem: BaseException, code: int, said: str, monkeypatch: Any, capsys: Any
) -> None:
    fails_with(monkeypatch, problem)
    error, hint = refused(capsys, ["plan", "x"], code)
    assert said in error and hint


def test_space_is_asked_for_when_it_ran_out(monkeypatch: Any, capsys: Any) -> None:
    fails_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    assert "free some space" in refused(capsys, ["plan", "x"], 1)[1]


def test_debug_shows_the_traceback(monkeypatch: Any) -> None:
    fails_with(monkeypatch, ValueError("inside"))
    with pytest.raises(ValueError, match="inside"):
        run_command(["plan", "x"], True)
    fails_with(monkeypatch, BadInput("a line", "a hint"))
    with pytest.raises(BadInput, match="a line"):
        run_command(["plan", "x"], True)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_debug_may_stand_anywhere(at: int, monkeypatch: Any) -> None:
    arguments = ["plan", "x"]
    arguments.insert(at, "--debug")
    seen: list[Any] = []
    monkeypatch.setattr(cli, "run_command", lambda a, debug: seen.append((a, debug)) or 0)
    monkeypatch.setattr("sys.argv", ["mopeq", *arguments])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and seen == [(["plan", "x"], True)]


def test_json_is_one_object_on_stdout_and_nothing_else(capsys: Any) -> None:
    from made import source

    folder = source("olmoe")
    capsys.readouterr()
    assert run_command(["plan", str(folder), "--json"], False) == 0
    caught = capsys.readouterr()
    assert caught.err == "" and caught.out.count("\n") == 1
    body = json.loads(caught.out)
    for key in (
        "params",
        "expert_params",
        "bytes_bf16",
        "bytes_source",
        "bytes_by_bits",
        "budget_bytes",
        "predicted_bytes",
    ):
        assert key in body


def test_people_get_a_table(capsys: Any) -> None:
    from made import source

    folder = source("olmoe")
    capsys.readouterr()
    for more in ([], ["--allocate", "kmeans"], ["--fit", "60%"]):
        assert run_command(["plan", str(folder), *more], False) == 0
        caught = capsys.readouterr()
        assert "olmoe" in caught.out and "MiB" in caught.out and caught.err == ""


def test_flags_of_the_contract() -> None:
    """Names that users and acceptance rely on; a change here is a change of the interface."""
    command = typer.main.get_command(app)
    flags = {
        name: {option for p in verb.params for option in p.opts if option.startswith("-")}
        for name, verb in command.commands.items()  # type: ignore[attr-defined]
    }
    bytes_flags = {"--bits", "--avg-bits", "--fit", "--per", "--allocate", "--group-size", "--other-bits", "--json"}
    assert bytes_flags <= flags["plan"]
    assert flags["quantize"] >= bytes_flags | {
        "-o", "--sensitivity", "--scope", "--method", "--map", "--calib", "--calib-tokens", "--seed", "--max-memory",
        "--device", "--run", "--shard-size", "--ray",
    }  # fmt: skip
    assert flags["map"] >= {"--avg-bits", "--fit", "--json"} and flags["run"] >= {"--prompt", "--image", "--json"}
    assert flags["eval"] >= {"--against", "--data", "--window", "--tasks", "--json"}
    assert flags["bench"] >= {"--shapes", "--tokens", "--bits", "--against", "--device", "--plot", "--json"}
    assert flags["report"] >= {"-o", "--json"} and flags["verify"] >= {"--json"} and flags["demo"] >= {"--json"}


def test_a_terminal_of_ascii_gets_what_it_can_show(tmp_path: Path) -> None:
    """A multiplication sign, or an answer in Chinese, is no failure of what was done."""
    out, _ = made.packed("olmoe")
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-m", "mopeq.cli", "map", out], env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and " ? 3g64a" in ended.stdout


def test_a_closed_pipe_is_no_fault(monkeypatch: Any, capsys: Any) -> None:
    fails_with(monkeypatch, BrokenPipeError())
    assert run_command(["plan", "x"], False) == 1
    assert capsys.readouterr().err == ""


def test_a_hub_id_that_cannot_be_had(monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise RuntimeError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    error, hint = refused(capsys, ["plan", "org/name"])
    assert "org/name" in error and "offline" in error and "and more" not in error and hint
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_ctrl_c_while_modules_load_shows_no_traceback(before: str) -> None:
    """Nothing is begun then; whoever imports typer first is told of it here. Who starts it with & is not heard."""
    lines = (
        "import builtins, os, signal\n"
        f"signal.signal(signal.SIGINT, signal.{before})\n"
        "real = builtins.__import__\n"
        "def told(name, *rest):\n"
        "    if name == 'typer':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = told\n"
        "from mopeq.__main__ import main\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert ended.returncode == (0 if before == "SIG_IGN" else -signal.SIGINT) and ended.stderr == ""
