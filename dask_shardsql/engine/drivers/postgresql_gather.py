"""PostgreSQL as the database that gathers: the query runs there over the rows of all shards.

What is needed of each sharded table comes into a temporary table of the same name, and
``pg_temp`` is where PostgreSQL looks first: so the query runs as it would in one database, with
that database's own types, collations, functions and reference tables. What a query needs the server
itself tells: a temporary view is made of it, whose dependencies are the tables and columns that it
reads, through views too, and whose text the server writes down again with every name as it was
understood. Then that text is checked in the same way: it must not read a shard's own slice.

Only statements of ours run while the transaction may write; it is read-only before the user's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psycopg2

from dask_shardsql.engine.drivers.base import Columns, OnBatch, Query
from dask_shardsql.engine.drivers.gathering import Extract, Split, Survey
from dask_shardsql.engine.drivers.postgresql_catalog import (
    FUNCTIONS,
    JIT,
    KEYS,
    NO_JIT,
    READ_BY,
    RELATIONS,
    RULES,
    Relation,
    sharded_tables,
)
from dask_shardsql.engine.drivers.postgresql_columns import (
    ColumnFacts,
    columns_in,
    database_of,
    definitions_of,
    types_of,
)
from dask_shardsql.engine.drivers.postgresql_copy import viewing
from dask_shardsql.engine.drivers.postgresql_hiding import (
    reads,
    refuse_ambiguous_names,
    refuse_hidden_reads,
    refuse_rows_as_values,
    refuse_what_is_not_seen,
    rows_as_values,
)
from dask_shardsql.engine.drivers.postgresql_merge import BEGIN, WAITING, PostgreSQLReceiving
from dask_shardsql.engine.drivers.postgresql_params import merge_params, read_strings_as_standard
from dask_shardsql.engine.drivers.postgresql_script import Script, pins
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.errors import MergeRefusedError, ShardSQLError, StatementError
from dask_shardsql.sql.statement import words_of
from dask_shardsql.topology import ShardedTable

__all__ = ["PostgreSQLGathering"]

_VIEW, _FINAL = "dask_shardsql_query", "dask_shardsql_final"
_WRITING = {"delete", "insert", "merge", "update"}
_SYSTEM = ("pg_catalog", "information_schema")
_NO_TEMP = (
    "temporary-table",
    "To gather rows, the login needs the TEMPORARY privilege on its database (GRANT TEMPORARY ON "
    "DATABASE ... TO ...), on a server that is no standby; or name another database of the same "
    "schema that merges: merge_dsn, or [merge] in the topology's file",
)
_AS_A_TABLE = "Over all shards, a query can only have columns that a table could have"
_REFUSED = {  # by SQLSTATE
    "0A000": _NO_TEMP,  # a standby
    "25006": _NO_TEMP,
    "42501": _NO_TEMP,
    "42P16": ("column-type", f"{_AS_A_TABLE}: cast that one, as to text"),
    "42P22": ("column-type", f"{_AS_A_TABLE}: write COLLATE behind that one"),
    "54011": (
        "too-many-columns",
        f"{_AS_A_TABLE}: select fewer, or some in each of several",
    ),
}


class PostgreSQLGathering(PostgreSQLReceiving):
    """See :class:`dask_shardsql.engine.drivers.gathering.Gathering`.

    Parameters
    ----------
    connection : Session
        Idle; nobody else uses it before the end.
    query : Query
        The query.
    sharded : sequence of ShardedTable
        The sharded tables.
    read : callable
        Reads the rows of a script, in the transaction that is open.
    """

    def __init__(
        self,
        connection: Any,
        query: Query,
        sharded: Sequence[ShardedTable],
        read: Callable[[Script, Callable[[Columns], Columns], OnBatch], None],
    ) -> None:
        super().__init__(connection, query)
        self._sharded, self._read = sharded, read
        self._gathered: dict[int, Relation] = {}
        self._views: list[tuple[Relation, str]] = []
        self._keys: dict[int, tuple[int, ...]] = {}
        self._text = ""
        self._read_by_it: dict[int, Relation] = {}
        self._table_of: dict[int, ShardedTable] = {}
        self._rules: list[tuple[Any, ...]] = []
        self._functions: list[tuple[Any, ...]] = []
        self._has_whole_rows, self._database = False, ""
        self._columns: dict[int, list[ColumnFacts]] = {}

    def survey(self) -> Survey:
        """Begin, and return what is needed of the sharded tables.

        Raises
        ------
        MergeRefusedError
            The query cannot be answered in this way.
        """
        text = merge_params(self._cursor, self._query)
        read_strings_as_standard(self._connection)
        self._begin(text)
        relations = self._relations(_VIEW)
        tables = sharded_tables(self._rows, self._sharded)
        names = {relation.name for relation in relations.values()}
        refuse_ambiguous_names(self._rows, names, self._sharded)
        self._rules = self._rows(RULES, view=f"pg_temp.{_VIEW}")
        self._functions = self._rows(FUNCTIONS, view=f"pg_temp.{_VIEW}")
        _, _, named, of_server = self._rules[0]
        refuse_what_is_not_seen(self._functions, named, of_server, tables)
        self._gathered = {oid: one for oid, one in relations.items() if oid in tables}
        refuse_hidden_reads(self._rows, _VIEW, relations, tables)
        self._read_by_it = {oid: one for oid, one in relations.items() if one.schema not in _SYSTEM}
        others = tuple(
            f"{one.schema}.{one.name}"
            for oid, one in self._read_by_it.items()
            if oid not in tables and one.kind != "v"
        )
        if not self._gathered:
            return Survey(text, (), others=others)
        full_names = [one.full_name for one in self._read_by_it.values()]
        self._columns = dict(zip(self._read_by_it, columns_in(self._rows, full_names), strict=True))
        views = {r.oid: r for r in relations.values() if r.kind == "v" and self._is_gathered(r.oid)}
        self._refuse_what_is_known_to_differ(views)
        self._find_views(views)
        self._write_down()
        keys = self._rows(KEYS, view=f"pg_temp.{_VIEW}")
        self._keys = {oid: tuple(columns) for oid, columns in keys if oid in self._gathered}
        self._database = database_of(self._rows)
        self.extracts = tuple(
            self._extract(relation, tables[oid].key) for oid, relation in self._gathered.items()
        )
        defined = tuple(replace(self._compared(one), definition=text) for one, text in self._views)
        self.tables = (*self.extracts, *defined)
        self._table_of = {oid: tables[oid] for oid in self._gathered}
        final = self._text
        return Survey(text, self.extracts, final, others=others, tables=defined, has_own=True)

    def split(self, shards: Sequence[str]) -> Split | str:
        """Return how the query can be answered with less than all rows, or why it can not.

        It is for after the survey, and for nothing to come after it.
        """
        from dask_shardsql.engine.drivers.postgresql_split import NotSplitError, split_query

        gathered = {oid: (one, self._table_of[oid]) for oid, one in self._gathered.items()}
        views = [view.oid for view, _ in self._views]
        row_column = rows_as_values(self._rows, _VIEW, [*gathered]) if self._has_whole_rows else ""
        try:
            split: Split | None = split_query(
                self._rows, _VIEW, gathered, self._read_by_it, views, shards, self._functions
            )
        except NotSplitError as error:
            split, why = None, error.reason
        if split is not None and self._has_whole_rows and split.strategy in ("gather", "merge"):
            split, why = None, "whole-rows"  # whose type is a table's, which a narrower one has not
        if split is None:
            refuse_rows_as_values(row_column)
            return why
        defined = definitions_of(self._rows, [one.full_name for one in self._read_by_it.values()])
        tables = tuple(
            replace(
                one,
                definition=defined.get(one.full_name, ""),
                is_whole=self._has_whole_rows,
                settings=split.settings,
            )
            for one in (*self.extracts, *map(self._compared, self._others()))
        )
        return replace(split, tables=tables)

    def prepare(self) -> None:
        """Make the temporary tables."""
        self._run(f"{JIT}; DROP VIEW pg_temp.{_VIEW}")
        for part in self.extracts:
            # with all columns, which the text may name; those that are not needed stay NULL
            columns = f"TABLE {part.full_name} WITH NO DATA"
            name = double_quoted(part.table)
            self._run(f"CREATE TEMPORARY TABLE {name} ON COMMIT DROP AS {columns}")

    def add_own(self) -> int:
        """Put this shard's own rows into the temporary tables, and return how many."""
        rows = 0
        for part in self.extracts:
            self._run(f"INSERT INTO pg_temp.{part.into} {part.select}")
            rows += self._cursor.rowcount
        return rows

    def read(self, resolve: Callable[[Columns], Columns], on_batch: OnBatch) -> None:
        """Run the query over what was gathered; the transaction then ends."""
        by_oid = dict(zip(self._gathered, self.extracts, strict=True))
        for oid, numbers in self._keys.items():
            named = {one.number: one.name for one in self._columns[oid]}
            key = ", ".join(double_quoted(named[number]) for number in numbers)
            name = double_quoted(by_oid[oid].table)
            self._run(f"ALTER TABLE pg_temp.{name} ADD PRIMARY KEY ({key})")
        for view, definition in self._views:
            self._run(f"CREATE TEMPORARY VIEW {double_quoted(view.name)} AS\n{definition}")
        for part in self.extracts:
            self._run(f"ANALYZE pg_temp.{double_quoted(part.table)}")
        self._check_final_text()
        self._read(Script(("SET TRANSACTION READ ONLY",), self._text), resolve, on_batch)

    def _begin(self, text: str) -> None:
        """Begin the transaction, and make a view of the query."""
        has_begun = False
        try:
            self._run("; ".join((BEGIN + " WRITE", WAITING, NO_JIT, *pins(self._query))))
            has_begun = True
            self._run(viewing(text))
            return
        except psycopg2.Error as error:
            refusal = _refusal(error, text if has_begun else "")
            if refusal is None:
                raise
        raise refusal

    def _run(self, sql: str) -> None:
        self._cursor.execute(sql)

    def _rows(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        self._cursor.execute(sql, values or None)
        if self._cursor.description is None:
            return []
        rows: list[tuple[Any, ...]] = self._cursor.fetchall()
        return rows

    def _relations(self, view: str) -> dict[int, Relation]:
        """Return what a temporary view reads, by oid."""
        found = self._rows(RELATIONS, view=f"pg_temp.{view}")
        return {row[0]: Relation(*row) for row in found}

    def _is_gathered(self, oid: int) -> bool:
        return reads(self._rows, oid, {*self._gathered})

    def _refuse_what_is_known_to_differ(self, views: dict[int, Relation]) -> None:
        ((self._has_whole_rows, has_system_columns, _, _),) = self._rules
        if has_system_columns:
            raise MergeRefusedError(
                "system-column",
                "it reads a system column (ctid, tableoid, xmin, ...), which says where a row is "
                "stored on its shard: leave that out",
            )
        names = [relation.name for relation in (*self._gathered.values(), *views.values())]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MergeRefusedError(
                "same-name",
                f"it reads several sharded tables, or views of them, named "
                f"{', '.join(map(repr, twice))}, of which only one can be gathered at a time",
            )

    def _find_views(self, views: dict[int, Relation]) -> None:
        """Keep the definitions of views over sharded tables, each behind those that it reads."""
        schemas = {r.schema for r in (*self._gathered.values(), *views.values())}
        # the server then writes their names without a schema, so that pg_temp has its say:
        # wherever that stands in it, it is to come first
        ((current,),) = self._rows("SELECT current_schemas(false)")
        front = [one for one in current if not one.startswith("pg_temp_")]
        path = ", ".join(map(double_quoted, (*front, *sorted(schemas - set(front)))))
        self.settings = (f"SET LOCAL search_path TO {path}",)
        self._rows(*self.settings)
        needs = {
            oid: {found for (found,) in self._rows(READ_BY, view=oid)} & set(views) for oid in views
        }
        while needs:
            ready = [oid for oid, wanted in needs.items() if not wanted & set(needs)]
            for oid in ready:
                ((definition,),) = self._rows(
                    "SELECT pg_catalog.pg_get_viewdef(%(view)s::pg_catalog.oid)", view=oid
                )
                self._views.append((views[oid], definition))
                del needs[oid]

    def _write_down(self) -> None:
        """Keep the query as the server has understood it."""
        name = f"pg_temp.{_VIEW}"
        ((text,),) = self._rows(
            "SELECT pg_catalog.pg_get_viewdef(%(view)s::pg_catalog.regclass)", view=name
        )
        self._text = text.rstrip().removesuffix(";")
        texts = [self._text, *(definition for _, definition in self._views)]
        inherited = any(r.kind == "r" and r.is_inherited for r in self._gathered.values())
        partitioned = any(r.kind == "p" for r in self._gathered.values())
        if (inherited or partitioned) and any("only" in map(str.lower, words_of(t)) for t in texts):
            raise MergeRefusedError(
                "only", "it reads ONLY a part of a sharded table: name that part"
            )

    def _extract(self, relation: Relation, key: str) -> Extract:
        columns = self._columns[relation.oid]
        key_columns = [one for one in columns if one.name == key]
        if not key_columns:
            raise MergeRefusedError(
                "unknown-key",
                f"the shard key {key!r} that the topology names is no column of "
                f"{relation.full_name}, which has {', '.join(one.name for one in columns)}",
            )
        chosen = self._chosen(relation) or key_columns
        if any(one.names_objects for one in chosen):
            raise MergeRefusedError(
                "column-type",
                f"a column of {relation.full_name} names objects of its own database (regclass and "
                "the like): leave it out, or cast it to text on each shard",
            )
        names = ", ".join(double_quoted(one.name) for one in chosen)
        select = f"SELECT {names} FROM {relation.full_name}"
        return replace(
            self._compared(relation),
            key=key,
            select=select,
            into=f"{double_quoted(relation.name)} ({names})",
            in_text=any(one.needs_text for one in chosen),
            types=types_of(chosen, key),
            settings=tuple(self.settings),
        )

    def _chosen(self, relation: Relation) -> list[ColumnFacts]:
        """Return the columns that are read of a table; all, where whole rows are."""
        wanted = {*relation.columns, *self._keys.get(relation.oid, ())}
        columns = self._columns[relation.oid]
        return [one for one in columns if one.number in wanted or self._has_whole_rows]

    def _compared(self, relation: Relation) -> Extract:
        """Return what all databases must agree on of a table or view that is not gathered."""
        types = types_of(self._chosen(relation), "")
        name, full_name = relation.name, relation.full_name
        return Extract(name, "", "", "", False, full_name, types, database=self._database)

    def _others(self) -> list[Relation]:
        return [one for oid, one in self._read_by_it.items() if oid not in self._gathered]

    def _check_final_text(self) -> None:
        """Make sure that what will run reads no slice of its own."""
        self._run(f"CREATE TEMPORARY VIEW {_FINAL} AS\n{self._text}\n")
        wrong = {oid for oid, _ in self._gathered.items()} | {view.oid for view, _ in self._views}
        left = [r for oid, r in self._relations(_FINAL).items() if oid in wrong]
        if left:
            raise MergeRefusedError(
                "hidden-name",
                f"it reads {left[0].full_name}, which another table of that name hides: rename one",
            )
        self._run(f"DROP VIEW pg_temp.{_FINAL}")


def _refusal(error: psycopg2.Error, text: str) -> ShardSQLError | None:
    """Return what is to be said of a text that no view can be made of, or why none can, if empty.

    Who has written it knows of no view.
    """
    code = error.pgcode or ""
    if text and code == "0A000":
        if _WRITING.isdisjoint(words_of(text)):
            return None
        return StatementError(
            "only a query can be read from the shards, and a WITH of this one changes rows",
            hint="leave out all that is not a SELECT",
        )
    if code not in _REFUSED:
        return None
    reason, remedy = _REFUSED[code]
    said = str(error.diag.message_primary).replace("view column", "column")
    return MergeRefusedError(reason, f"the server says: {said}. {remedy}")
