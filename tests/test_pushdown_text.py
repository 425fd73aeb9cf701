"""What ``str`` and ``dt`` make of columns as a part of the query: the same rows as without."""

from __future__ import annotations

import datetime
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pushdown import reads, same

import dask_shardsql as dss

pytestmark = pytest.mark.filterwarnings("ignore:.*accessor is deprecated|.*weekday is deprecated")
RNG = random.Random(5)  # noqa: S311
TEXTS = ["", "a", "A", "ab", "a b", "a\u0308", "ä", "%", "_", "a%", "100%", "a_b", "\\", "a\\b"]
TEXTS += [
    "a.b",
    "a\nb",
    "日本",
    "日",
    "b" * 300,
    "😀",
    "e\u0301\u0301",
    "ba",
    " a",
    "it's",
    "K",
    "ß",
]
DAYS = ["2024-02-29", "2023-12-31", "1970-01-01", "1969-12-31", "0001-01-01", "9999-12-31"]
DAYS += ["2024-01-01", "0001-12-31 BC", "0044-03-15 BC", "20000-05-06"]
HOURS = ["00:00:00", "23:59:59.999999", "12:30:15.000001", "00:00:00.000001", "05:00:59.5"]
TIMES = [" ".join((*day.split()[:1], hour, *day.split()[1:])) for day in DAYS for hour in HOURS]
COLUMNS = {
    "t": TEXTS,
    "v": [text for text in TEXTS if len(text) < 10],
    "d": DAYS,
    "at": TIMES,
    "seen": TIMES,
}
ROWS = [
    (i, i % 7, *(RNG.choice([None, *values]) for values in COLUMNS.values())) for i in range(600)
]


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(
        "SET TimeZone = 'UTC'; CREATE TABLE pt_rows (id int8 NOT NULL, n int4, t text, "
        "v varchar(9), d date, at timestamp, seen timestamptz)"
    )
    servers.load("pt_rows", ROWS, shard_of=lambda row: row[0] % 3)
    yield servers
    servers.execute("DROP TABLE pt_rows")


@pytest.fixture(scope="module")
def topology(loaded):
    dsns = {name: f"{loaded.dsns[name]} options='-c TimeZone=Asia/Tokyo'" for name in ("s1", "s2")}
    return dss.Topology.from_dsns(dsns, sharded={"pt_rows": "id"})


@pytest.fixture(scope="module")
def ddf(topology):
    return dss.read_sharded_sql("SELECT * FROM pt_rows", topology)


def is_pushed(make, ddf):
    return [len(read.where) if read else 0 for read in reads(ddf[make(ddf)].id)] == [1]


UTC = datetime.UTC
PATTERNS = [*TEXTS[:17], ("a", "ä"), ("%",), "x"]
NUMBERS = [0, 1, 2, 3, 5, 12, 31, 366, 59, -1, 2**40, 2.0, True, np.int64(1)]
YEARS = [1969, 2024, 1970, 1, 0, -1, -43, 9998, 9999, 20000, 2024.0, np.int64(2023), 2**40]
DATES = [datetime.date(2024, 2, 29), datetime.date(1, 1, 1), datetime.date(9999, 12, 31)]
DATES += [datetime.date(1969, 12, 31), datetime.date(2023, 12, 31)]
INSTANTS = [
    pd.Timestamp("2024-02-29"),
    pd.Timestamp("1970-01-01"),
    pd.Timestamp("2023-12-31 12:00"),
]
INSTANTS += [
    datetime.datetime(1, 1, 1),
    datetime.datetime(9999, 12, 31),
    datetime.datetime(2024, 1, 1),
]
ZONED = [pd.Timestamp(one).tz_localize("UTC") for one in INSTANTS[:3]]
ZONED += [pd.Timestamp("2024-02-29", tz="Asia/Tokyo"), datetime.datetime(9999, 12, 31, tzinfo=UTC)]
PARTS = [
    "month",
    "day",
    "quarter",
    "day_of_week",
    "dayofweek",
    "weekday",
    "dayofyear",
    "day_of_year",
]
MADE = {
    "t.str.len()": NUMBERS,
    "v.str.len()": NUMBERS,
    **{f"{name}.dt.{part}": NUMBERS for name in ("d", "at", "seen") for part in PARTS},
    **{f"{n}.dt.{p}": NUMBERS for n in ("at", "seen") for p in ("hour", "minute", "second")},
    **{f"{name}.dt.year": YEARS for name in ("d", "at", "seen")},
    **{f"{name}.dt.date": DATES for name in ("d", "at", "seen")},
    **{f"at.dt.{how}": INSTANTS for how in ("normalize()", "floor('D')")},
    **{f"seen.dt.{how}": ZONED for how in ("normalize()", "floor('D')")},
}
OPERATORS = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]


def made(name):
    """What makes that of a DataFrame."""
    return lambda d: eval(f"d.{name}", {"d": d})  # noqa: S307 - our own text


