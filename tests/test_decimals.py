"""Sums and means of exact decimals that dask computes, against PostgreSQL's own."""

from __future__ import annotations

import decimal
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from decimal import Decimal

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest
import values
from conftest import first_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_shardsql as dss
from dask_shardsql.frame.decimals import divide

# column: (its type, the places of a mean)
COLUMNS = {
    "small": ("numeric(10,2)", 16),
    "long": ("numeric(38,20)", 20),
    "wide": ("numeric(60,5)", 16),
    "free": ("numeric", 38),
}
TABLE = "d_amounts"


@pytest.fixture(scope="module")
def cursor(servers):
    connection = values.open_reference(servers)
    yield connection.cursor()
    connection.close()


@pytest.fixture(scope="module")
def ddf(servers):
    """Four shards, the last empty; group "null" has only NULLs, "one" lives on one shard."""
    definition = ", ".join(f"{name} {kind}" for name, (kind, _) in COLUMNS.items())
    servers.execute(f"DROP TABLE IF EXISTS {TABLE}")
    servers.execute(f"CREATE TABLE {TABLE} (n int4, g text, h int4, {definition}, f float8)")
    rows = []
    for n in range(60):
        group = ("a", "b", "null", "negative", "thirds")[n % 5]
        cents = {"negative": -n * 1_000_003, "thirds": n + 1}.get(group, (n - 30) * 77_777_777)
        small = None if group == "null" or n % 7 == 0 else Decimal(cents).scaleb(-2)
        with decimal.localcontext(prec=100):
            long = small and small * 10**7 + Decimal(n).scaleb(-20)
            wide = small and small * 10**40 + Decimal(n).scaleb(-5)
            free = small and small * 10**25 + Decimal(n).scaleb(-38)
        rows.append((n, group, n % 2, small, long, wide, free, n / 4))
    rows.append((60, "one", 0, *[Decimal("0.05")] * 4, None))
    servers.load(TABLE, rows, shard_of=lambda row: row[0] % 3)
    return dss.read_sharded_sql(f"TABLE {TABLE}", first_shards(servers, 4))


def plain(value):
    return None if value is None or value is pd.NA else value


def exact_mean(column, places):
    """Return SQL for the mean with `places` places, divided with many more and rounded there."""
    return f"round(sum({column})::numeric(500, 200) / nullif(count({column}), 0), {places})"


@pytest.mark.parametrize("column", COLUMNS)
def test_a_columns_totals(column, ddf, cursor):
    places = COLUMNS[column][1]
    cursor.execute(
        f"SELECT sum({column}), {exact_mean(column, places)}, min({column}), max({column}), "
        f"count({column}) FROM {TABLE}"
    )
    (expected,) = cursor.fetchall()
    found = [getattr(ddf[column], how)() for how in ("sum", "mean", "min", "max", "count")]
    found = dask.compute(*found)
    assert found == expected
    assert [type(value) for value in found[:4]] == [Decimal] * 4
    assert not -found[1].as_tuple().exponent < places


