"""DataFrames: dtypes come from the columns alone, whatever the rows, under each dtype_backend."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import pickle

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import values
from conftest import first_shards

import dask_shardsql as dss
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.frame.to_pandas import to_pandas
from dask_shardsql.sql.types import Column

BACKENDS = ["pyarrow", "numpy_nullable", "numpy"]
UTC = pa.timestamp("us", "UTC")
DATES, STAMPS = pa.date32(), pa.timestamp("us")
INTERVALS = pa.month_day_nano_interval()

# Arrow type, a value, and the dtype under numpy_nullable and numpy where that is not object.
TYPES = [
    (pa.bool_(), True, "boolean", object),
    (pa.int16(), 7, "Int16", "float64"),
    (pa.int32(), -7, "Int32", "float64"),
    (pa.int64(), 2**53, "Int64", "float64"),
    (pa.uint32(), 2**32 - 1, "UInt32", "float64"),
    (pa.float32(), 0.5, "Float32", "float32"),
    (pa.float64(), 0.1, "Float64", "float64"),
    (pa.string(), "é", "string", "str"),
    (pa.timestamp("us"), dt.datetime(1500, 1, 1, 1, 2, 3, 4), *["datetime64[us]"] * 2),
    (UTC, dt.datetime(2024, 1, 1, tzinfo=dt.UTC), *["datetime64[us, UTC]"] * 2),
    (pa.decimal128(10, 2), decimal.Decimal("1.50"), object, object),
    (pa.decimal256(76, 38), decimal.Decimal(1).scaleb(-28), object, object),
    (pa.date32(), dt.date(1, 1, 1), object, object),
    (pa.time64("us"), dt.time(23, 59, 59, 999999), object, object),
    (pa.binary(), b"\0\xff", object, object),
    (INTERVALS, (1, -2, 3000), object, object),
    (pa.list_(pa.int64()), [2**53 + 1, None], object, object),
    (pa.list_(pa.string()), ["", None], object, object),
    (pa.list_(UTC), [dt.datetime(2024, 1, 1, tzinfo=dt.UTC), None], object, object),
    (pa.list_(pa.decimal256(76, 38)), [decimal.Decimal("0.1"), None], object, object),
    (pa.list_(INTERVALS), [(1, -2, 3000), None], object, object),
]


def answer_of(*columns, unrepresentable="raise"):
    """Return an answer of columns given as (name, Arrow type, nullable)."""
    made = tuple(Column(name, str(kind), kind, nullable) for name, kind, nullable in columns)
    return Answer(Query("SELECT", unrepresentable=unrepresentable), made, made)


def frame_of(kind, items, backend, *, nullable=True, unrepresentable="raise", shard=None):
    answer = answer_of(("v", kind, nullable), unrepresentable=unrepresentable)
    array = items if isinstance(items, pa.Array) else pa.array(items, kind)
    return to_pandas(pa.table([array], answer.schema), answer, backend, shard)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TYPES, ids=lambda case: str(case[0]))
def test_dtypes_do_not_depend_on_rows(case, backend):
    kind, value, nullable_dtype, numpy_dtype = case
    expected = {
        "pyarrow": values.arrow_dtype(kind),
        "numpy_nullable": nullable_dtype,
        "numpy": numpy_dtype,
    }[backend]
    if expected == "str" and pd.__version__ < "3":
        expected = object
    meta = frame_of(kind, [], backend)
    assert meta.dtypes["v"] == expected
    for items in ([], [None], [value], [value, None, value], [None] * 3):
        frame = frame_of(kind, items, backend)
        pd.testing.assert_series_equal(frame.dtypes, meta.dtypes)
        assert frame["v"].isna().tolist() == [item is None for item in items]
        pd.testing.assert_series_equal(pickle.loads(pickle.dumps(frame)).dtypes, meta.dtypes)  # noqa: S301


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TYPES, ids=lambda case: str(case[0]))
def test_values_come_through(case, backend):
    kind, value, _, _ = case
    found = frame_of(kind, [value, None], backend)["v"].iloc[0]
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if isinstance(found, pd.DateOffset) or kind == pa.list_(INTERVALS):
        found = found if isinstance(found, list) else [found]
        value = value if isinstance(value, list) else [value]
        found = [
            f if f is None else tuple(f.kwds.values()) if hasattr(f, "kwds") else tuple(f)
            for f in found
        ]
        assert [f and sorted(f) for f in found] == [v and sorted(v) for v in value]
        return
    if kind == UTC or kind == pa.timestamp("us"):
        assert found == pd.Timestamp(value)
    assert found == value


@pytest.mark.parametrize("kind", [pa.int16(), pa.int32(), pa.int64(), pa.uint32(), pa.bool_()])
def test_numpy_keeps_integers_and_booleans_that_the_database_guarantees(kind):
    most = True if kind == pa.bool_() else 2 ** (kind.bit_width - 1) - 1
    meta = frame_of(kind, [], "numpy", nullable=False)
    frame = frame_of(kind, [most, most], "numpy", nullable=False)
    assert meta.dtypes["v"] == frame.dtypes["v"] == kind.to_pandas_dtype()
    assert frame["v"].tolist() == [most, most]
    with pytest.raises(dss.ColumnError, match="NOT NULL") as caught:
        frame_of(kind, [most, None], "numpy", nullable=False)
    assert caught.value.columns == ("v",)


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_numpy_has_no_float_for_an_integer_beyond_2_to_the_53rd(kind):
    signs = (1, -1) if kind == pa.int64() else (1,)
    exact = [sign * 2**53 for sign in signs]
    assert frame_of(kind, [*exact, None], "numpy")["v"].tolist()[:-1] == exact
    for sign in signs:
        for value in (sign * (2**53 + 1), sign * (2**53 + 2), sign * (2**63 - 1)):
            with pytest.raises(dss.UnrepresentableValueError) as caught:
                frame_of(kind, [1, None, value, value], "numpy", shard="s3")
            error = caught.value
            assert (error.column, error.value, error.shard) == ("v", str(value), "s3")
            assert "float64" in error.arrow_type
            found = frame_of(kind, [1, value], "numpy", unrepresentable="null")["v"]
            assert found.dtype == "float64"
            assert found[0] == 1
            assert math.isnan(found[1])


@pytest.mark.parametrize("backend", ["numpy_nullable", "numpy"])
@pytest.mark.parametrize(
    ("days", "shown"),
    [(-719163, "0001-12-31 BC"), (2932897, "10000-01-01"), (-735160, "0044-03-15 BC")],
)
def test_a_date_that_python_has_not(days, shown, backend, servers):
    with servers.connect("reference") as connection, connection.cursor() as cursor:
        cursor.execute("SELECT (DATE '1970-01-01' + %s)::text", (days,))
        assert cursor.fetchone() == (shown,)
    dates = pa.array([0, None, days], pa.int32()).cast(DATES)
    with pytest.raises(dss.UnrepresentableValueError) as caught:
        frame_of(DATES, dates, backend, shard="s3")
    error = caught.value
    assert (error.column, error.value, error.shard) == ("v", shown, "s3")
    assert "datetime.date" in error.arrow_type
    found = frame_of(DATES, dates, backend, unrepresentable="null")["v"]
    assert found.tolist() == [dt.date(1970, 1, 1), None, None]


@pytest.mark.parametrize("backend", ["numpy_nullable", "numpy"])
@pytest.mark.parametrize("kind", [DATES, STAMPS, UTC])
def test_an_array_with_a_date_that_python_has_not(kind, backend):
    units = -735160 if kind == DATES else -735160 * 86_400_000_000
    flat = pa.array([0, units, None], pa.int32() if kind == DATES else pa.int64()).cast(kind)
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), flat)
    with pytest.raises(dss.UnrepresentableValueError) as caught:
        frame_of(lists.type, lists, backend, shard="s3")
    assert (caught.value.column, caught.value.shard) == ("v", "s3")
    assert "44" in caught.value.value or "43" in caught.value.value
    first, second = frame_of(lists.type, lists, backend, unrepresentable="null")["v"]
    assert [str(item)[:10] for item in first] == ["1970-01-01"]
    assert second == [None, None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [STAMPS, UTC])
def test_timestamps_outside_the_years_1_to_9999_are_held(kind, backend):
    units = [-735160 * 86_400_000_000, 9223372036854775807, -9223372036854775807, None]
    found = frame_of(kind, pa.array(units, pa.int64()).cast(kind), backend)["v"]
    stored = [
        None if v is pd.NaT else v
        for v in (
            values.arrow_values(found.array.__arrow_array__())
            if backend == "pyarrow"
            else found.astype("int64").tolist()
        )
    ]
    assert stored[:3] == units[:3]
    assert found.isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_null(backend):
    """Only Arrow tells them apart: documented by pandas for its own two kinds of floats."""
    found = frame_of(pa.float64(), [math.nan, None, 1.0], backend)["v"]
    expected = [False, True, False] if backend == "pyarrow" else [True, True, False]
    assert found.isna().tolist() == expected


def test_intervals_print_under_every_backend():
    for backend in BACKENDS:
        frame = frame_of(INTERVALS, [(14, -3, 4_000), None], backend)
        assert "months=14" in repr(frame)
        assert "days=-3" in frame.to_string()
        assert frame.memory_usage(deep=True).sum() > 0


def test_what_pandas_does_with_a_date_before_year_1():
    """The notes of to_pandas: when one of these fails, pandas got better and they can go."""
    dates = pa.array([-735160, 0, None], pa.int32()).cast(DATES)
    frame = frame_of(DATES, dates, "pyarrow")
    ordered = frame.sort_values("v", ascending=False)
    assert ordered.index.tolist() == [1, 0, 2]
    assert (frame["v"] < dt.date(1970, 1, 1)).tolist()[:2] == [True, False]
    assert frame.groupby("v").size().tolist() == [1, 1]
    for use in (repr, lambda f: f["v"].tolist(), lambda f: f.to_csv()):
        with pytest.raises(OverflowError):
            use(frame)
    assert "-043-03-15" in repr(frame["v"].astype("timestamp[us][pyarrow]").to_frame())


def test_what_pandas_does_with_a_timestamp_before_year_1():
    stamps = pa.array([-735160 * 86_400_000_000, None], pa.int64())
    for kind in (STAMPS, UTC):
        frame = frame_of(kind, stamps.cast(kind), "pyarrow")
        assert "-043-03-15" in repr(frame)
        with pytest.raises(OverflowError):
            frame["v"].array.__arrow_array__().to_pylist()
    for backend in ("numpy", "numpy_nullable"):
        assert "-043-03-15" in repr(frame_of(STAMPS, stamps.cast(STAMPS), backend))
        with pytest.raises(NotImplementedError):
            repr(frame_of(UTC, stamps.cast(UTC), backend))


@pytest.fixture(scope="module")
def tables(servers):
    """Two tables of two shards, the second of them empty on s2."""
    servers.execute(
        "DROP TABLE IF EXISTS p_left, p_right CASCADE; "
        "CREATE TABLE p_left (id int8 NOT NULL, big int8 NOT NULL, ok bool NOT NULL); "
        "CREATE TABLE p_right (id int8 NOT NULL, big int8 NOT NULL, ok bool NOT NULL); "
        "CREATE VIEW p_view AS "
        "SELECT l.id, r.big, r.ok FROM p_left l LEFT JOIN p_right r USING (id)"
    )
    servers.load("p_left", [(i, 2**53 + i, True) for i in range(4)], shard_of=lambda r: r[0] % 2)
    servers.load("p_right", [(0, 7, False)], shard_of=lambda r: 0)
    return first_shards(servers, 2)


def read(sql, topology, **options):
    ddf = dss.read_sharded_sql(sql, topology, **options)
    frames = dask.compute(*ddf.partitions)
    for frame in frames:
        pd.testing.assert_series_equal(frame.dtypes, ddf.dtypes)
        assert isinstance(frame.index, pd.RangeIndex)
        assert frame.index.tolist() == list(range(len(frame)))
    return ddf, pd.concat(frames)


def test_not_null_columns_are_int64_and_bool_under_numpy(tables):
    ddf, frame = read("TABLE p_left", tables, dtype_backend="numpy")
    assert ddf.dtypes.to_dict() == {"id": "int64", "big": "int64", "ok": "bool"}
    assert sorted(frame["big"]) == [2**53 + i for i in range(4)]
    assert frame["ok"].tolist() == [True] * 4


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT l.id, r.big, r.ok FROM p_left l LEFT JOIN p_right r USING (id)",
        "SELECT l.id, r.big, r.ok FROM p_right r RIGHT JOIN p_left l USING (id)",
        "SELECT l.id, r.big, r.ok FROM p_left l FULL JOIN p_right r USING (id)",
        "SELECT id, b AS big, o AS ok FROM p_left NATURAL LEFT JOIN p_right AS r (id, b, o)",
        "SELECT id, big, ok FROM p_view",
        "SELECT id, (SELECT big FROM p_right r WHERE r.id = l.id) AS big, "
        "(SELECT ok FROM p_right r WHERE r.id = l.id) AS ok FROM p_left l",
        "SELECT id, NULLIF(big, 2^53 + id) AS big, NULLIF(ok, true) AS ok FROM p_left UNION ALL "
        "SELECT NULL, big, ok FROM p_right",
        "SELECT id, big, ok FROM p_right GROUP BY GROUPING SETS ((id, big, ok), ())",
    ],
)
def test_outer_joins_make_floats_and_objects_under_numpy(sql, tables):
    ddf, frame = read(sql, tables, dtype_backend="numpy")
    assert ddf.dtypes["big"] == "float64"
    assert ddf.dtypes["ok"] == "object"
    assert frame["big"].dropna().tolist() == [7.0]
    assert frame["ok"].dropna().tolist() == [False]
    assert frame["big"].isna().sum() > 0


def test_a_not_null_that_is_not_valid_yet_promises_nothing(servers, table_name):
    servers.execute(f"CREATE TABLE {table_name} (big int8)")
    servers.load(table_name, [(None,)])
    topology = first_shards(servers, 1)
    with servers.session("s1") as cursor:
        cursor.execute("SHOW server_version_num")
        if int(cursor.fetchone()[0]) < 180000:
            pytest.skip("NOT NULL constraints that are not yet valid came with PostgreSQL 18")
    servers.execute(f"ALTER TABLE {table_name} ADD CONSTRAINT n NOT NULL big NOT VALID")
    ddf = dss.read_sharded_sql(f"TABLE {table_name}", topology, dtype_backend="numpy")
    assert ddf.dtypes["big"] == "float64"
    assert ddf.compute()["big"].isna().tolist() == [True]


def test_a_null_where_the_database_promised_none_is_an_error_not_a_wrong_dtype(servers, table_name):
    servers.execute(f"CREATE TABLE {table_name} (big int8)")
    servers.load(table_name, [(None,)])
    topology = first_shards(servers, 1)
    servers.execute(
        "SET allow_system_table_mods = on; UPDATE pg_attribute SET attnotnull = true "
        f"WHERE attrelid = '{table_name}'::regclass AND attname = 'big'"
    )  # as a table that was damaged
    ddf = dss.read_sharded_sql(f"TABLE {table_name}", topology, dtype_backend="numpy")
    with pytest.raises(dss.ColumnError, match="big"):
        ddf.compute()
    options = {"dtype_backend": "numpy", "types": {"big": "float64"}}
    assert ddf.dtypes["big"] == "int64"
    found = dss.read_sharded_sql(f"TABLE {table_name}", topology, **options).compute()
    assert found["big"].isna().tolist() == [True]


def test_the_error_through_dask_names_column_and_value(tables):
    sql = "SELECT big + 0 AS big FROM p_left"
    ddf = dss.read_sharded_sql(sql, tables, dtype_backend="numpy")
    with pytest.raises(dss.UnrepresentableValueError) as caught:
        ddf.compute()
    assert caught.value.column == "big"
    assert int(caught.value.value) in [2**53 + i for i in range(1, 4)]
    found = dss.read_sharded_sql(
        sql, tables, dtype_backend="numpy", unrepresentable="null"
    ).compute()
    assert found["big"].dropna().tolist() == [2.0**53]
    kept = dss.read_sharded_sql(sql, tables, dtype_backend="numpy", types={"big": "string"})
    assert sorted(map(int, kept.compute()["big"])) == [2**53 + i for i in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_shard_column_has_one_dtype(backend, tables):
    ddf, frame = read("TABLE p_right", tables, dtype_backend=backend, shard_column="shard")
    assert frame["shard"].tolist() == ["s1"]
    assert list(ddf.columns) == ["id", "big", "ok", "shard"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_decides_the_dtype(backend, tables):
    options = {"types": {"id": "float64", "big": "string"}, "dtype_backend": backend}
    ddf, frame = read("SELECT id, big FROM p_left", tables, **options)
    expected = {"pyarrow": "double[pyarrow]", "numpy_nullable": "Float64", "numpy": "float64"}
    assert ddf.dtypes["id"] == expected[backend]
    assert sorted(frame["id"]) == [0.0, 1.0, 2.0, 3.0]
    assert sorted(frame["big"]) == [str(2**53 + i) for i in range(4)]


def test_divisions_are_unknown_and_the_index_starts_anew_in_each_partition(tables):
    ddf = dss.read_sharded_sql("TABLE p_left", tables)
    assert not ddf.known_divisions
    assert ddf.compute().index.tolist() == [0, 1, 0, 1]
    assert isinstance(ddf, dd.DataFrame)
    assert ddf._meta.index.dtype == ddf.compute().index.dtype


def test_an_unknown_backend_is_refused(tables):
    with pytest.raises(dss.ConfigurationError, match="dtype-backend"):
        dss.read_sharded_sql("SELECT 1", tables, dtype_backend="polars")