def conditions():
    def compared(name):
        values = st.sampled_from(MADE[name])
        of = made(name)
        return st.one_of(
            st.builds(
                lambda op, v: lambda d: getattr(of(d), op)(v), st.sampled_from(OPERATORS), values
            ),
            st.builds(lambda vs: lambda d: of(d).isin(vs), st.lists(values, max_size=3)),
            st.builds(
                lambda a, b, edges: lambda d: of(d).between(a, b, inclusive=edges),
                *(values, values, st.sampled_from(["both", "neither", "left", "right"])),
            ),
            st.just(lambda d: of(d).isna()),
        )

    matches = st.builds(
        lambda name, how, pattern, na: lambda d: getattr(d[name].str, how)(pattern, **na),
        st.sampled_from(["t", "v"]),
        st.sampled_from(["startswith", "endswith"]),
        st.sampled_from(PATTERNS),
        st.sampled_from([{}, {"na": True}, {"na": False}, {"na": None}]),
    )
    contains = st.builds(
        lambda name, pattern, options: lambda d: d[name].str.contains(pattern, **options),
        st.sampled_from(["t", "v"]),
        st.sampled_from([one for one in PATTERNS if isinstance(one, str) and one != "\\"]),
        st.sampled_from([{}, {"regex": False}, {"na": False}, {"case": False}, {"na": True}]),
    )
    single = st.one_of(st.sampled_from(sorted(MADE)).flatmap(compared), matches, contains)
    return st.recursive(
        single,
        lambda inner: st.one_of(
            st.builds(lambda a, b: lambda d: a(d) & b(d), inner, inner),
            st.builds(lambda a, b: lambda d: a(d) | b(d), inner, inner),
            st.builds(lambda a: lambda d: ~a(d), inner),
        ),
        max_leaves=4,
    )


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(condition=conditions())
def test_any_condition_gives_the_same_rows(condition, ddf):
    same(lambda d: d[condition(d)][["id"]], ddf)


@pytest.mark.parametrize("name", sorted(MADE))
def test_each_comparison_gives_the_same_rows(name, ddf):
    of, pushed = made(name), 0
    for value in MADE[name]:
        for operator in OPERATORS:
            same(lambda d, o=operator, v=value: d[getattr(of(d), o)(v)].id, ddf)
            pushed += is_pushed(lambda d, o=operator, v=value: getattr(of(d), o)(v), ddf)
    assert pushed >= 18
    assert is_pushed(lambda d: of(d).notnull(), ddf)
    assert is_pushed(lambda d: of(d).isin([]) | ~of(d).between(*MADE[name][:2]) | (d.n > 1), ddf)


@pytest.mark.parametrize("how", ["startswith", "endswith", "contains"])
def test_each_pattern_gives_the_same_rows(how, ddf):
    options = {"regex": False} if how == "contains" else {}
    for pattern in PATTERNS:
        if how == "contains" and isinstance(pattern, tuple):
            continue
        for na in ({}, {"na": True}, {"na": False}):

            def make(d, pattern=pattern, na=na):
                return getattr(d.t.str, how)(pattern, **options, **na)

            same(lambda d, make=make: d[make(d)].id, ddf)
            same(lambda d, make=make: d[~make(d)].id, ddf)
            assert is_pushed(make, ddf)


LEFT = {
    "a regular expression": lambda d: d.t.str.contains("a."),
    "another one": lambda d: d.t.str.contains("a|b"),
    "its flags": lambda d: d.t.str.contains("a", flags=2),
    "either case": lambda d: d.t.str.contains("A", case=False),
    "lower": lambda d: d.t.str.lower() == "a",
    "upper": lambda d: d.t.str.upper() == "A",
    "strip": lambda d: d.t.str.strip() == "a",
    "no text at all": lambda d: d.t.str.startswith(()),
    "the length of what was stripped": lambda d: d.t.str.strip().str.len() == 1,
    "hours": lambda d: d.at.dt.floor("h") == INSTANTS[0],
    "two days": lambda d: d.at.dt.floor("2D") == INSTANTS[0],
    "another kind of value": lambda d: d.at.dt.date == INSTANTS[0],
    "a time for an instant": lambda d: d.seen.dt.normalize() == INSTANTS[0],
    "a text for a date": lambda d: d.at.dt.date == "2024-02-29",
    "half a month": lambda d: d.at.dt.month == 1.5,
    "two of a column": lambda d: d.at.dt.normalize() == d.at,
    "the other way round": lambda d: d.at == d.at.dt.normalize(),
    "a year of its day": lambda d: d.at.dt.normalize().dt.year == 2024,
    "a property that is not known": lambda d: d.at.dt.is_leap_year,
    "nanoseconds": lambda d: d.at.dt.normalize() == pd.Timestamp("2024-02-29 00:00:00.000000001"),
    "a text that is none": lambda d: d.t.str.startswith("a\0"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_pandas(name, ddf):
    make = LEFT[name]
    assert not is_pushed(make, ddf)
    same(lambda d: d[make(d)].id, ddf)


def test_two_that_are_made_are_compared(ddf):
    for make in (
        lambda d: d.at.dt.month > d.seen.dt.month,
        lambda d: d.t.str.len() >= d.v.str.len(),
        lambda d: d.t.str.len() == d.n,
    ):
        assert is_pushed(make, ddf)
        same(lambda d, make=make: d[make(d)].id, ddf)


def test_lengths_are_counted_in_any_encoding(loaded, table_name):
    dsn = loaded.dsns["s1"]
    with loaded.session("s1") as cursor:
        cursor.connection.autocommit = True
        for encoding in ("LATIN1", "EUC_JIS_2004", "UTF8"):
            name = f"{table_name}_{encoding.lower()}"
            cursor.execute(
                f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' "
                "TEMPLATE template0"
            )
            other = dss.Topology.from_dsns({"s1": f"{dsn} dbname={name}"})
            text = "é" if encoding == "LATIN1" else "か\u309a"
            ddf = dss.read_sharded_sql(f"SELECT '{text}'::text AS t", other)
            for length in (1, 2, 3):
                found = ddf[ddf.t.str.len() == length]
                assert reads(found)[0].where
                assert len(found.compute()) == (length == len(text))
