"""Random queries with merge="global", each compared with the one database that has all the rows.

    python tests/fuzz/merge.py --seconds 200             # a loop over seeds
    python tests/fuzz/merge.py --seed 7 --runs 1         # one of its queries again

A query joins up to three tables or inner queries in any way, with any condition, and selects rows,
distinct rows, windows, or groups with aggregates, perhaps ordered and cut; or it combines several.
Whatever comes out must be the same: rows, their order where the query gives one, names and types,
or the server's error.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections import Counter
from functools import partial
from typing import Any

import dask_shardsql as dss
from dask_shardsql.testing import ShardServers, start_shards

TABLES = {"o": "fz_orders", "i": "fz_items", "k": "fz_kinds"}
COLUMNS = {"o": ["id", "kind", "total", "flag"], "i": ["oid", "n", "qty"], "k": ["kind", "w"]}
NUMBERS = {"o": ["id", "total"], "i": ["oid", "n", "qty"], "k": ["w"]}
KEYS = {"o": "id", "i": "oid", "k": "w"}
KEY = {"public.fz_orders": "id", "public.fz_items": "oid"}
JOINS = ["JOIN", "JOIN", "LEFT JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", "CROSS JOIN"]
OPERATORS = ["<", ">", "=", "<>", "<=", ">="]
INSIDE = {  # other relations with the columns of a table
    "o": [
        "(SELECT * FROM fz_orders x WHERE x.total > 9)",
        "(SELECT x.id, max(x.kind) AS kind, sum(x.total) AS total, bool_or(x.flag) AS flag "
        "FROM fz_orders x GROUP BY x.id)",
        "(SELECT min(x.id) AS id, x.kind, count(*) AS total, x.flag FROM fz_orders x "
        "GROUP BY x.kind, x.flag)",
        "(SELECT DISTINCT x.id, x.kind, x.total, x.flag FROM fz_orders x)",
        "(SELECT * FROM fz_orders x ORDER BY x.total, x.id LIMIT 9)",
        "fz_seen",
    ],
    "i": [
        "(SELECT x.oid, x.n, x.qty FROM fz_items x JOIN fz_orders z ON z.id = x.oid)",
        "(SELECT x.oid, count(*) AS n, sum(x.qty) AS qty FROM fz_items x GROUP BY x.oid)",
        "(SELECT x.oid, x.n, x.qty FROM fz_items x UNION ALL SELECT z.id, 1, 2 FROM fz_orders z)",
        "fz_counted",
    ],
    "k": [
        "(SELECT x.kind, x.w FROM fz_kinds x WHERE x.w > 3)",
        "(SELECT x.kind, max(x.w) AS w FROM fz_kinds x GROUP BY x.kind)",
        "(SELECT x.kind, (sum(x.total) % 12)::int AS w FROM fz_orders x GROUP BY x.kind)",
    ],
}
INNER = [
    "SELECT id FROM fz_orders",
    "SELECT n FROM fz_items WHERE qty < 3",
    "SELECT w FROM fz_kinds",
]


class Grammar:
    """Writes queries.

    Parameters
    ----------
    rng : random.Random
        Decides.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._tables: list[str] = []
        self._numbers = itertools.count()
        self._depth = 0

    def query(self) -> str:
        """Return a query."""
        if self._rng.random() < 0.1:
            word = self._rng.choice(["UNION ALL", "UNION ALL", "UNION", "EXCEPT", "INTERSECT ALL"])
            both = [f"SELECT q.c0 AS c0 FROM ({self._one()}) q" for _ in range(2)]
            return f"{both[0]} {word} {both[1]}"
        if self._rng.random() < 0.1:
            name, body = self._rng.choice(["w", "fz_orders"]), self._one()
            how = self._rng.choice(["", "", "MATERIALIZED"])
            if self._rng.random() < 0.5:
                return (
                    f"WITH {name} AS {how} ({body}) SELECT count(*) AS n, min({name}.c0) AS m "
                    + (f"FROM {name}")
                )
            return f"WITH w AS {how} ({body}) SELECT a.c0 FROM w a, w b WHERE a.c0 = b.c0"
        return self._one()

    def source_and_condition(self) -> tuple[str, str, str]:
        """Return tables to read from, a condition on their rows, and a column."""
        source = self._source()
        return source, self._condition(), self._column(COLUMNS)

    def _one(self) -> str:
        before, self._tables = self._tables, []
        self._depth += 1
        source = self._source()
        if self._rng.random() < 0.6:
            source += f" WHERE {self._condition()}"
        found = self._rows(source) if self._rng.random() < 0.4 else self._groups(source)
        self._tables = before
        self._depth -= 1
        return found

    def _source(self) -> str:
        """Choose and join the tables."""
        source = self._relation()
        for _ in range(1, self._rng.choice([1, 1, 2, 2, 3])):
            before, join = self._rng.choice(self._tables), self._rng.choice(JOINS)
            source += f" {join} {self._relation()}"
            alias = self._tables[-1]
            if join != "CROSS JOIN":
                source += f" ON {before}.{KEYS[before[0]]} = {alias}.{KEYS[alias[0]]}"
                if join != "FULL JOIN" and self._rng.random() < 0.2:
                    source += f" AND {self._condition()}"
        return source

    def _relation(self) -> str:
        """Choose a table, or write a query that has its columns; its alias is the latest then."""
        kind, number = self._rng.choice("oik"), next(self._numbers)
        table = TABLES[kind]
        if self._depth < 3 and self._rng.random() < 0.15:
            table = self._rng.choice(INSIDE[kind])
        alias = f"{kind}{number}"
        self._tables.append(alias)
        return f"{table} {alias}"

    def _column(self, columns: dict[str, list[str]]) -> str:
        alias = self._rng.choice(self._tables)
        return f"{alias}.{self._rng.choice(columns[alias[0]])}"

    def _number(self) -> str:
        return self._column(NUMBERS)

    def _condition(self, depth: int = 0) -> str:
        one, low = self._number(), self._rng.randrange(60)
        if self._rng.random() < 0.3:
            alias = self._rng.choice(self._tables)
            one = f"{alias}.{KEYS[alias[0]]}"
        if depth < 2 and self._rng.random() < 0.2:
            word = self._rng.choice(["AND", "OR"])
            return f"({self._condition(depth + 1)} {word} {self._condition(depth + 1)})"
        return self._rng.choice(
            [
                f"{one} {self._rng.choice(OPERATORS)} {self._number()}",
                f"{one} {self._rng.choice(OPERATORS)} {low}",
                f"{one} BETWEEN {low} AND {low + 20}",
                f"{self._column(COLUMNS)} IS {self._rng.choice(['', 'NOT '])}NULL",
                f"{one} IN ({low}, {self._rng.randrange(60)})",
                f"{one} IN ({self._rng.choice(INNER)})",
                f"EXISTS (SELECT FROM fz_items z WHERE z.oid = {one})",
                f"{one} > (SELECT {self._rng.choice(['max(z.qty)', 'count(*)', 'avg(z.n)'])} "
                f"FROM fz_items z WHERE z.oid = {self._number()})",
                f"{one} < (SELECT avg(z.total) FROM fz_orders z)",
                f"{one} IN (SELECT z.oid FROM fz_items z GROUP BY z.oid HAVING count(*) > 1)",
                f"{one} NOT IN (SELECT z.n FROM fz_items z WHERE z.n > {low})",
                f"NOT EXISTS (SELECT FROM fz_kinds z WHERE z.w = {one})",
            ]
        )

    def _rows(self, source: str) -> str:
        chosen = [
            self._rng.choice(
                [
                    self._column(COLUMNS),
                    f"{self._number()} + {self._number()}",
                    f"CASE WHEN {self._condition()} THEN {self._number()} END",
                    f"abs({self._number()})",
                    f"rank() OVER (PARTITION BY {self._number()} ORDER BY {self._number()})",
                    f"sum({self._number()}) OVER (PARTITION BY {self._number()})",
                ]
            )
            for _ in range(self._rng.randrange(1, 4))
        ]
        distinct = self._rng.choice(["", "", "DISTINCT "])
        if self._rng.random() < 0.1:
            order = f" ORDER BY {chosen[0]}, " + ", ".join(str(n + 1) for n in range(len(chosen)))
            columns = ", ".join(f"{column} AS c{n}" for n, column in enumerate(chosen))
            return f"SELECT DISTINCT ON ({chosen[0]}) {columns} FROM {source}{order}"
        columns = ", ".join(f"{column} AS c{n}" for n, column in enumerate(chosen))
        return f"SELECT {distinct}{columns} FROM {source}{self._order(len(chosen))}"

    def _groups(self, source: str) -> str:
        keys = [
            self._rng.choice(
                [self._column(COLUMNS), self._column(COLUMNS), f"{self._number()} % 3"]
            )
            for _ in range(self._rng.randrange(3))
        ]
        results = [self._aggregate() for _ in range(self._rng.randrange(1, 3))]
        columns = ", ".join(f"{column} AS c{n}" for n, column in enumerate([*keys, *results]))
        text = f"SELECT {columns} FROM {source}"
        if keys:
            text += " GROUP BY " + ", ".join(str(n + 1) for n in range(len(keys)))
        if self._rng.random() < 0.3:
            text += f" HAVING count(*) > {self._rng.randrange(3)}"
        return text + self._order(len(keys) + len(results))

    def _aggregate(self) -> str:
        number = self._number()
        return self._rng.choice(
            [
                "count(*)",
                f"count(DISTINCT {self._column(COLUMNS)})",
                *(f"{name}({number})" for name in ("sum", "avg", "min", "max", "stddev")),
                f"sum({number}) FILTER (WHERE {self._condition()})",
                f"sum({number}) / nullif(count({number}), 0) + 1",
                f"array_agg({number} ORDER BY {number})",
                f"sum(DISTINCT {number})",
                f"var_pop({number})",
                f"percentile_disc(0.5) WITHIN GROUP (ORDER BY {number})",
                f"CASE WHEN count(*) > 3 THEN max({number}) ELSE {self._rng.randrange(9)} END",
            ]
        )

    def _order(self, columns: int) -> str:
        if self._rng.random() < 0.7:
            return ""
        order = " ORDER BY " + ", ".join(str(n + 1) for n in range(columns))
        return order + (f" LIMIT {self._rng.randrange(1, 20)}" if self._rng.random() < 0.5 else "")


