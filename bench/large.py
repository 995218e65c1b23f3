"""A model larger than memory through the whole line: peak memory of each command's process tree, and the disk's pace.

    python bench/large.py --layers 27 -o results.json        16 B parameters, 31 GB: as large as DeepSeek-V2-Lite

Makes a seeded checkpoint of DeepSeek-V2-Lite's shape (kept for the next run), then runs `plan`, `quantize` without data
at mixed widths, `run` from the packed folder, and with --calibrated `quantize` by fisher and a quantizer, on a few
tokens, all under --max-memory. Weights are slices of one pool of random numbers: they say nothing, and cost what real
ones cost.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from mopeq.nouns import OutputTensor, parse_size, size_text
from mopeq.packed import index_json, json_bytes, shard_names, split_shards, write_atomic, write_safetensors
from mopeq.progress import progress, say
from mopeq.rundir import free_bytes
from mopeq.tensors import tensor_data

HIDDEN, VOCABULARY, EXPERTS, HEADS = 2048, 102400, 64, 16
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=10944, moe_intermediate_size=1408,
    num_attention_heads=HEADS, num_key_value_heads=HEADS, n_routed_experts=EXPERTS, num_experts_per_tok=6,
    n_shared_experts=2, first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
POOL = 1 << 27  # random numbers, bf16
TEXT = "Codes are whole numbers; a scale belongs to a group of weights, and every expert keeps its own width. " * 200


def tensors(layers: int) -> list[OutputTensor]:
    """Every tensor of the checkpoint, in the order it is stored."""
    found = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]

    def mlp(stem: str, inner: int) -> None:
        for p, shape in (("gate", (inner, HIDDEN)), ("up", (inner, HIDDEN)), ("down", (HIDDEN, inner))):
            found.append((f"{stem}.{p}_proj.weight", shape))

    for i in range(layers):
        at = f"model.layers.{i}"
        found += [
            (f"{at}.input_layernorm.weight", (HIDDEN,)),
            (f"{at}.post_attention_layernorm.weight", (HIDDEN,)),
            (f"{at}.self_attn.q_proj.weight", (HEADS * 192, HIDDEN)),
            (f"{at}.self_attn.kv_a_proj_with_mqa.weight", (512 + 64, HIDDEN)),
            (f"{at}.self_attn.kv_a_layernorm.weight", (512,)),
            (f"{at}.self_attn.kv_b_proj.weight", (HEADS * 256, 512)),
            (f"{at}.self_attn.o_proj.weight", (HIDDEN, HEADS * 128)),
        ]
        if i == 0:
            mlp(f"{at}.mlp", 10944)
            continue
        found.append((f"{at}.mlp.gate.weight", (EXPERTS, HIDDEN)))
        mlp(f"{at}.mlp.shared_experts", 2 * 1408)
        for e in range(EXPERTS):
            mlp(f"{at}.mlp.experts.{e}", 1408)
    found += [("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]
    return [OutputTensor(name, "BF16", shape) for name, shape in found]


def generate(folder: Path, layers: int, seed: int) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "config.json").exists():
        say(f"{folder} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    outputs = tensors(layers)
    size = sum(t.nbytes for t in outputs)
    if free_bytes(folder) < 1.6 * size:
        sys.exit(f"{size_text(size)} of source and what is made of it need more than {size_text(free_bytes(folder))}")
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
    names = shard_names(len(shards := split_shards(outputs, 5 * 10**9)))
    with progress("generate", size, "bytes") as p:

        def give(tensor: OutputTensor) -> memoryview:
            p.step(tensor.nbytes)
            count = tensor.nbytes // 2
            if len(tensor.shape) == 1:
                return tensor_data(torch.ones(tensor.shape, dtype=torch.bfloat16))
            if count > POOL:
                return tensor_data(pool.repeat(-(-count // POOL))[:count])
            start = int(torch.randint(0, POOL - count + 1, (), generator=generator))
            return tensor_data(pool[start : start + count])

        for name, shard in zip(names, shards, strict=True):
            write_safetensors(folder / name, shard, give)
    write_atomic(folder / "model.safetensors.index.json", json_bytes(index_json(shards)))
    write_tokenizer(folder)
    config = {"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "dtype": "bfloat16"}
    write_atomic(folder / "config.json", json_bytes(config | SHAPE | {"num_hidden_layers": layers}))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def tree_rss(root: int) -> int:
    """Resident bytes of a process and all below it, as /proc tells."""
    children: dict[int, list[int]] = {}
    resident: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # it ended
            continue
        pid = int(status.parent.name)
        children.setdefault(int(fields["PPid"]), []).append(pid)
        resident[pid] = 1024 * int(fields.get("VmRSS", "0").split()[0])
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += resident.get(pid, 0)
        waiting += children.get(pid, [])
    return total


def traffic(pid: int) -> dict[str, int]:
    """Bytes a process has read and written so far, from the disk or the page cache; {} once it has ended."""
    try:
        rows = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:
        return {}
    return {"bytes_read": int(rows["rchar"]), "bytes_written": int(rows["wchar"])}


def command(words: list[str], timings: list[dict[str, Any]], what: str) -> dict[str, Any]:
    """Run a mopeq command; what it printed as JSON. Put down under `what`: seconds, those of both cores' work in it
    (less than its share of the machine where others ran too), peak memory, bytes read and written."""
    started, peak = time.monotonic(), 0
    moved: dict[str, int] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "mopeq.cli", *words, "--json"], stdout=subprocess.PIPE, text=True)

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            began = time.monotonic()
            peak = max(peak, tree_rss(process.pid))
            moved.update(traffic(process.pid))
            time.sleep(max(0.05, 20 * (time.monotonic() - began)))  # looking must not take what is looked at its time

    watching = threading.Thread(target=sample)
    watching.start()
    printed, _ = process.communicate()
    watching.join()
    if process.returncode:
        sys.exit(f"mopeq {' '.join(words)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = round(time.monotonic() - started, 1)
    timings.append({"what": what, "seconds": seconds, "cpu_seconds": round(cpu, 1), "peak_rss_bytes": peak, **moved})
    say(f"{what}: {timings[-1]['seconds']} s, peak {size_text(peak)}")
    return dict(json.loads(printed))


def disk_pace(folder: Path, size: int = 1 << 30) -> dict[str, float]:
    """Bytes a second of one sequential write (synced) and read (not from the cache) in the folder."""
    path, block = folder / "pace.tmp", os.urandom(1 << 22)
    started = time.monotonic()
    with open(path, "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    wrote = time.monotonic() - started
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.monotonic()
        while file.read(1 << 22):
            pass
    read = time.monotonic() - started
    path.unlink()
    return {"write": round(size / wrote), "read": round(size / read)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=27, help="27 is DeepSeek-V2-Lite; each has 1.2 GB")
    parser.add_argument("--folder", type=Path, default=Path("large"), help="where source and outputs lie")
    parser.add_argument("--max-memory", default="8GiB")
    parser.add_argument("--calibrated", metavar="METHOD", help="also fisher with this quantizer: rtn, gptq, …")
    parser.add_argument("--calib-tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="the result as JSON")
    args = parser.parse_args()
    source, packed = args.folder / f"source-{args.layers}", args.folder / "packed"
    generate(source, args.layers, args.seed)
    timings: list[dict[str, Any]] = []
    pace = disk_pace(args.folder)
    say(f"disk: writes {size_text(pace['write'])}/s, reads {size_text(pace['read'])}/s")
    widths = ["--avg-bits", "2.5", "--other-bits", "8"]  # equal scores: half of the matrices at 2 bits, half at 3
    free = ["--sensitivity", "hessian", "--method", "rtn"]
    plan = command(["plan", str(source), *widths], timings, "plan")
    limit = [*widths, "--max-memory", args.max_memory]
    shutil.rmtree(packed, ignore_errors=True)
    made = command(["quantize", str(source), "-o", str(packed), *limit, *free], timings, "hessian, rtn")
    line = timings[-1]
    command(["run", str(packed), "--prompt", "Codes are", "--max-new-tokens", "8"], timings, "load and generate")
    if args.calibrated:
        text = args.folder / "calib.txt"
        text.write_text(TEXT)
        shutil.rmtree(args.folder / "calibrated", ignore_errors=True)
        words = ["quantize", str(source), "-o", str(args.folder / "calibrated"), *limit]
        words += ["--sensitivity", "fisher", "--method", args.calibrated, "--calib", str(text)]
        command([*words, "--calib-tokens", str(args.calib_tokens)], timings, f"fisher, {args.calibrated}")
    ideal = made["bytes_source"] / pace["read"] + made["bytes_weights"] / pace["write"]
    result = {
        "params": plan["params"],
        "bytes_source": made["bytes_source"],
        "bytes_weights": made["bytes_weights"],
        "max_memory_bytes": parse_size(args.max_memory),
        "make_bytes": plan["run"]["make_bytes"],
        "disk": pace,
        "params_per_second": round(plan["params"] / line["seconds"]),
        "params_per_cpu_second": round(plan["params"] / line["cpu_seconds"]),
        "load": os.getloadavg(),
        "share_of_disk": round(ideal / line["seconds"], 3),  # reading the source and writing the result once, no more
        "steps": timings,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        write_atomic(args.output, json_bytes(result))
    over = [t["what"] for t in timings if t["peak_rss_bytes"] > parse_size(args.max_memory)]
    if over:
        sys.exit(f"over --max-memory {args.max_memory}: {', '.join(over)}")


if __name__ == "__main__":
    main()
