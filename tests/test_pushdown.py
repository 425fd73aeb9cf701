"""dask's operations as a part of the query: the same answer as without, and less that is read."""

from __future__ import annotations

import datetime
import math
import random
from decimal import Decimal

import dask
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_shardsql as dss
from dask_shardsql.engine.drivers.postgresql import PostgreSQLDriver
from dask_shardsql.frame.expr import ReadShards

SCHEMA = """
CREATE TABLE pd_rows (
    id int8 NOT NULL, small int2, n int4, big int8, x float8, y float8, r float4, ok bool,
    price numeric(15,2), exact numeric(38,6), word text, short varchar(9), code char(5),
    day date, at timestamp, seen timestamptz, free numeric, doc jsonb)
"""
RNG = random.Random(3)  # noqa: S311
NAN, INF = math.nan, math.inf
WORDS = ["", "a", "b", "B", "ä", "z", "a b", "it's", "50%", "back\\slash", '"q"', "naïve", "日本"]
FLOATS = [0.0, -0.0, 1.0, -1.5, 0.1, 1e300, NAN, INF, -INF]
DAYS = [datetime.date(2024, 1, 1) + datetime.timedelta(n) for n in range(5)]
TIMES = [datetime.datetime(2024, 1, 1, 12) + datetime.timedelta(hours=n * 7) for n in range(5)]
PRICES = [Decimal(n) / 100 for n in (0, 5, 6, 7, 14, 29, 57, 100, -7, 123456789012345)]
COLUMNS = {
    "small": [0, 1, -5, 32767],
    "n": [0, 1, 2, -3, 2**31 - 1],
    "big": [0, 1, -1, 2**53 + 1, 2**63 - 1, -(2**63)],
    "x": FLOATS,
    "y": FLOATS,
    "r": [0.5, 0.1, -2.0, NAN, INF],
    "ok": [True, False],
    "price": PRICES,
    "exact": [*PRICES[:8], Decimal("12345678901234567890.123456")],
    "word": WORDS,
    "short": WORDS[:8],
    "code": ["", "a", "ab", "a b", "abcde"],
    "day": DAYS,
    "at": TIMES,
    "seen": [time.replace(tzinfo=datetime.UTC) for time in TIMES],
}
ROWS = [
    (i, *(RNG.choice([None, *values]) for values in COLUMNS.values()), i / 8, '{"a": 1}')
    for i in range(300)
]
VALUES = {
    **{name: [*values, *values[:1]] for name, values in COLUMNS.items()},
    "small": [0, 1, -5, 40_000, 1.5, True],
    "n": [0, 1, 2.0, 2**40, -7],
    "big": [0, 2**63 - 1, 2**53, 0.5],
    "x": [*FLOATS, 1, 0, 2**60],
    "price": [*PRICES, 0.07, 0.06, 0.29, 0.57, 1, -0.07, 1e20, Decimal("0.070")],
    "exact": [*PRICES[:4], 5, 0.07],
    "code": ["", "a", "a    ", "ab   ", "abcde", "     "],
    "day": [*DAYS, pd.Timestamp("2024-01-02")],
    "at": [
        *TIMES,
        pd.Timestamp("2024-01-01 12:00:00.000001"),
        pd.Timestamp(2024, 1, 2).as_unit("s"),
    ],
    "seen": [
        *(pd.Timestamp(time, tz="Europe/Berlin") for time in TIMES),
        pd.Timestamp("2024-01-01 12:00:00.000000001", tz="UTC"),
    ],
}


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("pd_rows", ROWS, shard_of=lambda row: row[0] % 3)
    yield servers
    servers.execute("DROP TABLE pd_rows")


@pytest.fixture(scope="module")
def topology(loaded):
    """Shards of which the last is empty."""
    names = list(loaded.dsns)[:4]
    return dss.Topology.from_dsns({n: loaded.dsns[n] for n in names}, sharded={"pd_rows": "id"})


@pytest.fixture(scope="module")
def ddf(topology):
    return dss.read_sharded_sql("SELECT * FROM pd_rows", topology)


