"""What the server says of a query's columns -> columns, with types matched by name.

OIDs of built-in types are the same in every database; those of enums, domains, composites and
extensions differ between databases, so they are looked up and compared by name.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from dask_shardsql.engine.copy_arena import Kinds
from dask_shardsql.engine.copy_kernel.layout import Kind
from dask_shardsql.sql.types import Column, arrow_type_of

__all__ = [
    "Described",
    "Field",
    "columns_of",
    "described_by",
    "fields_of",
    "fields_of_cursor",
    "makes_nulls",
]

_NUMERIC = 1700
_FIELD = struct.Struct(">IhIhih")  # table, column, type, its length, its modifier, format
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
  WHERE t.oid = ANY('{{{oids}}}'::pg_catalog.oid[])
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
WHERE attnotnull AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = attrelid AND k.contype = 'n'
        AND NOT k.convalidated AND attnum = ANY(k.conkey))
    AND attrelid = ANY('{{{oids}}}'::pg_catalog.oid[])
"""
_MAKES_NULLS = re.compile(r"\b(left|right|full|cube|rollup|grouping)\b", re.IGNORECASE)


class Field(NamedTuple):
    """A field of a RowDescription (PostgreSQL manual, "Message Formats")."""

    name: str
    table_oid: int
    table_column: int
    type_code: int
    modifier: int


@dataclass(frozen=True)
class Described:
    """A described query: its columns, the server's own fields, and the types that are not built in.

    The types are by OID: the name, and the names that decide the Arrow type and the kind.
    """

    columns: tuple[Column, ...]
    fields: Sequence[Field]
    looked_up: Mapping[int, tuple[str, str, str]]

    def kinds(self, columns: Sequence[Column]) -> list[Kinds]:
        """Return what is sent of each of these columns, which may have other Arrow types."""
        if columns == self.columns:
            return list(self._own_kinds)
        return [
            _kinds_of_field(field, self.looked_up, column.arrow_type)
            for field, column in zip(self.fields, columns, strict=True)
        ]

    @functools.cached_property
    def _own_kinds(self) -> list[Kinds]:
        return [
            _kinds_of_field(field, self.looked_up, column.arrow_type)
            for field, column in zip(self.fields, self.columns, strict=True)
        ]


@functools.lru_cache(maxsize=256)
def described_by(description: bytes) -> Described | None:
    """Return what a RowDescription message says if all of its types are built in, else None."""
    fields = fields_of(description)
    if any(field.type_code not in _BUILT_IN for field in fields):
        return None
    return columns_of(fields, _nothing_to_run, find_not_null=False)


def _nothing_to_run(sql: str) -> NoReturn:
    raise AssertionError(sql)


def fields_of(description: bytes) -> tuple[Field, ...]:
    """Return the fields of a RowDescription message."""
    (count,) = struct.unpack_from(">h", description)
    fields, at = [], 2
    for _ in range(count):
        end = description.index(b"\0", at)
        table, column, oid, _, modifier, _ = _FIELD.unpack_from(description, end + 1)
        fields.append(Field(description[at:end].decode("utf-8"), table, column, oid, modifier))
        at = end + 1 + _FIELD.size
    return tuple(fields)


def fields_of_cursor(description: Sequence[Any]) -> list[Field]:
    """Return the fields of a psycopg2 cursor's description."""
    fields = []
    for entry in description:
        modifier = -1
        if entry.type_code == _NUMERIC and entry.precision not in (None, 65535):
            modifier = (entry.precision << 16 | (entry.scale or 0) & 0x7FF) + 4
        table, column = entry.table_oid or 0, entry.table_column or 0
        fields.append(Field(entry.name, table, column, entry.type_code, modifier))
    return fields


