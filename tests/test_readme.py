"""What README prints runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_python_of_readme_runs_as_printed(capsys):
    blocks = _blocks(README)
    assert blocks
    exec("\n".join(blocks), {})  # one session, in the order of reading
    loss, pairs, plan = capsys.readouterr().out.split(maxsplit=2)
    assert float(loss) == 0.0  # policy = reference: phi(0) = 0
    assert abs(float(pairs) - 0.6931) < 1e-3  # log 2
    assert plan.startswith("token route on torch: 512 tokens x 1000")


def test_the_first_example_is_ten_lines():
    block = re.search(r"## Ten lines\n\n```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [line for line in block.group(1).splitlines() if line.strip()]
    assert len(lines) <= 11  # ten, and the imports


def test_readme_begins_with_the_two_commands():
    assert re.search(r"make demo.*\nmake test", README[:900])


def test_readme_makes_the_case_in_one_screen_and_links_to_what_is_there():
    assert len(README.splitlines()) <= 120
    links = [link for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", README) if "://" not in link]
    assert len(links) > 15
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link
    named = re.findall(r"`((?:docs|examples|tests|benchmarks|fused_losses)/[\w./-]*)`", README)
    for path in named:
        assert (ROOT / path).exists(), path


def test_each_promise_links_to_tests_that_are_there():
    section = README.partition("## Promises, and the tests that hold them\n")[2]
    promises = re.findall(r"^\d\. .+$", section, re.MULTILINE)
    assert [promise[0] for promise in promises] == list("12345678")
    for promise in promises:
        links = re.findall(r"\]\((tests/test_\w+\.py) \"(\w+)\"\)", promise)
        assert links, promise
        assert len(links) == promise.count("]("), promise
        for path, name in links:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def test_{name}\w*\(", source, re.MULTILINE), (path, name)
