"""A line in a file for each step that a command takes, so that others know where it was killed and what it did twice.

    stage NAME    commit PATH    work UNIT

A unit of work is a quantizer's call, an expert quantized apart, a batch's gradients, a layer's moments of a batch, or a
tensor of a shard; a commit is a rename that makes a result appear. At line `at` of a stage (or of all) something
happens (HAPPENS): the process is killed, say, or its disk fills up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = (
    "load_calibration",
    "check_weights",
    "sense",
    "allocate",
    "quantize_layers",
    "write_checkpoint",
    "check",
    "seal",
)


def fill(folder: str) -> None:
    """Leave no free byte on the disk of a folder."""
    with contextlib.suppress(OSError), open(Path(folder) / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def touch(path: str) -> None:
    """Write a file anew, as it is."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data)


HAPPENS: dict[str, Callable[[str], None]] = {
    "kill": lambda _: os.killpg(0, signal.SIGKILL),
    "int": lambda _: os.kill(os.getpid(), signal.SIGINT),
    "term": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "fill": fill,
    "touch": touch,
}


def install(path: str, at: int | None = None, within: str = "", happens: str = "kill", target: str = "") -> None:
    """Trace this process from now on."""
    from mopeq import assemble, stages
    from mopeq.quant import apart, gptq, rtn
    from mopeq.sense import moments, quadratic
    from mopeq.verbs import evaluate

    os.setpgid(0, 0)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    lines, stage = [0], ["start"]

    def tell(*words: object) -> None:
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())
        lines[0] += within in ("", stage[0])
        if lines[0] == at:
            lines[0] = -1 << 62  # once
            HAPPENS[happens](target)

    def before(owner: Any, name: str, what: Callable[..., tuple[object, ...] | None]) -> None:
        original = getattr(owner, name)

        def traced(*args: Any, **kwargs: Any) -> Any:
            if (words := what(*args, **kwargs)) is not None:
                tell(*words)
            return original(*args, **kwargs)

        setattr(owner, name, traced)

    def begins(name: str) -> Callable[..., tuple[object, ...]]:
        def words(*_: Any, **__: Any) -> tuple[object, ...]:
            stage[0] = name
            return "stage", name

        return words

    def quantized(w: Any, fmt: Any, **_: Any) -> tuple[object, ...]:
        digest = hashlib.sha256(w.float().contiguous().numpy().tobytes()).hexdigest()[:12]
        return "work", f"{stage[0]}:{fmt.name}:{digest}"

    def gradients(walking: Any, *_: Any, **__: Any) -> tuple[object, ...] | None:
        import torch

        return ("work", f"{stage[0]}:gradients:{walking.now}") if torch.is_grad_enabled() else None

    def adds(adding: Any, module: Any, *_: Any, **__: Any) -> tuple[object, ...] | None:
        found = id(module) in adding.found
        layer = getattr(module, "_mopeq_traced", None)
        return ("work", f"{stage[0]}:moments:{layer}:{adding.walking.now}") if found else None

    def numbered(adding: Any, walking: Any, batches: Any, pairs: Any, *_: Any, **__: Any) -> None:
        for layer, module in pairs:
            object.__setattr__(module, "_mopeq_traced", layer.layer)

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        tell("commit", target)

    replace, os.replace = os.replace, replaced  # type: ignore[assignment]
    for name in STAGES:
        before(stages, name, begins(name))
    before(evaluate, "measure", begins("eval"))
    before(gptq, "quantize", quantized)
    before(rtn, "quantize", quantized)
    before(quadratic, "sampled_loss", gradients)
    each_expert = apart.each_expert

    def traced_experts(folder: Any, spec: Any, layers: Any, work: Callable[..., Any], *more: Any) -> Any:
        def traced(layer: Any, e: int, *weights: Any) -> Any:
            tell("work", f"{stage[0]}:expert:{layer.layer}:{e}")
            return work(layer, e, *weights)

        return each_expert(folder, spec, layers, traced, *more)

    apart.each_expert = traced_experts
    before(moments.Adding, "__init__", numbered)
    before(moments.Adding, "__call__", adds)
    before(assemble.Supply, "__call__", lambda _, out: ("work", f"write:{out.name}"))
    tell("stage", "start")


def read(path: Path) -> list[tuple[str, str]]:
    """(kind, what) of each line."""
    if not path.exists():
        return []
    return [(kind, what) for kind, _, what in (line.partition(" ") for line in path.read_text().splitlines())]