@pytest.mark.parametrize("column", COLUMNS)
def test_the_mean_is_what_avg_rounds(column, ddf, cursor):
    """avg() has at least 16 significant digits; where it has no more places, ours has as many."""
    cursor.execute(f"SELECT avg({column}) FROM {TABLE}")
    (expected,) = cursor.fetchone()
    places = min(-expected.as_tuple().exponent, COLUMNS[column][1])
    assert places > 0
    found = ddf[column].mean().compute()
    unit = Decimal(1).scaleb(-places)
    with decimal.localcontext(prec=200):
        assert abs(found - expected) <= unit


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize(
    "options",
    [{}, {"sort": True}, {"sort": False}],
    ids=str,
)
@pytest.mark.parametrize("split_out", [1, 3])
@pytest.mark.parametrize("by", [["g"], ["g", "h"]], ids=str)
def test_totals_of_groups(column, options, split_out, by, ddf, cursor):
    expected = groups(cursor, column, by)
    grouped = ddf.groupby(by if len(by) > 1 else by[0], **options)[column]
    split = {"split_out": split_out}
    found = [
        grouped.sum(**split),
        grouped.mean(**split),
        grouped.min(**split),
        grouped.max(**split),
        grouped.count(**split),
    ]
    metas = [part.dtype for part in found]
    found = dask.compute(*found)
    assert [part.dtype for part in found] == metas
    together = {key: tuple(plain(part[key]) for part in found) for key in found[0].index}
    assert together == expected


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("split_out", [1, 3])
def test_agg(column, split_out, ddf, cursor):
    expected = groups(cursor, column, ["g"])
    grouped = ddf.groupby("g")
    lists = grouped[column].agg(["mean", "sum", "max"], split_out=split_out)
    found = lists.compute()
    assert list(found.columns) == ["mean", "sum", "max"]
    assert found.dtypes.equals(lists.dtypes)
    for key, (total, mean, _, most, _) in expected.items():
        assert [plain(found.loc[key, name]) for name in found] == [mean, total, most]
    mapped = grouped.agg({column: ["sum", "mean"], "f": "mean"}, split_out=split_out).compute()
    for key, (total, mean, *_) in expected.items():
        assert plain(mapped.loc[key, (column, "sum")]) == total
        assert plain(mapped.loc[key, (column, "mean")]) == mean
    one = grouped.agg({column: "mean"}).compute()[column]
    assert {key: plain(one[key]) for key in one.index} == {k: v[1] for k, v in expected.items()}


def groups(cursor, column, by):
    """Return sum, mean, min, max and count of each group, as PostgreSQL has them.

    A sum of nothing is NULL there and 0 in pandas, by pandas' ``min_count=0``.
    """
    keys = ", ".join(by)
    cursor.execute(
        f"SELECT {keys}, coalesce(sum({column}), 0), {exact_mean(column, COLUMNS[column][1])}, "
        f"min({column}), max({column}), count({column}) FROM {TABLE} GROUP BY {keys}"
    )
    found = {}
    for row in cursor.fetchall():
        key, rest = row[: len(by)], row[len(by) :]
        found[key if len(by) > 1 else key[0]] = rest
    assert any(row[1] is None for row in found.values())
    assert any(row[1] is not None and row[1] < 0 for row in found.values())
    return found


def test_frames_of_several_columns(ddf, cursor):
    names = ["small", "free", "f"]
    cursor.execute(
        f"SELECT {exact_mean('small', 16)}, {exact_mean('free', 38)}, avg(f), sum(small), "
        f"sum(free), sum(f) FROM {TABLE}"
    )
    (expected,) = cursor.fetchall()
    means, sums = dask.compute(ddf[names].mean(), ddf[names].sum())
    assert (*means[names], *sums[names]) == expected
    by = ddf.groupby("g")[["small", "free"]].mean().compute()
    for name in by:
        expected = {key: row[1] for key, row in groups(cursor, name, ["g"]).items()}
        assert {key: plain(by.loc[key, name]) for key in by.index} == expected


@pytest.mark.parametrize("split_every", [2, False])
def test_sums_keep_their_digits_in_every_step(split_every, ddf, cursor):
    cursor.execute(f"SELECT sum(free), sum(wide) FROM {TABLE}")
    (expected,) = cursor.fetchall()
    assert min(len(str(value)) for value in expected) > 40
    many = ddf.repartition(npartitions=4)
    found = dask.compute(*(many[c].sum(split_every=split_every) for c in ("free", "wide")))
    assert found == expected


def test_nothing_has_no_mean(ddf):
    none = ddf[ddf.g == "no such group"]
    assert none.small.mean().compute() is pd.NA
    assert none.small.sum().compute() == 0
    assert none.groupby("g").small.mean().compute().tolist() == []
    nulls = ddf[ddf.g == "null"]
    assert nulls.small.mean().compute() is pd.NA
    assert nulls[["small", "free"]].mean().compute().isna().tolist() == [True, True]


