"""Aggregates of floating point in parts: variances, covariances and regressions of all shards."""

from __future__ import annotations

import itertools
import math
import random

import pytest

import dask_shardsql as dss

SCHEMA = """
CREATE TABLE fl_points (id int8 NOT NULL, g text, x float8, y float8, r real, n int4, keep bool);
"""
RNG = random.Random(11)  # noqa: S311
NAN, INF = float("nan"), float("inf")
KINDS = {
    "spread": lambda: (RNG.gauss(0, 1), RNG.gauss(3, 2)),
    "far": lambda: (1e9 + RNG.gauss(0, 1), -1e8 + RNG.random()),
    "line": lambda: (x := RNG.randrange(1000) / 8, 3 * x - 7),
    "constant x": lambda: (2.5, RNG.random()),
    "constant y": lambda: (RNG.random(), -0.5),
    "tiny": lambda: (RNG.random() * 1e-150, RNG.random() * 1e-140),
    "least": lambda: (RNG.random() * 1e-200, RNG.random() * 1e-308),
    "huge": lambda: (RNG.random() * 1e150, RNG.random() * 1e140),
    "gaps": lambda: (RNG.choice([None, RNG.random()]), RNG.choice([None, RNG.random()])),
    "never both": lambda: RNG.choice([(None, 1.5), (1.5, None)]),
    "not a number": lambda: (RNG.choice([NAN, 1.0]), RNG.random()),
    "infinite": lambda: (RNG.choice([INF, 1.0]), RNG.random()),
    "infinities": lambda: (RNG.choice([INF, -INF]), RNG.choice([-INF, 0.5])),
}
POINTS = [
    (i, kind, *make(), RNG.choice([None, i / 4]), i % 9, i % 5 > 0)
    for i, (kind, make) in enumerate(itertools.chain(*[KINDS.items()] * 60))
] + [(10_000, "single", 3.5, 4.5, 5.5, 6, True)]
ONE = [
    f"{name}({argument}){only}"
    for name in ("var_pop", "var_samp", "variance", "stddev_pop", "stddev_samp", "stddev")
    for argument in ("x", "r", "x + r")
    for only in ("", " FILTER (WHERE keep)")
]
TWO = [
    f"{name}({arguments}){only}"
    for name in (
        *("regr_count", "regr_avgx", "regr_avgy", "regr_sxx", "regr_syy", "regr_sxy", "corr"),
        *("covar_pop", "covar_samp", "regr_slope", "regr_intercept", "regr_r2"),
    )
    for arguments in ("y, x", "x, n")
    for only in ("", " FILTER (WHERE keep)")
]
PRODUCTS = ("corr", "regr_r2", "regr_intercept")
"""PostgreSQL multiplies two sums for these, before it divides."""


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    servers.load("fl_points", POINTS, shard_of=lambda row: row[0] * 7 % 3)
    yield servers
    servers.execute("DROP TABLE fl_points")


@pytest.fixture(scope="module")
def topology(loaded):
    """Shards of which the last is empty."""
    names = list(loaded.dsns)[:4]
    return dss.Topology.from_dsns({n: loaded.dsns[n] for n in names}, sharded={"fl_points": "id"})


def are_close(one, other, error):
    if one is None or other is None or math.isnan(one) or math.isnan(other):
        return one is other or (None not in (one, other) and math.isnan(one) and math.isnan(other))
    return one == other or math.isclose(one, other, rel_tol=error, abs_tol=error * 1e-290)


@pytest.mark.parametrize("call", [*ONE, *TWO])
def test_they_are_those_of_one_database(call, topology, loaded):
    for sql in (
        f"SELECT g, {call} AS v FROM fl_points GROUP BY g ORDER BY g",
        f"SELECT n, {call} AS v FROM fl_points WHERE g NOT LIKE 'infin%' GROUP BY n ORDER BY n",
        f"SELECT {call} AS v FROM fl_points WHERE g IN ('spread', 'line', 'gaps')",
        f"SELECT {call} AS v FROM fl_points WHERE g = 'single'",
        f"SELECT {call} AS v FROM fl_points WHERE id < 0",
    ):
        expected = dss.collect(sql, loaded.reference)
        found = dss.collect(sql, topology, merge="global")
        assert found.schema == expected.schema
        assert found.num_rows == expected.num_rows
        for one, other in zip(found.to_pylist(), expected.to_pylist(), strict=True):
            group = one.pop("g", "")
            assert group == other.pop("g", "")
            if group in ("huge", "tiny") and call.startswith(PRODUCTS):
                continue  # one database has infinity or NaN for what we have a number for
            # what is a small difference of large numbers has their error
            error = 1e-5 if group == "far" else 1e-9
            assert are_close(one.pop("v"), other.pop("v"), error), (sql, group)
            assert one == other
    how = dss.explain(sql, topology, merge="global")
    assert (how.strategy, how.reason) == ("merge", "aggregates")


def test_their_error_is_no_larger_than_that_of_one_database(topology, loaded):
    """Means that are far from zero, and far from each other: squares would swallow the rest."""
    sql = "SELECT var_pop(x + n * 1e6) AS v FROM fl_points WHERE g = 'far'"
    exact = "SELECT var_pop(x::text::numeric + n * 1000000)::float8 AS v FROM fl_points " \
        "WHERE g = 'far'"  # fmt: skip
    truth = dss.collect(exact, loaded.reference)["v"][0].as_py()
    found = dss.collect(sql, topology, merge="global")["v"][0].as_py()
    assert math.isclose(found, truth, rel_tol=1e-9)


@pytest.mark.parametrize("separator", ["','", "''", "NULL", "chr(9)", "'{0}'"])
def test_texts_without_an_order_are_joined_on_the_shards(separator, topology, loaded):
    sql = f"SELECT g, string_agg(n::text, {separator}) AS s FROM fl_points GROUP BY g ORDER BY g"
    expected, found = (
        dss.collect(sql, *how[:1], **dict(how[1:]))
        for how in ((loaded.reference,), (topology, ("merge", "global")))
    )
    assert found.schema == expected.schema
    for one, other in zip(found.to_pylist(), expected.to_pylist(), strict=True):
        assert one["g"] == other["g"]
        assert sorted(one["s"]) == sorted(other["s"])
        assert len(one["s"]) == len(other["s"])
    how = dss.explain(sql, topology, merge="global")
    assert (how.strategy, how.reason) == ("merge", "aggregates")


@pytest.mark.parametrize(
    "call", ["string_agg(g, g)", "string_agg(g, ',' ORDER BY id)", "array_agg(n)", "json_agg(n)"]
)
def test_others_need_their_rows(call, topology, loaded):
    sql = f"SELECT length(({call})::text) AS n FROM fl_points"
    found = dss.collect(sql, topology, merge="global")
    assert found.equals(dss.collect(sql, loaded.reference))
    how = dss.explain(sql, topology, merge="global")
    assert (how.strategy, how.reason) == ("merge", "columns")
