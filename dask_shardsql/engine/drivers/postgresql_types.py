"""psycopg2's column descriptions -> columns, with types matched by name.

OIDs of built-in types are the same in every database; those of enums, domains, composites and
extensions differ between databases, so they are looked up and compared by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from dask_shardsql.engine.copy_arena import Kinds
from dask_shardsql.engine.copy_kernel.layout import Kind
from dask_shardsql.sql.types import Column, arrow_type_of

__all__ = ["column_of", "is_built_in", "kinds_of", "look_up", "makes_nulls", "mark_not_null"]

_NUMERIC = 1700
_ENUM = "an enum"  # no name of a type has a space and no quotes

# oid: (name, oid of its array type); from PostgreSQL's src/include/catalog/pg_type.dat
_SCALARS = {
    16: ("bool", 1000),
    17: ("bytea", 1001),
    18: ('"char"', 1002),
    19: ("name", 1003),
    20: ("int8", 1016),
    21: ("int2", 1005),
    23: ("int4", 1007),
    25: ("text", 1009),
    26: ("oid", 1028),
    114: ("json", 199),
    700: ("float4", 1021),
    701: ("float8", 1022),
    869: ("inet", 1041),
    1042: ("bpchar", 1014),
    1043: ("varchar", 1015),
    1082: ("date", 1182),
    1083: ("time", 1183),
    1114: ("timestamp", 1115),
    1184: ("timestamptz", 1185),
    1186: ("interval", 1187),
    _NUMERIC: ("numeric", 1231),
    2950: ("uuid", 2951),
    3802: ("jsonb", 3807),
}
# Those whose bytes the kernel reads. The binary form of xml is another than its text, "char" may be
# any byte; the others are read as what their output function writes.
_KINDS = {
    "bool": Kind.BOOL,
    "bytea": Kind.TEXT,
    "int8": Kind.INT64,
    "int2": Kind.INT16,
    "int4": Kind.INT32,
    "oid": Kind.INT32,
    "float4": Kind.INT32,
    "float8": Kind.INT64,
    "date": Kind.DATE,
    "time": Kind.TIME,
    "timestamp": Kind.TIMESTAMP,
    "timestamptz": Kind.TIMESTAMP,
    "interval": Kind.INTERVAL,
    "uuid": Kind.UUID,
    "jsonb": Kind.JSONB,
} | dict.fromkeys(("json", "name", "text", "bpchar", "varchar", _ENUM), Kind.TEXT)
_BUILT_IN = {oid: name for oid, (name, _) in _SCALARS.items()}
_BUILT_IN |= {array: f"{name}[]" for name, array in _SCALARS.values()}

# A domain under an array is followed to the type it stands for, over any number of domains; the
# server itself does so for a domain that is a column's type. box is left out, as its arrays are
# delimited by ';'; so are the two vectors, which are written without braces.
_LOOK_UP = """
WITH RECURSIVE asked AS (
  SELECT t.oid, n.nspname, t.typname, t.typtype, e.oid AS element
  FROM pg_catalog.pg_type t
  JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
  LEFT JOIN pg_catalog.pg_type e
    ON e.oid = t.typelem AND t.typcategory = 'A' AND t.typlen = -1 AND e.typdelim = ','
   AND t.typname NOT IN ('int2vector', 'oidvector')
  WHERE t.oid = ANY(%s)
), under (element, oid) AS (
  SELECT element, element FROM asked
  UNION
  SELECT u.element, d.typbasetype
  FROM under u JOIN pg_catalog.pg_type d ON d.oid = u.oid AND d.typtype = 'd'
)
SELECT a.oid, a.nspname, a.typname, a.typtype, e.typname, en.nspname,
       b.typname, bn.nspname, b.typtype
FROM asked a
LEFT JOIN (pg_catalog.pg_type e
           JOIN pg_catalog.pg_namespace en ON en.oid = e.typnamespace) ON e.oid = a.element
LEFT JOIN (under u
           JOIN pg_catalog.pg_type b ON b.oid = u.oid AND b.typtype <> 'd'
           JOIN pg_catalog.pg_namespace bn ON bn.oid = b.typnamespace) ON u.element = a.element
