"""One statement: find where a text's statement ends, as PostgreSQL's lexer would.

The rules are those of the PostgreSQL manual, section 4.1: quoted strings and identifiers,
``E''`` strings with backslashes, dollar quotes, comments (``/* */`` nests); in detail those of
PostgreSQL's ``scan.l`` with ``standard_conforming_strings`` on.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from dask_shardsql.errors import StatementError

__all__ = ["sendable", "single_query", "tokens_of", "words_of"]

_QUERY_WORDS = ("select", "table", "values", "with")

# What can hide a semicolon, or stands outside of it; strings and block comments only begin here, as
# their ends are found by hand. Every character beyond ASCII belongs to a name, blanks too.
_TOKEN = re.compile(
    r"""
      (?P<line>--[^\r\n]*)
    | (?P<block>/\*)
    | (?P<escape>[eE]')
    | (?P<string>')
    | (?P<identifier>"[^"]*(?:"|\Z))
    | (?P<dollar>\$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*)?\$)
    | (?P<end>;)
    | (?P<blank>[ \t\n\r\f\v]+)
    | (?P<word>[A-Za-z0-9_$\x80-\U0010ffff]+)
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_BLOCK_EDGE = re.compile(r"/\*|\*/")
_ESCAPE_EDGE = re.compile(r"\\|'")
_GAP = re.compile(r"[ \t\n\r\f\v]+|--[^\r\n]*")


def single_query(sql: str) -> str:
    """Return the text of the one query in `sql`, without the semicolon that ends it.

    Parameters
    ----------
    sql : str
        The user's text; its comments are kept.

    Raises
    ------
    StatementError
        The text is empty, holds several statements, or starts like something that is not a query.
    """
    return _single_query(sendable(sql))


def sendable(sql: object) -> str:
    """Return a text that can be sent to a database at all.

    Raises
    ------
    StatementError
        It is no text, or holds what no SQL text may: NUL, or half of a character.
    """
    if not isinstance(sql, str):
        raise StatementError(f"the query must be a text, not {type(sql).__name__}")
    if "\0" in sql:
        raise StatementError("the query holds a NUL character, which no SQL text may", query=sql)
    try:
        sql.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = sql.encode("utf-8", "replace").decode("utf-8")
        raise StatementError(
            "the query holds half of a surrogate pair, which UTF-8 cannot express",
            position=error.start + 1,
            query=shown,
        ) from None
    return sql


@functools.lru_cache(maxsize=256)  # every shard asks for the same text
def _single_query(sql: str) -> str:
    first: str | None = None
    end: int | None = None
    start, begun = 0, False
    for kind, begins, ends in tokens_of(sql):
        if kind == "end" and not begun:
            start = ends
        elif kind == "end":
            end = begins if end is None else end
        elif kind not in ("line", "block", "blank"):
            if end is not None:
                raise StatementError(
                    "only one statement can be run, and a second one starts here",
                    position=begins + 1,
                    query=sql,
                    hint="run the statements one by one",
                )
            begun = True
            token = _TOKEN.match(sql, begins)
            if first is None and token is not None and token.group() != "(":
                first = token.group()
    if first is None:
        raise StatementError("the query is empty", query=sql)
    if first.lower() not in _QUERY_WORDS:
        hint = "write SELECT, VALUES, TABLE or WITH ... SELECT"
        if first.lower() == "explain":
            hint = "leave EXPLAIN out, and give the query to dask_shardsql.explain"
        raise StatementError(
            f"only a query can be read from the shards, and this text starts with {first[:30]!r}",
            query=sql,
            hint=hint,
        )
    return sql[start:end]


def words_of(sql: str) -> Iterator[str]:
    """Give the words and signs of a text in small letters, without its strings and comments."""
    for kind, start, end in tokens_of(sql):
        if kind in ("word", "other"):
            yield sql[start:end].lower()
        elif kind == "identifier":
            yield sql[start:end]


def tokens_of(sql: str) -> Iterator[tuple[str, int, int]]:
    """Give the kind of each token, where it starts and where it ends."""
    position = 0
    while position < len(sql):
        token = _TOKEN.match(sql, position)
        assert token is not None  # noqa: S101 - 'other' matches any character
        start, position = position, token.end()
        kind = token.lastgroup or ""
        if kind == "escape":
            position = _end_of_escape_string(sql, position)
        elif kind == "string":
            close = sql.find("'", position)
            position = close + 1 if close >= 0 else len(sql)
        elif kind == "dollar":
            close = sql.find(token.group(), position)
            position = close + len(token.group()) if close >= 0 else len(sql)
        elif kind == "block":
            position = _end_of_block_comment(sql, position)
        yield kind, start, position


def _end_of_block_comment(sql: str, position: int) -> int:
    depth = 1
    for edge in _BLOCK_EDGE.finditer(sql, position):
        depth += 1 if edge.group() == "/*" else -1
        if depth == 0:
            return edge.end()
    return len(sql)


def _end_of_escape_string(sql: str, position: int) -> int:
    """Return where an ``E''`` string ends; it may go on, with its backslashes, in another line."""
    while edge := _ESCAPE_EDGE.search(sql, position):
        if edge.group() == "\\" or sql.startswith("'", edge.end()):
            position = edge.end() + 1  # whatever is escaped, or the second of two quotes
        elif more := _continuation(sql, edge.end()):
            position = more
        else:
            return edge.end()
    return len(sql)


def _continuation(sql: str, position: int) -> int | None:
    """Return where a string goes on that only blanks, comments and a line's end part from this."""
    on_another_line = False
    while gap := _GAP.match(sql, position):
        on_another_line |= "\n" in gap.group() or "\r" in gap.group()
        position = gap.end()
    return position + 1 if on_another_line and sql.startswith("'", position) else None
