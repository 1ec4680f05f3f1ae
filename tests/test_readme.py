"""What README prints runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_of_readme_runs_as_printed(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
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
