"""Hook of mkdocs: the page of studies shows the committed results of each.

A line ``<!-- study: drift -->`` becomes the line of the machine, a table of the summary in
examples/studies/results/drift.json, and the figure beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[2] / "examples" / "studies" / "results"
_PLACE = re.compile(r"<!-- study: (\w+) -->")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Let the site hold the figures."""
    for figure in sorted(RESULTS.glob("*.png")):
        target = f"studies/{figure.name}"
        files.append(File.generated(config, target, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the results where the page asks for them."""
    return _PLACE.sub(lambda found: section(found[1]), markdown)


def section(name: str) -> str:
    """Machine, summary and figure of a study."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"summary": {}}
    if not found["summary"]:
        return f"*No full run of `examples/studies/{name}.py` has been committed yet.*"
    about = found["machine"]
    seeds = sorted({int(n) for key in found["parts"] for n in re.findall(r"seed (\d+)", key)})
    rows = [row for key, value in found["summary"].items() for row in _rows(key, value)]
    return "\n".join(
        [
            f"*{about['cpu']}, {about['cores']} cores, torch {about['packages']['torch']}, commit "
            f"{about['commit']}; {max(len(seeds), 1)} seed(s), {found['seconds'] / 60:.0f} "
            "minutes; intervals: 95 %, bootstrap over seeds.*",
            "",
            "| | |",
            "| --- | --- |",
            *rows,
            "",
            f"![Figure of the study {name}](studies/{name}.png)",
        ]
    )


def _rows(key: str, value: Any) -> list[str]:
    if isinstance(value, dict) and "mean" not in value:
        return [row for inner, item in value.items() for row in _rows(f"{key}: {inner}", item)]
    return [f"| {key.replace('|', chr(92) + '|')} | {_shown(value)} |"]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        if value["mean"] is None:
            return "-"
        if value["low"] is None:
            return f"{value['mean']:.4g}"
        return f"{value['mean']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)
