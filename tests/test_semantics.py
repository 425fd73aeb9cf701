"""A union that is not one answer is warned of; a shard that cannot have rows is not visited."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

import dask_shardsql as dss
from dask_shardsql.sql.semantics import why_not_a_union

KEYS = (("orders", "id"), ("public.items", "oid"))


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("SELECT * FROM orders", None),
        ("SELECT * FROM orders WHERE kind = %s AND 'order by' <> 'limit' -- GROUP BY", None),
        ("TABLE orders", None),
        ("SELECT id, count(*) FROM orders GROUP BY id HAVING count(*) > 1", None),
        ("SELECT upper(kind), id, count(*) FROM orders GROUP BY 1, 2", None),
        ("SELECT * FROM orders, items WHERE id = oid", None),
        ("SELECT * FROM orders o JOIN items i ON o.id = i.oid JOIN kinds k ON k.x = i.x", None),
        ("SELECT * FROM orders WHERE EXISTS (SELECT 1 FROM items WHERE oid = id)", None),
        ("SELECT rank() OVER (PARTITION BY id ORDER BY x) FROM orders", None),
        ("SELECT id FROM orders UNION ALL SELECT oid FROM items", None),
        ("WITH q AS (SELECT * FROM orders) SELECT * FROM q", None),
        ("SELECT 1 AS a", None),
        ("SELECT id FROM orders UNION ALL SELECT x FROM kinds", "the same rows"),
        ("WITH k AS (SELECT x FROM kinds) SELECT * FROM k", "the same rows"),
        ("SELECT range_agg(x) FROM orders", "aggregates"),
        ("SELECT nonsense nonsense nonsense FROM orders GROUP", None),
        ("SELECT count(*) FROM orders", "aggregates"),
        ('SELECT sum(x) FROM "orders" WHERE id > 3', "aggregates"),
        ("SELECT kind, count(*) FROM orders GROUP BY 1", "aggregates"),
        ("SELECT max(x) FROM (SELECT x FROM orders) q", "aggregates"),
        ("SELECT x %% 3 AS x FROM orders ORDER BY x", "ORDER BY"),
        ("SELECT * FROM orders LIMIT %s", "LIMIT"),
        ("SELECT * FROM orders OFFSET 3", "OFFSET"),
        ("SELECT DISTINCT kind FROM orders", "DISTINCT"),
        ("SELECT DISTINCT o.kind FROM orders o JOIN items i ON i.oid = o.id", "DISTINCT"),
        ("SELECT DISTINCT ON (kind) kind, id FROM orders", "DISTINCT"),
        ("SELECT DISTINCT id FROM orders ORDER BY id", "ORDER BY"),
        ("SELECT DISTINCT ON (id) id, x FROM orders ORDER BY id, x", "ORDER BY"),
        ("SELECT DISTINCT id FROM orders LIMIT 3", "LIMIT"),
        ("SELECT DISTINCT id, rank() OVER (ORDER BY x) FROM orders", "windows"),
        ("SELECT count(*) FROM (SELECT DISTINCT id FROM orders) q", "aggregates"),
        ("SELECT DISTINCT * FROM (SELECT kind FROM orders) q", "DISTINCT"),
        ("SELECT count(*) OVER (PARTITION BY x) FROM orders", "windows"),
        ("SELECT sum(count(*)) OVER (PARTITION BY 1) FROM orders", "aggregates"),
        ("SELECT id, sum(x) OVER (PARTITION BY id) FROM orders", None),
        ("SELECT DISTINCT id FROM orders", None),
        ("SELECT DISTINCT Kind, o.ID FROM orders o", None),
        ("SELECT DISTINCT i.oid, o.kind FROM orders o JOIN items i ON i.oid = o.id", None),
        ("SELECT DISTINCT ON (id) id, x FROM orders", None),
        ("SELECT DISTINCT * FROM orders", None),
        ("SELECT DISTINCT id, count(*) FROM orders GROUP BY id", None),
        ("SELECT * FROM orders WHERE id IN (SELECT DISTINCT oid FROM items)", None),
        ("SELECT rank() OVER (ORDER BY x) FROM orders", "windows"),
        ("SELECT id FROM orders UNION SELECT oid FROM items", "UNION"),
        ("SELECT * FROM orders JOIN items ON items.x = orders.x", "joins"),
        ("SELECT * FROM kinds LEFT JOIN orders ON true", "joins"),
        ("SELECT * FROM kinds", "no sharded table"),
    ],
)
def test_what_holds_within_each_shard(sql, why):
    found = why_not_a_union(sql, KEYS)
    assert (found is None) if why is None else (why in (found or ""))


def test_a_simple_query_needs_no_parser():
    code = (
        "import sys; from dask_shardsql.sql.semantics import why_not_a_union as why; "
        "why('SELECT a, upper(b) FROM orders WHERE id = %s', (('orders', 'id'),)); "
        "assert 'sqlglot' not in sys.modules; why('SELECT 1', (('orders', 'id'),)); "
        "assert 'sqlglot' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def pruned(servers):
    servers.execute(
        "CREATE TABLE se_orders (id int8 NOT NULL, x int); CREATE TABLE se_kinds (x int)"
    )
    names = list(servers.dsns)[:3]
    rows = [(i, i % 7) for i in range(60)]
    servers.load("se_orders", rows, shard_of=lambda row: row[0] % 3)
    servers.load("se_kinds", [(i,) for i in range(9)])
    servers.execute("ANALYZE se_orders")
    dsns = {name: servers.dsns[name] for name in names}
    sharded = {"se_orders": {"key": "id", "function": "modulo", "shards": names}}
    return dss.Topology.from_dsns(dsns, sharded=sharded)


def test_a_warning_says_what_to_do(pruned):
    with pytest.warns(dss.UnionSemanticsWarning, match="aggregates.*merge='global'") as caught:
        assert len(dss.collect("SELECT count(*) FROM se_orders", pruned)) == 3
    assert caught[0].filename == __file__
    with pytest.warns(dss.UnionSemanticsWarning, match="LIMIT") as caught:
        dss.read_sharded_sql("SELECT * FROM se_orders LIMIT 2", pruned)
    assert caught[0].filename == __file__
    with pytest.warns(dss.UnionSemanticsWarning, match="no sharded table") as caught:
        assert sum(b.num_rows for b in dss.stream("SELECT x FROM se_kinds", pruned)) == 27
    assert caught[0].filename == __file__
    found = dss.explain("SELECT count(*) FROM se_orders", pruned)
    assert "aggregates" in found.message
    assert found.message in str(found)


def test_no_warning_where_there_is_nothing_to_say(pruned):
    alone = dss.Topology(pruned.shards[:1], (dss.ShardedTable("se_orders", "id"),))
    unnamed = dss.Topology(pruned.shards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dss.collect("SELECT id FROM se_orders WHERE x = %s", pruned, [1])
        dss.collect("SELECT count(*) FROM se_orders", alone)
        dss.collect("SELECT count(*) FROM se_orders", unnamed)
        dss.collect("SELECT count(*) FROM se_orders", pruned, shards=["s1"])
        dss.collect("SELECT count(*) FROM se_orders", pruned, merge="global")
        dss.read_sharded_table("se_orders", pruned)


def test_the_command_notes_it_and_can_merge(pruned, servers, tmp_path):
    file = tmp_path / "shards.toml"
    shards = "\n".join(
        f'[[shards]]\nname = "{shard.name}"\ndsn = "{servers.dsns[shard.name]}"'
        for shard in pruned.shards
    )
    file.write_text(f'{shards}\n[sharded]\nse_orders = "id"\n')
    file.chmod(0o600)
    command = [sys.executable, "-m", "dask_shardsql.cli", "query", "-t", str(file), "-f", "csv"]
    sql = "SELECT count(*) AS n FROM se_orders"

    def run(*more):
        done = subprocess.run([*command, *more, sql], capture_output=True, text=True, check=True)
        return done.stdout.split(), done.stderr

    rows, said = run()
    assert rows == ["n", "20", "20", "20"]
    assert said.startswith("note: the union of 3 shards' answers is not")
    assert said.endswith(". --merge global gives that\n")
    assert run("--merge", "global") == (["n", "60"], "")
    assert os.path.exists(file)


@pytest.mark.parametrize(
    ("sql", "params", "strategy", "shards"),
    [
        ("SELECT count(*) AS n, sum(x) AS s FROM se_orders WHERE id = %s", [7], "direct", {"s2"}),
        ("SELECT * FROM se_orders WHERE id = %(id)s ORDER BY x", {"id": 9}, "direct", {"s1"}),
        (
            "SELECT rank() OVER (ORDER BY x) AS r FROM se_orders WHERE id IN (3, 6)",
            None,
            "direct",
            {"s1"},
        ),
        ("SELECT count(*) AS n FROM se_orders WHERE id = 1 AND id = 2", None, "direct", set()),
        ("SELECT count(*) AS n FROM se_orders WHERE false", None, "direct", set()),
        ("SELECT id FROM se_orders WHERE id = ANY(%s)", [[1, 4, 5]], "union", {"s2", "s3"}),
        ("SELECT id, x FROM se_orders WHERE id BETWEEN 1 AND 2", None, "union", {"s2", "s3"}),
        (
            "SELECT a.id FROM se_orders a JOIN se_orders b ON a.id = b.id WHERE b.id = 4",
            None,
            "direct",
            {"s2"},
        ),
        ("SELECT count(*) AS n FROM se_orders WHERE id IN (1, 2)", None, "merge", {"s2", "s3"}),
        (
            "SELECT id FROM se_orders WHERE id = 1 UNION SELECT id FROM se_orders WHERE id = 4",
            None,
            "direct",
            {"s2"},
        ),
        (
            "SELECT id FROM se_orders WHERE id = 1 UNION SELECT id FROM se_orders WHERE id = 5",
            None,
            "merge",
            {"s2", "s3"},
        ),
        (
            "SELECT k.x, o.id FROM se_kinds k LEFT JOIN se_orders o ON o.x = k.x AND o.id = 4",
            None,
            "direct",
            {"s2"},
        ),
        ("SELECT count(*) AS n FROM se_orders WHERE id <> 1", None, "merge", {"s1", "s2", "s3"}),
        ("SELECT count(*) AS n FROM se_orders WHERE x = 1", None, "merge", {"s1", "s2", "s3"}),
    ],
)
def test_shards_without_rows_are_not_visited(sql, params, strategy, shards, pruned, servers):
    expected = dss.collect(sql, servers.reference, params)
    found = dss.collect(sql, pruned, params, merge="global")
    assert found.schema.equals(expected.schema)
    assert sorted(map(str, found.to_pylist())) == sorted(map(str, expected.to_pylist()))
    explained = dss.explain(sql, pruned, params, merge="global")
    assert explained.strategy == strategy
    assert set(explained.visited) == shards
    for table in explained.gathered:
        assert {shard for shard, size in table["bytes"].items() if size} <= shards


def test_explain_can_measure(pruned):
    sql = "SELECT x, count(*) AS n FROM se_orders GROUP BY x"
    found = dss.explain(sql, pruned, merge="global", analyze=True)
    (answer,) = [one for one in found.actual if one["part"] == "answer"]
    assert (answer["shard"], answer["rows"]) == (found.shards[0], 7)
    partials = {one["shard"]: one for one in found.actual if one["part"] == "partial"}
    assert {shard: one["rows"] for shard, one in partials.items()} == {"s1": 7, "s2": 7, "s3": 7}
    # a COPY's header and trailer, and for each row two bytes, and 4 + 4 and 4 + 8
    sizes = {shard: one["bytes"] for shard, one in partials.items()}
    assert sizes == {shard: 0 if shard in found.shards else 21 + 7 * 22 for shard in sizes}
    assert all(0 < one["seconds"] < 60 for one in found.actual)
    assert f"answer    {answer['shard']}: 7 rows" in str(found)
    assert found.to_dict()["actual"] == list(found.actual)
    union = dss.explain("SELECT id FROM se_orders", pruned, analyze=True)
    assert [(one["part"], one["rows"]) for one in union.actual] == [("answer", 20)] * 3
    assert dss.explain(sql, pruned, merge="global").actual == ()
    refused = dss.explain(sql, pruned, merge="global", analyze=True, max_gather_bytes=1)
    assert refused.actual == ()
    assert "which is refused" in str(refused)


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as made,
    ):
        yield made


@pytest.mark.parametrize("way", ["threads", "cluster"])
def test_stream_gives_one_answer_in_its_order(way, pruned, servers, request):
    sql = "SELECT id, x FROM se_orders ORDER BY x DESC, id LIMIT 45"
    expected = dss.collect(sql, servers.reference)
    client = request.getfixturevalue("client") if way == "cluster" else None
    reader = dss.stream(sql, pruned, merge="global", batch_size=256, scheduler=client)
    assert reader.schema == expected.schema
    batches = list(reader)
    assert [row for batch in batches for row in batch.to_pylist()] == expected.to_pylist()
    assert len(batches) > 1
    with pytest.raises(dss.MergeRefusedError):
        dss.stream("SELECT ctid::text FROM se_orders", pruned, merge="global")
    with pytest.raises(dss.ConfigurationError, match="single shards"):
        dss.stream(sql, pruned, merge="global", shards=["s1"])
