"""Errors: whole after pickling, and no bare driver error among them."""

from __future__ import annotations

import inspect
import pickle
import re

import psycopg2
import psycopg2.errors
import pytest

import dask_shardsql as dss
from dask_shardsql import errors
from dask_shardsql.engine.drivers.base import driver_named

NAMES = [name for name in errors.__all__ if name.endswith("Error")]
TREE = [getattr(errors, name) for name in NAMES]


def example(kind):
    """An instance with a value in every parameter."""
    values = {"position": 3, "differences": (("s", "c", "a", "b"),), "columns": ("x",)}
    parameters = inspect.signature(kind).parameters
    return kind(**{name: values.get(name, f"{name} text") for name in parameters})


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling_whole(kind):
    error = example(kind)
    error.shard = "s9"
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert issubclass(kind, dss.ShardSQLError)


def test_the_tree_at_the_top_of_the_file_is_the_tree():
    drawn = re.findall(r"^ +((?:[│ ]*)[├└]── )?(\w+Error)\b", errors.__doc__, re.MULTILINE)
    assert sorted(name for _, name in drawn) == sorted(NAMES)
    parents = {}
    for branch, name in drawn:
        parents[len(branch)] = name
        if branch:
            above = parents[max(depth for depth in parents if depth < len(branch))]
            assert getattr(errors, name).__bases__[0].__name__ == above
            for deeper in [depth for depth in parents if depth > len(branch)]:
                del parents[deeper]


PSYCOPG2 = sorted(
    {
        value
        for module in (psycopg2, psycopg2.errors, psycopg2.extensions)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, psycopg2.Error | psycopg2.Warning)
    },
    key=lambda kind: kind.__name__,
)


def test_there_are_many_driver_errors_to_map():
    assert len(PSYCOPG2) > 200


@pytest.mark.parametrize("kind", PSYCOPG2, ids=lambda kind: kind.__name__)
def test_every_error_of_psycopg2_is_mapped(kind):
    mapped = driver_named("postgresql").translate(kind("a message"))
    assert isinstance(mapped, dss.ShardSQLError)
    assert "a message" in str(mapped)


def test_errors_of_other_code_are_not_taken_for_the_drivers():
    assert driver_named("postgresql").translate(KeyError("x")) is None


def test_a_real_error_keeps_detail_hint_position_and_sqlstate(topology):
    with pytest.raises(dss.QueryError) as caught:
        dss.collect("SELECT upperr('a') AS x", topology, shards=["s1"])
    error = caught.value
    assert error.sqlstate == "42883"
    assert error.position == 8
    assert "hint: No function matches" in str(error)
    assert str(error).splitlines()[1:3] == ["LINE 1: SELECT upperr('a') AS x", " " * 15 + "^"]


def test_a_server_that_goes_away_is_a_lost_connection(servers):
    topology = dss.Topology.from_dsns({"s1": servers.dsns["s1"]})
    with pytest.raises(dss.ConnectionLostError) as caught:
        dss.collect("SELECT pg_terminate_backend(pg_backend_pid())::text AS x", topology)
    assert caught.value.shard == "s1"
    assert dss.collect("SELECT 1 AS x", topology).num_rows == 1
