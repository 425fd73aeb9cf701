"""Columns, views and databases as PostgreSQL's catalog tells of them, compared between shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dask_shardsql.engine.drivers.gathering import Extract, refuse_other_view
from dask_shardsql.errors import SchemaMismatchError

__all__ = [
    "ColumnFacts",
    "Rows",
    "asking",
    "columns_in",
    "compare_tables",
    "database_of",
    "definitions_of",
    "types_of",
]

_ALTER = "Alter the tables to agree"
Rows = Callable[..., list[tuple[Any, ...]]]
"""Runs SQL with named values, and returns its rows."""

# of the columns of some relations, by the place that these have among those asked for: number and
# name; whether it must travel as text (the binary form of some types holds an oid, which is another
# one in each database); whether it names an object of the database itself; its type to compare, and
# to show; whether it is NOT NULL; and how it is defined: the collation, and the labels, fields or
# base types of all types that it is made of
_COLUMNS = """
WITH RECURSIVE asked(place, oid) AS (
    SELECT named.place, pg_catalog.to_regclass(named.name)::pg_catalog.oid
    FROM pg_catalog.unnest(%(names)s::text[]) WITH ORDINALITY AS named(name, place)
), typed(place, relation, number, name, oid, part) AS (
    SELECT asked.place, a.attrelid, a.attnum, a.attname, a.atttypid, false
    FROM asked JOIN pg_catalog.pg_attribute a ON a.attrelid = asked.oid
    WHERE a.attnum > 0 AND NOT a.attisdropped
    UNION
    SELECT typed.place, typed.relation, typed.number, typed.name, next.oid,
        typed.part OR t.typtype <> 'd'
    FROM typed JOIN pg_catalog.pg_type t ON t.oid = typed.oid, LATERAL (
        SELECT t.typbasetype WHERE t.typtype = 'd'
        UNION ALL SELECT t.typelem WHERE t.typelem <> 0 AND t.typlen = -1
        UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r
            WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
        UNION ALL SELECT f.atttypid FROM pg_catalog.pg_attribute f
            WHERE t.typtype = 'c' AND f.attrelid = t.typrelid AND f.attnum > 0
                AND NOT f.attisdropped
    ) AS next(oid)
), known AS (
SELECT typed.place, typed.relation, typed.number, typed.name, bool_or(NOT typed.part AND (
    t.typtype = 'c' OR t.typsend = 0 OR t.typreceive = 0 OR t.typname IN ('record', '_record')
    OR (t.typlen = -1 AND t.typelem <> 0 AND (t.typelem >= 16384 OR EXISTS (
        SELECT FROM pg_catalog.pg_type e WHERE e.oid = t.typelem AND e.typsend = 0))))) AS in_text,
    bool_or((t.typname ~ '^_?reg' AND t.oid < 16384)) AS is_a_name,
    pg_catalog.string_agg(DISTINCT CASE
        WHEN t.typname = 'money' THEN pg_catalog.current_setting('lc_monetary')
        WHEN t.typtype = 'e' THEN t.typname || ' ' || (
            SELECT pg_catalog.string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder)
            FROM pg_catalog.pg_enum e WHERE e.enumtypid = t.oid)
        WHEN t.typtype = 'r' THEN t.typname || ' ' || (
            SELECT pg_catalog.format('%%s %%s %%s', pg_catalog.format_type(r.rngsubtype, NULL),
                c.opcname, (SELECT l.collname FROM pg_catalog.pg_collation l
                    WHERE l.oid = r.rngcollation))
            FROM pg_catalog.pg_range r JOIN pg_catalog.pg_opclass c ON c.oid = r.rngsubopc
            WHERE r.rngtypid = t.oid)
        WHEN t.typtype = 'd' THEN t.typname || ' '
            || pg_catalog.format_type(t.typbasetype, t.typtypmod) || coalesce((
                SELECT ' ' || l.collname FROM pg_catalog.pg_collation l
                WHERE l.oid = t.typcollation AND l.collname <> 'default'), '')
        WHEN t.typtype = 'c' THEN t.typname || ' ' || (
            SELECT pg_catalog.string_agg(pg_catalog.format('%%I %%s%%s', f.attname,
                pg_catalog.format_type(f.atttypid, f.atttypmod), ' ' || l.collname), ', '
                ORDER BY f.attnum)
            FROM pg_catalog.pg_attribute f LEFT JOIN pg_catalog.pg_collation l
                ON l.oid = f.attcollation AND l.collname <> 'default'
            WHERE f.attrelid = t.typrelid AND f.attnum > 0 AND NOT f.attisdropped) END, '; ')
        AS made_of
FROM typed JOIN pg_catalog.pg_type t ON t.oid = typed.oid
GROUP BY 1, 2, 3, 4
)
SELECT known.place::int4, known.number, known.name::text, known.in_text, known.is_a_name,
    pg_catalog.format('%%s.%%s %%s', n.nspname, t.typname, a.atttypmod),
    pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull, (
        SELECT pg_catalog.format('%%s %%s', c.collname,
            coalesce(pg_catalog.pg_collation_actual_version(c.oid), ''))
        FROM pg_catalog.pg_collation c WHERE c.oid = a.attcollation AND c.collname <> 'default'),
    known.made_of
