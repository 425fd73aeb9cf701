"""Random tables, sharded at random: the union is what one unsharded database holds.

The reference's rows are written by the server itself (see ``values``), not by our decoder.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import dask
import pandas as pd
import pyarrow as pa
import pytest
import values
from conftest import first_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_shardsql as dss

SCALARS = [kind for kind in values.scalar_kinds() if kind.sql not in ("xml", '"char"')]
ENUM = values.Kind(
    "u_mood",
    pa.string(),
    "({x})::text",
    str,
    st.sampled_from(values.MOODS),
)
PRICE = replace(next(k for k in SCALARS if k.sql == "numeric(10,2)"), sql="u_price")
KINDS = [*SCALARS, *values.array_kinds(SCALARS), ENUM, values.array_of(ENUM), PRICE]
TABLE = "u_random"
JOIN = "JOIN u_labels l ON l.k = t.k % 3"
MOST = 10

common = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module")
def cursors(servers):
    """A cursor on every shard and, last, on the reference; types and reference table are there."""
    names = [*servers.dsns, "reference"]
    connections = [values.open_reference(servers, name) for name in names]
    found = [connection.cursor() for connection in connections]
    for number, cursor in enumerate(found):
        for other in range(number):  # so that no two shards have the same OIDs
            cursor.execute(f"CREATE TYPE u_other_{other} AS ENUM ()")
        cursor.execute("CREATE TYPE u_mood AS ENUM %s", (values.MOODS,))
        cursor.execute("CREATE DOMAIN u_price AS numeric(10,2)")
        cursor.execute("CREATE TABLE u_labels (k int4, label text NOT NULL)")
        cursor.execute("INSERT INTO u_labels VALUES (0, 'zero'), (1, 'one'), (2, 'two')")
    yield found
    for connection in connections:
        connection.close()


@pytest.fixture(scope="module")
def topologies(servers):
    return {n: first_shards(servers, n) for n in (1, 2, 4, 7)}


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


class Sharded(NamedTuple):
    """A random table: its columns' kinds and whether they are NOT NULL, rows, and their shards."""

    columns: list[tuple[values.Kind, bool]]
    rows: list[tuple[str | None, ...]]
    n: int
    shards: list[int]


@st.composite
def tables(draw, extremes=True):
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
    columns = [(kind, draw(st.booleans())) for kind in kinds]
    cells = []
    for kind, not_null in columns:
        cell = kind.plain
        if extremes and kind.extreme:
            cell |= st.sampled_from(kind.extreme)
        cells.append(cell if not_null else st.none() | cell)
    rows = draw(st.lists(st.tuples(*cells), max_size=MOST))
    n = draw(st.sampled_from([1, 2, 4, 7]))
    empty = draw(st.integers(0, n - 1)) if n > 1 else None
    full = [number for number in range(n) if number != empty]
    shards = draw(st.lists(st.sampled_from(full), min_size=len(rows), max_size=len(rows)))
    return Sharded(columns, rows, n, shards)


def load(cursors, table):
    """Fill the table on n shards and on the reference."""
    columns, rows, n, shards = table
    definition = ", ".join(
        f"c{i} {kind.sql}{' NOT NULL' if not_null else ''}"
        for i, (kind, not_null) in enumerate(columns)
    )
    marks = ", ".join(["%s"] * (len(columns) + 1))
    for number, cursor in [*enumerate(cursors[:n]), (None, cursors[-1])]:
        statements = [
            f"DROP TABLE IF EXISTS {TABLE}; CREATE TABLE {TABLE} (k int4 NOT NULL, {definition})"
        ]
        statements += [
            cursor.mogrify(f"INSERT INTO {TABLE} VALUES ({marks})", (k, *row)).decode()
            for k, (row, shard) in enumerate(zip(rows, shards, strict=True))
            if number is None or shard == number
        ]
        cursor.execute("; ".join(statements))


def reference(cursors, columns, join=""):
    """Return the rows of the reference as a multiset of canonical texts."""
    extra = ", l.label" if join else ""
    items = ", ".join(kind.reference(f"t.c{i}") for i, (kind, _) in enumerate(columns))
    cursor = cursors[-1]
    cursor.execute(f"SELECT t.k, {items}{extra} FROM {TABLE} t {join}")
    kinds = [kind for kind, _ in columns]
    found = Counter()
    for k, *cells in cursor.fetchall():
        label = [cells.pop()] if join else []
        settled = [kind.settle(text) for kind, text in zip(kinds, cells, strict=True)]
        found[k, *settled, *label] += 1
    return found


def of_arrow(table, columns):
    """Return the rows of an Arrow table as a multiset of canonical texts."""
    found = [table["k"].to_pylist()]
    for i, (kind, _) in enumerate(columns):
        assert table.schema.field(f"c{i}").type == kind.arrow
        found.append([kind.canon(v) for v in values.arrow_values(table[f"c{i}"])])
    if "label" in table.column_names:
        found.append(table["label"].to_pylist())
    return Counter(zip(*found, strict=True))


