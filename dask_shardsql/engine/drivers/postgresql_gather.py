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
    COLUMNS,
    DATABASE,
    FAMILY,
    FUNCTIONS,
    JIT,
    KEYS,
    NO_JIT,
    READ_BY,
    RELATIONS,
    RULES,
    Relation,
)
from dask_shardsql.engine.drivers.postgresql_hiding import (
    reads,
    refuse_ambiguous_names,
    refuse_hidden_reads,
    refuse_what_is_not_seen,
)
from dask_shardsql.engine.drivers.postgresql_merge import BEGIN, WAITING, PostgreSQLReceiving
from dask_shardsql.engine.drivers.postgresql_params import merge_params, read_strings_as_standard
from dask_shardsql.engine.drivers.postgresql_script import Script, pins
from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.sql.statement import words_of
from dask_shardsql.topology import ShardedTable

__all__ = ["PostgreSQLGathering"]

_VIEW, _FINAL = "dask_shardsql_query", "dask_shardsql_final"
_SYSTEM = ("pg_catalog", "information_schema")
_NO_TEMP = (
    "temporary-table",
    "To gather rows, the login needs the TEMPORARY privilege on its database (GRANT TEMPORARY ON "
    "DATABASE ... TO ...), on a server that is no standby; or name another database of the same "
    "schema that merges: merge_dsn, or [merge] in the topology's file",
)
_REFUSED = {  # by SQLSTATE
    "0A000": _NO_TEMP,  # a standby
    "25006": _NO_TEMP,
    "42501": _NO_TEMP,
    "42P16": ("column-type", "Cast that column to a type that a table could have"),
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
        tables = self._sharded_tables()
        names = {relation.name for relation in relations.values()}
        refuse_ambiguous_names(self._rows, names, self._sharded)
        self._rules = self._rows(RULES, view=f"pg_temp.{_VIEW}")
        self._functions = self._rows(FUNCTIONS, view=f"pg_temp.{_VIEW}")
        refuse_what_is_not_seen(self._functions, self._rules[0][2], tables)
        self._gathered = {oid: one for oid, one in relations.items() if oid in tables}
        refuse_hidden_reads(self._rows, _VIEW, relations, tables)
        others = tuple(
            f"{one.schema}.{one.name}"
            for oid, one in relations.items()
            if oid not in tables and one.kind != "v" and one.schema not in _SYSTEM
        )
        if not self._gathered:
            return Survey(text, (), others=others)
        views = {r.oid: r for r in relations.values() if r.kind == "v" and self._is_gathered(r.oid)}
        self._refuse_what_is_known_to_differ(views)
        self._find_views(views)
        self._write_down()
        keys = self._rows(KEYS, view=f"pg_temp.{_VIEW}")
        self._keys = {oid: tuple(columns) for oid, columns in keys if oid in self._gathered}
        ((self._database,),) = self._rows(DATABASE)
        self.extracts = self.tables = tuple(
            self._extract(relation, tables[oid].key) for oid, relation in self._gathered.items()
        )
        self._read_by_it = relations
        self._table_of = {oid: tables[oid] for oid in self._gathered}
        return Survey(text, self.extracts, self._text, others=others)

    def split(self, shards: Sequence[str]) -> Split | None:
        """Return how the query can be answered with less than all rows, if it can.

        It is for after the survey, and for nothing to come after it.
        """
        from dask_shardsql.engine.drivers.postgresql_split import NotSplitError, split_query

        gathered = {oid: (one, self._table_of[oid]) for oid, one in self._gathered.items()}
        views = [view.oid for view, _ in self._views]
        try:
            split = split_query(
                self._rows, _VIEW, gathered, self._read_by_it, views, shards, self._functions
            )
        except NotSplitError:
            return None
        if self._has_whole_rows and split.strategy != "union":
            return None  # whose type is a table's, which a narrower one has not
        return replace(split, tables=tuple(self.extracts))

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
            named = {number: name for number, name, *_ in self._rows(COLUMNS, table=oid, key="")}
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
            self._run(f"CREATE TEMPORARY VIEW {_VIEW} AS\n{text}\n")
            return
        except psycopg2.Error as error:
            why = _REFUSED.get(error.pgcode or "")
            if why is None or (has_begun and error.pgcode == "0A000"):
                raise
            reason, remedy = why
            said = error.diag.message_primary
        raise MergeRefusedError(reason, f"the server says: {said}. {remedy}")

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

    def _sharded_tables(self) -> dict[int, ShardedTable]:
        """Return every sharded table by oid, also for all that is a part of one."""
        found: dict[int, ShardedTable] = {}
        for table in self._sharded:
            name = ".".join(map(double_quoted, table.name.split(".", 1)))
            family = self._rows(FAMILY, name=name)
            if not family:
                raise MergeRefusedError(
                    "unknown-table",
                    f"the topology's sharded table {table.name!r} is not to be found: write it as "
                    "the database has it, upper and lower case too, and with its schema if that is "
                    "not in the search_path",
                )
            found |= {oid: table for (oid,) in family}
        return found

    def _is_gathered(self, oid: int) -> bool:
        return reads(self._rows, oid, {*self._gathered})

    def _refuse_what_is_known_to_differ(self, views: dict[int, Relation]) -> None:
        ((self._has_whole_rows, has_system_columns, _),) = self._rules
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
        if self._has_whole_rows:  # whose columns the server does not list
            self._gathered = {
                oid: one._replace(
                    columns=[row[0] for row in self._rows(COLUMNS, table=oid, key="")]
                )
                for oid, one in self._gathered.items()
            }

    def _find_views(self, views: dict[int, Relation]) -> None:
        """Keep the definitions of views over sharded tables, each behind those that it reads."""
        schemas = {r.schema for r in (*self._gathered.values(), *views.values())}
        # the server then writes their names without a schema, so that pg_temp has its say
        ((current,),) = self._rows("SELECT current_setting('search_path')")
        ((in_front,),) = self._rows("SELECT current_schemas(false)")
        behind = ", ".join(map(double_quoted, sorted(schemas - set(in_front))))
        # wherever pg_temp stands in it: it is to come first
        front = [one for one in current.split(",") if one.strip() not in ("", "pg_temp")]
        path = ", ".join([*front, behind] if behind else front)
        self._rows("SELECT set_config('search_path', %(path)s, true)", path=path)
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
        columns = self._rows(COLUMNS, table=relation.oid, key=key)
        wanted = set(relation.columns) | set(self._keys.get(relation.oid, ()))
        chosen = [one for one in columns if one[0] in wanted]
        chosen = chosen or [one for one in columns if one[1] == key] or columns[:1]
        if any(is_a_name for _, _, _, is_a_name, *_ in chosen):
            raise MergeRefusedError(
                "column-type",
                f"a column of {relation.full_name} names objects of its own database (regclass and "
                "the like): leave it out, or cast it to text on each shard",
            )
        names = ", ".join(double_quoted(name) for _, name, *_ in chosen)
        select = f"SELECT {names} FROM {relation.full_name}"
        in_text = any(needs_text for _, _, needs_text, *_ in chosen)
        into = f"{double_quoted(relation.name)} ({names})"
        types = tuple((name, *of_type) for _, name, _, _, *of_type in chosen)
        full_name, database = relation.full_name, self._database
        return Extract(
            relation.name, key, select, into, in_text, full_name, types, database=database
        )

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
