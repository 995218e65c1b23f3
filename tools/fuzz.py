"""Feed mopeq damaged and hostile files, and see what it says: python tools/fuzz.py --cases 20000

Every case takes something whole (a tiny checkpoint, a packed one, data, a picture), spoils it by its own seed, and runs
what a user would run. It must end in success or in mopeq's own error (one line, one hint), within SECONDS and
MEMORY bytes, with no write outside its folder, no code executed, no connection opened. A child process of each block of
cases is watched from outside, and by an audit hook from inside. `--case TARGET:SEED` repeats one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # whatever was asked: a fork of a process with a woken pool stands still
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from PIL import Image  # noqa: E402

from mopeq.errors import MopeqError  # noqa: E402
from mopeq.progress import silence  # noqa: E402

SECONDS = 20.0  # of work, on a slow machine; most cases take milliseconds
STILL = 300.0  # by the clock, until a case that does not even work is given up
MEMORY = 1 << 30  # beyond what a process with torch has; a picture of the largest size allowed takes 0.6 of it
BLOCK = 250  # cases a child process

# ---------------------------------------------------------------------------------------------- spoiling bytes

TOKENS = (b"\x00", b"\xff" * 8, b"{", b"}", b"[" * 99, b'"', b"\\u0000", b"\n", b"\t", b"-1", b"1e999", b"NaN", b"null")
TOKENS += (b"../", b"/etc/passwd", b"9" * 400, b"\xf0\x9f\x98\x80", b"\xd8\x00", b"__metadata__", b"\r", b"'", b",")


def spoil_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few of: bits flipped, bytes put in, taken out, doubled, cut off, moved."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(raw) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1000))
        match rng.randrange(7):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at:at] = rng.choice(TOKENS)
            case 2:
                del raw[at : at + length]
            case 3:
                raw[at:at] = raw[at : at + length]
            case 4:
                del raw[at:]
            case 5:
                raw[at : at + length] = rng.randbytes(length)
            case 6:
                raw[at : at + len(t)] = (t := rng.choice(TOKENS))
    return bytes(raw)


# ----------------------------------------------------------------------------------------------- spoiling JSON


DEEP = {f"@{levels}@": levels for levels in (30, 300, 700, 900, 100_000)}  # stand for as many brackets in brackets


def hostile(rng: random.Random) -> Any:
    """A value that somebody did not think of."""
    numbers = (0, 1, -1, 2, 3, 7, 255, 2**31, 2**31 - 1, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400)
    floats = (0.5, -0.0, 1e308, float("inf"), float("nan"), 1e-400)
    words = ("", "x", "mopeq", "../../up", "/etc/passwd", "~", "a\nb", "\x00", "\ud800", "é" * 300, "0" * 5000, "F16")
    words += ("{e}", "{e.__class__}", "%s", "None", "2g64a", "3g1a", "9g64a", "8g0a", "BF16", "U8", "I64", "F8_E4M3")
    words += ("model.layers.0.mlp.experts", "gate", "model.safetensors", "model-00001-of-99999.safetensors", "auto")
    others = (None, True, False, [], {}, [[]], [None], {"": None}, [0] * 1000, *DEEP)
    return copy.deepcopy(rng.choice(rng.choice((numbers, floats, words, others))))


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within one, itself among them."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from nodes(value[key], (*path, key))


def spoil_json(value: Any, rng: random.Random) -> Any:
    """A few values replaced, taken out, renamed, exchanged, moved a little."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        paths = list(nodes(value))
        path = rng.choice(paths)
        if not path:
            if rng.random() < 0.05:
                return hostile(rng)
            continue
        owner = value
        for key in path[:-1]:
            owner = owner[key]
        key = path[-1]
        match rng.randrange(6):
            case 0:
                del owner[key]
            case 1 if isinstance(owner, dict):
                owner[str(hostile(rng))[:200]] = owner.pop(key)
            case 2 if isinstance(owner[key], int):
                owner[key] += rng.choice((-1, 1, 2, 8, 64, -64, 10**9))
            case 3 if isinstance(owner[key], str) and owner[key]:
                owner[key] = spoil_bytes(owner[key].encode("utf-8", "replace"), rng).decode("utf-8", "replace")
            case 4:
                other = value
                for step in rng.choice(paths):
                    other = other[step] if isinstance(other, list | dict) and has(other, step) else other
                owner[key] = copy.deepcopy(other) if len(str(other)) < 20000 else 0
            case _:
                owner[key] = hostile(rng)
    return value