FROM known JOIN pg_catalog.pg_attribute a
    ON a.attrelid = known.relation AND a.attnum = known.number
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
ORDER BY 1, 2"""
# of some views, by name; nothing for other relations
_DEFINITIONS = """
SELECT named.name, pg_catalog.pg_get_viewdef(c.oid)
FROM pg_catalog.unnest(%(names)s::text[]) AS named(name)
JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.to_regclass(named.name)::pg_catalog.oid
WHERE c.relkind IN ('v', 'm')"""
# what decides how texts are ordered, compared and measured where nothing else is said
_DATABASE = """
SELECT pg_catalog.concat_ws(' ', pg_catalog.pg_encoding_to_char(d.encoding), d.datcollate,
    d.datctype, pg_catalog.to_jsonb(d)->>'datlocprovider', coalesce(
        pg_catalog.to_jsonb(d)->>'datlocale', pg_catalog.to_jsonb(d)->>'daticulocale'),
    pg_catalog.to_jsonb(d)->>'datcollversion')
FROM pg_catalog.pg_database d WHERE d.datname = pg_catalog.current_database()"""


def asking(cursor: Any) -> Rows:
    """Return what runs SQL with named values, and returns its rows, if it has any."""

    def rows(sql: str, **values: Any) -> list[tuple[Any, ...]]:
        cursor.execute(sql, values or None)
        return [] if cursor.description is None else cursor.fetchall()

    return rows


class ColumnFacts(NamedTuple):
    """What the catalog says of a column of a relation."""

    number: int
    name: str
    needs_text: bool  # to travel
    names_objects: bool  # of its own database
    type: str
    shown: str  # the type, for people
    is_not_null: bool
    collation: str | None
    made_of: str | None  # labels, fields, base types


def columns_in(rows: Rows, names: Sequence[str]) -> list[list[ColumnFacts]]:
    """Return the columns of relations, which are named as in a query; none if one is missing."""
    found: list[list[ColumnFacts]] = [[] for _ in names]
    for place, *facts in rows(_COLUMNS, names=list(names)):
        found[place - 1].append(ColumnFacts(*facts))
    return found


def definitions_of(rows: Rows, names: Sequence[str]) -> dict[str, str]:
    """Return the texts of those relations that are views, by name."""
    return dict(rows(_DEFINITIONS, names=list(names)))


def database_of(rows: Rows) -> str:
    """Return what decides how texts are ordered, compared and measured in this database."""
    ((found,),) = rows(_DATABASE)
    return str(found)


def types_of(columns: Sequence[ColumnFacts], key: str) -> tuple[tuple[str | None, ...], ...]:
    """Return what columns must be alike in, as :attr:`Extract.types`; only a key must be NOT NULL.

    Each is a name, a type, the same as it is shown to people, its collation and what it is made of.
    """
    found = []
    for one in columns:
        is_key = " NOT NULL" if one.is_not_null and one.name == key else ""
        kinds = (one.type + is_key, one.shown + is_key)
        found.append((one.name, *kinds, one.collation, one.made_of))
    return tuple(found)


def compare_tables(rows: Rows, tables: Sequence[Extract]) -> None:
    """Refuse tables which are not what they are on the shard that gathers.

    Raises
    ------
    SchemaMismatchError
        A column is of another type, or its type is defined in another way, or the shard key may
        be NULL here, or columns stand in another order where that counts, or a view is defined in
        another way, or the database compares texts in another way.
    """
    if not tables:
        return
    here, there = database_of(rows), tables[0].database
    if here != there:
        raise SchemaMismatchError(
            f"the database's encoding and collation are ({here}) here, and ({there}) on the "
            "shard that this one is compared with: texts would be compared and ordered in another "
            "way on each. Make the databases agree"
        )
    names = [one.full_name for one in tables]
    for table, columns in zip(tables, columns_in(rows, names), strict=True):
        _compare_columns(table, types_of(columns, table.key))
    found = definitions_of(rows, names)
    for table in tables:
        refuse_other_view(table, found.get(table.full_name, ""))


def _compare_columns(table: Extract, columns: Sequence[tuple[str | None, ...]]) -> None:
    found = {name: of_type for name, *of_type in columns}
    for name, *wanted in table.types:
        if (other := found.get(name)) is None:
            raise SchemaMismatchError(
                f"{table.full_name} has no column {name!r} here, which the query reads on the "
                f"shard that this one is compared with. {_ALTER}"
            )
        if other[0] != wanted[0]:
            raise SchemaMismatchError(
                f"column {name!r} of {table.full_name} is {other[1]} here, and {wanted[1]} on the "
                f"shard that this one is compared with: values would be converted. {_ALTER}"
            )
        for here, there in zip(other[2:], wanted[2:], strict=True):
            if here != there:
                raise SchemaMismatchError(
                    f"column {name!r} of {table.full_name} is of a type or collation that is "
                    f"defined as ({here}) here, and as ({there}) on the shard that this one is "
                    "compared with: values would be ordered, compared or read in another way. Make "
                    "them agree"
                )
    names = [str(name) for name, *_ in table.types]
    if table.is_whole and names != [*found]:
        raise SchemaMismatchError(
            f"the columns of {table.full_name}, of which whole rows are read, are "
            f"({', '.join(map(str, found))}) here, and ({', '.join(names)}) on the shard that "
            "this one is compared with. Name columns in the query, or create the tables alike"
        )