def columns_of(
    fields: Sequence[Field], run: Callable[[str], Sequence[Sequence[Any]]], find_not_null: bool
) -> Described:
    """Return the columns that a query's fields stand for.

    Parameters
    ----------
    fields : sequence of Field
        As the server describes them.
    run : callable
        Runs a query on the same session, and returns its rows.
    find_not_null : bool
        Whether to mark the columns that are plain references to NOT NULL columns of a table.
    """
    unknown = sorted({field.type_code for field in fields} - _BUILT_IN.keys())
    looked_up = _look_up(run, unknown) if unknown else {}
    columns = tuple(
        _column_of(field, looked_up)
        if looked_up
        else _built_in_column(field.name, field.type_code, field.modifier)
        for field in fields
    )
    tables = sorted({field.table_oid for field in fields if field.table_oid})
    if find_not_null and tables:
        rows = run(_NOT_NULL.format(oids=",".join(map(str, tables))))
        known = {(int(table), int(column)) for table, column in rows}
        columns = tuple(
            replace(column, nullable=(field.table_oid, field.table_column) not in known)
            for field, column in zip(fields, columns, strict=True)
        )
    return Described(columns, fields, looked_up)


def _look_up(
    run: Callable[[str], Sequence[Sequence[Any]]], oids: Sequence[int]
) -> Mapping[int, tuple[str, str, str]]:
    found = {}
    for row in run(_LOOK_UP.format(oids=",".join(map(str, oids)))):
        oid, schema, name, sort, element, its_schema, base, base_schema, its = row
        if element is None:
            found[int(oid)] = (_qualified(schema, name), "text", _ENUM if sort == "e" else "")
        else:
            built_in = base_schema == "pg_catalog"
            kind = base if built_in else _ENUM if its == "e" else ""
            deciding = base if built_in else "text"
            shown = f"{_qualified(its_schema, element)}[]"
            found[int(oid)] = (shown, f"{deciding}[]", f"{kind}[]")
    return found


def _kinds_of_field(
    field: Field, looked_up: Mapping[int, tuple[str, str, str]], arrow_type: pa.DataType
) -> Kinds:
    """Return what is sent of a column that is to be of an Arrow type.

    Nothing, where the kernel cannot read that: the column's text form is to be sent instead.

    Parameters
    ----------
    field : Field
        Its description.
    looked_up : mapping
        Of :class:`Described`.
    arrow_type : pyarrow.DataType
        The type to deliver, which may be another than its own.
    """
    oid = field.type_code
    return _kinds_of(looked_up[oid][2] if oid in looked_up else _BUILT_IN[oid], arrow_type)


@functools.lru_cache(maxsize=1024)
def _kinds_of(name: str, arrow_type: pa.DataType) -> Kinds:
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


@functools.lru_cache(maxsize=4096)
def _built_in_column(name: str, type_code: int, modifier: int) -> Column:
    return _column_of(Field(name, 0, 0, type_code, modifier), {})


def _column_of(field: Field, looked_up: Mapping[int, tuple[str, str, str]]) -> Column:
    if field.type_code != _NUMERIC:
        shown, deciding = (looked_up.get(field.type_code) or (_BUILT_IN[field.type_code],) * 2)[:2]
        return Column(field.name, shown, arrow_type_of(deciding))
    if field.modifier < 4:
        return Column(field.name, "numeric", arrow_type_of("numeric"))
    # the scale has 11 bits and a sign, as negative ones came with PostgreSQL 15
    precision, scale = (field.modifier - 4) >> 16 & 0xFFFF, (field.modifier - 4) & 0x7FF
    scale -= 2048 if scale > 1023 else 0
    return Column(
        field.name,
        f"numeric({precision},{scale})",
        arrow_type_of("numeric", precision, scale),
    )


def makes_nulls(sql: str) -> bool:
    """Whether a query may make NULLs of a NOT NULL column (outer joins, grouping sets)."""
    return _MAKES_NULLS.search(sql) is not None


def _qualified(schema: str, name: str) -> str:
    return name if schema == "pg_catalog" else f"{schema}.{name}"