def has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else isinstance(key, int) and key < len(owner)


def json_text(value: Any) -> bytes:
    text = json.dumps(value)
    for mark, levels in DEEP.items():
        text = text.replace(f'"{mark}"', "[" * levels + "]" * levels, 1)
    return text.encode("utf-8", "surrogatepass")


def spoiled_json(body: Any, rng: random.Random) -> bytes:
    """As JSON text; one in four by its bytes instead."""
    if rng.random() < 0.25:
        return spoil_bytes(json_text(body), rng)
    return json_text(spoil_json(body, rng))


# -------------------------------------------------------------------------------------------------- whole things


@cache
def room() -> Path:
    """Where everything lies; removed by `main` and by the tests."""
    return Path(tempfile.mkdtemp(prefix="mopeq-fuzz-"))


@cache
def source() -> Path:
    import tiny

    small = dict(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=2, num_experts=4)
    return tiny.write(room() / "source", "olmoe", **small, vocab_size=320)


@cache
def stacked() -> Path:
    import tiny

    return tiny.write(room() / "stacked", "gpt_oss", hidden_size=16, intermediate_size=8, num_local_experts=4)


@cache
def float8() -> Path:
    from packed_sources import FLOAT8, read_all, to_float8, write_all

    folder = Path(shutil.copytree(source(), room() / "float8"))
    return write_all(folder, to_float8(read_all(source()))[0], FLOAT8)


@cache
def packed() -> Path:
    from mopeq.stages import quantize

    out = room() / "packed"
    with silence():
        quantize(source(), out, sensitivity="hessian", method="rtn", other_bits=8, shard_size="4kB")
    return out


@cache
def pictures() -> tuple[bytes, ...]:
    """One of each kind that is read, and a few that are made to hurt."""
    made, rgb = [], Image.effect_noise((40, 30), 50).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        rgb.save(buffer, kind)
        made.append(buffer.getvalue())
    frames = io.BytesIO()
    rgb.save(frames, "GIF", save_all=True, append_images=[rgb] * 5)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    turned = io.BytesIO()
    rgb.save(turned, "JPEG", exif=exif)
    return (*made, frames.getvalue(), turned.getvalue(), *bombs())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of that size whose pixels are `rows`."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def bombs() -> Iterator[bytes]:
    """Small files that claim much: pixels, text, rows without end, frames."""
    text = chunk(b"zTXt", b"Comment\x00\x00" + zlib.compress(bytes(1 << 26), 9))
    profile = chunk(b"iCCP", b"icc\x00\x00" + zlib.compress(bytes(1 << 26), 9))
    yield bomb(2**31 - 1, 2**31 - 1, bytes(100))
    yield bomb(65500, 65500, bytes(1 << 20))
    yield bomb(8193, 8192, bytes(1 << 20))
    yield bomb(8, 8, bytes(1 << 26))
    yield bomb(8, 8, bytes(200), text)
    yield bomb(8, 8, bytes(200), profile)
    yield bomb(8, 8, bytes(200), text * 20)
    yield b"P6 99999 99999 255\n" + bytes(64)
    yield (
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x00\x00\x00" + b"," + struct.pack("<HHHH", 0, 0, 65535, 65535)
    )
    yield b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------------ targets


DEBUG: list[str] = []  # "--debug" to see where a case ends


