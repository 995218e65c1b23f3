"""What each verb prints for people. Machines use --json."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from mopeq.nouns import size_text

WIDEST = 1000  # of a table: rich would cut figures short to fit the terminal, or 80 columns where there is none


def table(*columns: str) -> Table:
    t = Table(box=None, pad_edge=False, show_header=any(columns))
    for i, name in enumerate(columns):
        t.add_column(name, justify="left" if i == 0 else "right")
    return t


def out(*things: Any) -> None:
    console = Console(highlight=False, soft_wrap=True, width=WIDEST)
    for thing in things:
        console.print(thing)


def count_text(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e8 else f"{parameters / 1e6:.3f} M"


def show_plan(r: dict[str, Any]) -> None:
    out(
        f"{r['model_type']}: {count_text(r['params'])} parameters, {count_text(r['expert_params'])} of them in"
        f" {r['experts']:,} routed experts of {r['layers']} layers"
    )
    t = table("", "bytes", "")
    t.add_row("source", f"{r['bytes_source']:,}", size_text(r["bytes_source"]))
    t.add_row("in bf16", f"{r['bytes_bf16']:,}", size_text(r["bytes_bf16"]))
    for bits, size in sorted(r["bytes_by_bits"].items()):
        t.add_row(f"every expert at {bits} bits", f"{size:,}", size_text(size))
    t.add_row("  of which not routed experts", f"{r['bytes_other']:,}", size_text(r["bytes_other"]))
    if r["predicted_bytes"] is not None:
        t.add_row("[bold]this plan[/bold]", f"[bold]{r['predicted_bytes']:,}[/bold]", size_text(r["predicted_bytes"]))
    else:
        t.add_row("kmeans, at least", f"{r['minimum_bytes']:,}", size_text(r["minimum_bytes"]))
        t.add_row("kmeans, at most", f"{r['maximum_bytes']:,}", size_text(r["maximum_bytes"]))
    out(t)
    run = r["run"]
    if run["weights_bytes"] is not None:
        kv = run["kv_cache_bytes_per_1000_tokens"]
        cache = f" + {size_text(kv)} of KV cache per 1,000 tokens" if kv else ""
        out(f"to run: {size_text(run['weights_bytes'])} of weights{cache}")
    out(
        f"to make: {size_text(run['make_bytes'])} of memory, one layer at a time (the largest has"
        f" {size_text(run['largest_layer_bytes'])} of experts)"
    )
    out(*(f"note: {note}" for note in r["notes"]))


def show_quantized(r: dict[str, Any]) -> None:
    out(
        f"{r['out']}: {r['bytes_weights']:,} bytes of weights ({size_text(r['bytes_weights'])}, from"
        f" {size_text(r['bytes_source'])})",
        f"experts: {r['avg_expert_bits']:.3f} code bits on average, {r['avg_expert_bits_effective']:.3f} with scales"
        " and zero points; " + ", ".join(f"{n} × {name}" for name, n in r["counts"].items()),
        f"{r['seconds']:.1f} s, peak {size_text(r['peak_rss_bytes'])}",
    )


def show_map(r: dict[str, Any]) -> None:
    """One row a layer and projection, one character an expert: its width in bits."""
    bits = [name.split("g")[0] for name in r["formats"]]
    numbers = {prefix: layer for layer, prefix in r["layers"].items()}
    for prefix, rows in r["experts"].items():
        for p, digits in rows.items():
            widths = "".join(bits[int(d, 36)] for d in digits)
            out(f"layer {numbers[prefix]:>3} {p:<5} {widths}")
    out(", ".join(f"{n} × {name}" for name, n in r["counts"].items()) + f"   digest {r['digest']}")
    if "bytes_weights" in r:
        out(
            f"{r['bytes_weights']:,} bytes of weights ({size_text(r['bytes_weights'])}),"
            f" {r['avg_expert_bits']:.3f} code bits a routed weight"
        )
    if against := r.get("against"):
        out(f"{against['differ']} of {against['matrices']} matrices differ from {against['digest']}")
        for p, change in against["mean_bits_change"].items():
            out(f"  {p:<5} {change:+.3f} bits")


def show_answer(r: dict[str, Any]) -> None:
    out(r["answer"])


def number(x: Any, digits: int = 4) -> str:
    return "-" if x is None else f"{x:.{digits}f}"


def show_evaluation(r: dict[str, Any]) -> None:
    t = table("", "KL", "median", "99 %", "ppl", "original's", "top-1", "tokens")
    for name, part in {"all": r, **r.get("by_modality", {})}.items():
        t.add_row(
            name,
            number(part["kl"], 5),
            number(part["kl_median"], 5),
            number(part["kl_p99"], 4),
            number(part["ppl"], 3),
            number(part["ppl_against"], 3),
            number(part["top1_agreement"], 4),
            f"{part['tokens']:,}",
        )
    out(t)
    if r["tasks"]:
        t = table("task", "score", "95 %", "n")
        for name, row in r["tasks"].items():
            if "score" not in row:  # a harness's figures that are no mean of the items' scores
                t.add_row(name, ", ".join(f"{figure} {number(value, 3)}" for figure, value in row.items()))
                continue
            low, high = row["ci95"]
            t.add_row(name, number(row["score"], 3), f"{low:.3f} to {high:.3f}", str(row["n"]))
        out(t)


def show_report(r: dict[str, Any]) -> None:
    out(f"{r['output']}: {r['checkpoints']} checkpoint{'s' if r['checkpoints'] != 1 else ''}, {size_text(r['bytes'])}")


def show_verified(r: dict[str, Any]) -> None:
    out(
        f"{r['out']} is whole: {r['files']} files, {r['tensors']:,} tensors, {r['matrices']:,} routed matrices,"
        f" {r['bytes_weights']:,} bytes of weights"
    )


def show_demo(r: dict[str, Any]) -> None:
    t = table("checkpoint", "MiB", "KL", "text ppl", "accuracy", "content digest")
    for row in r["rows"]:
        t.add_row(
            row["name"],
            f"{row['bytes_weights'] / 2**20:.2f}",
            number(row["kl"]),
            number(row["ppl"], 3),
            number(row["accuracy"], 3),
            row["digest"][:16],
        )
    out(t, f"report: {r['report']}", f"{r['seconds']:.0f} s")