def load(servers: ShardServers) -> None:
    """Make the tables: duplicates, NULLs, rows without partners, and a shard that is empty.

    In another schema the same rows are sharded by other columns, which may be NULL.
    """
    rng = random.Random(1)  # noqa: S311
    kinds, flags = [None, "a", "b", "c"], [None, True, False]
    orders = [
        (i, rng.choice(kinds), rng.choice([None, *range(40)]), rng.choice(flags)) for i in range(60)
    ]
    items = [(rng.randrange(70), i % 50, rng.choice([None, *range(9)])) for i in range(120)]
    rows = [(rng.choice([*kinds, "d"]), i) for i in range(12)]
    shards = len(servers.dsns) - 1
    for schema, order_key, item_key in (("public", 0, 0), ("fz_again", 2, 2)):
        servers.execute(
            f"CREATE SCHEMA IF NOT EXISTS {schema}; SET search_path TO {schema}; "
            "CREATE TABLE fz_orders (id int8 NOT NULL, kind text, total int4, flag bool); "
            "CREATE TABLE fz_items (oid int8 NOT NULL, n int4, qty int4); "
            "CREATE TABLE fz_kinds (kind text, w int4); "
            "CREATE VIEW fz_seen AS SELECT o.* FROM fz_orders o JOIN fz_kinds k USING (kind); "
            "CREATE VIEW fz_counted AS SELECT oid, (count(*))::int4 AS n, max(qty) AS qty "
            "FROM fz_items GROUP BY oid; RESET search_path"
        )

        def shard_of(row: tuple[Any, ...], key: int) -> int:
            # a key that is NULL is anywhere
            return (row[0] if row[key] is None else row[key]) % shards

        by_order, by_item = (partial(shard_of, key=key) for key in (order_key, item_key))
        servers.load(f"{schema}.fz_orders", orders, shard_of=by_order)
        servers.load(f"{schema}.fz_items", items, shard_of=by_item)
        servers.load(f"{schema}.fz_kinds", rows)


