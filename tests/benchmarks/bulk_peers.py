"""The other ways of reading a whole sharded table, for ``bulk_ways.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from importlib import resources
from typing import Any

import pyarrow as pa
from shards import Login

MONEY = ("l_quantity", "l_extendedprice", "l_discount", "l_tax")
MONEY_TYPE = pa.decimal128(15, 2)


class Skip(Exception):  # noqa: N818 - not an error
    """A way that cannot be measured here; the text says why."""


@contextmanager
def thread_each(read_one: Callable[[Any, str], Any], targets: list[Any]) -> Iterator[Any]:
    """Give a function that calls `read_one` with each target and the SQL, all at once."""
    with ThreadPoolExecutor(len(targets)) as pool:
        yield lambda query: list(pool.map(lambda target: read_one(target, query.sql), targets))


@contextmanager
def with_adbc(topology, logins, as_decimals=False):
    from adbc_driver_postgresql import dbapi

    def read_one(connection, sql):
        with connection.cursor() as cursor:
            cursor.execute(sql)
            table = cursor.fetch_arrow_table()
        return money_as_decimals(table) if as_decimals else table

    with ExitStack() as stack:
        connections = [stack.enter_context(closing(dbapi.connect(each.dsn))) for each in logins]
        read = stack.enter_context(thread_each(read_one, connections))
        yield lambda query: pa.concat_tables(read(query))


def money_as_decimals(table: pa.Table) -> pa.Table:
    if pa.types.is_floating(table.schema.field(MONEY[0]).type):
        raise Skip("money is no text here")
    for name in MONEY:
        number = table.column_names.index(name)
        chunks = [getattr(chunk, "storage", chunk) for chunk in table.column(number).chunks]
        column = pa.chunked_array(chunks, None if chunks else pa.string())
        table = table.set_column(number, name, column.cast(MONEY_TYPE))
    return table


@contextmanager
def with_connectorx(topology, logins):
    import connectorx

    def read_one(login, sql):
        return connectorx.read_sql(login.url, sql, return_type="arrow")

    with thread_each(read_one, logins) as read:
        yield lambda query: pa.concat_tables(read(query))


@contextmanager
def with_polars(topology, logins, engine):
    import polars

    __import__({"adbc": "adbc_driver_postgresql"}.get(engine, engine))

    def read_one(login, sql):
        return polars.read_database_uri(sql, login.url, engine=engine)

    with thread_each(read_one, logins) as read:
        yield lambda query: polars.concat(read(query), rechunk=False)


@contextmanager
def with_duckdb(topology, logins):
    import duckdb
    import duckdb_extension_postgres_scanner as extension

    place = resources.files(extension) / "extensions" / f"v{duckdb.__version__}"
    file = place / "postgres_scanner.duckdb_extension"
    if not file.is_file():
        raise Skip(f"duckdb-extension-postgres-scanner is not for duckdb {duckdb.__version__}")
    with closing(duckdb.connect()) as connection:
        connection.execute(f"LOAD '{file}'")
        for login in logins:
            dsn = login.dsn.replace("'", "''")
            connection.execute(f"ATTACH '{dsn}' AS \"{login.shard}\" (TYPE postgres, READ_ONLY)")

        def read(query):
            parts = [query.on(f'"{login.shard}".public.{query.table}') for login in logins]
            return connection.execute(" UNION ALL ".join(parts)).to_arrow_table()

        yield read


@contextmanager
def with_psycopg2(topology, logins):
    import pandas as pd
    import psycopg2

    def read_one(connection, sql):
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            names = [column.name for column in cursor.description]
            return pd.DataFrame(cursor.fetchall(), columns=names)

    with ExitStack() as stack:
        connections = [stack.enter_context(closing(psycopg2.connect(e.dsn))) for e in logins]
        read = stack.enter_context(thread_each(read_one, connections))
        yield lambda query: pd.concat(read(query), ignore_index=True)


def _sqlalchemy_url(login: Login) -> str:
    import sqlalchemy

    url = sqlalchemy.make_url(login.url).set(drivername="postgresql+psycopg2")
    return url.render_as_string(hide_password=False)


@contextmanager
def with_pandas(topology, logins):
    import pandas as pd
    import sqlalchemy

    def read_one(connection, sql):
        return pd.read_sql_query(sqlalchemy.text(sql), connection)

    with ExitStack() as stack:
        engines = [sqlalchemy.create_engine(_sqlalchemy_url(login)) for login in logins]
        connections = [stack.enter_context(engine.connect()) for engine in engines]
        read = stack.enter_context(thread_each(read_one, connections))
        yield lambda query: pd.concat(read(query), ignore_index=True)


@contextmanager
def with_dask(topology, logins):
    import dask.dataframe as dd
    import sqlalchemy

    with ThreadPoolExecutor(len(logins)) as pool:

        def read(query):
            parts = []
            for url in map(_sqlalchemy_url, logins):
                engine = sqlalchemy.create_engine(url)
                table = sqlalchemy.Table(query.table, sqlalchemy.MetaData(), autoload_with=engine)
                select = sqlalchemy.select(table)
                if query.where:
                    select = select.where(sqlalchemy.text(query.where))
                parts.append(dd.read_sql_query(select, url, "l_orderkey", npartitions=1))
            return dd.concat(parts, interleave_partitions=False).compute(
                scheduler="threads", pool=pool
            )

        yield read
