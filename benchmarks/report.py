"""Tables and plots from result files alone: ``python benchmarks/report.py [files] [--out DIR]``.

Without files, the newest full run of every machine. Each JSON file gets a Markdown file and its
plots beside it, or in ``--out``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import targets

FOLDER = Path(__file__).resolve().parent / "results"
MIB = 2**20

Line = dict[str, Any]
Record = dict[str, Any]


def newest(folder: Path) -> list[Path]:
    """The newest full run of every machine; its newest quick run where there is no full one."""
    found = []
    for machine in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(machine.glob("*.json"), key=lambda path: _date(path))
        full = [path for path in files if not path.stem.endswith("-quick")]
        found += (full or files)[-1:]
    return found


def _date(path: Path) -> str:
    return json.loads(path.read_text("utf-8"))["machine"]["date"]


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def new_mib(line: Line) -> float | None:
    """Peak beyond the gradients that autograd returns, in MiB."""
    if line.get("peak_bytes") is None:
        return None
    return max(0, line["peak_bytes"] - line["gradient_bytes"]) / MIB


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, align, *rows))


def case_table(record: Record) -> str:
    """Everyone of one case."""
    linear = record["ndv"] is not None
    head = ["", "ms", "min", "forward", "backward", "over ours", "over floor", "MiB beyond grads"]
    head += ["NDV", "GFLOP/s", "error dX", "error dW"] if linear else ["GB/s", "error dlogits"]
    rows = []
    for line in record["contenders"]:
        times = [line.get(f"{part}_s") for part in ("forward", "backward")]
        row = [line["name"] if line["kind"] != "floor" else line["what"]]
        row += [milliseconds(line["time_s"][key]) for key in ("median", "min")]
        row += ["" if t is None else milliseconds(t["median"]) for t in times]
        row += [_number(line["ratio_to_ours"], ".2f"), _number(line.get("ratio_to_floor"), ".2f")]
        row.append(_number(new_mib(line), ".0f"))
        error = line.get("error", {})
        if linear:
            flops = line["flops"]
            row.append("" if flops is None else f"{flops / record['ndv']:.1f}")
            row.append(_number(line["gflops"], ".0f"))
            row += [_number(error.get(name), ".1e") for name in ("dx", "dw")]
        else:
            row.append(f"{record['moved_bytes'] / line['time_s']['median'] / 1e9:.1f}")
            row.append(_number(error.get("dlogits"), ".1e"))
        rows.append(row)
    return _table(head, rows)


def summary_table(records: list[Record]) -> str:
    """One line per case: our time, and the others' as multiples of it."""
    peers: list[str] = []
    for record in records:
        peers += [
            line["name"]
            for line in record["contenders"]
            if line["kind"] == "peer" and line["budget_mib"] is None and line["name"] not in peers
        ]
    rows = []
    for record in records:
        lines = {line["name"]: line for line in record["contenders"]}
        ours = record["contenders"][1]
        row = [record["name"], milliseconds(ours["time_s"]["median"])]
        row += [_number(ours["ratio_to_floor"], ".2f"), _number(new_mib(ours), ".0f")]
        row += [_number(lines.get(name, {}).get("ratio_to_ours"), ".2f") for name in peers]
        rows.append(row)
    return _table(["case", "ours, ms", "over floor", "MiB", *peers], rows)


def skipped(records: list[Record]) -> list[str]:
    """Who was left out, with each reason once."""
    reasons: dict[str, set[str]] = {}
    for record in records:
        for entry in record["skipped"]:
            reasons.setdefault(entry["name"], set()).add(entry["reason"])
    return [f"- {name}: {'; '.join(sorted(found))}" for name, found in sorted(reasons.items())]


def _machine(about: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    gpu = f"{about['gpu']} (driver {about['driver']}), " if about.get("gpu") else ""
    return (
        f"{gpu}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_gib']} GiB; {packages}; commit {about['commit']}, {about['date']}"
    )


def _plot_memory(records: list[Record], path: Path) -> bool:
    import matplotlib.pyplot as plt

    chosen = [r for r in records if r["case"]["budgets"] and r["ndv"] is not None]
    if not chosen:
        return False
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, 4.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(chosen) :]:
        axis.remove()
    for axis, record in zip(axes.flat, chosen, strict=False):
        _draw_memory(axis, record)
    _save(figure, path)
    return True


