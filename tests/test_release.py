"""What a public repository needs beside the code: it is whole, and says what the Makefile does."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import fused_losses

ROOT = Path(__file__).parents[1]


def load(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_ci_runs_what_a_change_has_to_pass_and_nothing_that_is_not_there():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    targets = set(jobs["check"]["strategy"]["matrix"]["target"])
    required = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert required | {"docs"} <= targets <= make_targets()
    assert any(step.get("run") == "make ${{ matrix.target }}" for step in jobs["check"]["steps"])
    assert any(step.get("run") == "python -m build" for step in jobs["wheel"]["steps"])


def test_the_citation_names_the_software_and_the_paper():
    citation = load("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what CFF demands
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["url"].endswith("2507.00018")


def test_the_forms_of_issues_ask_for_what_they_need():
    forms = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= form.keys(), path.name
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])


def test_one_version_is_named_everywhere():
    citation = load("CITATION.cff")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)
    assert newest, "CHANGELOG.md: no heading of a release with its date"
    assert newest[1] == citation["version"] == fused_losses.__version__
    assert newest[2] == str(citation["date-released"])
