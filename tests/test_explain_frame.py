"""What ``explain`` says of a DataFrame is what its shards are asked for; it asks them nothing."""

from __future__ import annotations

import json
import sqlite3

import dask
import dask.dataframe as dd
import pandas as pd
import pytest
from test_pushdown import asked_by

import dask_shardsql as dss

ROWS = [(i, i % 5, i / 2, f"w{i % 3}", i / 4) for i in range(40)]


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(
        "CREATE TABLE ef_rows (id int8, n int4, x float8, word text, price numeric(9,2))"
    )
    servers.load("ef_rows", ROWS, shard_of=lambda row: row[0] % 3)
    yield servers
    servers.execute("DROP TABLE ef_rows")


@pytest.fixture(scope="module")
def topology(loaded):
    dsns = {name: loaded.dsns[name] for name in ("s1", "s2", "s3")}
    return dss.Topology.from_dsns(dsns, sharded={"ef_rows": "id"})


@pytest.fixture(scope="module")
def ddf(topology):
    return dss.read_sharded_sql("SELECT * FROM ef_rows", topology)


ALIKE = "PostgreSQL is not known to agree with Arrow on every row"
NOT_THE_SAME = "shards are not known to compute the same"
BESIDES = "other parts need all of these rows"
COUNT = "ddf['word'].str.count('w') > 0"
NO_GROUPS = f"shards are not known to make the same groups, or {BESIDES}"


def counts(d):
    return d.word.str.count("w") > 0