def _draw_memory(axis: Any, record: Record) -> None:
    floor, *lines = record["contenders"]

    def point(line: Line) -> tuple[float, float]:
        return max(new_mib(line) or 0.0, 1.0), line["time_s"]["median"] * 1e3

    ours = sorted((line for line in lines if line["peer"] == "fused-losses"), key=point)
    axis.plot(*zip(*map(point, ours), strict=True), "o-", color="C0", label="fused-losses")
    labels: dict[float, list[int]] = {}  # budgets larger than the whole call share their point
    for line in ours:
        labels.setdefault(round(point(line)[0]), []).append(line["budget_mib"])
    for x, budgets in labels.items():
        y = min(point(line)[1] for line in ours if line["budget_mib"] in budgets)
        text = ", ".join(str(budget) for budget in sorted(budgets)) + " MiB"
        axis.annotate(
            text, (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=7, color="C0"
        )
    for number, line in enumerate(line for line in lines if line["kind"] == "peer"):
        marker = "sD^vP*X<>hpd"[number % 12]
        axis.plot(*point(line), marker, color=f"C{1 + number % 9}", label=line["name"])
    time = floor["time_s"]["median"] * 1e3
    axis.axhline(time, color="0.5", ls="--", lw=1, label=floor["what"])
    axis.margins(0.1, 0.12)
    axis.set(xscale="log", yscale="log", title=record["name"])
    axis.set(xlabel="peak beyond the gradients, MiB", ylabel="forward + backward, ms")
    _plain_ticks(axis.xaxis)
    _plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3, which="both", lw=0.5)
    axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with numbers, also where it spans less than a decade."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _plot_scaling(records: list[Record], path: Path) -> bool:
    import matplotlib.pyplot as plt

    letters = [x for x in "NVD" if any(r["case"]["series"] == x for r in records)]
    if not letters:
        return False
    figure, axes = plt.subplots(
        1, len(letters), figsize=(4.4 * len(letters), 4.0), squeeze=False, layout="constrained"
    )
    for axis, letter in zip(axes[0], letters, strict=True):
        series = [r for r in records if r["case"]["series"] == letter]
        curves: dict[str, list[tuple[int, float]]] = {}
        for record in series:
            for line in record["contenders"]:
                name = "bare GEMMs" if line["kind"] == "floor" else line["peer"]
                point = record["case"][letter], line["time_s"]["median"] * 1e3
                curves.setdefault(name, []).append(point)
        for name, points in curves.items():
            style = {"color": "0.5", "ls": "--"} if name == "bare GEMMs" else {"marker": "o"}
            axis.plot(*zip(*sorted(points), strict=True), label=name, **style)
        fixed = series[0]["case"]
        others = ", ".join(f"{x} = {fixed[x]}" for x in "NDV" if x != letter)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({r["case"][letter] for r in series}))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(yscale="log", xlabel=letter, title=f"{others}, {fixed['dtype']}")
        _plain_ticks(axis.yaxis)
        axis.grid(alpha=0.3, which="both", lw=0.5)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][0].legend(fontsize=8)
    _save(figure, path)
    return True


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(source: Path, out: Path) -> Path:
    """Write the Markdown and the plots of one result file; return the Markdown's path."""
    content = json.loads(source.read_text("utf-8"))
    records = content["cases"]
    parts = [f"# Benchmarks: {_machine(content['machine'])}"]
    if content["quick"]:
        parts.append("A quick run: few rounds, small sizes; no figures to quote.")
    parts.append(
        "Forward and backward together, median of rounds in which everyone takes a turn; ratios "
        "are medians of the ratios within a round. `over ours` above 1: slower than this library. "
        "MiB: peak of new memory beyond the gradients that are returned. NDV: GEMM FLOPs counted, "
        "where torch makes them, N the labels that count. Errors: relative Frobenius, to float64."
    )
    parts += ["## Summary", summary_table(records)]
    checks = targets.check(records)
    if checks:
        head = ["target", "bound", "measured", ""]
        rows = [[c.what, c.bound, f"{c.value:.2f}", "met" if c.met else "MISSED"] for c in checks]
        parts += ["## Targets", _table(head, rows)]
    for name, draw, title in (
        ("memory", _plot_memory, "Time against memory"),
        ("scaling", _plot_scaling, "Scaling"),
    ):
        image = out / f"{source.stem}-{name}.png"
        if draw(records, image):
            parts += [f"## {title}", f"![{title}]({image.name})"]
    for record in records:
        parts += [f"## {record['name']}", case_table(record)]
        rows = record["error_rows"]
        scope = "" if rows == record["case"]["N"] else f" Errors on the first {rows} positions."
        parts.append(f"{record['rounds']} rounds.{scope} Plan: {record['plan']}")
    left_out = skipped(records)
    if left_out:
        parts += ["## Left out", "\n".join(left_out)]
    path = out / f"{source.stem}.md"
    path.write_text("\n\n".join(parts) + "\n", "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the report (default: beside the file)")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    files = options.files or (newest(FOLDER) if FOLDER.is_dir() else [])
    if not files:
        parser.error(f"no result files; run `make bench` first, it writes to {FOLDER.name}/")
    for source in files:
        out = options.out or source.parent
        out.mkdir(parents=True, exist_ok=True)
        print(report(source, out))


if __name__ == "__main__":
    main()
