"""Long lists of constants: one node each in a syntax tree, which is written back as it was.

They are found in the text that PostgreSQL writes (``pg_get_viewdef``): ``ARRAY[(1)::bigint, ...]``
behind IN, and the rows of VALUES. There no string has escapes, and there are no comments.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import sqlglot
from sqlglot import exp

__all__ = ["constants_in", "put_back", "without_lists"]

_NAME = r'(?:"[^"]*(?:""[^"]*)*"|\w+)'
_TYPE = (
    rf"{_NAME}(?:\.{_NAME})?(?: varying| precision)?(?:\([\d,-]+\))?"
    r"(?: with(?:out)? time zone)?(?:\[\])*"
)
_LITERAL = r"(?:'[^']*(?:''[^']*)*'|\d[\d.]*|true|false|NULL)"
_CASTS = rf"(?:::{_TYPE})*"
# each alternative begins in its own way, so that a list that is none is given up at once
_CAST = rf"{_LITERAL}{_CASTS}"
_TWICE = rf"\({_CAST}\){_CASTS}"
_CONSTANT = rf"(?:{_CAST}|{_TWICE}|\({_TWICE}\){_CASTS})"
_LIST = rf"{_CONSTANT}(?:(?:, ?|\), \(){_CONSTANT}){{16,}}"  # of VALUES several rows
_LISTS = re.compile(
    rf"(?<=\bARRAY\[)(?P<list>{_LIST})(?=\])|(?<=\bVALUES \()(?P<rows>{_LIST})(?=\))"
    r"""|'[^']*'|"[^"]*\""""
)
_PARTS = re.compile(rf"(?P<literal>{_LITERAL})(?P<casts>(?:\)*::{_TYPE})*)")
_TO = re.compile(rf"::({_TYPE})")
_MARK = "\0"  # which no text has that a server has written


def without_lists(sql: str) -> tuple[str, list[str]]:
    """Return a text with a short string in the place of each long list, and the lists."""
    lists: list[str] = []

    def shortened(match: re.Match[str]) -> str:
        if match.lastgroup is None:
            return match.group()
        lists.append(match.group())
        return f"'{_MARK}{len(lists) - 1}'"

    return _LISTS.sub(shortened, sql), lists


def put_back(tree: exp.Expr, lists: list[str]) -> None:
    """Let the nodes that stand for lists be written as these."""
    for node in tree.find_all(exp.Literal) if lists else ():
        if node.this.startswith(_MARK):
            node.set("this", lists[int(node.this.removeprefix(_MARK))])
            node.set("is_string", False)  # a number is written as it is


def constants_in(node: exp.Expr) -> Iterator[tuple[str, tuple[exp.DataType, ...]]] | None:
    """Return the constants that a node stands for, and what they are cast to, the first one first.

    None if it is no long list.
    """
    if not isinstance(node, exp.Literal) or node.is_string or "," not in node.this:
        return None
    return ((one["literal"], _types(one["casts"])) for one in _PARTS.finditer(node.this))


@functools.lru_cache(maxsize=1000)
def _types(casts: str) -> tuple[exp.DataType, ...]:
    names = _TO.findall(casts)
    return tuple(sqlglot.parse_one(f"NULL::{one}", dialect="postgres").args["to"] for one in names)
