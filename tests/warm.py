"""The real command line in processes of its own that start fast: a server that has torch awake forks one per command.

Each child runs `mopeq.cli.main()` with its own stdout, stderr, signals and limits, so it can be interrupted, killed
or starved without harm to the tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from made import DATA_FREE, room

SOURCES = [str(Path(__file__).resolve().parents[1] / "src"), str(Path(__file__).resolve().parent)]


@dataclass
class Ended:
    """How a command ended: its exit status (negative: the signal that killed it), and what it printed."""

    code: int
    out: str
    err: str

    def refused(self, code: int = 2) -> tuple[str, str]:
        """(error, hint): the command failed with `code`, one line `error: …`, one `hint: …`, nothing on stdout."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error:")]
        hints = [line for line in lines if line.startswith("hint:")]
        assert (self.code, self.out) == (code, ""), self
        assert len(errors) == len(hints) == 1, self.err
        assert lines[-2:] == [errors[0], hints[0]], self.err
        assert "Traceback" not in self.err, self.err
        assert len(errors[0]) > len("error: ") and len(hints[0]) > len("hint: "), self.err
        return errors[0].removeprefix("error: "), hints[0].removeprefix("hint: ")


class Running:
    """A command at work."""

    def __init__(self, server: Server, pid: int, stem: Path):
        self.server, self.pid, self.stem = server, pid, stem

    def err(self) -> str:
        return self.printed(".err")

    def printed(self, suffix: str) -> str:
        path = self.stem.with_suffix(suffix)
        return path.read_text() if path.exists() else ""  # killed before it had opened its outputs

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        code = self.server.ask({"wait": self.pid})["code"]
        return Ended(code, self.printed(".out"), self.err())

    def wait_until(self, true: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Whether `true()` came before the command ended by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if true():
                return True
            if not self.server.ask({"alive": self.pid})["alive"]:
                return False
            time.sleep(0.001)
        raise AssertionError("the command neither went on nor ended")


class Server:
    """Forks commands; it never runs one itself, so it has no threads that a fork would lose."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(SOURCES)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.count = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def start(self, *arguments: object, **limits: Any) -> Running:
        """limits: file_bytes (RLIMIT_FSIZE); user (a uid); pause: "module:function" before which it waits once `after`
        calls went through, leaving `stem.paused`, for a signal or (with `release`) for `stem.go`; trace: what
        traced.install is given."""
        if arguments[:1] == ("quantize",):  # without calibration where a test does not ask for it, as made.quantize
            given = {str(a).partition("=")[0] for a in arguments}
            arguments += tuple(
                x
                for k, v in DATA_FREE.items()
                if f"--{k}" not in given and "--help" not in given
                for x in (f"--{k}", v)
            )
        self.count += 1
        stem = room() / "commands" / str(self.count)
        stem.parent.mkdir(exist_ok=True)
        pid = self.ask({"run": [str(a) for a in arguments], "stem": str(stem), **limits})["pid"]
        return Running(self, pid, stem)

    def run(self, *arguments: object, **limits: Any) -> Ended:
        return self.start(*arguments, **limits).wait()


@cache
def server() -> Server:
    return Server()


def mopeq(*arguments: object, **limits: Any) -> Ended:
    """Run one command to its end."""
    return server().run(*arguments, **limits)


# ------------------------------------------------------------------------------------------ in the server


def pause_at(where: str, after: int, release: bool, stem: str) -> None:
    """Make the function wait (and leave a file `.paused`) at its call number after + 1."""
    from importlib import import_module

    module_name, function = where.split(":")
    module = import_module(module_name)
    original, calls = getattr(module, function), [0]

    def paused(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            Path(stem).with_suffix(".paused").touch()
            while not (release and Path(stem).with_suffix(".go").exists()):
                time.sleep(0.02)
        return original(*args, **kwargs)

    setattr(module, function, paused)


def child(request: dict[str, Any]) -> None:
    import resource

    from mopeq.cli import main

    stem = Path(request["stem"])
    for fd, path in ((1, stem.with_suffix(".out")), (2, stem.with_suffix(".err"))):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts with & ignore it
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - open as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if "file_bytes" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if "user" in request:
        os.setgid(request["user"])
        os.setuid(request["user"])
    if "trace" in request:
        import traced

        traced.install(**request["trace"])
    if "pause" in request:
        pause_at(request["pause"], request.get("after", 0), request.get("release", False), request["stem"])
    sys.argv = ["mopeq", *request["run"]]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    import torch
    import transformers.integrations.moe
    import transformers.models.auto.modeling_auto
    import transformers.models.olmoe.modeling_olmoe  # noqa: F401

    import mopeq.assemble
    import mopeq.readback
    import mopeq.stages
    import mopeq.verbs.evaluate
    import mopeq.verbs.run  # noqa: F401

    torch.set_num_threads(1)
    ended: dict[int, int] = {}

    def poll(pid: int, flags: int) -> bool:
        """Whether a child has ended."""
        if pid not in ended:
            found, status = os.waitpid(pid, flags)
            if found:
                ended[pid] = os.waitstatus_to_exitcode(status)
        return pid in ended

    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            pid = os.fork()
            if pid == 0:
                child(request)
            answer: dict[str, Any] = {"pid": pid}
        elif "wait" in request:
            poll(request["wait"], 0)
            answer = {"code": ended[request["wait"]]}
        else:
            answer = {"alive": not poll(request["alive"], os.WNOHANG)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
