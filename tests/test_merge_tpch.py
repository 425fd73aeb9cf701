"""TPC-H's 22 queries with merge="global": the answers of the one database that has all the rows."""

from __future__ import annotations

from pathlib import Path

import duckdb
import duckdb_extension_tpch
import pytest

import dask_shardsql as dss
from dask_shardsql.testing import start_shards
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

ON_REFERENCE_TABLES = {2, 11, 16}
ROWS_OF_SHARDS_MEET = {13, 17, 20, 22}


def queries():
    """Return the queries, as DuckDB's extension has them, by number."""
    (extension,) = Path(duckdb_extension_tpch.__file__).parent.rglob("tpch.duckdb_extension")
    with duckdb.connect() as connection:
        connection.execute(f"LOAD '{extension}'")
        found = connection.execute("SELECT query_nr, query FROM tpch_queries() ORDER BY 1")
        return dict(found.fetchall())


QUERIES = queries()


@pytest.fixture(scope="module")
def tpch():
    with start_shards(4, sharded=TPCH_SHARDED) as servers:
        load_tpch(servers, 0.01)
        yield servers


@pytest.mark.parametrize("number", QUERIES)
def test_it_is_the_answer_of_one_database(number, tpch):
    expected = dss.collect(QUERIES[number], tpch.reference)
    assert dss.collect(QUERIES[number], tpch.topology, merge="global").equals(expected)
    way = dss.explain(QUERIES[number], tpch.topology, merge="global").strategy
    others = "gather" if number in ROWS_OF_SHARDS_MEET else "merge"
    assert way == ("direct" if number in ON_REFERENCE_TABLES else others)


def test_there_are_22():
    assert len(QUERIES) == 22
