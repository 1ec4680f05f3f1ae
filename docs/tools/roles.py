"""Griffe extension: what docstrings write for people and Sphinx, in the Markdown of the site.

``:func:`name` `` becomes code, linked where the site has the name; the number of a source, [6],
stays text. A dataclass whose fields have help texts gets them as a section of its docstring.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|meth):`([^`]+)`")
_SOURCE = re.compile(r"(?<!\w)\[(\d+(?:, \d+)*)\]")


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = _SOURCE.sub(r"\\[\1\\]", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(_link, text)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """List the fields that have a help text, and what they are by default."""
        fields = [
            line
            for attribute in cls.members.values()
            if isinstance(attribute, griffe.Attribute) and "'help'" in str(attribute.value)
            for line in _field(attribute)
        ]
        if fields and cls.docstring is not None:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(f"    {f}" for f in fields)


def _field(attribute: griffe.Attribute) -> list[str]:
    call = ast.parse(str(attribute.value), mode="eval").body
    assert isinstance(call, ast.Call)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    metadata = given["metadata"]
    assert isinstance(metadata, ast.Dict)
    (text,) = (v for k, v in zip(metadata.keys, metadata.values, strict=True) if _is_help(k))
    default = given.get("default")
    if default is None:  # a function that makes it
        default = given["default_factory"].body  # type: ignore[attr-defined]
    return [f"{attribute.name}: {_words(text)} Default: `{ast.unparse(default)}`."]


def _is_help(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "help"


def _words(text: ast.expr) -> str:
    if isinstance(text, ast.Constant):
        return str(text.value)
    assert isinstance(text, ast.JoinedStr)
    # A list of names joined into the text: the name of the list stands for it.
    return "".join(
        str(part.value)
        if isinstance(part, ast.Constant)
        else f"`{[n.id for n in ast.walk(part) if isinstance(n, ast.Name)][-1]}`"
        for part in text.values
    )


def _link(role: re.Match[str]) -> str:
    name = role[1].rpartition(".")[2]
    home = _HOMES.get(name, "")
    return f"[`{name}`][{home}]" if home else f"`{name}`"


def _public_names(package: str) -> dict[str, str]:
    """Map the names that a package lists in ``__all__`` to their full ones."""
    source = Path(package.replace(".", "/"), "__init__.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return {name: f"{package}.{name}" for name in ast.literal_eval(node.value)}
    return {}


_HOMES = {
    **_public_names("fused_losses.integrations"),
    **_public_names("fused_losses.trainer"),
    **_public_names("fused_losses"),
}