def command(*arguments: object) -> str:
    """What the command line said: "fine", or mopeq's error. Unfit says what it must not be."""
    from mopeq.cli import run_command

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command([str(a) for a in arguments], bool(DEBUG))
    lines = err.getvalue().splitlines()
    if code == 0:
        return "fine"
    said = [line for line in lines if line.startswith(("error:", "hint:"))]
    if code not in (1, 2) or [line.partition(":")[0] for line in lines[-2:]] != ["error", "hint"] or len(said) != 2:
        raise Unfit(f"exit {code}: {err.getvalue()[-500:]}")
    if "fault of mopeq's" in lines[-1] or "Traceback" in err.getvalue() or out.getvalue():
        raise Unfit(lines[-2])
    return lines[-2]


class Unfit(Exception):
    """An answer that no user should get."""


class TookTooLong(BaseException):
    """Raised by the alarm, past every `except Exception`."""


def spoiled_header(path: Path, rng: random.Random) -> bytes:
    """A safetensors file with its header spoiled, its length word, or any byte of it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    match rng.randrange(5):
        case 0:
            return spoil_bytes(raw, rng)
        case 1:
            return (
                struct.pack("<Q", rng.choice((0, 1, length + 1, length - 1, 2**63, 2**64 - 1, 10**8, len(raw))))
                + raw[8:]
            )
        case 2:
            text = spoil_bytes(raw[8 : 8 + length], rng)
        case _:
            text = json_text(spoil_json(header, rng))
    return struct.pack("<Q", len(text)) + text + data


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """A file's bytes exchanged for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def plan_or_quantize(folder: Path, rng: random.Random) -> str:
    """Mostly the plan; now and then all of it, into an OUT whose folder is looked at afterwards."""
    if rng.random() > 0.04:
        return command("plan", folder, "--json")
    out = room() / "out"
    try:
        answer = command("quantize", folder, "-o", out, "--sensitivity", "hessian", "--method", "rtn", "--json")
        if answer != "fine" and (list(out.rglob("*.part")) or (out / "mopeq_manifest.json").exists()):
            raise Unfit(f"{answer}: and something was left behind")
        return answer
    finally:
        shutil.rmtree(out, ignore_errors=True)


def fuzz_header(rng: random.Random) -> str:
    folder = rng.choice((source, stacked, float8))()
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    with replaced(path, spoiled_header(path, rng)):
        return plan_or_quantize(folder, rng)


def fuzz_index(rng: random.Random) -> str:
    folder = rng.choice((packed, sharded))()
    path = folder / "model.safetensors.index.json"
    with replaced(path, spoiled_json(json.loads(path.read_text()), rng)):
        if folder == packed():
            return resealed(rng)
        return plan_or_quantize(folder, rng)


@cache
def sharded() -> Path:
    """A source in several shards."""
    from packed_sources import read_all, write_all

    return write_all(Path(shutil.copytree(source(), room() / "sharded")), read_all(source()), None, shards=3)


def fuzz_config(rng: random.Random) -> str:
    folder = rng.choice((source, stacked, float8))()
    path = folder / "config.json"
    with replaced(path, spoiled_json(json.loads(path.read_text()), rng)):
        return plan_or_quantize(folder, rng)


def fuzz_map(rng: random.Random) -> str:
    path = room() / "map.json"
    path.write_bytes(spoiled_json(json.loads((packed() / "precision_map.json").read_text()), rng))
    if rng.random() < 0.3:
        return command("map", path, "--against", packed(), "--json")
    return command("plan", source(), "--map", path, "--json")


def resealed(rng: random.Random) -> str:
    """What readers say of the packed folder as it is now, sealed by a manifest that fits."""
    from mopeq.packed import write_manifest

    if rng.random() < 0.1:
        return command("verify", packed())
    manifest = packed() / "mopeq_manifest.json"
    with replaced(manifest, manifest.read_bytes()):
        write_manifest(packed())
        if rng.random() < 0.02:
            return command("run", packed(), "--prompt", "x", "--max-new-tokens", "1")
        return command(rng.choice(("verify", "verify", "map")), packed(), "--json")


def fuzz_packed(rng: random.Random) -> str:
    path = rng.choice([*packed().glob("*.safetensors"), packed() / "precision_map.json", packed() / "config.json"])
    if path.suffix == ".json":
        data = spoiled_json(json.loads(path.read_text()), rng)
    else:
        data = spoiled_header(path, rng)
    with replaced(path, data):
        return resealed(rng)


