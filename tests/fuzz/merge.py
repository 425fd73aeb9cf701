"""Random queries with merge="global", each compared with the one database that has all the rows.

    python tests/fuzz/merge.py --seconds 200             # a loop over seeds
    python tests/fuzz/merge.py --seed 7 --runs 1         # one of its queries again

A query joins up to three tables in any way, with any condition, and selects rows, distinct rows,
or groups with aggregates, perhaps ordered and cut. Whatever comes out must be the same: rows, their
order where the query gives one, names and types, or the server's error.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

import dask_shardsql as dss
from dask_shardsql.testing import ShardServers, start_shards

TABLES = {"o": "fz_orders", "i": "fz_items", "k": "fz_kinds"}
COLUMNS = {"o": ["id", "kind", "total", "flag"], "i": ["oid", "n", "qty"], "k": ["kind", "w"]}
NUMBERS = {"o": ["id", "total"], "i": ["oid", "n", "qty"], "k": ["w"]}
KEYS = {"o": "id", "i": "oid", "k": "w"}
SHARDED = {"fz_orders": "id", "fz_items": "oid"}
JOINS = ["JOIN", "JOIN", "LEFT JOIN", "LEFT JOIN", "RIGHT JOIN", "FULL JOIN", "CROSS JOIN"]
OPERATORS = ["<", ">", "=", "<>", "<=", ">="]
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

    def query(self) -> str:
        """Return a query."""
        source = self._source()
        if self._rng.random() < 0.6:
            source += f" WHERE {self._condition()}"
        return self._rows(source) if self._rng.random() < 0.4 else self._groups(source)

    def _source(self) -> str:
        """Choose and join the tables."""
        self._tables = [self._rng.choice("oik") + "0"]
        source = f"{TABLES[self._tables[0][0]]} {self._tables[0]}"
        for number in range(1, self._rng.choice([1, 1, 2, 2, 3])):
            alias, join = self._rng.choice("oik") + str(number), self._rng.choice(JOINS)
            before = self._rng.choice(self._tables)
            source += f" {join} {TABLES[alias[0]]} {alias}"
            self._tables.append(alias)
            if join != "CROSS JOIN":
                source += f" ON {before}.{KEYS[before[0]]} = {alias}.{KEYS[alias[0]]}"
                if join != "FULL JOIN" and self._rng.random() < 0.2:
                    source += f" AND {self._condition()}"
        return source

    def _column(self, columns: dict[str, list[str]]) -> str:
        alias = self._rng.choice(self._tables)
        return f"{alias}.{self._rng.choice(columns[alias[0]])}"

    def _number(self) -> str:
        return self._column(NUMBERS)

    def _condition(self, depth: int = 0) -> str:
        one, low = self._number(), self._rng.randrange(60)
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
                ]
            )
            for _ in range(self._rng.randrange(1, 4))
        ]
        distinct = self._rng.choice(["", "", "DISTINCT "])
        columns = ", ".join(f"{column} AS c{n}" for n, column in enumerate(chosen))
        return f"SELECT {distinct}{columns} FROM {source}{self._order(len(chosen))}"

    def _groups(self, source: str) -> str:
        keys = [self._column(COLUMNS) for _ in range(self._rng.randrange(3))]
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
            ]
        )

    def _order(self, columns: int) -> str:
        if self._rng.random() < 0.7:
            return ""
        order = " ORDER BY " + ", ".join(str(n + 1) for n in range(columns))
        return order + (f" LIMIT {self._rng.randrange(1, 20)}" if self._rng.random() < 0.5 else "")


def load(servers: ShardServers) -> None:
    """Make the tables: duplicates, NULLs, rows without partners, and a shard that is empty."""
    rng = random.Random(1)  # noqa: S311
    servers.execute(
        "CREATE TABLE fz_orders (id int8, kind text, total int4, flag bool); "
        "CREATE TABLE fz_items (oid int8, n int4, qty int4); "
        "CREATE TABLE fz_kinds (kind text, w int4)"
    )
    kinds, flags = [None, "a", "b", "c"], [None, True, False]
    orders = [
        (i, rng.choice(kinds), rng.choice([None, *range(40)]), rng.choice(flags)) for i in range(60)
    ]
    items = [(rng.randrange(70), i % 50, rng.choice([None, *range(9)])) for i in range(120)]
    shards = len(servers.dsns) - 1
    servers.load("fz_orders", orders, shard_of=lambda row: row[0] % shards)
    servers.load("fz_items", items, shard_of=lambda row: row[0] % shards)
    servers.load("fz_kinds", [(rng.choice([*kinds, "d"]), i) for i in range(12)])


def outcome(sql: str, topology: dss.Topology, merge: str) -> Any:
    """Return what comes of a query: names, types and rows, or the server's error."""
    try:
        table = dss.collect(sql, topology, merge=merge)
    except dss.QueryError as error:
        return error.sqlstate
    rows = [repr(row) for row in table.to_pylist()]
    return table.schema, rows if "ORDER BY" in sql else sorted(rows)


def run(seed: int, servers: ShardServers) -> str:
    """Compare one query; return how it was answered."""
    sql = Grammar(random.Random(seed)).query()  # noqa: S311
    topology = dss.Topology.from_dsns(servers.dsns, sharded=SHARDED)
    expected, found = outcome(sql, servers.reference, "union"), outcome(sql, topology, "global")
    if found != expected:
        raise AssertionError(f"{sql}\nis {found}\nnot {expected}")
    return dss.explain(sql, topology, merge="global").strategy if seed % 10 == 0 else "other"


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
                seed += 1
        except BaseException:
            print(f"failed: --seed {seed} --runs 1", flush=True)
            raise
    print(f"{ways.total()} queries; of every tenth: {dict(ways)}")


if __name__ == "__main__":
    main()