def computed(make, ddf):
    """Return what it gives, or the kind of error."""
    try:
        found = make(ddf).compute(scheduler="sync")
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        return type(error)
    if not hasattr(found, "reset_index"):
        return found
    return found.reset_index(drop=True)  # rows have no names in a database


def same(make, ddf):
    on = computed(make, ddf)
    with dask.config.set({"shardsql.pushdown": False}):
        off = computed(make, ddf)
    if isinstance(off, pd.DataFrame):
        pd.testing.assert_frame_equal(on, off, check_exact=True)
        assert list(on.dtypes) == list(off.dtypes)
    elif isinstance(off, pd.Series):
        pd.testing.assert_series_equal(on, off, check_exact=True)
    else:
        assert type(on) is type(off)
        assert on == off
    return off


def reads(frame):
    """Return what is read of the query, once for each read."""
    optimized = frame.optimize(fuse=False).expr
    return [read.answer.narrowing for read in optimized.find_operations(ReadShards)]


def conditions():
    names = st.sampled_from(sorted(COLUMNS))

    def compared(name):
        values = st.sampled_from(VALUES[name])
        operators = st.sampled_from(["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"])
        other = st.sampled_from([name, "y" if name == "x" else name])
        several = st.lists(values, max_size=4)
        return st.one_of(
            st.builds(lambda op, v: lambda d: getattr(d[name], op)(v), operators, values),
            st.builds(lambda op, o: lambda d: getattr(d[name], op)(d[o]), operators, other),
            st.builds(lambda vs: lambda d: d[name].isin(vs), several),
            st.builds(
                lambda a, b, edges: lambda d: d[name].between(a, b, inclusive=edges),
                *(values, values, st.sampled_from(["both", "neither", "left", "right"])),
            ),
            st.just(lambda d: d[name].isna()),
            st.just(lambda d: d[name].notnull()),
            *([st.just(lambda d: d.ok)] if name == "ok" else []),
        )

    single = names.flatmap(compared)
    return st.recursive(
        single,
        lambda inner: st.one_of(
            st.builds(lambda a, b: lambda d: a(d) & b(d), inner, inner),
            st.builds(lambda a, b: lambda d: a(d) | b(d), inner, inner),
            st.builds(lambda a: lambda d: ~a(d), inner),
        ),
        max_leaves=5,
    )


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(condition=conditions())
def test_any_condition_gives_the_same_rows(condition, ddf):
    same(lambda d: d[condition(d)][["id"]], ddf)


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_each_comparison_gives_the_same_rows(name, ddf):
    pushed = 0
    for value in VALUES[name]:
        for operator in ("__eq__", "__ne__", "__lt__", "__ge__", "__le__", "__gt__"):

            def make(d, operator=operator, value=value):
                return d[getattr(d[name], operator)(value)].id

            is_error = isinstance(same(make, ddf), type)
            pushed += not is_error and bool(reads(make(ddf))[0].where)
    assert pushed >= 4