def fuzz_manifest(rng: random.Random) -> str:
    path = packed() / rng.choice(("mopeq_manifest.json", "mopeq_manifest.json", "mopeq_run.json"))
    with replaced(path, spoiled_json(json.loads(path.read_text()), rng)):
        if path.name == "mopeq_run.json":
            return command("map", packed(), "--avg-bits", "2.5", "--json")
        return command("verify", packed(), "--json")


def fuzz_sensitivity(rng: random.Random) -> str:
    path = next((packed() / ".mopeq" / "sensitivity").glob("*.npz"))
    with replaced(path, spoil_bytes(path.read_bytes(), rng)):
        return command("map", packed(), "--avg-bits", "2.5", "--json")


@cache
def tokenizer() -> Any:
    from mopeq.data.processor import load_processor

    return load_processor(source())


def shown(path: Path) -> str:
    """A data file read, every picture decoded, every item worded and cut into tokens."""
    from mopeq.data.encode import encode, windows
    from mopeq.data.readers import picture, read

    try:
        items = read(path)
        for item in items[:20]:
            for image in item.images:
                picture(image, item.source)
            if not item.images:
                encode(item, tokenizer())
        windows((item.text for item in items if item.text), tokenizer(), 64)
    except MopeqError as error:
        return told(error)
    return "fine"


def told(error: MopeqError) -> str:
    if not error.line.strip() or not error.hint.strip():
        raise Unfit(f"an error without line or hint: {error!r}")
    return f"error: {error.line}"


@cache
def encoded() -> tuple[str, ...]:
    return tuple(base64.b64encode(data).decode() for data in pictures()[:9])


def fuzz_jsonl(rng: random.Random) -> str:
    image = rng.choice(encoded())
    (room() / "picture.png").write_bytes(pictures()[0])
    rows: list[Any] = [
        {"text": "A line of text."},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]},
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
            "images": [image],
        },
        {
            "image": rng.choice(("picture.png", image)),
            "question": "what?",
            "answer": rng.choice(("a", ["a", "b"], "['a']")),
        },
        {"question": "which?", "options": rng.choice((["a", "b"], {"A": "a"})), "answer": "A", "hint": "h"},
    ]
    rng.shuffle(rows)
    lines = [json_text(spoil_json(row, rng)) if rng.random() < 0.5 else json_text(row) for row in rows]
    data = b"\n".join(lines) + b"\n"
    path = room() / rng.choice(("data.jsonl", "data.jsonl", "MMMU_DEV.jsonl"))
    path.write_bytes(spoil_bytes(data, rng) if rng.random() < 0.4 else data)
    return shown(path)


def fuzz_tsv(rng: random.Random) -> str:
    image = rng.choice(encoded())
    names = ["index", "image", "question", "answer", "A", "B", "hint", "image_path", "category"]
    header = rng.sample(names, rng.randint(3, len(names)))
    cells = [
        "0",
        "1",
        image,
        str([image, image]),
        "[" * 200,
        "['a', 'b']",
        "what <image 1> is it?",
        "",
        '"',
        "\x00",
        "A",
    ]
    cells += [
        "[1, 2]",
        "picture.png",
        "../up.png",
        "{'a': 1}",
        "é" * 70,
        "9" * 5000,
        "['" + "a" * 90 + "'",
        "<image 0>",
    ]
    rows = ["\t".join(header)]
    for number in range(rng.randint(0, 4)):
        good = {"index": str(number), "image": image, "question": "what <image 1>?", "answer": "['x', 'y']"}
        rows.append("\t".join(good.get(n, "x") if rng.random() < 0.7 else rng.choice(cells) for n in header))
    data = "\n".join(rows).encode()
    name = rng.choice(("data", "MMMU_DEV_VAL", "ChartQA_TEST", "COCO_VAL", "MMBench_DEV_EN", "TextVQA_VAL", "POPE"))
    path = room() / f"{name}.tsv"
    path.write_bytes(spoil_bytes(data, rng) if rng.random() < 0.4 else data)
    return shown(path)


