"""What may hide a sharded table from PostgreSQL's word on what a query reads: it is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dask_shardsql.engine.drivers.postgresql_catalog import (
    BEHIND,
    GUARDED,
    NAMESAKES,
    PARENTS,
    POLICIES,
    READ_BY,
    ROW_COLUMNS,
    Relation,
)
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.topology import ShardedTable

__all__ = [
    "reads",
    "refuse_ambiguous_names",
    "refuse_hidden_reads",
    "refuse_rows_as_values",
    "refuse_what_is_not_seen",
    "rows_as_values",
]

Rows = Callable[..., list[tuple[Any, ...]]]
# functions of the server's own to which a table is named in a string
_RUNS_SQL = frozenset({"ts_stat", "ts_rewrite"})
_RUNS_SQL_PREFIXES = (
    *("cursor_to_xml", "database_to_xml", "query_to_xml", "schema_to_xml", "table_to_xml"),
    *("lo_", "loread"),  # and large objects, which are numbered in each database by itself
    *("has_", "pg_get_", "pg_stat_get_", "pg_relation_", "row_security_active"),
)
# what says something of the session that asks
_OF_SESSION = (
    *("current_setting", "current_schema", "txid_current", "txid_snapshot", "pg_backend_pid"),
    *("pg_current_xact", "pg_current_snapshot", "pg_my_temp_schema"),
)


def refuse_ambiguous_names(rows: Rows, read: set[str], sharded: Sequence[ShardedTable]) -> None:
    """Refuse names that stand for several tables, as the topology gives no schema."""
    for table in sharded:
        if "." in table.name or table.name not in read:
            continue
        schemas = [schema for (schema,) in rows(NAMESAKES, name=table.name)]
        if len(schemas) > 1:
            raise MergeRefusedError(
                "ambiguous-name",
                f"there is a table {table.name!r} in each of the schemas "
                f"{', '.join(map(repr, schemas))}: say in the topology which of them is "
                f"sharded, as in {schemas[0]}.{table.name}",
            )


def refuse_what_is_not_seen(
    functions: Sequence[tuple[Any, ...]],
    named: Sequence[int] | None,
    of_server: str | None,
    tables: Mapping[int, ShardedTable],
) -> None:
    """Refuse what reads a table that is named in a string, or looks at the table itself."""
    if of_server is not None:
        raise MergeRefusedError(
            "system-table",
            f"it reads {of_server}, which says something of one database only: ask each shard, "
            "with merge='union' and shard_column",
        )
    for name, _, _, _, is_own, names_tables in functions:
        is_one = name in _RUNS_SQL or name.startswith(_RUNS_SQL_PREFIXES)
        if names_tables or (is_one and not is_own):
            raise MergeRefusedError(
                "function",
                f"it calls {name!r}, which reads what is named in a string or by a number, and "
                "would see one shard's: write what it does into the query",
            )
        if name.startswith(_OF_SESSION) and not is_own:
            raise MergeRefusedError(
                "function",
                f"it calls {name!r}, which says something of a session, of which each shard has "
                "another: leave it out",
            )
    for oid in named or ():
        if oid in tables:
            raise MergeRefusedError(
                "table-as-object",
                f"it looks at the sharded table {tables[oid].name!r} as an object of the "
                "database (regclass), which each shard has one of: ask a shard for that, with "
                "shards=[...]",
            )


def rows_as_values(rows: Rows, query: str, tables: Sequence[int]) -> str:
    """Return the name of a column of the query whose values are rows of some tables; or nothing."""
    found = rows(ROW_COLUMNS, view=f"pg_temp.{query}", tables=list(tables))
    return str(found[0][0]) if found else ""


def refuse_rows_as_values(column: str) -> None:
    """Refuse a column of a sharded table's row type: where rows are gathered it is another one."""
    if column:
        raise MergeRefusedError(
            "column-type",
            f"its column {column!r} has whole rows of a sharded table, which has a type of its own "
            "where they are gathered: select their columns, or cast it to text",
        )


def refuse_hidden_reads(
    rows: Rows,
    query: str,
    relations: Mapping[int, Relation],
    tables: Mapping[int, ShardedTable],
) -> None:
    """Refuse what reads a shard's own slice where no table of the query shows it."""
    escaped = (re.escape(_last_of(table.name)) for table in tables.values())
    names = re.compile(rf"(?<![\w$])({'|'.join(escaped)})(?![\w$])")
    sharded = set(tables)
    for function, source, is_harmless, oid in rows(BEHIND, view=f"pg_temp.{query}"):
        if oid is not None and reads(rows, oid, sharded):
            raise MergeRefusedError(
                "function",
                "it uses a function, an operator or a row type that is made of a sharded "
                "table, which has one shard's rows and all its columns: write what it does "
                "into the query",
            )
        if function is None:
            continue
        if not is_harmless or names.search(source.lower()):
            raise MergeRefusedError(
                "function",
                f"it calls the function {function!r}, which may read a sharded table and would "
                "see one shard's rows of it: write what it does into the query, or declare it "
                "IMMUTABLE if it reads no table",
            )
    parents = {oid for (oid,) in rows(PARENTS, tables=list(sharded))} - sharded
    for relation in relations.values():
        if relation.oid in parents:
            raise MergeRefusedError(
                "parent-table",
                f"{relation.full_name} has parts that are sharded tables, and is none itself: "
                "name it in the topology instead of them",
            )
    for (oid,) in rows(GUARDED, tables=[*relations]):
        if oid in sharded or _is_guarded_by_others(rows, oid, sharded):
            raise MergeRefusedError(
                "row-security",
                f"policies decide which rows of {relations[oid].name!r} may be seen, and they may "
                "depend on who reads, and on other rows",
            )
    for view in relations.values():
        if view.kind == "m" and reads(rows, view.oid, sharded):
            raise MergeRefusedError(
                "materialized-view",
                f"materialized view {view.name!r} holds what its own shard's slice was when it "
                "was refreshed: read the tables it is made of",
            )


def reads(rows: Rows, oid: int, sharded: set[int]) -> bool:
    """Whether it is a sharded table, or a view that is made of one, through others too."""
    seen, left = set(), [oid]
    while left:
        one = left.pop()
        if one in sharded:
            return True
        if one not in seen:
            seen.add(one)
            left += [found for (found,) in rows(READ_BY, view=one)]
    return False


def _is_guarded_by_others(rows: Rows, table: int, sharded: set[int]) -> bool:
    """Whether policies of a reference table look at sharded tables, or might."""
    return any(
        oid is None or has_policies or reads(rows, oid, sharded)
        for oid, has_policies in rows(POLICIES, tables=[table])
    )


def _last_of(name: str) -> str:
    return name.rpartition(".")[2].lower()
