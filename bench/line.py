"""How fast the calibrated line is beside GPTQModel's GPTQ: the same model, calibration tokens and threads, turn about.

    python bench/line.py --model MODEL --calib text.jsonl --calib-tokens 16384 --rounds 2 -o line.json

Ours is `mopeq quantize` at an average of 2.5 bits: checking, sensing by fisher in three formats, allocation, gptq,
writing and reading back. Theirs (tried with 7.7.0) is loading, `quantize` at 2 bits and saving. Both are without
starting Python and importing libraries; `whole` is our command with that. Only routed experts are quantized; where
the tool cannot (sides that are no multiples of 32), the model is first widened by zeros, as in peers.py. Threads are
OMP_NUM_THREADS, or all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mopeq.packed import json_bytes, write_atomic
from mopeq.progress import say

Asked = argparse.Namespace


def ours(asked: Asked) -> dict[str, float]:
    """The command in a process of its own, which tells its seconds without those of importing libraries."""
    before, started = cpu(resource.RUSAGE_CHILDREN), time.monotonic()
    took = alone(asked, "--ours")
    return took | {"whole": time.monotonic() - started, "whole_cpu": cpu(resource.RUSAGE_CHILDREN) - before}


def run_ours(asked: Asked) -> None:
    import mopeq.plugins.hf  # noqa: F401  # which brings torch and transformers
    from mopeq.cli import main

    with tempfile.TemporaryDirectory() as folder:
        words = ["quantize", asked.model, "-o", f"{folder}/out", "--avg-bits", "2.5", "--calib", asked.calib]
        sys.argv = ["mopeq", *words, "--calib-tokens", str(asked.calib_tokens)]
        used, started = cpu(resource.RUSAGE_SELF), time.monotonic()
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
        took = {"seconds": time.monotonic() - started, "cpu": cpu(resource.RUSAGE_SELF) - used}
    print(f"\n{json.dumps(took)}")


def alone(asked: Asked, who: str) -> dict[str, float]:
    """This file in a process of its own, whose last line tells what it took."""
    model, calib = (str(Path(path).resolve()) for path in (asked.model, asked.calib))
    given = ["--model", model, "--calib", calib, "--calib-tokens", str(asked.calib_tokens)]
    command = [sys.executable, str(Path(__file__).resolve()), who, *given]
    with tempfile.TemporaryDirectory() as folder:  # GPTQModel writes its logs where it is started
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
    return dict(json.loads(printed.splitlines()[-1]))


def run_theirs(asked: Asked) -> None:
    cores = os.cpu_count() or 1
    os.cpu_count = lambda: max(cores, 8)  # type: ignore[method-assign]  # its pools fail where they see few cores
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from peers import wide_model

    from mopeq.data.calibration import calibrate_with
    from mopeq.data.processor import load_processor, tokenizer_of
    from mopeq.models import load_config

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores)))
    folder = Path(asked.model)
    batches = calibrate_with(folder, load_config(folder), [asked.calib], asked.calib_tokens, 0).batches
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for b in batches for row in b["input_ids"]]
    with tempfile.TemporaryDirectory() as wide, tempfile.TemporaryDirectory() as made:
        model = wide_model(folder)
        linears = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        model.save_pretrained(wide)
        tokenizer_of(load_processor(folder)).save_pretrained(wide)
        del model
        kept: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in linears}  # all but the experts
        used, started = cpu(resource.RUSAGE_SELF), time.monotonic()
        found = GPTQModel.load(wide, QuantizeConfig(bits=2, group_size=64, sym=False, dynamic=kept), device="cpu")
        found.quantize(data, batch_size=8)
        found.save(made)
        took = {"seconds": time.monotonic() - started, "cpu": cpu(resource.RUSAGE_SELF) - used}
    print(f"\n{json.dumps(took)}")


def cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--calib-tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=2)
    for who in ("--ours", "--theirs"):
        parser.add_argument(who, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    if asked.ours or asked.theirs:
        (run_ours if asked.ours else run_theirs)(asked)
        return
    from mopeq.job import open_job
    from mopeq.options import Options

    params = open_job(asked.model, Options()).spec.expert_params
    rounds = []
    for _ in range(asked.rounds):
        rounds.append({"ours": ours(asked), "theirs": alone(asked, "--theirs")})
        say(json.dumps(rounds[-1]))
    least = {who: {what: min(r[who][what] for r in rounds) for what in ("seconds", "cpu")} for who in rounds[0]}
    result = {
        "expert_params": params,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "tokens": asked.calib_tokens,
        "rounds": rounds,
        "params_per_second": {who: round(params / took["seconds"]) for who, took in least.items()},
        "ratio": {what: least["theirs"][what] / least["ours"][what] for what in ("seconds", "cpu")},
        "load": os.getloadavg(),
    }
    print(json.dumps(result, indent=1))
    if asked.output:
        write_atomic(asked.output, json_bytes(result))


if __name__ == "__main__":
    main()
