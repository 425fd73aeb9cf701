"""What we assume of dask's private classes; each test fails loudly when dask moves one of them."""

from __future__ import annotations

import decimal
import inspect
import time
from importlib.metadata import requires, version

import dask
import dask.dataframe as dd
import pandas as pd
import pyarrow as pa
import pytest
from dask._expr import FinalizeCompute
from dask.callbacks import Callback
from distributed import Client, get_worker
from packaging.requirements import Requirement

import dask_shardsql as dss
from dask_shardsql.frame import (
    _dask,
    accessors,
    constants,
    decimals,
    explained,
    groups,
    partials,
    pushdown,
)
from dask_shardsql.frame.expr import ReadShards, ReadWhole


def test_the_installed_dask_is_within_the_pin():
    pins = {r.name: r for r in map(Requirement, requires("dask_shardsql")) if not r.marker}
    for name in ("dask", "distributed"):
        assert pins[name].specifier.contains(version(name))
        assert any(s.operator == "<" for s in pins[name].specifier), f"{name} has no upper pin"


def test_every_name_behind_the_door_exists_and_is_used():
    modules = (
        inspect.getmodule(ReadShards),
        accessors,
        constants,
        decimals,
        explained,
        groups,
        partials,
        pushdown,
    )
    sources = [inspect.getsource(module) for module in modules]
    sources.append(inspect.getsource(inspect.getmodule(dss.read_sharded_sql)))
    for name in _dask.__all__:
        assert hasattr(_dask, name)
        assert any(name in source for source in sources), f"{name} is not used"


def test_what_pushdown_assumes_of_conditions():
    """The operands of dask's expressions, and that nothing else is meant by these classes."""
    ddf = dd.from_pandas(pd.DataFrame({"a": [1, 2, 3], "b": [1, 2, 4]}), npartitions=1)
    comparisons = [_dask.EQ, _dask.NE, _dask.LT, _dask.LE, _dask.GT, _dask.GE]
    made = [ddf.a == 1, ddf.a != 1, ddf.a < 1, ddf.a <= 1, ddf.a > 1, ddf.a >= 1]
    for kind, frame in zip(comparisons, made, strict=True):
        assert type(frame.expr) is kind
        assert kind._parameters == ["left", "right"]
    assert type((ddf.a > 1).expr) is _dask.GT
    both = (ddf.a > 1) & (ddf.b > 1)
    assert (type(both.expr), type((~both).expr)) == (_dask.And, _dask.Invert)
    assert type(((ddf.a > 1) | (ddf.b > 1)).expr) is _dask.Or
    between = ddf.a.between(1, 2, inclusive="left").expr
    assert (type(between), between.left, between.right) == (_dask.Between, 1, 2)
    assert between.inclusive == "left"
    isin = ddf.a.isin([1, 2]).expr
    held = isin.operand("values")
    assert (type(isin), type(held)) == (_dask.Isin, _dask.DelayedExpr)
    assert list(constants.held(held.operand("obj"))) == [1, 2]
    assert [type(f.expr) for f in (ddf.a.isna(), ddf.a.notnull())] == [_dask.IsNa, _dask.NotNull]
    chosen = ddf[both].expr
    assert (type(chosen), type(chosen.predicate)) == (_dask.Filter, _dask.And)
    head = ddf.head(2, npartitions=1, compute=False).expr
    assert (type(head), head.n, head._parameters) == (_dask.Head, 2, ["frame", "n", "npartitions"])
    projection = ddf.a.expr
    assert (type(projection), projection.operand("columns")) == (_dask.Projection, "a")


def test_what_accessors_assume_of_str_and_dt():
    """How dask keeps what was called; the deprecated names are pandas' words for the same."""
    frame = pd.DataFrame({"t": ["a"], "d": pd.to_datetime(["2024-02-29"])})
    ddf = dd.from_pandas(frame.convert_dtypes(dtype_backend="pyarrow"), npartitions=1)
    for made, kind, of in (
        (ddf.t.str.startswith("a", na=False), _dask.FunctionMap, ("str", "startswith")),
        (ddf.t.str.endswith(("a", "b")), _dask.FunctionMap, ("str", "endswith")),
        (ddf.t.str.contains("a", regex=False), _dask.FunctionMap, ("str", "contains")),
        (ddf.t.str.len(), _dask.FunctionMap, ("str", "len")),
        (ddf.d.dt.floor("D"), _dask.FunctionMap, ("dt", "floor")),
        (ddf.d.dt.normalize(), _dask.FunctionMap, ("dt", "normalize")),
        (ddf.d.dt.year, _dask.PropertyMap, ("dt", "year")),
        (ddf.d.dt.date, _dask.PropertyMap, ("dt", "date")),
    ):
        expr = made.expr
        assert (type(expr), expr.accessor, expr.attr) == (kind, *of)
        assert type(expr.frame) is _dask.Projection
    called = ddf.t.str.contains("a", False, na=True).expr
    assert (called.operand("args"), called.operand("kwargs")) == (("a", False), {"na": True})
    for how, (names, _) in accessors._PATTERNS.items():
        of_pandas = inspect.signature(getattr(pd.Series.str, how)).parameters
        assert tuple(of_pandas) == ("self", *names)