def of_pandas(frame, columns):
    """Return the rows of a DataFrame as a multiset of canonical texts.

    Under NumPy's dtypes a NaN is a NULL: the tables that are read so have no NaN.
    """
    found = [[int(k) for k in frame["k"]]]
    for i, (kind, _) in enumerate(columns):
        found.append([kind.canon(v) for v in values.pandas_values(frame[f"c{i}"])])
    return Counter(zip(*found, strict=True))


def check_partitions(ddf, frames):
    for frame in frames:
        pd.testing.assert_series_equal(frame.dtypes, ddf.dtypes)


@given(table=tables())
@settings(common, max_examples=values.EXAMPLES)
def test_collect_is_the_union(table, cursors, topologies):
    load(cursors, table)
    found = dss.collect(f"TABLE {TABLE}", topologies[table.n], shard_column="shard")
    found.validate(full=True)
    assert of_arrow(found, table.columns) == reference(cursors, table.columns)
    placed = dict(zip(found["k"].to_pylist(), found["shard"].to_pylist(), strict=True))
    assert placed == {k: f"s{shard + 1}" for k, shard in enumerate(table.shards)}


@given(table=tables())
@settings(common, max_examples=values.EXAMPLES)
def test_pyarrow_partitions_are_the_union_on_threads(table, cursors, topologies):
    load(cursors, table)
    ddf = dss.read_sharded_sql(f"TABLE {TABLE}", topologies[table.n])
    assert list(ddf.dtypes[1:]) == [values.arrow_dtype(kind.arrow) for kind, _ in table.columns]
    frames = dask.compute(*ddf.partitions, scheduler="threads")
    check_partitions(ddf, frames)
    assert [len(frame) for frame in frames] == [table.shards.count(i) for i in range(table.n)]
    assert of_pandas(pd.concat(frames), table.columns) == reference(cursors, table.columns)


@pytest.mark.parametrize("dtype_backend", ["numpy_nullable", "numpy"])
@given(table=tables(extremes=False))
@settings(common, max_examples=values.EXAMPLES)
def test_numpy_partitions_are_the_union_on_threads(dtype_backend, table, cursors, topologies):
    load(cursors, table)
    ddf = dss.read_sharded_sql(f"TABLE {TABLE}", topologies[table.n], dtype_backend=dtype_backend)
    frames = dask.compute(*ddf.partitions, scheduler="threads")
    check_partitions(ddf, frames)
    assert of_pandas(pd.concat(frames), table.columns) == reference(cursors, table.columns)
    assert of_pandas(ddf.compute(scheduler="threads"), table.columns) == reference(
        cursors, table.columns
    )


@given(table=tables())
@settings(common, max_examples=values.EXAMPLES // 2)
def test_a_join_with_a_reference_table_is_the_union(table, cursors, topologies):
    load(cursors, table)
    items = ", ".join(f"t.c{i}" for i in range(len(table.columns)))
    sql = f"SELECT t.k, {items}, l.label FROM {TABLE} t {JOIN}"
    found = dss.collect(sql, topologies[table.n])
    expected = reference(cursors, table.columns, JOIN)
    assert of_arrow(found, table.columns) == expected
    assert sum(expected.values()) == len(table.rows)


@pytest.mark.parametrize("dtype_backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_the_union_on_processes(dtype_backend, cursors, topologies, pool):
    @given(table=tables(extremes=dtype_backend == "pyarrow"))
    @settings(common, max_examples=max(4, values.EXAMPLES // 8))
    def check(table):
        load(cursors, table)
        ddf = dss.read_sharded_sql(
            f"TABLE {TABLE}", topologies[table.n], dtype_backend=dtype_backend
        )
        frames = dask.compute(*ddf.partitions, scheduler="processes", pool=pool)
        check_partitions(ddf, frames)
        assert of_pandas(pd.concat(frames), table.columns) == reference(cursors, table.columns)

    check()


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype_backend", ["pyarrow", "numpy_nullable", "numpy"])
def test_every_type_at_once(n, dtype_backend, cursors, topologies):
    """All the types side by side, with the last of the shards empty when there are several."""
    columns = [(kind, False) for kind in KINDS]
    choices = [examples(kind) for kind in KINDS]
    if dtype_backend == "pyarrow":
        choices = [c + list(k.extreme) for c, k in zip(choices, KINDS, strict=True)]
    most = max(map(len, choices))
    rows = [tuple(c[i] if i < len(c) else None for c in choices) for i in range(most)]
    shards = [i % max(1, n - 1) for i in range(most)]
    load(cursors, Sharded(columns, rows, n, shards))
    ddf = dss.read_sharded_sql(f"TABLE {TABLE}", topologies[n], dtype_backend=dtype_backend)
    frames = dask.compute(*ddf.partitions)
    check_partitions(ddf, frames)
    assert n == 1 or len(frames[-1]) == 0
    assert of_pandas(pd.concat(frames), columns) == reference(cursors, columns)


def examples(kind):
    """Return a few values of `kind`, the same in every run."""
    found = []

    @settings(common, max_examples=8)
    @given(kind.plain)
    def take(value):
        found.append(value)

    take()
    return found
