"""Programs that differ from a given one in exactly one operator or one integer.

An edit is made twice, in the syntax tree and in the text, and kept only if parsing the edited text
gives the edited tree: comments, precedence and odd layout can then never turn one edit into two,
and the rejected answer keeps the layout of the chosen one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

# operator -> (its text, what it becomes, the text of that)
_SWAPS: dict[type[ast.AST], tuple[str, type[ast.AST], str]] = {
    ast.Lt: ("<", ast.LtE, "<="),
    ast.LtE: ("<=", ast.Lt, "<"),
    ast.Gt: (">", ast.GtE, ">="),
    ast.GtE: (">=", ast.Gt, ">"),
    ast.Eq: ("==", ast.NotEq, "!="),
    ast.NotEq: ("!=", ast.Eq, "=="),
    ast.In: ("in", ast.NotIn, "not in"),
    ast.NotIn: (r"not\s+in", ast.In, "in"),
    ast.Is: ("is", ast.IsNot, "is not"),
    ast.IsNot: (r"is\s+not", ast.Is, "is"),
    ast.Add: (r"\+", ast.Sub, "-"),
    ast.Sub: ("-", ast.Add, "+"),
    ast.Mult: (r"\*", ast.Add, "+"),
    ast.Div: ("/", ast.Mult, "*"),
    ast.FloorDiv: ("//", ast.Mod, "%"),
    ast.Mod: ("%", ast.FloorDiv, "//"),
    ast.Pow: (r"\*\*", ast.Mult, "*"),
    ast.And: ("and", ast.Or, "or"),
    ast.Or: ("or", ast.And, "and"),
}


class Mutant(NamedTuple):
    """An edited program and what was edited, such as ``"Lt -> LtE"``."""

    source: str
    edit: str


class _Edit(NamedTuple):
    """Replace ``value`` by ``new`` in ``owner``; in the text, ``old`` between two byte offsets."""

    owner: ast.AST | list[ast.cmpop]
    key: str | int
    value: object
    new: object
    start: int
    end: int
    old: str
    text: str


def mutants(source: str, after: int = 0) -> list[Mutant]:
    """Return every program that is one edit away from ``source``.

    Args:
        source: a Python program.
        after: the number of leading characters that must stay as they are (the prompt).
    """
    tree = ast.parse(source)
    raw = source.encode()
    lines = [0]
    for line in raw.split(b"\n"):
        lines.append(lines[-1] + len(line) + 1)
    first = len(source[:after].encode())
    found = []
    for edit in _edits(tree, lines):
        if edit.start < first:
            continue
        span = raw[edit.start : edit.end].decode(errors="replace")
        # Around an operator only brackets, blanks and continuations may stand; a comment may not.
        match = re.fullmatch(rf"([\s)\\]*)({edit.old})([\s(\\]*)", span)
        if match is None:
            continue
        middle = f"{match[1]}{edit.text}{match[3]}".encode()
        edited = (raw[: edit.start] + middle + raw[edit.end :]).decode()
        if _dump_edited(tree, edit) == _dump_text(edited):
            found.append(Mutant(edited, f"{_name(edit.value)} -> {_name(edit.new)}"))
    return found


def _edits(tree: ast.Module, lines: list[int]) -> Iterator[_Edit]:
    def start(node: ast.expr) -> int:
        return lines[node.lineno - 1] + node.col_offset

    def end(node: ast.expr) -> int:
        return lines[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for i, op in enumerate(node.ops):
                old, new, text = _SWAPS[type(op)]
                span = end(operands[i]), start(operands[i + 1])
                yield _Edit(node.ops, i, op, new(), *span, old, text)
        elif isinstance(node, ast.BinOp) and type(node.op) in _SWAPS:
            old, new, text = _SWAPS[type(node.op)]
            yield _Edit(node, "op", node.op, new(), end(node.left), start(node.right), old, text)
        elif isinstance(node, ast.AugAssign) and type(node.op) in _SWAPS:
            old, new, text = _SWAPS[type(node.op)]
            span = end(node.target), start(node.value)
            yield _Edit(node, "op", node.op, new(), *span, f"{old}=", f"{text}=")
        elif isinstance(node, ast.BoolOp) and len(node.values) == 2:
            old, new, text = _SWAPS[type(node.op)]
            span = end(node.values[0]), start(node.values[1])
            yield _Edit(node, "op", node.op, new(), *span, old, text)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            value, plus = node.value, node.value + 1
            yield _Edit(node, "value", value, plus, start(node), end(node), str(value), str(plus))


def _dump_edited(tree: ast.Module, edit: _Edit) -> str:
    _put(edit, edit.new)
    try:
        return ast.dump(tree)
    finally:
        _put(edit, edit.value)


def _put(edit: _Edit, value: object) -> None:
    if isinstance(edit.owner, list):
        edit.owner[edit.key] = value
    else:
        setattr(edit.owner, edit.key, value)


def _dump_text(source: str) -> str | None:
    try:
        return ast.dump(ast.parse(source))
    except (SyntaxError, ValueError):
        return None


def _name(value: object) -> str:
    return str(value) if isinstance(value, int) else type(value).__name__