def test_what_explain_assumes(ddf_of_three):
    ddf = ddf_of_three
    left = ddf[ddf.a > 1].query("a > 2")
    assert (type(left.expr), left.expr.operand("_expr")) == (_dask.Query, "a > 2")
    head = ddf.head(2, compute=False).optimize(fuse=False).expr
    assert type(head) is _dask.BlockwiseHead
    assert head.n == 2
    chunk = ddf.groupby("a").b.sum().optimize(fuse=False).expr.frame
    assert (type(chunk), chunk.by) == (_dask.GroupByChunk, ["a"])
    assert (ddf.a > 1).expr._operator_repr == ">"


@pytest.fixture
def ddf_of_three():
    return dd.from_pandas(pd.DataFrame({"a": [1, 2, 3], "b": [1, 2, 4]}), npartitions=1)


def test_what_partials_assume_of_reductions():
    ddf = dd.from_pandas(pd.DataFrame({"a": [1, 2, 3]}), npartitions=2)
    kinds = {"sum": _dask.Sum, "count": _dask.Count, "min": _dask.Min, "max": _dask.Max}
    for name, kind in kinds.items():
        tree = getattr(ddf.a, name)().optimize(fuse=False).expr
        assert type(tree) is _dask.TreeReduce
        chunk = tree.frame
        assert type(chunk) is _dask.Chunk
        assert chunk.kind is kind
        assert isinstance(chunk.frame, _dask.Projection) or chunk.frame.ndim == 1
        values = pd.Series([3, 1, 2])
        assert chunk.chunk(values, **chunk.chunk_kwargs) == getattr(values, name)()
    length = _dask.Len(ddf.expr)
    assert length.combine([length.chunk(pd.DataFrame({"a": [1, 2]})), 3]) == 5
    assert length.aggregate([2, 3]) == 5


def test_dask_adds_what_it_meets_to_its_dependents():
    """So that what is made while it simplifies is known in part only (see `is_known`)."""
    source = inspect.getsource(_dask.Expr.simplify_once)
    assert "dependents[operand._name].append" in source


def test_partition_filtering_calls_filtered_task():
    assert "_filtered_task" in inspect.getsource(_dask.PartitionsFiltered._task)
    assert list(inspect.signature(_dask.PartitionsFiltered._filtered_task).parameters) == [
        *("self", "name", "index"),
    ]


def test_the_means_that_decimals_replace_are_still_where_dask_calls_them():
    assert _dask.GroupByMean.reduction_aggregate is decimals.mean_of_groups
    assert _dask.groupby_module._finalize_mean is decimals.finalize_mean
    original = list(inspect.signature(decimals._dask_finalize_mean).parameters)
    assert list(inspect.signature(decimals.finalize_mean).parameters) == original
    source = inspect.getsource(inspect.getmodule(_dask.GroupByMean)._mean_agg)
    for part in (
        "levels",
        "sort=False",
        "observed=False",
        "dropna=True",
        "len(result.columns) // 2",
    ):
        assert part in source
    assert "_finalize_mean," in inspect.getsource(_dask.groupby_module)


@pytest.mark.parametrize("how", ["mean", "agg"])
def test_means_of_other_types_are_dasks_own(how):
    frame = pd.DataFrame({"k": [1, 1, 2, 2], "x": [1.0, 2.0, None, None], "i": [1, 2, 3, 5]})
    grouped = dd.from_pandas(frame, npartitions=3).groupby("k")
    found = grouped.mean() if how == "mean" else grouped.agg({"x": "mean", "i": "mean"})
    expected = frame.groupby("k").mean()
    pd.testing.assert_frame_equal(found.compute(), expected)


def test_without_our_mending_dask_cannot_average_decimals():
    """When this fails, dask or pandas can do it and decimals.py can go."""
    kind = pa.decimal128(12, 2)
    total = pd.Series([decimal.Decimal(3)], dtype=pd.ArrowDtype(pa.decimal128(38, 2)))
    with pytest.raises(pa.ArrowInvalid, match="precision"):
        total / pd.Series([2], dtype="int64[pyarrow]")
    frame = pd.DataFrame(
        {"k": [1, 1], "v": pd.Series([1, 2], dtype=pd.ArrowDtype(kind))},
    )
    mean = dd.from_pandas(frame, npartitions=1).groupby("k").v.mean().compute()
    assert mean.tolist() == [decimal.Decimal("1.5")]


