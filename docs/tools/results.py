"""Hook of mkdocs: the page of benchmarks shows the newest committed run of each machine.

``make bench-report`` draws Markdown and plots of the JSON under benchmarks/results/<machine>; its
first line holds machine, versions, commit and time. A line ``<!-- results -->`` becomes the summary
and the plots of those runs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_PLACE = "<!-- results -->"
_PLOT = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def newest_runs() -> list[Path]:
    """The report of the latest run on each machine."""
    runs: dict[str, Path] = {}
    for report in sorted(RESULTS.glob("*/*.md"), key=_time):
        if report.with_suffix(".json").exists() and _time(report):
            runs[report.parent.name] = report
    return list(runs.values())


def _time(report: Path) -> str:
    first = report.read_text(encoding="utf-8").partition("\n")[0]
    found = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first)
    return found[0] if found else ""


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Let the site hold the plots."""
    for report in newest_runs():
        for _, plot in _PLOT.findall(report.read_text(encoding="utf-8")):
            target = f"results/{report.parent.name}/{plot}"
            files.append(File.generated(config, target, abs_src_path=str(report.parent / plot)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the runs where the page asks for them."""
    if _PLACE not in markdown:
        return markdown
    return markdown.replace(_PLACE, "\n\n".join(map(_summary, newest_runs())))


def _summary(report: Path) -> str:
    text = report.read_text(encoding="utf-8")
    title = text.partition("\n")[0].removeprefix("# Benchmarks: ")
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    plots = "\n\n".join(
        f"![{words}](results/{report.parent.name}/{plot})" for words, plot in _PLOT.findall(text)
    )
    return f"### {report.parent.name}\n\n{title}\n\n{sections['Summary'].strip()}\n\n{plots}"