def fuzz_text(rng: random.Random) -> str:
    path = room() / "data.txt"
    path.write_bytes(spoil_bytes("plain text, ünïcode, \u2028 and more. ".encode() * rng.randint(0, 30), rng))
    return shown(path)


def fuzz_picture(rng: random.Random) -> str:
    from mopeq.data.readers import picture

    made = pictures()
    data = made[rng.randrange(len(made))] if rng.random() < 0.25 else made[rng.randrange(9)]
    data = data if rng.random() < 0.1 else spoil_bytes(data[:4000], rng) + data[4000:]
    image: bytes | Path = data
    if rng.random() < 0.3:
        image = room() / "spoiled.img"
        image.write_bytes(data)
    try:
        assert picture(image).mode == "RGB"
    except MopeqError as error:
        return told(error)
    return "fine"


TARGETS: dict[str, tuple[Callable[[random.Random], str], float]] = {  # and its share of the cases
    "header": (fuzz_header, 0.2),
    "index": (fuzz_index, 0.07),
    "config": (fuzz_config, 0.14),
    "map": (fuzz_map, 0.1),
    "packed": (fuzz_packed, 0.14),
    "manifest": (fuzz_manifest, 0.05),
    "sensitivity": (fuzz_sensitivity, 0.03),
    "jsonl": (fuzz_jsonl, 0.1),
    "tsv": (fuzz_tsv, 0.07),
    "text": (fuzz_text, 0.02),
    "picture": (fuzz_picture, 0.08),
}

# ----------------------------------------------------------------------------------------------------- watching

WRITES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.chmod",
    "os.truncate",
    "os.utime",
)
RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
RUNS += (
    "socket.connect",
    "socket.getaddrinfo",
    "ctypes.dlopen",
    "webbrowser.open",
    "urllib.Request",
    "shutil.unpack_archive",
)
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: what is done that no input may cause."""
    if event in RUNS:
        seen.append(f"{event} {str(arguments)[:200]}")
    elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, mode, flags = arguments
        if set(str(mode or "")) & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            outside(event, path)
    elif event in WRITES:
        outside(event, *(arguments if event in ("os.remove", "os.rmdir") else arguments[:1]))
    elif event == "exec" and str(room()) in getattr(arguments[0], "co_filename", ""):
        seen.append(f"exec {arguments[0].co_filename}")


def outside(event: str, path: Any, folder: int = -1) -> None:
    if isinstance(path, int):
        return
    where = os.getcwd() if folder < 0 else os.readlink(f"/proc/self/fd/{folder}")
    place = os.path.realpath(os.path.join(where, os.fsdecode(path)))
    if not place.startswith((str(room()) + os.sep, "/dev/null")) and "__pycache__" not in place:
        seen.append(f"{event} {place}")


@dataclass
class Outcome:
    """How a case ended: "fine", "error: …" by mopeq, or a fault."""

    target: str
    seed: int
    answer: str
    fault: str = ""
    seconds: float = 0.0
    grown: int = 0  # the process's peak, beyond its start


def one_case(target: str, seed: int) -> Outcome:
    """Run a case in this process, timed."""
    seen.clear()
    started = time.process_time()
    outcome = Outcome(target, seed, "")
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        outcome.answer = TARGETS[target][0](random.Random(f"{target}:{seed}"))
    except TookTooLong:
        outcome.fault = f"more than {SECONDS} s"
    except Unfit as problem:
        outcome.fault = str(problem)
    except BaseException as problem:
        last = problem.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        where = f"{Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last else ""
        outcome.fault = f"{type(problem).__name__}: {str(problem)[:300]} ({where})"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    outcome.seconds = time.process_time() - started
    if seen:
        outcome.fault = f"{outcome.fault} {'; '.join(seen[:3])}".strip()
    return outcome


def too_long(*_: Any) -> None:
    raise TookTooLong


def child(cases: list[tuple[str, int]], report: int) -> None:
    """Run a block of cases, each told as one line of JSON."""
    signal.signal(signal.SIGPROF, too_long)
    room()  # is there before the hook asks for it
    sys.addaudithook(watch)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with silence():
        for target, seed in cases:
            os.write(report, (json.dumps({"target": target, "seed": seed}) + "\n").encode())
            outcome = one_case(target, seed)
            outcome.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
            os.write(report, (json.dumps(vars(outcome)) + "\n").encode())


def block(cases: list[tuple[str, int]]) -> list[Outcome]:
    """A block in a child; one that dies or stands still is a fault of the case it was at."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            child(cases, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    found: list[Outcome] = []
    at: dict[str, Any] | None = None
    with open(reader, "rb", buffering=0) as pipe:
        rest = b""
        while True:
            if not select.select([pipe], [], [], STILL)[0]:
                os.kill(pid, signal.SIGKILL)
                rest = b""
            more = pipe.read(1 << 16)
            if not more:
                break
            *lines, rest = (rest + more).split(b"\n")
            for line in lines:
                row = json.loads(line)
                at = None if "answer" in row else row
                if at is None:
                    found.append(Outcome(**row))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if at is not None:
        found.append(Outcome(at["target"], at["seed"], "", f"the process ended with {status}, or stood still"))
        left = cases[len(found) :]
        return found + (block(left) if left else [])
    return found