"""

_NOT_NULL = """
SELECT attrelid, attnum FROM pg_catalog.pg_attribute
WHERE attnotnull AND attrelid = ANY(%s::oid[])
"""
_MAKES_NULLS = re.compile(r"\b(left|right|full|cube|rollup|grouping)\b", re.IGNORECASE)


def is_built_in(oid: int) -> bool:
    """Whether the type of that OID is the same in every database, and known here."""
    return oid in _BUILT_IN


def look_up(cursor: Any, oids: Iterable[int]) -> Mapping[int, tuple[str, str, str]]:
    """Return, for each OID, the type's name and those that decide its Arrow type and its kind."""
    cursor.execute(_LOOK_UP, (list(oids),))
    found = {}
    for oid, schema, name, sort, element, its_schema, base, base_schema, its in cursor.fetchall():
        if element is None:
            found[oid] = (_qualified(schema, name), "text", _ENUM if sort == "e" else "")
        else:
            built_in = base_schema == "pg_catalog"
            kind = base if built_in else _ENUM if its == "e" else ""
            deciding = base if built_in else "text"
            found[oid] = (f"{_qualified(its_schema, element)}[]", f"{deciding}[]", f"{kind}[]")
    return found


def kinds_of(
    entry: Any, looked_up: Mapping[int, tuple[str, str, str]], arrow_type: pa.DataType
) -> Kinds:
    """Return how COPY BINARY sends a column that is to be of an Arrow type.

    Nothing, where the kernel cannot read that: the column's text form is to be sent instead.

    Parameters
    ----------
    entry : psycopg2.extensions.Column
        Its description.
    looked_up : mapping
        What :func:`look_up` returned.
    arrow_type : pyarrow.DataType
        The type to deliver, which may be another than its own.
    """
    oid = entry.type_code
    name = looked_up[oid][2] if oid in looked_up else _BUILT_IN[oid]
    if name.endswith("[]"):
        if not pa.types.is_list(arrow_type):
            return ()
        element = _kind_of(name[:-2], arrow_type.value_type)
        return () if element is None else (Kind.LIST, element)
    kind = _kind_of(name, arrow_type)
    return () if kind is None else (kind,)


def _kind_of(name: str, arrow_type: pa.DataType) -> Kind | None:
    if name == "numeric":
        if pa.types.is_decimal128(arrow_type):
            return Kind.NUMERIC128 if 0 <= arrow_type.scale <= arrow_type.precision else None
        if pa.types.is_decimal256(arrow_type):
            return Kind.NUMERIC256 if 0 <= arrow_type.scale <= arrow_type.precision else None
        return None
    kind = _KINDS.get(name)
    own = pa.string() if name == _ENUM else arrow_type_of(name)
    return kind if arrow_type == own else None


def column_of(entry: Any, looked_up: Mapping[int, tuple[str, str, str]]) -> Column:
    """Return the column that one entry of a psycopg2 cursor's description stands for."""
    oid = entry.type_code
    if oid != _NUMERIC:
        shown, deciding, _ = looked_up.get(oid) or (_BUILT_IN[oid],) * 3
        return Column(entry.name, shown, arrow_type_of(deciding))
    if entry.precision is None or entry.precision == 65535:
        return Column(entry.name, "numeric", arrow_type_of("numeric"))
    # psycopg2 gives the scale's 11 bits unsigned; negative scales came with PostgreSQL 15
    scale = (entry.scale or 0) & 0x7FF
    scale -= 2048 if scale > 1023 else 0
    return Column(
        entry.name,
        f"numeric({entry.precision},{scale})",
        arrow_type_of("numeric", entry.precision, scale),
    )


def makes_nulls(sql: str) -> bool:
    """Whether a query may make NULLs of a NOT NULL column (outer joins, grouping sets)."""
    return _MAKES_NULLS.search(sql) is not None


def mark_not_null(
    cursor: Any, description: Sequence[Any], columns: Sequence[Column]
) -> tuple[Column, ...]:
    """Mark the columns that are plain references to NOT NULL columns of a table."""
    tables = sorted({entry.table_oid for entry in description if entry.table_oid})
    cursor.execute(_NOT_NULL, (tables,))
    known = set(cursor.fetchall())
    return tuple(
        replace(column, nullable=(entry.table_oid, entry.table_column) not in known)
        for entry, column in zip(description, columns, strict=True)
    )


def _qualified(schema: str, name: str) -> str:
    return name if schema == "pg_catalog" else f"{schema}.{name}"
