"""Groups that the shards make: the same as those that pandas makes of the rows."""

from __future__ import annotations

import dask
import pandas as pd
import pytest
from distributed import Client, LocalCluster
from test_pushdown import COLUMNS, ROWS, SCHEMA, asked_by, outcome

import dask_shardsql as dss

KEYS = ("small", "n", "big", "ok", "price", "exact", "word", "short", "code", "day", "at", "seen")
NUMBERS = ("small", "n", "big", "x", "y", "price", "exact")
ORDERED = ("small", "n", "big", "price", "exact", "word", "short", "day", "at", "seen")
PUSHED = {
    "sum": NUMBERS,
    "mean": NUMBERS,
    "count": tuple(COLUMNS),
    "size": tuple(COLUMNS),
    "min": ORDERED,
    "max": ORDERED,
}


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA.replace("pd_rows", "pg_rows"))
    servers.load("pg_rows", ROWS, shard_of=lambda row: row[0] % 3)
    yield servers
    servers.execute("DROP TABLE pg_rows")


@pytest.fixture(scope="module")
def topology(loaded):
    """Shards of which the last is empty."""
    names = list(loaded.dsns)[:4]
    return dss.Topology.from_dsns({n: loaded.dsns[n] for n in names}, sharded={"pg_rows": "id"})


@pytest.fixture(scope="module")
def ddf(topology):
    return dss.read_sharded_sql("SELECT * FROM pg_rows", topology)


def same(make, ddf, monkeypatch):
    """Return whether the shards have made the groups."""
    asked = asked_by(monkeypatch)
    on = outcome(make, ddf)
    is_pushed = [" GROUP BY " in sql for sql in asked]
    with dask.config.set({"shardsql.pushdown": False}):
        off = outcome(make, ddf)
    if isinstance(off, type):
        assert on is off
        return None
    for one in (on, off):
        assert not isinstance(one, type), one
    on, off = on.sort_index(), off.sort_index()
    equal = pd.testing.assert_series_equal
    equal = pd.testing.assert_frame_equal if isinstance(off, pd.DataFrame) else equal
    equal(on, off, check_exact=False, rtol=1e-12, atol=0)
    return bool(is_pushed) and all(is_pushed)


@pytest.mark.parametrize("dropna", [None, True, False])
@pytest.mark.parametrize("key", COLUMNS)
def test_keys(key, dropna, ddf, monkeypatch):
    is_pushed = same(lambda d: d.groupby(key, dropna=dropna).id.sum(), ddf, monkeypatch)
    assert is_pushed is None or is_pushed == (key in KEYS)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("function", PUSHED)
def test_functions(function, column, ddf, monkeypatch):
    def make(d):
        return getattr(d.groupby("word")[column], function)()

    is_pushed = same(make, ddf, monkeypatch)
    assert is_pushed is None or is_pushed == (column in PUSHED[function])


@pytest.mark.parametrize("rows", ["some", "none", "no value", "one partition"])
@pytest.mark.parametrize("function", PUSHED)
def test_rows(function, rows, ddf, monkeypatch):
    chosen = {
        "some": lambda d: d[d.ok & (d.n >= 0)],
        "none": lambda d: d[d.n == 77],
        "no value": lambda d: d[d.price.isna()],
        "one partition": lambda d: d.partitions[[1, 3]],
    }[rows]
    assert same(lambda d: getattr(chosen(d).groupby("day").price, function)(), ddf, monkeypatch)