@dataclass
class Survey:
    """All outcomes, counted."""

    cases: int = 0
    fine: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    grown: int = 0
    faults: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        (self.fine if outcome.answer == "fine" else self.refused)[outcome.target] += not outcome.fault
        self.slowest, self.grown = max(self.slowest, outcome.seconds), max(self.grown, outcome.grown)
        if outcome.fault:
            self.faults.append(outcome)


def plan_cases(count: int, seed: int) -> list[tuple[str, int]]:
    """Targets by their shares, in a mixed order."""
    cases = [(name, seed * 10**7 + n) for name, (_, share) in TARGETS.items() for n in range(round(count * share))]
    random.Random(seed).shuffle(cases)
    return cases


def survey(count: int, seed: int, tell: Callable[[Outcome], None] = lambda _: None) -> Survey:
    import mopeq.assemble
    import mopeq.cli
    import mopeq.data.encode
    import mopeq.readback
    import mopeq.stages
    import mopeq.verbs.map
    import mopeq.verbs.run
    import mopeq.verbs.verify  # noqa: F401 - woken before any child is forked, and counted in none

    for ready in (source, stacked, float8, packed, sharded, pictures, encoded, tokenizer):
        ready()
    found, cases = Survey(), plan_cases(count, seed)
    for at in range(0, len(cases), BLOCK):
        for outcome in block(cases[at : at + BLOCK]):
            found.add(outcome)
            if outcome.fault:
                tell(outcome)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="repeat one, as TARGET:SEED, with its traceback")
    parser.add_argument("--json", type=Path)
    asked, started = parser.parse_args(), time.monotonic()
    try:
        if asked.case:
            target, _, seed = asked.case.partition(":")
            DEBUG.append("--debug")
            print(TARGETS[target][0](random.Random(f"{target}:{seed}")))
            return 0
        found = survey(asked.cases, asked.seed, lambda o: print(f"{o.target}:{o.seed} {o.fault}", flush=True))
    finally:
        shutil.rmtree(room(), ignore_errors=True)
    seconds = time.monotonic() - started
    for name in TARGETS:
        print(f"{name}: {found.fine[name]} fine, {found.refused[name]} refused")
    print(
        f"{found.cases} cases, {len(found.faults)} faults; slowest {found.slowest:.1f} s, "
        f"{found.grown / 2**20:.0f} MiB at most; {seconds:.0f} s, seed {asked.seed}"
    )
    if asked.json:
        rows = {name: {"fine": found.fine[name], "refused": found.refused[name]} for name in TARGETS}
        facts = {"cases": found.cases, "faults": len(found.faults), "seconds": round(seconds), "seed": asked.seed}
        facts |= {"slowest_seconds": round(found.slowest, 1), "grown_bytes": found.grown}
        asked.json.write_text(json.dumps(facts | {"targets": rows}, indent=1) + "\n")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