def outcome(sql: str, topology: dss.Topology, merge: str) -> Any:
    """Return what comes of a query: names, types and rows, or the server's error."""
    try:
        table = dss.collect(sql, topology, merge=merge)
    except dss.QueryError as error:
        return error.sqlstate
    except dss.MergeRefusedError as error:
        return error.reason
    rows = [repr(row) for row in table.to_pylist()]
    is_ordered = "ORDER BY" in sql.rpartition(")")[2]
    return table.schema, rows if is_ordered else sorted(rows)


def topology_of(servers: ShardServers, seed: int) -> dss.Topology:
    """Return one of: with the function that says where rows are, without, and by other keys."""
    if seed % 3 == 2:
        path = "options='-c search_path=fz_again,public'"
        dsns = {name: f"{dsn} {path}" for name, dsn in servers.dsns.items()}
        other = {"fz_again.fz_orders": "total", "fz_again.fz_items": "qty"}
        return dss.Topology.from_dsns(dsns, sharded=other)
    how = {"function": "modulo", "shards": list(servers.dsns)[:-1]}
    sharded = {table: {"key": key, **how} if seed % 3 else key for table, key in KEY.items()}
    return dss.Topology.from_dsns(servers.dsns, sharded=sharded)


def run(seed: int, servers: ShardServers) -> str:
    """Compare one query; return how it was answered."""
    sql = Grammar(random.Random(seed)).query()  # noqa: S311
    topology = topology_of(servers, seed)
    expected, found = outcome(sql, servers.reference, "union"), outcome(sql, topology, "global")
    if isinstance(found, str) != isinstance(expected, str) and "22012" in (found, expected):
        return "error"  # which rows are divided first is the planner's choice
    if found == "hidden-name" and "WITH fz_orders" in sql:
        return "refused"
    if found != expected:
        raise AssertionError(f"{sql}\nis {found}\nnot {expected}")
    if isinstance(found, str):
        return "error"
    return dss.explain(sql, topology, merge="global").strategy if seed % 10 == 0 else "other"