# what is made, what is asked for, what is left to dask and why
SHAPES = {
    "all": (lambda d: d, "rows", {}),
    "columns": (lambda d: d[["word", "n"]], "rows", {}),
    "a series": (lambda d: d[d.n > 1].word, "rows", {}),
    "the index": (lambda d: d.index, "rows", {}),
    "a sum": (lambda d: d.n.sum(), "reductions", {}),
    "a mean of a filter": (lambda d: d[d.n > 1].price.mean(), "reductions", {}),
    "a length": (lambda d: d[d.n > 1].shape[0], "count", {}),
    "groups": (lambda d: d.groupby("word").n.sum(), "groups", {}),
    "groups of a filter": (
        lambda d: d[d.n > 1].groupby("word", dropna=False).agg({"n": ["max"], "price": "sum"}),
        "groups",
        {},
    ),
    "a head": (lambda d: d[d.n > 1].head(3, npartitions=-1, compute=False), "rows", {}),
    "some partitions": (lambda d: d.partitions[[0, 2]].n.max(), "reductions", {}),
    "a part of a filter": (
        lambda d: d[(d.n > 1) & counts(d)].id,
        "rows",
        {f"({COUNT})": ALIKE},
    ),
    "one of two": (
        lambda d: d[~counts(d) | d.n.isin([1, 2]) | d.x.between(1, 2)].id,
        "rows",
        {f"((~({COUNT}) | ddf['n'].isin([1, 2])) | ddf['x'].between(1, 2, 'both'))": ALIKE},
    ),
    "behind a head": (
        lambda d: (lambda h: h[h.n > 1])(d.head(9, npartitions=1, compute=False)),
        "rows",
        {"(ddf.head(9)['n'] > 1)": "it is not of columns as they were read"},
    ),
    "a head behind it": (
        lambda d: d[counts(d)].head(3, npartitions=-1, compute=False),
        "rows",
        {f"({COUNT})": ALIKE, "ddf[...].head(3)": "a condition before it is in dask"},
    ),
    "a reduction behind it": (
        lambda d: d[counts(d)].n.max(),
        "rows",
        {f"({COUNT})": ALIKE, "ddf['n'][...].max()": "a condition before it is in dask"},
    ),
    "NaN": (
        lambda d: d.x.max(),
        "rows",
        {"ddf['x'].max()": NOT_THE_SAME},
    ),
    "another function": (
        lambda d: d.word.value_counts(),
        "rows",
        {"ddf['word'].value_counts()": NOT_THE_SAME},
    ),
    "other keys": (lambda d: d.groupby("x").n.sum(), "rows", {"ddf.groupby('x').sum()": NO_GROUPS}),
    "other aggregates": (
        lambda d: d.groupby("word").agg({"n": "std"}),
        "rows",
        {"ddf.groupby('word').agg()": NO_GROUPS},
    ),
    "two of one": (
        lambda d: d.n + d[d.n > 1].n,
        "rows",
        {"(ddf['n'] > 1)": BESIDES},
    ),
    "a text of pandas": (
        lambda d: d.query("n > 1").id,
        "rows",
        {"ddf.query('n > 1')": "what query() says is looked into by pandas alone"},
    ),
    "a computed column": (
        lambda d: d.assign(z=d.n + 1)[["z", "id"]],
        "rows",
        {},
    ),
    "a merge": (lambda d: d.merge(d[["id"]], on="id"), "rows", {}),
    "a merge of a part": (
        lambda d: d.merge(d[d.n > 1], on="id"),
        "rows",
        {"(ddf['n'] > 1)": BESIDES},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_says_what_the_shards_are_asked(shape, ddf, monkeypatch):
    make, asks_for, left = SHAPES[shape]
    asked = asked_by(monkeypatch)
    found = dss.explain(make(ddf))
    assert not asked
    make(ddf).compute(scheduler="sync")
    on = [(read["sql"], shard) for read in found.reads for shard in read["shards"]]
    assert sorted(sql for sql, _ in on) == sorted(asked)
    assert {read["asks_for"] for read in found.reads} == {asks_for}
    assert {one["operation"]: one["because"] for one in found.left} == left
    assert not found.message
    for read in found.reads:
        assert all(
            one.replace('("', '(dask_shardsql."') in read["sql"] for one in read["conditions"]
        )


def test_what_it_shows(ddf):
    found = dss.explain(ddf[(ddf.n > 1) & counts(ddf)][["id"]].partitions[[1]])
    assert str(found) == (
        'each      SELECT dask_shardsql."id", dask_shardsql."word" FROM (\n'
        "          SELECT * FROM ef_rows\n"
        '          ) AS dask_shardsql WHERE (dask_shardsql."n" > 1)\n'
        "asked for rows: id, word\n"
        "on        s2\n"
        'where     ("n" > 1)\n'
        f"in dask   ({COUNT})\n"
        f"          {ALIKE}"
    )
    (read,) = found.to_dict()["reads"]
    assert (read["partitions"], read["columns"], read["limit"]) == (1, ["id", "word"], None)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    page = found._repr_html_()
    assert "<th>where</th><td><pre>(&quot;n&quot; &gt; 1)</pre>" in page
    (read,) = dss.explain(ddf.head(2, compute=False)).reads
    assert (read["limit"], read["shards"]) == (2, ["s1"])


def test_why_nothing_can_be_pushed(topology, loaded, tmp_path):
    sql = "SELECT * FROM ef_rows"

    def because(read):
        found = dss.explain(read[read.n > 1])
        assert [one["operation"] for one in found.left] == ["(ddf['n'] > 1)"]
        (read,) = found.reads
        assert found.left[0]["because"] == read["because"]
        return read["because"]

    named = dss.read_sharded_sql(sql, topology, snapshot="monday")
    assert because(named) == "all rows are read under the name of a snapshot"
    nullable = dss.read_sharded_sql(sql, topology, dtype_backend="numpy_nullable")
    assert because(nullable) == "dtype_backend='numpy_nullable' has other NULLs and types"
    over_all = dss.read_sharded_sql(
        "SELECT word, count(*) AS n FROM ef_rows GROUP BY 1", topology, merge="global"
    )
    assert because(over_all) == "rows of several shards meet for merge='global'"
    with dask.config.set({"shardsql.pushdown": False}):
        assert because(dss.read_sharded_sql(sql, topology)) == "shardsql.pushdown is off"
    sqlite3.connect(tmp_path / "one.db").close()
    file = dss.Topology.from_dsns({"s1": f"sqlite:///{tmp_path}/one.db"})
    of_file = dss.read_sharded_sql("SELECT 1 AS n", file, types={"n": "int64"})
    assert because(of_file) == "only PostgreSQL is asked for less than a query's answer"


def test_slices(topology, monkeypatch):
    ddf = dss.read_sharded_table("ef_rows", topology, partitions_per_shard=2)
    asked = asked_by(monkeypatch)
    found = dss.explain(ddf[ddf.n > 1].price.sum())
    assert not asked
    (read,) = found.reads
    assert (read["partitions"], read["sliced_by"]) == (6, "ctid")
    assert "on        s1, s2, s3, in 6 partitions by ctid" in str(found)
    (left,) = found.left
    assert left == {"operation": "ddf['price'].sum()", "because": "the shards are read in slices"}


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d[d.n > 1].sort_values("id"),
        lambda d: d[d.n > 1].set_index("id"),
        lambda d: d[d.n > 1].repartition(partition_size="1 KiB"),
    ],
)
def test_what_dask_would_compute_first_is_not_computed(make, ddf, topology, monkeypatch):
    sliced = dss.read_sharded_table("ef_rows", topology, partitions_per_shard=2)
    asked = asked_by(monkeypatch)
    for one in (ddf, sliced):
        found = dss.explain(make(one))
        assert not asked
        assert [read["conditions"] for read in found.reads] == [['("n" > 1)']]
        assert "dask itself computes something of the rows" in str(found)


def test_what_is_made_of_no_read(ddf):
    own = dd.from_pandas(pd.DataFrame({"n": [1, 2]}), npartitions=1)
    assert str(dss.explain(own[own.n > 1])) == "reads     nothing of shards"
    assert dss.explain(ddf.persist(scheduler="sync")).reads == ()


def test_only_a_text_has_options(ddf, topology):
    for options in ({"topology": topology}, {"analyze": True}, {"merge": "global"}):
        with pytest.raises(dss.ConfigurationError, match="nothing else"):
            dss.explain(ddf, **options)