def test_dask_operations_on_a_read(topology, servers, table_name):
    servers.execute(f"CREATE TABLE {table_name} (id int8, kind text, x float8)")
    rows = [(i, f"k{i % 3}", i / 2) for i in range(60)]
    servers.load(table_name, rows, shard_of=lambda row: row[0] % 4)
    ddf = dss.read_sharded_sql(f"SELECT * FROM {table_name}", topology)
    whole = ddf.compute().sort_values("id").reset_index(drop=True)
    assert list(whole["id"]) == list(range(60))
    assert len(ddf[ddf.x > 10]) == sum(x / 2 > 10 for x in range(60))
    assert len(ddf.head(3)) == 3
    assert ddf.head(100, npartitions=-1, compute=True).shape == (60, 3)
    assert ddf.partitions[1].compute().id.min() == 1
    assert ddf.partitions[[3, 0]].npartitions == 2
    assert sorted(ddf[["x"]].columns) == ["x"]
    assert ddf.x.max().compute() == 29.5
    assert ddf.nlargest(2, "x").compute().id.tolist() == [59, 58]
    assert ddf.persist().x.sum().compute() == sum(range(60)) / 2
    merged = ddf.merge(pd.DataFrame({"kind": ["k0"], "name": ["zero"]}), on="kind").compute()
    assert len(merged) == 20
    assert ddf.set_index("id").loc[7:8].compute().x.tolist() == [3.5, 4.0]
    assert ddf.repartition(npartitions=2).npartitions == 2
    assert dd.concat([ddf, ddf]).npartitions == 8
    assert ddf.map_partitions(len).compute().tolist() == [15, 15, 15, 15]
    assert ddf.assign(y=ddf.x + 1).y.min().compute() == 1
    assert (ddf.x + ddf.id).sum().compute() == sum(range(60)) * 1.5


def test_what_slices_assume_of_lowering():
    """One computation lowers with one memory, which reaches every operand."""
    assert list(inspect.signature(_dask.Expr.lower_once).parameters) == ["self", "lowered"]
    source = inspect.getsource(_dask.Expr.lower_completely)
    assert source.count("lowered: dict = {}") == 1
    assert source.index("lowered: dict = {}") < source.index("while True")
    assert "operand.lower_once(lowered)" in inspect.getsource(_dask.Expr.lower_once)


def test_what_slices_assume_of_the_local_scheduler():
    """An ended computation shows its results and what still runs; done ones are let go of."""
    seen = []

    def finish(graph, state, errored):
        seen.append((errored, dict(state["cache"]), set(state["running"])))

    def fails(x):
        raise ArithmeticError

    graph = {"a": _dask.Task("a", str, 1), "b": _dask.Task("b", fails, _dask.TaskRef("a"))}
    with Callback(finish=finish), pytest.raises(ArithmeticError):
        dask.get(graph, "b")
    graph["b"] = _dask.Task("b", int, _dask.TaskRef("a"))
    with Callback(finish=finish):
        assert dask.get(graph, "b") == 1
    assert seen == [(True, {"a": "1"}, {"b"}), (False, {"b": 1}, set())]


def test_what_slices_assume_of_the_distributed_scheduler():
    """A key's state has room for a note, which is gone when the key is forgotten."""

    def note(dask_scheduler, key):
        task = dask_scheduler.tasks[key]
        before, task.metadata = task.metadata, {"dask_shardsql": 1}
        return before, task.state

    def is_known(dask_scheduler, key):
        return key in dask_scheduler.tasks

    def key_in_task():
        return get_worker().get_current_task()

    with Client(processes=False, n_workers=1, dashboard_address=None) as client:
        future = client.submit(key_in_task, key=("k", 0))
        assert future.result() == ("k", 0)
        assert client.run_on_scheduler(note, key=("k", 0)) == (None, "memory")
        assert client.run_on_scheduler(note, key=("k", 0)) == ({"dask_shardsql": 1}, "memory")
        del future
        deadline = time.monotonic() + 10
        while client.run_on_scheduler(is_known, key=("k", 0)):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_an_expression_chooses_how_compute_ends(topology):
    ddf = dss.read_sharded_sql("SELECT 1 AS x", topology)
    finalized = FinalizeCompute(ddf.expr).optimize()
    assert isinstance(finalized, ReadWhole)
    assert len(finalized.__dask_keys__()) == 1