def relate(seed: int, servers: ShardServers) -> None:
    """Compare queries with each other that must agree, without one database that is right.

    Rows for which a condition is true, false and unknown are together all rows (TLP); and as many
    meet it where it decides which rows are read as where it is only computed of them (NoREC).
    """
    source, condition, column = Grammar(random.Random(seed)).source_and_condition()  # noqa: S311
    topology = topology_of(servers, seed)

    def rows(sql: str) -> Counter[str]:
        found = dss.collect(sql, topology, merge="global").to_pylist()
        return Counter(map(str, found))

    read = f"SELECT {column} AS c FROM {source}"
    parts = (f"{read} WHERE ({condition}) IS {value}" for value in ("TRUE", "FALSE", "UNKNOWN"))
    if rows(read) != sum(map(rows, parts), Counter()):
        raise AssertionError(f"{read} WHERE {condition}: not all rows, or more")
    filtered = f"SELECT count(*) AS n FROM {source} WHERE {condition}"
    computed = f"SELECT count(*) FILTER (WHERE {condition}) AS n FROM {source}"
    if rows(filtered) != rows(computed):
        raise AssertionError(f"{filtered} is not as many as {computed}")


def main() -> None:
    """Run the loop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ways: Counter[str] = Counter()
    with start_shards(4) as servers:
        load(servers)
        deadline = time.monotonic() + options.seconds
        seed = options.seed
        try:
            while seed < options.seed + options.runs and time.monotonic() < deadline:
                ways[run(seed, servers)] += 1
                if seed % 5 == 0:
                    relate(seed, servers)
                seed += 1
        except BaseException:
            print(f"failed: --seed {seed} --runs 1", flush=True)
            raise
    print(f"{ways.total()} queries; of every tenth: {dict(ways)}")


if __name__ == "__main__":
    main()