SHAPES = {
    "columns": (lambda d: d[["word", "n"]], ("word", "n"), 0),
    "one column": (lambda d: d.n + d.small, ("small", "n"), 0),
    "assign": (lambda d: d.assign(z=d.n + 1)[["z", "word"]], ("n", "word"), 0),
    "assign over it": (lambda d: d.assign(n=d.big)[["n"]], ("big",), 0),
    "rename": (lambda d: d.rename(columns={"n": "z"})[["z"]], ("n",), 0),
    "rename and filter": (lambda d: d.rename(columns={"n": "z"})[["z", "id"]], ("id", "n"), 0),
    "no column": (lambda d: d[[]], ("ok",), 0),
    "filter": (lambda d: d[d.n > 1].word, ("word",), 1),
    "two filters": (lambda d: d[d.n > 0][d.ok].word, ("word",), 2),
    "a part of a filter": (
        lambda d: d[(d.n > 0) & (d.word.str.count(".") > 1)].id,
        ("id", "word"),
        1,
    ),
    "nothing of a filter": (lambda d: d[d.word.str.count(".") > 1].id, ("id", "word"), 0),
    "sum of a filter": (lambda d: d[d.n > 0].price.sum(), ("price",), 1),
    "groups of a filter": (
        lambda d: d[d.ok].groupby("word", sort=True).n.sum(),
        ("n", "word"),
        1,
    ),
    "a filter by a sum": (lambda d: d[d.n > d.n.min()].id, ("id", "n"), 0),
    "columns behind a filter": (lambda d: d[d.n > 1][["id", "word"]], ("id", "word"), 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_is_read_than_is_needed(shape, ddf):
    make, columns, conditions = SHAPES[shape]
    same(make, ddf)
    for read in reads(make(ddf)):
        assert read.columns == columns
        assert len(read.where) == conditions


def test_what_reaches_the_servers(ddf, topology, monkeypatch):
    asked = []
    read = PostgreSQLDriver.read

    def spy(self, connection, query, *more):
        asked.append(" ".join(query.sql.split()))
        return read(self, connection, query, *more)

    monkeypatch.setattr(PostgreSQLDriver, "read", spy)
    ddf[(ddf.word == "50%") & (ddf.n >= -3)].id.compute(scheduler="sync")
    assert len(asked) == len(topology.shards)
    (sql,) = set(asked)
    assert sql == (
        'SELECT dask_shardsql."id" FROM ( SELECT * FROM pd_rows ) AS dask_shardsql WHERE '
        '(dask_shardsql."word" = \'50%\'::text AND dask_shardsql."word" COLLATE "C" = '
        "'50%'::text) AND (dask_shardsql.\"n\" >= (-3))"
    )
    asked.clear()
    assert len(ddf.head(2)) == 2
    assert [one.rpartition(" ")[2] for one in asked] == ["2"]


def asked_by(monkeypatch):
    """Record the queries that are read."""
    asked = []
    read = PostgreSQLDriver.read
    monkeypatch.setattr(
        PostgreSQLDriver,
        "read",
        lambda self, connection, query, *more: (
            asked.append(query.sql) or read(self, connection, query, *more)
        ),
    )
    return asked


LENGTHS = {
    "all": (lambda d: d, 1),
    "a column": (lambda d: d.word, 1),
    "a computed one": (lambda d: d.n + d.small, 1),
    "assigned": (lambda d: d.assign(z=d.n + 1), 1),
    "the index": (lambda d: d.index, 1),
    "filtered": (lambda d: d[d.n > 0], 1),
    "filtered twice": (lambda d: d[d.n > 0][d.ok].word, 1),
    "filtered in part": (lambda d: d[(d.n > 0) & (d.word.str.count(".") > 1)], 0),
    "partitions": (lambda d: d.partitions[[0, 2]], 1),
    "without NULLs": (lambda d: d.dropna(subset=["n"]), 0),
}


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_counted_where_they_are(length, ddf, monkeypatch):
    make, is_counted = LENGTHS[length]
    with dask.config.set({"shardsql.pushdown": False}):
        expected = len(make(ddf))
    asked = asked_by(monkeypatch)
    with dask.config.set(scheduler="sync"):
        assert len(make(ddf)) == expected
        assert make(ddf).shape[0].compute() == expected
    assert all(("SELECT count(*)" in sql) == is_counted for sql in asked)
    shards = 2 if length == "partitions" else 4
    assert len(asked) == 2 * shards  # each is asked once


def test_lengths_of_other_reads(ddf, topology):
    sliced = dss.read_sharded_table("pd_rows", topology, partitions_per_shard=3)
    assert len(sliced) == len(ROWS)
    assert len(sliced.partitions[[0, 1, 2]]) == len(ROWS) // 3
    assert len(sliced[sliced.n > 0]) == len(ddf[ddf.n > 0])
    over_all = dss.read_sharded_sql(
        "SELECT word, count(*) FROM pd_rows GROUP BY 1", topology, merge="global"
    )
    assert len(over_all) == len({row[10] for row in ROWS})
    assert len(dss.read_sharded_sql("SELECT word FROM pd_rows", topology, merge="global")) == 300
    nothing = dss.read_sharded_sql("SELECT id FROM pd_rows WHERE id < %s", topology, params=(0,))
    assert len(nothing) == 0
    assert len(ddf.head(7, npartitions=-1, compute=False)) == 7


def outcome(make, ddf):
    try:
        return make(ddf).compute(scheduler="sync")
    except (TypeError, ValueError, NotImplementedError, ArithmeticError) as error:
        return type(error)


REDUCED = {
    "sum": ("small", "n", "big", "x", "y", "r", "price", "exact"),
    "mean": ("small", "n", "big", "x", "y", "r", "price", "exact"),
    "count": tuple(COLUMNS),
    "min": ("small", "n", "big", "price", "exact", "word", "short", "day", "at", "seen"),
    "max": ("small", "n", "big", "price", "exact", "word", "short", "day", "at", "seen"),
}


@pytest.mark.parametrize("rows", ["all", "some", "none", "no value", "partitions"])
@pytest.mark.parametrize("function", REDUCED)
def test_reductions(function, rows, ddf, monkeypatch):
    asked = asked_by(monkeypatch)
    for name in COLUMNS:
        chosen = {
            "all": lambda d: d,
            "some": lambda d: d[d.ok & (d.n >= 0)],
            "none": lambda d: d[d.n == 77],
            "no value": lambda d, name=name: d[d[name].isna()],
            "partitions": lambda d: d.partitions[[1, 3]],
        }[rows]

        def make(d, name=name, chosen=chosen):
            return getattr(chosen(d)[name], function)()

        asked.clear()
        on = outcome(make, ddf)
        words = ("sum(", "count(") if function == "mean" else (f"{function}(",)
        is_pushed = bool(asked) and all(word in sql for word in words for sql in asked)
        with dask.config.set({"shardsql.pushdown": False}):
            off = outcome(make, ddf)
        assert type(on) is type(off), (name, on, off)
        if isinstance(off, float):
            assert on == pytest.approx(off, rel=1e-12, nan_ok=True), name
        else:
            assert (on is off) or (on == off), (name, on, off)
        if isinstance(off, Decimal) and off.is_finite():
            assert on.as_tuple() == off.as_tuple()
        if rows in ("all", "some") and not isinstance(off, type):
            assert is_pushed == (name in REDUCED[function]), name


def test_reductions_that_are_left_to_pandas(ddf, monkeypatch):
    asked = asked_by(monkeypatch)
    for make in (
        lambda d: d.x.sum(skipna=False),
        lambda d: d.x.max(),  # where NaN is not what it is to PostgreSQL
        lambda d: d.n.sum() + d.word.str.count(".").max(),
        lambda d: (d.r + d.x).sum(),
    ):
        asked.clear()
        on = outcome(make, ddf)
        assert len(asked) == 4  # one read, not a read and a query for each reduction
        assert not any("sum(" in sql or "max(" in sql for sql in asked)
        with dask.config.set({"shardsql.pushdown": False}):
            off = outcome(make, ddf)
        assert on is off or on == pytest.approx(off, nan_ok=True)


COMPUTED = {
    "integers": lambda d: (d.id * d.small).sum(),
    "decimals": lambda d: (d.price * d.small).sum(),
    "a decimal and a number": lambda d: (d.price * (1 - d.price)).sum(),
    "floats": lambda d: (d.x * d.y - 1).sum(),
    "of a filter": lambda d: (d[d.n > 0].price + d[d.n > 0].small).max(),
    "a mean": lambda d: (d.price * 3).mean(),
    "a count": lambda d: (d.small - 1).count(),
    "beside others": lambda d: (d.small * 2).sum() - d.small.max(),
    "with a name": lambda d: (d.small + d.id).rename("both").min(),
    "NumPy's numbers": lambda d: (d.small + np.int64(3)).sum(),
    "a Decimal": lambda d: (d.price - Decimal("0.5")).min(),
    "beyond its type": lambda d: (d.big + 1).sum(),
}


@pytest.mark.parametrize("shape", COMPUTED)
def test_reductions_of_what_is_computed(shape, ddf, monkeypatch):
    asked = asked_by(monkeypatch)
    on = outcome(COMPUTED[shape], ddf)
    assert "part_0" in asked[0]
    with dask.config.set({"shardsql.pushdown": False}):
        off = outcome(COMPUTED[shape], ddf)
    assert type(on) is type(off)
    if isinstance(off, float):
        assert on == pytest.approx(off, rel=1e-12, nan_ok=True)
    else:
        assert on is off or on == off


def test_reductions_of_one_shard(loaded):
    topology = dss.Topology.from_dsns({"s1": loaded.dsns["s1"]}, sharded={"pd_rows": "id"})
    one = dss.read_sharded_sql("SELECT * FROM pd_rows", topology)
    for function in REDUCED:
        on = outcome(lambda d, function=function: getattr(d.price, function)(), one)
        with dask.config.set({"shardsql.pushdown": False}):
            assert on == outcome(lambda d, function=function: getattr(d.price, function)(), one)
    assert len(one) == len(ROWS) // 3


def test_several_reductions_are_one_query(ddf, monkeypatch):
    asked = asked_by(monkeypatch)

    def make(d):
        return d.n.max() - d.n.min() + d.small.sum() + d.price.count()

    found = make(ddf).compute()
    assert len(asked) == 4
    with dask.config.set({"shardsql.pushdown": False}):
        assert found == make(ddf).compute()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([2**63 - 1, 1, 5], "int8"),
        ([-(2**63), -1], "int8"),
        ([2**31 - 1] * 5, "int4"),
        ([1e308, 1e308], "float8"),
        ([3e38, 3e38, -1.0], "float4"),
        ([INF, -INF], "float8"),
        (["9" * 31 + ".999999"] * 3, "numeric(37,6)"),
    ],
)
def test_sums_beyond_their_type(values, kind, topology, loaded, table_name):
    """What Arrow gives there is what is given: it wraps around, or has infinity."""
    loaded.execute(f"CREATE TABLE {table_name} (id int8, v {kind})")
    loaded.load(table_name, list(enumerate(values)), shard_of=lambda row: 0)
    ddf = dss.read_sharded_sql(f"TABLE {table_name}", topology)
    on = outcome(lambda d: d.v.sum(), ddf)
    with dask.config.set({"shardsql.pushdown": False}):
        off = outcome(lambda d: d.v.sum(), ddf)
    assert type(on) is type(off)
    assert on == pytest.approx(off, nan_ok=True) if isinstance(off, float) else on == off


