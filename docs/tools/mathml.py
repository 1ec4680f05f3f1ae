"""Hook of mkdocs: formulas become MathML while the site is built, so that pages load no script.

Formulas between one or two dollar signs reach the hook in elements of the class "arithmatex". An
equation with a tag gets its number at the right, and the anchor ``#eq-5`` where that is 5.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_TAG = re.compile(r"\\tag\{(\d+)\}")
_SOURCE = re.compile(r"^\$\$(?:(?!\$\$).)*?\\tag\{(\d+)\}\s*\$\$", re.DOTALL | re.MULTILINE)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put an anchor before each equation that has a number, where mkdocs looks for anchors."""
    return _SOURCE.sub(lambda found: f"[](){{ #eq-{found[1]} }}\n\n{found[0]}", markdown)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Convert the formulas of a page."""
    content = _DISPLAY.sub(lambda found: _equation(found[1]), content)
    return _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)


def _equation(latex: str) -> str:
    tag = _TAG.search(latex)
    formula = _mathml(_TAG.sub("", latex), "block")
    if tag is None:
        return f'<div class="equation">{formula}</div>'
    number = f'<span class="number">({tag[1]})</span>'
    return f'<div class="equation">{formula}{number}</div>'


def _mathml(latex: str, display: str) -> str:
    formula = convert(html.unescape(latex).strip(), display=display)
    # MathML Core knows neither this variant of digits nor this name of a space.
    formula = formula.replace('<mn mathvariant="double-struck">1</mn>', "<mn>&#x1D7D9;</mn>")
    return formula.replace('width="negativethinmathspace"', 'width="-0.167em"')
