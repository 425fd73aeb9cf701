"""The ways of reading a whole sharded table that ``bulk.py`` compares: the limit, ours, the peers'.

Each is a context manager: what it imports, connects and starts comes before the clock; it gives a
function that reads one query from every shard. ImportError or Skip says that it cannot be measured
here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.compute as pc
from bulk_peers import (
    Skip,
    with_adbc,
    with_connectorx,
    with_dask,
    with_duckdb,
    with_pandas,
    with_polars,
    with_psycopg2,
)
from shards import Login, find_psql

import dask_shardsql as dss

LIMIT = "psql"
_COPY_TO_NULL = """
import psycopg2, sys
with psycopg2.connect(sys.argv[1]) as connection, connection.cursor() as cursor:
    with open("/dev/null", "wb") as null:
        for statement in sys.stdin:
            cursor.copy_expert(statement, null, 1 << 20)
            print("done", flush=True)
"""


@dataclass(frozen=True)
class Query:
    """All columns of a table, or of a few of its rows on every shard."""

    table: str
    where: str = ""

    @property
    def sql(self) -> str:
        return self.on(self.table)

    def on(self, table: str) -> str:
        return f"SELECT * FROM {table}" + (f" WHERE {self.where}" if self.where else "")

    @property
    def few(self) -> Query:
        return Query(self.table, "l_orderkey < 100")


@dataclass(frozen=True)
class Summary:
    """What is checked of a result, for ways that do not keep it or have already looked at it."""

    rows: int
    keys: int  # the sum of l_orderkey
    price: Any  # the sum of l_extendedprice
    nbytes: int  # as Arrow
    money: str  # the type of l_extendedprice


Read = Callable[[Query], Any]


@dataclass(frozen=True)
class Way:
    title: str
    open: Callable[[dss.Topology, list[Login]], AbstractContextManager[Read]]
    slow: bool = False


def copy_statement(query: Query) -> str:
    return f"COPY ({query.sql}) TO STDOUT (FORMAT binary)"


@contextmanager
def with_psql(topology, logins):
    psql = find_psql()
    if psql is None:
        with with_copy_expert(topology, logins) as read:
            yield read
        return

    def read(query):
        words = [psql, "-X", "-q", "-w", "-c", copy_statement(query), "-d"]
        running = [
            subprocess.Popen(
                [*words, login.public_dsn],
                env=login.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for login in logins
        ]
        for process in running:
            _, complaint = process.communicate()
            if process.returncode:
                raise RuntimeError(complaint.strip())

    yield read


@contextmanager
def with_copy_expert(topology, logins):
    """The limit where there is no psql: a Python process a shard, connected before the clock."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _COPY_TO_NULL, login.public_dsn],
            env=login.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for login in logins
    ]

    def read(query):
        for process in running:
            print(copy_statement(query), file=process.stdin, flush=True)
        for process in running:
            if not process.stdout.readline():
                raise RuntimeError("COPY failed; psycopg2's message is above")

    try:
        yield read
    finally:
        for process in running:
            process.communicate()


@contextmanager
def dask_cluster(processes):
    """Have the library's tasks run in so many worker processes; with 0, in threads here."""
    if not processes:
        yield
        return
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=processes, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield


@contextmanager
def with_collect(topology, logins, processes=0):
    with dask_cluster(processes):
        yield lambda query: dss.collect(query.sql, topology)


@contextmanager
def with_collect_over_libpq(topology, logins):
    """As where TLS or GSSAPI encrypts the connections, without the encryption's own cost."""
    from dask_shardsql.engine.drivers.postgresql_libpq import Session

    Session.is_plain = False
    with with_collect(topology, logins) as read:
        yield read


@contextmanager
def with_read_sharded_sql(topology, logins, processes=0):
    with dask_cluster(processes):
        yield lambda query: dss.read_sharded_sql(query.sql, topology).compute()


@contextmanager
def with_stream(topology, logins):
    if not hasattr(dss, "stream"):
        raise Skip("this dask_shardsql has no stream")

    def read(query):
        rows = keys = price = nbytes = 0
        with dss.stream(query.sql, topology) as batches:
            for batch in batches:
                rows += batch.num_rows
                keys += pc.sum(batch.column("l_orderkey")).as_py() or 0
                price += pc.sum(batch.column("l_extendedprice")).as_py() or 0
                nbytes += batch.nbytes
            money = str(batches.schema.field("l_extendedprice").type)
        return Summary(rows, keys, price, nbytes, money)

    yield read


WAYS = {
    LIMIT: Way("psql, COPY (FORMAT binary) to /dev/null: the limit", with_psql),
    "collect": Way("**dss.collect**, threads", with_collect),
    "collect-libpq": Way(
        "**dss.collect**, threads, through libpq (as under TLS)", with_collect_over_libpq
    ),
    "collect-cluster": Way(
        "**dss.collect**, cluster of 2 processes", partial(with_collect, processes=2)
    ),
    "frame": Way("**dss.read_sharded_sql**().compute(), threads", with_read_sharded_sql),
    "frame-cluster": Way(
        "**dss.read_sharded_sql**().compute(), cluster of 2 processes",
        partial(with_read_sharded_sql, processes=2),
    ),
    "stream": Way("**dss.stream**, each batch dropped after use", with_stream),
    "adbc": Way("ADBC fetch_arrow_table, threads", with_adbc),
    "adbc-decimal": Way(
        "ADBC, its text cast to decimal128 with Arrow", partial(with_adbc, as_decimals=True)
    ),
    "connectorx": Way("connectorx read_sql to Arrow, threads", with_connectorx),
    "polars-connectorx": Way(
        "polars read_database_uri, connectorx, threads", partial(with_polars, engine="connectorx")
    ),
    "polars-adbc": Way(
        "polars read_database_uri, ADBC, threads", partial(with_polars, engine="adbc")
    ),
    "duckdb": Way("DuckDB postgres_scanner to Arrow, UNION ALL", with_duckdb),
    "psycopg2": Way("psycopg2 fetchall to pandas, threads", with_psycopg2, slow=True),
    "pandas": Way("pandas read_sql_query over SQLAlchemy, threads", with_pandas, slow=True),
    "dask": Way("dask.dataframe read_sql_query, one a shard, threads", with_dask, slow=True),
}
