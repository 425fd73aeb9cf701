"""The types that a shard key's values have, and their texts as PostgreSQL writes them.

What is not written in exactly that way is not read: who asks must then take it for unknown.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

__all__ = ["KEY_TYPES", "read_key", "type_of_column", "type_of_value"]

#: Each type's name, and the Python type of its values: exactly that, none that is derived from it.
KEY_TYPES: dict[str, type] = {
    "date": date,
    "integer": int,
    "numeric": Decimal,
    "text": str,
    "timestamp": datetime,
    "uuid": UUID,
}
_OF_COLUMNS = {
    **dict.fromkeys(("smallint", "integer", "bigint", "int2", "int4", "int8"), "integer"),
    **dict.fromkeys(("text", "character varying", "varchar"), "text"),
    **dict.fromkeys(("timestamp without time zone", "timestamp"), "timestamp"),
    **{name: name for name in ("date", "numeric", "uuid")},
}
_DATE = "[0-9]{4}-[0-9]{2}-[0-9]{2}"
_WRITTEN = {
    "date": _DATE,
    "integer": "-?[0-9]{1,1000}",
    "numeric": r"-?[0-9]{1,1000}(\.[0-9]{1,1000})?",
    "timestamp": _DATE + r"( [0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?)?",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def type_of_value(value: Any) -> str | None:
    """Return the name of a value's type.

    None where it has none, as ``True``, NaN and times with a time zone have.
    """
    if type(value) is datetime and value.tzinfo is not None:
        return None
    if type(value) is Decimal and not value.is_finite():
        return None
    return next((name for name, of in KEY_TYPES.items() if type(value) is of), None)


def type_of_column(name: str) -> str | None:
    """Return the name of the type that the values of a column have.

    Parameters
    ----------
    name : str
        PostgreSQL's name of the column's type, as from ``format_type`` (``numeric(12,2)``) or as
        in the catalog (``pg_catalog.int8``). None comes back for every other, such as ``char(n)``,
        ``citext`` and domains.
    """
    plain = re.sub(r"\([0-9, -]*\)", "", name).removeprefix("pg_catalog.").strip()
    return _OF_COLUMNS.get(plain)


def read_key(text: str, kind: str) -> Any:
    """Return the value that a text stands for.

    Parameters
    ----------
    text : str
        As PostgreSQL writes it, with ``DateStyle`` ISO.
    kind : str
        One of :data:`KEY_TYPES`.

    Returns
    -------
    object
        None where the text is written in another way, or Python has no such value (a date before
        year 1, ``infinity``).
    """
    if kind == "text":
        return text
    if re.fullmatch(_WRITTEN[kind], text):
        with suppress(ValueError):  # a 30th of February
            if kind in ("date", "timestamp"):
                return KEY_TYPES[kind].fromisoformat(text)  # type: ignore[attr-defined]
            return KEY_TYPES[kind](text)
    return None
