"""`mopeq demo`: the whole line on the embedded model, then the report. Every step is the command it prints."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from mopeq.data.readers import Item, read
from mopeq.embedded import heldout_text, model_dir
from mopeq.embedded.world import evaluation_tsv
from mopeq.errors import BadInput
from mopeq.nouns import size_text
from mopeq.packed import content_digest
from mopeq.progress import say
from mopeq.stages import plan, quantize
from mopeq.verbs.evaluate import evaluate
from mopeq.verbs.report import write as write_report
from mopeq.verbs.run import answer

MARK = ".mopeq-demo"
ITEMS = 40  # of each task
CALIBRATION = 8192  # tokens: an eighth of the default, for a demonstration's sake
ARMS: dict[str, dict[str, Any]] = {
    "uniform-2": {"allocate": "uniform", "avg_bits": 2, "calib_tokens": CALIBRATION},
    "mixed-2.5": {"avg_bits": 2.5, "calib_tokens": CALIBRATION},
    "uniform-3": {"allocate": "uniform", "avg_bits": 3, "calib_tokens": CALIBRATION},
    "mixed-3": {"avg_bits": 3, "calib_tokens": CALIBRATION},
}
ASKED = "mixed-3"


def demo(output: str | Path) -> dict[str, Any]:
    """Plan, quantize at several budgets, ask a question about a picture, evaluate, report; all below `output`."""
    started = time.monotonic()
    out = fresh(Path(output))
    source = nearby(model_dir())
    command(f"mopeq plan {source} --avg-bits 2.5")
    ahead = plan(source, avg_bits=2.5)
    before, after = size_text(ahead["bytes_source"]), size_text(ahead["predicted_bytes"])
    say(f"{before} -> {after}, exactly, before any weight is read")
    table = out / "evaluation.tsv"
    evaluation_tsv(table)
    say(f"wrote {table}: questions about pictures the model has not seen")
    rows = [row(name, out, source, table) for name in ARMS]
    item = next(i for i in read(table) if i.images)
    reply = ask(out / ASKED, item, out / "picture.png")
    report = out / "report.html"
    command(f"mopeq report {' '.join(str(out / name) for name in ARMS)} -o {report}")
    write_report([out / name for name in ARMS], report)
    return {"rows": rows, "question": reply, "report": str(report), "seconds": round(time.monotonic() - started, 1)}


def nearby(path: Path) -> Path:
    """The path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def fresh(out: Path) -> Path:
    """An empty folder of ours; an earlier demo is cleared away, anything else is refused."""
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists()):
            raise BadInput(f"{out} is not empty and not an earlier demo", "choose another -o")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()
    return out


def row(name: str, out: Path, source: Path, table: Path) -> dict[str, Any]:
    """One checkpoint of the demo, made and measured."""
    options = ARMS[name]
    flags = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())
    command(f"mopeq quantize {source} -o {out / name} {flags}")
    made = quantize(source, out / name, **options)
    text = nearby(heldout_text())
    command(f"mopeq eval {out / name} --against {source} --data {table} --data {text} --limit {ITEMS}")
    measured = evaluate(out / name, against=source, data=[table, text], limit=ITEMS)
    scores = [task["score"] for task in measured["tasks"].values()]
    return {
        "name": name,
        "bytes_weights": made["bytes_weights"],
        "avg_expert_bits": made["avg_expert_bits"],
        "kl": measured["kl"],
        "ppl": measured["by_modality"]["text"]["ppl"],
        "ppl_against": measured["by_modality"]["text"]["ppl_against"],
        "accuracy": sum(scores) / len(scores),
        "digest": content_digest(out / name),
    }


def ask(folder: Path, item: Item, picture: Path) -> dict[str, Any]:
    """Put an item's picture on disk and ask the packed checkpoint about it."""
    image = item.images[0]
    picture.write_bytes(image if isinstance(image, bytes) else image.read_bytes())
    question = str(item.meta["question"])
    command(f'mopeq run {folder} --image {picture} --prompt "{question}"')
    said = answer(folder, question, [picture], max_new_tokens=24)
    say(f"{said['answer']}   (right: {item.answer})")
    return {"question": question, "answer": said["answer"], "right": item.answer}


def command(line: str) -> None:
    say(f"\n$ {line}")