SHAPES = {
    "several keys": lambda d: d.groupby(["word", "day"]).price.sum(),
    "several keys, NULL too": lambda d: d.groupby(["word", "day"], dropna=False).price.max(),
    "all columns": lambda d: d[["word", "n", "price"]].groupby("word").sum(),
    "one of all": lambda d: d[["word", "n", "price"]].groupby("word").min().price,
    "some columns": lambda d: d.groupby("word")[["price", "n"]].max(),
    "mean of some": lambda d: d.groupby("word")[["price", "n"]].mean(),
    "a list": lambda d: d.groupby("word").price.agg(["sum", "min", "mean", "count"]),
    "a mapping": lambda d: d.groupby("word").agg({"price": ["sum", "max"], "n": "mean"}),
    "names": lambda d: d.groupby("word").agg(total=("price", "sum"), rows=("id", "size")),
    "all by name": lambda d: d[["word", "n", "small"]].groupby("word").agg("sum"),
    "sizes": lambda d: d.groupby(["ok", "day"]).size(),
    "sorted": lambda d: d.groupby("word", sort=True).n.sum(),
    "in several partitions": lambda d: d.groupby("word").n.sum(split_out=2),
    "in a tree": lambda d: d.groupby("word").n.sum(split_every=2),
    "groups of a filter": lambda d: d[(d.n > 0) & ~d.ok].groupby("word").price.sum(),
    "a filter of groups": lambda d: d.groupby("word").n.sum().loc[lambda s: s > 0],
    "computed behind": lambda d: d.groupby("word").n.sum() * 2,
    "by a column": lambda d: d.groupby(d.word).n.sum(),
    "the key is counted": lambda d: d.groupby("word").word.count(),
}
COMPUTED = {
    "an integer": lambda d: d.assign(z=d.id + d.small).groupby("word").z.max(),
    "a decimal": lambda d: d.assign(z=d.price * d.small).groupby("word").z.sum(),
    "a float": lambda d: d.assign(z=d.x * 2).groupby("word").z.sum(),
    "of a number": lambda d: d.assign(z=1 - d.price).groupby("word").z.mean(),
    "of one another": lambda d: (
        d.assign(z=d.id * 2).assign(zz=lambda e: e.z - e.small).groupby("word").zz.sum()
    ),
    "beside columns": lambda d: (
        d[d.n >= 0]
        .assign(z=d.price * d.small, zz=d.id + 1)
        .groupby(["word", "ok"])
        .agg({"z": ["sum", "mean"], "zz": "count", "n": "max"})
    ),
    "as a key": lambda d: d.assign(z=d.small + 1).groupby("z").price.sum(),
    "set": lambda d: d.assign(z=d.id).groupby("word").z.min(),
    "beyond its type": lambda d: d.assign(z=d.big * d.big).groupby("word").z.sum(),
}
LEFT = {
    "another column of a name": lambda d: d.assign(n=d.small * 2).groupby("word").n.sum(),
    "computed, and more": lambda d: (lambda e: e.groupby("word").z.sum() / e.z.max())(
        d.assign(z=d.id + d.small)
    ),
    "the variance of a computed one": lambda d: d.assign(z=d.id + 1).groupby("word").z.var(),
    "variance": lambda d: d.groupby("word").n.var(),
    "first": lambda d: d.groupby("word", sort=True).n.first(),
    "different values": lambda d: d.groupby("word").n.nunique(),
    "a function": lambda d: d.groupby("word").agg({"n": ["sum", "std"]}),
    "middle": lambda d: d.groupby("word").n.median(),
    "at least": lambda d: d.groupby("word").n.sum(min_count=9),
    "computed keys": lambda d: d.groupby(d.word.str.upper()).n.sum(),
    "half a filter": lambda d: d[d.word.str.count(".") > 1].groupby("word").n.sum(),
    "two": lambda d: d.groupby("word").n.sum() / d.groupby("word").n.count(),
    "totals": lambda d: d.n / d.n.sum(),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, ddf, monkeypatch):
    assert same(SHAPES[shape], ddf, monkeypatch) is True


@pytest.mark.parametrize("shape", COMPUTED)
def test_computed(shape, ddf, monkeypatch):
    assert same(COMPUTED[shape], ddf, monkeypatch) in (True, None)


@pytest.mark.parametrize("shape", LEFT)
def test_what_is_left_to_pandas(shape, ddf, monkeypatch):
    assert not same(LEFT[shape], ddf, monkeypatch)


