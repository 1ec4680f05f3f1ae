"""The pages of docs/: their code runs, their links lead somewhere, every public name is there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import runpy
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fused_losses

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# A block that is not run has this line above it, with the reason.
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>\S.{9,}?) -->\n+\Z")
BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)
# Names that a page takes from its reader, who has a model and data: `<!-- given: model, pairs -->`.
GIVEN = re.compile(r"<!-- given: (?P<names>[\w, ]+) -->")
REFERENCE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def program(text: str) -> str:
    """The Python of a page, each line at the number that it has on the page."""
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        if block["language"] != "python" or NOT_RUN.search(text[: block.start()]):
            continue
        first = text[: block.start("code")].count("\n")
        code = block["code"].split("\n")[:-1]
        lines[first : first + len(code)] = code
    return "\n".join(lines)


def given(text: str, folder: Path) -> dict[str, Any]:
    """What a page takes from its reader, tiny."""
    names = GIVEN.search(text)
    if names is None:
        return {}
    from tiny_training import llama, pair_rows, sft_rows, tokenizer

    model = llama()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    kept = {
        "model": model,
        "tokenizer": tokenizer(),
        "demonstrations": sft_rows(8),
        "pairs": pair_rows(8),
        "input_ids": torch.randint(0, 40, (2, 6)),
    }
    return {name: kept[name] for name in re.split(r",\s*", names["names"])}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if program(read(p)).strip()], ids=name_of)
def test_the_python_of_a_page_runs_in_the_order_of_reading(page, tmp_path, monkeypatch, capsys):
    text = read(page)
    if GIVEN.search(text):
        pytest.importorskip("datasets", reason="the page trains a model")
    if "import triton" in text:
        pytest.importorskip("triton", reason="the page writes a device function")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    script = tmp_path / f"{page.stem}.py"  # a file: Triton reads the source of device functions
    script.write_text(program(text), encoding="utf-8")
    runpy.run_path(str(script), init_globals=given(text, tmp_path), run_name=page.stem)


def test_every_block_says_its_language_and_what_is_not_run_says_why():
    for page in PAGES:
        text = read(page)
        assert text.count("```") == 2 * len(list(BLOCK.finditer(text))), page.name
        for block in BLOCK.finditer(text):
            assert block["language"] in {"python", "bash", "text", "yaml"}, page.name
        skipped = text.count("<!-- not run")
        reasons = [b for b in BLOCK.finditer(text) if NOT_RUN.search(text[: b.start()])]
        assert skipped == len(reasons), f"{page.name}: a reason stands right above its block"


def slug(heading: str) -> str:
    """The anchor that Python-Markdown gives a heading."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def anchors(page: Path) -> set[str]:
    text = read(page)
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    equations = re.findall(r"\\tag\{(\d+)\}", text)
    return (
        {slug(h) for h in headings} | {f"eq-{n}" for n in equations} | set(REFERENCE.findall(text))
    )


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", without_code(read(page)))


def test_the_anchors_of_headings_are_those_of_the_site():
    assert slug("Which loss, when?") == "which-loss-when"
    assert slug("`linear_loss`: your own") == "linear_loss-your-own"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_internal_link_leads_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(DOCS), f"{link} leaves the site"
        assert target.is_file(), f"{link} is not there"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_what_the_pages_name_of_the_repository_exists():
    targets = set(re.findall(r"^([a-z-]+):.*## ", read(ROOT / "Makefile"), re.MULTILINE))
    folders = "tests|docs|examples|benchmarks|fused_losses|kernels"
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", read(page)):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
        assert set(re.findall(r"(?:`|^)make ([a-z-]+)", read(page), re.MULTILINE)) <= targets