def test_a_mean_rounds_half_away_from_zero(servers, cursor):
    """1/32 of 1e-16 and the like: halves at the seventeenth place, which no float could tell."""
    half = "0.0000000000000001"
    sql = (
        f"SELECT g, v::numeric(30,16) AS v FROM (VALUES (1, {half}), (1, 0), (2, -{half}), (2, 0))"
    )
    sql += " AS t (g, v)"
    cursor.execute(f"SELECT g, round(avg(v), 16) FROM ({sql}) AS q GROUP BY g")
    expected = dict(cursor.fetchall())
    assert expected == {1: Decimal(half), 2: -Decimal(half)}
    ddf = dss.read_sharded_sql(sql, first_shards(servers, 1))
    assert ddf.groupby("g").v.mean().compute().to_dict() == expected
    assert ddf[ddf.g == 2].v.mean().compute() == expected[2]


def test_a_mean_too_large_for_its_type_is_an_error_that_names_it(servers):
    topology = first_shards(servers, 2)
    sql = "SELECT 1 AS g, 12345678901234567890123456789012345.12::numeric(38,2) AS v"
    ddf = dss.read_sharded_sql(sql, topology)
    expected = Decimal("12345678901234567890123456789012345.12")
    assert ddf.v.mean().compute() == expected
    with pytest.raises(dss.UnrepresentableValueError, match="12345678901234567890123456789012345"):
        ddf.groupby("g").v.mean().compute()
    wide = dss.read_sharded_sql(sql, topology, types={"v": "decimal256(76, 2)"})
    assert wide.groupby("g").v.mean().compute().tolist() == [expected]


def test_other_numbers_are_dasks_own(ddf, cursor):
    cursor.execute(f"SELECT sum(f), avg(f), sum(n), avg(n)::float8 FROM {TABLE}")
    (expected,) = cursor.fetchall()
    found = dask.compute(ddf.f.sum(), ddf.f.mean(), ddf.n.sum(), ddf.n.mean())
    assert found == pytest.approx(expected)
    frame = pd.DataFrame({"i": [2, 3, 4], "x": [1.5, None, 2.0]})
    ours = dd.from_pandas(frame, npartitions=3)
    assert ours.i.prod().compute() == 24  # dask's product is a kind of sum
    assert ours.prod().compute().tolist() == [24, 3.0]
    assert ours.mean().compute().tolist() == frame.mean().tolist()
    assert ours[ours.i > 9].i.sum().compute() == 0
    assert math.isnan(ours[ours.i > 9].x.mean().compute())


def test_processes_that_never_imported_the_package(ddf):
    """Tasks whose data is plain pandas must still find what decimals.py adds to dask."""
    whole = ddf.compute()[["g", "small", "free"]]
    plain_ddf = dd.from_pandas(whole.reset_index(drop=True), npartitions=3)
    context = multiprocessing.get_context("spawn")
    asked = [
        lambda: plain_ddf.groupby("g").small.mean(),
        lambda: plain_ddf.free.sum(),
        lambda: plain_ddf.free.mean(),
        lambda: plain_ddf.groupby("g").free.agg(["mean"]),
    ]
    for ask in asked:
        expected = ask().compute(scheduler="sync")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = ask().compute(scheduler="processes", pool=pool)
        if isinstance(expected, Decimal):
            assert found == expected
        else:
            assert found.sort_index().equals(expected.sort_index())


decimals = st.decimals(allow_nan=False, allow_infinity=False, places=5, max_value=10**30)


@given(rows=st.lists(st.tuples(st.none() | decimals, st.integers(0, 9)), min_size=1, max_size=6))
@settings(max_examples=values.EXAMPLES, deadline=None, derandomize=True)
def test_divide_is_exact(rows):
    """Against Python's fractions: the nearest number of 16 places, half away from zero."""
    from fractions import Fraction

    totals, counts = zip(*rows, strict=True)
    kind = pd.ArrowDtype(pa.decimal256(76, 5))
    total = pd.Series(pa.array(totals, pa.decimal256(76, 5)), dtype=kind, name="v")
    found = divide(total, pd.Series(counts, dtype="int64[pyarrow]"))
    assert found.dtype == pd.ArrowDtype(pa.decimal256(76, 16))
    for total, count, mean in zip(totals, counts, found, strict=True):
        if total is None or not count:
            assert mean is pd.NA
            continue
        scaled = abs(Fraction(total) / count * 10**16)
        whole = int(scaled) + (scaled - int(scaled) >= Fraction(1, 2))
        assert Fraction(mean) == Fraction(whole if total >= 0 else -whole, 10**16)