def test_what_reaches_the_servers(ddf, topology, monkeypatch):
    asked = asked_by(monkeypatch)
    ddf[ddf.n > 0].groupby("word").price.mean().compute(scheduler="sync")
    assert len(asked) == len(topology.shards)
    (sql,) = {" ".join(sql.split()) for sql in asked}
    assert sql == (
        'SELECT dask_shardsql."word" COLLATE "C" AS key_0, '
        'sum(dask_shardsql."price")::numeric(38,2) AS "part_0", '
        'count(dask_shardsql."price")::int8 AS "part_1" FROM ( SELECT * FROM pg_rows ) AS '
        'dask_shardsql WHERE (dask_shardsql."n" > 0) GROUP BY dask_shardsql."word" COLLATE "C"'
    )


@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "float8", "numeric(38,0)"])
def test_sums_beyond_their_type(kind, topology, loaded, table_name, monkeypatch):
    most = {"int2": 2**15 - 1, "int4": 2**31 - 1, "int8": 2**63 - 1, "float8": 1e308}
    value = most.get(kind, 10**38 - 1)
    loaded.execute(f"CREATE TABLE {table_name} (id int8, k text, v {kind})")
    rows = [(n, "ab"[n % 3 % 2], value if n % 3 else 1) for n in range(9)]
    loaded.load(table_name, rows, shard_of=lambda row: 0)
    wide = dss.read_sharded_sql(f"TABLE {table_name}", topology)
    same(lambda d: d.groupby("k").v.sum(), wide, monkeypatch)


def test_names_as_long_as_they_can_be(topology, loaded, table_name, monkeypatch):
    long = "c" * 63
    loaded.execute(f"CREATE TABLE {table_name} (id int8, {long} int8)")
    loaded.load(table_name, [(n, n % 3) for n in range(9)], shard_of=lambda row: row[0] % 2)
    wide = dss.read_sharded_sql(f"TABLE {table_name}", topology)
    assert same(lambda d: d.groupby(long).id.sum(), wide, monkeypatch)
    assert wide[long].sum().compute() == 9


def test_blanks_at_the_end_tell_groups_apart(topology, loaded, table_name, monkeypatch):
    loaded.execute(f"CREATE TABLE {table_name} (id int8, free bpchar, n int8)")
    rows = [(n, "a" + " " * (n % 3), n) for n in range(9)]
    loaded.load(table_name, rows, shard_of=lambda row: row[0] % 2)
    wide = dss.read_sharded_sql(f"TABLE {table_name}", topology)
    assert same(lambda d: d.groupby("free").n.sum(), wide, monkeypatch)
    assert len(wide.groupby("free").n.sum().compute()) == 3


@pytest.mark.parametrize("backend", ["numpy", "numpy_nullable"])
def test_other_backends_group_by_themselves(backend, topology, monkeypatch):
    ddf = dss.read_sharded_sql("SELECT word, n FROM pg_rows", topology, dtype_backend=backend)
    assert not same(lambda d: d.groupby("word").n.sum(), ddf, monkeypatch)


def test_decimals_read_as_floats(topology, monkeypatch):
    types = {"price": "float64", "exact": "float64"}
    ddf = dss.read_sharded_sql("SELECT * FROM pg_rows", topology, types=types)
    for make in (
        lambda d: d.groupby("word")[["price", "exact"]].sum(),
        lambda d: d.assign(z=d.price * (1 - d.exact)).groupby("ok").z.mean(),
        lambda d: d.groupby("word").price.count(),
    ):
        assert same(make, ddf, monkeypatch)
    assert not same(lambda d: d.groupby("price").n.sum(), ddf, monkeypatch)


def test_on_a_cluster(ddf):
    def make():
        return ddf.groupby("word").price.agg(["sum", "mean"]).compute().sort_index()

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        found = make()
        with dask.config.set({"shardsql.pushdown": False}):
            pd.testing.assert_frame_equal(found, make())


def test_chosen_columns_may_be_merged(ddf):
    columns = ddf[["id"]]
    assert len(ddf.merge(columns, on="id")) == len(columns.merge(ddf, on="id")) == len(ROWS)