def nav_entries(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        target = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from nav_entries(target) if isinstance(target, list) else [target]


def test_the_navigation_holds_every_page_once():
    config = yaml.safe_load(read(ROOT / "mkdocs.yml"))
    assert sorted(nav_entries(config["nav"])) == sorted(map(name_of, PAGES))


def test_every_figure_is_shown_and_nothing_else_lies_there():
    shown = {(p.parent / link).resolve() for p in PAGES for link in links(p)}
    drawn = set((DOCS / "figures").glob("*.*"))
    assert drawn <= shown
    assert {p.suffix for p in drawn} <= {".svg"}


def test_the_figure_of_memory_shows_the_plans_as_they_are(monkeypatch):
    pytest.importorskip("matplotlib", reason="the script draws with it")
    monkeypatch.syspath_prepend(DOCS / "tools")
    import figures

    drawn = read(DOCS / "figures" / "memory.svg")
    for title, rows in figures.timelines():
        for words in (title, *rows):
            assert words in drawn, f"{words}: run python docs/tools/figures.py"


def documented() -> list[str]:
    return [name for page in PAGES for name in REFERENCE.findall(read(page))]


def test_the_reference_holds_every_public_name_once():
    names = documented()
    assert len(names) == len(set(names))
    assert {f"fused_losses.{name}" for name in fused_losses.__all__} <= set(names)


FUNCTIONS = [n for n in fused_losses.__all__ if inspect.isfunction(getattr(fused_losses, n))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_a_page_on_one_template(name):
    text = read(DOCS / "reference" / "functions" / f"{name}.md")
    assert text.startswith(f"# {name}\n")
    assert REFERENCE.findall(text) == [f"fused_losses.{name}"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Contract", "Limits"]
    assert f"<!-- facts: {name} -->" in text
    assert text.partition("## Limits\n\n- ")[2].strip()


def test_the_facts_of_a_function_are_those_of_its_plan_its_measurements_and_its_tests(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "tools")
    import facts

    linear = {name for name in FUNCTIONS if name.startswith("linear_")}
    assert set(facts.calls()) == linear
    text = facts.on_page_markdown("before\n<!-- facts: linear_pearson_loss -->\nafter")
    assert text.startswith("before\n## Cost")
    assert "| trained head | token | 6 |" in text
    assert "| frozen head | frozen | 4 |" in text
    assert "| no gradients | forward | 2 |" in text
    assert "## Accuracy" in text
    assert "of `pearson`" in text
    assert "`tests/test_linear_autograd.py`" in text
    for name in FUNCTIONS:
        assert facts.tests_of(name), f"no test names {name}"


def test_the_page_of_studies_shows_each_study_once_as_its_results_say(monkeypatch, tmp_path):
    pytest.importorskip("mkdocs", reason="the hook stands on its files")
    monkeypatch.syspath_prepend(DOCS / "tools")
    import studies

    asked = re.findall(r"<!-- study: (\w+) -->", read(DOCS / "studies.md"))
    assert sorted(asked) == sorted(p.stem for p in (ROOT / "examples/studies").glob("*.yaml"))
    assert "has been committed yet" in studies.section("none")
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    interval = {"mean": 1.25, "low": 1.0, "high": 2.0, "seeds": 2}
    packages = {"torch": "2.13.0"}
    results = {
        "machine": {"cpu": "a CPU", "cores": 2, "packages": packages, "commit": "abc"},
        "seconds": 120.0,
        "parts": {"mle, seed 0": {}, "mle, seed 3": {}},
        "summary": {"KL(pi || pi_ref)": interval, "by": {"one": 1.5, "two": None}},
    }
    (tmp_path / "some.json").write_text(json.dumps(results))
    text = studies.on_page_markdown("<!-- study: some -->")
    assert "a CPU, 2 cores, torch 2.13.0, commit abc; 2 seed(s), 2 minutes" in text
    assert r"| KL(pi \|\| pi_ref) | 1.25 [1, 2] |" in text
    assert "| by: one | 1.5 |\n| by: two | - |" in text
    assert "(studies/some.png)" in text


@pytest.mark.parametrize(
    "package",
    ["fused_losses.trainer", "fused_losses.integrations", "fused_losses.integrations.trl"],
)
def test_the_reference_holds_the_public_names_of_the_optional_parts(package):
    module = pytest.importorskip(package, exc_type=ImportError)
    assert {f"{package}.{name}" for name in module.__all__} <= set(documented())


def test_what_the_reference_shows_exists():
    for name in documented():
        path, _, attribute = name.rpartition(".")
        try:
            home = importlib.import_module(path) if path else importlib.import_module(name)
        except ImportError:
            assert path.startswith(("fused_losses.trainer", "fused_losses.integrations")), name
            continue
        assert not path or hasattr(home, attribute), name


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "mkdocstrings", "latex2mathml"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the extra docs brings it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    page = read(tmp_path / "site" / "objectives.html")
    assert 'id="eq-14"' in page
    assert "arithmatex" not in page  # every formula has been converted
    scripts = re.findall(r'<(?:script|link)[^>]*(?:src|href)="(https?:[^"]*)"', page)
    assert scripts == []  # reading needs no network either
