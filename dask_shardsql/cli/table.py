"""An answer as aligned text for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pyarrow as pa
from rich.cells import cell_len, set_cell_size

from dask_shardsql.cli.text import as_text, is_number

__all__ = ["MOST_ROWS", "table_lines"]

#: More rows than these are not written as a table.
MOST_ROWS = 1000

_NARROWEST = 12
_GAP = "  "
# C0 and C1 controls, line separators, and what reorders text: a value must not move the cursor.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_SHORT_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def table_lines(table: pa.Table, width: int | None = None) -> tuple[list[str], list[str]]:
    """Return the heading's and the body's lines.

    Parameters
    ----------
    table : pyarrow.Table
        At most :data:`MOST_ROWS` of its rows are written.
    width : int, optional
        Cells to fit into, as on a terminal: long values are cut (…), and an answer with too many
        columns is written with one line for each value. By default nothing is cut.
    """
    shown = table.slice(0, MOST_ROWS)
    names = [_printable(name) for name in table.column_names]
    columns = [_cells(column) for column in shown.columns]
    numbers = [is_number(field.type) for field in table.schema]
    widths = [
        max([cell_len(name), *map(cell_len, cells)])
        for name, cells in zip(names, columns, strict=True)
    ]
    if width is not None and not _fits(widths, width):
        return [], _records(names, columns, width)
    heading = _row(names, widths, numbers)
    rule = _GAP.join("─" * each for each in widths)
    rows = [_row(row, widths, numbers) for row in zip(*columns, strict=True)]
    return [heading, rule], rows


def count_line(rows: int) -> str:
    """Return the line under a table."""
    cut = f", the first {MOST_ROWS:,} shown" if rows > MOST_ROWS else ""
    return f"({rows:,} row{'' if rows == 1 else 's'}{cut})"


def _cells(column: pa.ChunkedArray) -> list[str]:
    texts: list[str | None] = []
    for chunk in column.chunks:
        texts += as_text(chunk).to_pylist()
    return ["NULL" if text is None else _printable(text) for text in texts]


def _printable(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    number = ord(character)
    return _SHORT_ESCAPES.get(character) or (
        f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
    )


def _fits(widths: list[int], width: int) -> bool:
    """Narrow the widest columns, in place, until a row fits; return whether it can."""
    room = width - len(_GAP) * (len(widths) - 1)
    if sum(min(each, _NARROWEST) for each in widths) > room:
        return False
    while sum(widths) > room:
        widest = max(widths)
        number = widths.index(widest)
        second = max([each for each in widths if each < widest], default=_NARROWEST)
        widths[number] = max(_NARROWEST, second, widest - (sum(widths) - room))
        if widths[number] == widest:
            widths[number] -= 1
    return True


def _row(cells: Sequence[str], widths: list[int], numbers: list[bool]) -> str:
    placed = []
    for cell, width, number in zip(cells, widths, numbers, strict=True):
        text = _cut(cell, width)
        blanks = " " * (width - cell_len(text))
        placed.append(blanks + text if number else text + blanks)
    return _GAP.join(placed).rstrip()


def _cut(text: str, width: int) -> str:
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(width - 1, 0)).rstrip() + "…"


def _records(names: list[str], columns: list[list[str]], width: int) -> list[str]:
    name_width = min(max(map(cell_len, names)), max(width // 2, _NARROWEST))
    room = max(width - name_width - len(_GAP), _NARROWEST)
    lines = []
    for number, row in enumerate(zip(*columns, strict=True), start=1):
        label = f"── row {number:,} "
        lines.append(label + "─" * max(0, min(width, 60) - len(label)))
        for name, cell in zip(names, row, strict=True):
            left = _cut(name, name_width)
            left += " " * (name_width - cell_len(left))
            lines.append(f"{left}{_GAP}{_cut(cell, room)}".rstrip())
    return lines