def test_what_is_put_beside_each_other_is_one_read(ddf):
    """Rows are found by their place, which may be another one in a second read."""
    for make in (
        lambda d: d.n + d.index.to_series().astype("int64[pyarrow]"),
        lambda d: d[d.n > 0].index.to_series().astype("int64[pyarrow]") + d[d.n > 0].n,
        lambda d: d.assign(z=d.n + 1)[["z", "word"]],
    ):
        optimized = make(ddf).optimize(fuse=False).expr
        assert len({read._name for read in optimized.find_operations(ReadShards)}) == 1


def test_two_branches_of_one_read_are_read_once(ddf):
    one = ddf[ddf.n > 0]
    assert len(reads(one.x + one.n)) == 1
    both = ddf.n + one.n  # rows are found by their place in each shard
    assert [read.where for read in reads(both)] == [()]
    same(lambda d: d.n + d[d.n > 0].n, ddf)
    same(lambda d: d[d.n > 0].n + d[d.x > 0].n, ddf)


@pytest.mark.parametrize("n", [0, 1, 5, 1000])
def test_heads(n, ddf):
    for npartitions in (1, -1):
        found = ddf.head(n, npartitions=npartitions)
        assert len(found) == min(n, len(ROWS) if npartitions == -1 else len(ROWS) // 3)
        assert found.dtypes.equals(ddf.dtypes)
        assert {read.limit for read in reads(ddf.head(n, npartitions, compute=False))} == {n}
    head = ddf[ddf.n > 0].head(3, compute=False)
    assert [(len(read.where), read.limit) for read in reads(head)] == [(1, 3)]
    rest = ddf[ddf.word.str.count(".") > 1].head(3, compute=False)
    assert reads(rest) == [None]


def test_a_head_is_not_filtered_before_it_is_cut(ddf):
    head = ddf.head(50, npartitions=-1, compute=False)
    found = head[head.n > 0]
    assert all(read is None or read.limit in (None, 50) for read in reads(found))
    assert len(found.compute(scheduler="sync")) <= 50


@pytest.mark.parametrize(
    "options",
    [
        {"dtype_backend": "numpy"},
        {"dtype_backend": "numpy_nullable"},
        {"types": {"price": "float64"}},
        {"unrepresentable": "null"},
        {"shard_column": "shard"},
        {"partitions_per_shard": 2, "partition_by": "id"},
        {"params": {"most": 200}},
    ],
)
def test_other_kinds_of_reads(options, topology):
    # numpy has no large integers beside NULLs
    columns = "id, n, word, price, day" if "numpy" in str(options) else "*"
    where = " WHERE id < %(most)s" if "params" in options else ""
    sql = f"SELECT {columns} FROM pd_rows{where}"
    ddf = dss.read_sharded_sql(sql, topology, **options)
    for make in (
        lambda d: d[["word", "n"]],
        lambda d: d[[d.columns[-1]]],
        lambda d: d[d.n > 0].sort_values("id")[["id", "word"]],
        lambda d: d[(d.word == "50%") | (d.price > Decimal("0.06"))].id,
        lambda d: d[d.day >= DAYS[2]].id,
        lambda d: d.head(3, npartitions=-1, compute=False).n.count(),
    ):
        same(make, ddf)
    (read,) = reads(ddf[["word"]])
    assert read.columns == ("word",)
    (filtered,) = reads(ddf[ddf.price > Decimal(1)].id)
    is_exact = not options.keys() & {"dtype_backend", "types", "unrepresentable"}
    assert bool(filtered.where) == is_exact


def test_a_table_in_slices(topology):
    ddf = dss.read_sharded_table("pd_rows", topology, partitions_per_shard=3)
    assert ddf.npartitions == 12
    for make in (
        lambda d: d[["id"]].sort_values("id"),
        lambda d: d[d.n > 0].id,
        lambda d: d[d.n > 0].price.sum(),
    ):
        same(make, ddf)
    assert [len(read.where) for read in reads(ddf[ddf.n > 0].id)] == [1]


def test_what_is_named_is_read_whole(topology):
    ddf = dss.read_sharded_sql("SELECT * FROM pd_rows", topology, snapshot="monday")
    assert reads(ddf[ddf.n > 0].id) == [None]


def test_an_answer_over_all_rows_is_read_whole(topology):
    sql = "SELECT word, count(*) AS n FROM pd_rows GROUP BY word"
    ddf = dss.read_sharded_sql(sql, topology, merge="global")
    assert reads(ddf[ddf.n > 1].word) == [None]
    same(lambda d: d[d.n > 1].word, ddf)
    rows = dss.read_sharded_sql("SELECT * FROM pd_rows", topology, merge="global")
    assert [read.columns for read in reads(rows[rows.n > 1].word)] == [("word",)]
    same(lambda d: d[d.n > 1].word, rows)


def test_it_can_be_switched_off(ddf):
    with dask.config.set({"shardsql.pushdown": False}):
        assert reads(ddf[ddf.n > 0][["id"]]) == [None]
    with (
        dask.config.set({"shardsql.pushdown": "no"}),
        pytest.raises(dss.ConfigurationError, match="pushdown"),
    ):
        reads(ddf[["id"]])


def test_values_that_no_query_may_hold_are_left_to_pandas(ddf):
    assert not reads(ddf[ddf.word == "a\0b"].id)[0].where
    assert not reads(ddf[ddf.n.isin(range(5000))].id)[0].where
    assert not reads(ddf[ddf.word.isin(["a", None])].id)[0].where
    assert not reads(ddf[ddf.x.isin(np.array([1.0, 0.0]))].id)[0].where
    assert reads(ddf[ddf.n.isin(np.array([1, 2]))].id)[0].where
