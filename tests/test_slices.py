"""Shards split into slices: every row once, in one snapshot, and no session is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import cloudpickle
import dask
import psycopg2
import pytest
from conftest import first_shards
from distributed import Client, LocalCluster, wait

import dask_shardsql as dss
from dask_shardsql import union
from dask_shardsql.engine import slices, snapshots
from dask_shardsql.engine.drivers import postgresql_script, postgresql_slices
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.slicing import Part, Slicing
from dask_shardsql.frame.expr import ReadShards, Snapshots

ROWS = 1332  # of sl_deleted on each shard
TABLES = {
    "empty": ("v int", "SELECT 1, 1 WHERE false"),
    "one_row": ("v int", "SELECT 1, 5"),
    "nulls": ("v int", "SELECT i, NULL FROM generate_series(1, 60) i"),
    "one_value_many_nulls": (
        "v int",
        "SELECT i, CASE WHEN i % 10 = 0 THEN i END FROM generate_series(1, 90) i",
    ),
    "skewed": (
        "v int, pad text",
        "SELECT i, CASE WHEN i % 20 = 0 THEN i WHEN i % 50 > 0 THEN 7 END, repeat('x', 200) "
        "FROM generate_series(1, 2000) i",
    ),
    "nan": (
        "v float8",
        "SELECT i, CASE i % 6 WHEN 0 THEN 'NaN' WHEN 1 THEN 'Infinity' WHEN 2 THEN '-Infinity' "
        "WHEN 3 THEN -0.0 WHEN 4 THEN NULL ELSE i / 3.0 END::float8 FROM generate_series(1, 300) i",
    ),
    "bytes_first": (
        'v text COLLATE "C"',
        r"SELECT i, chr(33 + i % 60) || '%s \ '' " + '"' + "' || i FROM generate_series(1, 300) i",
    ),
    "language": (
        'v text COLLATE "slices_language"',
        "SELECT i, (ARRAY['Ä','a','z','Z','é','E','ö','O'])[1 + i % 8] || i % 9 "
        "FROM generate_series(1, 300) i",
    ),
    "caseless": (
        'v text COLLATE "slices_caseless"',
        "SELECT i, (ARRAY['a','A','b','B'])[1 + i % 4] FROM generate_series(1, 300) i",
    ),
    "padded": ("v char(5)", "SELECT i, 'k' || i % 30 FROM generate_series(1, 300) i"),
    "stamps": (
        "v timestamptz",
        "SELECT i, CASE WHEN i % 9 > 0 THEN '2024-03-31 00:00Z'::timestamptz + i * interval '7 min'"
        " ELSE 'infinity' END FROM generate_series(1, 300) i WHERE i % 9 > 0",
    ),
    "halves_of_rows": (
        "v slices_pair",
        "SELECT i, CASE i % 4 WHEN 0 THEN NULL WHEN 1 THEN ROW(NULL, NULL)::slices_pair "
        "WHEN 2 THEN ROW(i, NULL)::slices_pair ELSE ROW(i, 'x')::slices_pair END "
        "FROM generate_series(1, 300) i",
    ),
    "toasted": (
        "v int, pad text",
        "SELECT i, i, (SELECT string_agg(md5((i * 1000 + j)::text), '') "
        "FROM generate_series(1, 300) j) FROM generate_series(1, 40) i",
    ),
}
WAYS = {
    **{f"ctid {k}": {"partitions_per_shard": k} for k in (2, 3, 40)},
    **{f"range {k}": {"partitions_per_shard": k, "partition_by": "v"} for k in (2, 3, 7)},
    **{
        f"hash {k}": {
            "partitions_per_shard": k,
            "partition_by": "v",
            "partition_method": "hash",
        }
        for k in (2, 5)
    },
}


@pytest.fixture(scope="module")
def two(servers):
    return first_shards(servers, 2)


@pytest.fixture(scope="module", autouse=True)
def tables(servers):
    """On every shard, of each kind of table one named sl_<kind>, with `id` and `v`."""
    for sql in (
        "DROP TABLE IF EXISTS sl_partitioned, sl_heirs CASCADE",
        *(f"DROP TABLE IF EXISTS sl_{name}" for name in TABLES),
        "DROP TYPE IF EXISTS slices_pair",
        "DROP COLLATION IF EXISTS slices_language, slices_caseless",
        "CREATE TYPE slices_pair AS (a int, b text)",
    ):
        servers.execute(sql)
    caseless = "(provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    for name, wanted in (
        ("language", "(provider = icu, locale = 'sv-SE')"),
        ("caseless", caseless),
    ):
        try:
            servers.execute(f"CREATE COLLATION slices_{name} {wanted}")
        except dss.QueryError:  # a build without ICU: some other order than that of bytes
            servers.execute(f"CREATE COLLATION slices_{name} FROM {_another_collation(servers)}")
    for name, (columns, select) in TABLES.items():
        servers.execute(f"CREATE TABLE sl_{name} (id int, {columns})")
        servers.execute(f"INSERT INTO sl_{name} {select}")
    servers.execute("CREATE TABLE sl_partitioned (id int, v int, pad text) PARTITION BY RANGE (id)")
    for number, (low, high) in enumerate(((0, 50), (50, 2000), (2000, 2001), (3000, 4000))):
        servers.execute(
            f"CREATE TABLE sl_partitioned_{number} PARTITION OF sl_partitioned "
            f"FOR VALUES FROM ({low}) TO ({high})"
            + (" PARTITION BY HASH (id)" if number == 1 else "")
        )
    for number in range(3):
        servers.execute(
            f"CREATE TABLE sl_partitioned_1_{number} PARTITION OF sl_partitioned_1 "
            f"FOR VALUES WITH (MODULUS 3, REMAINDER {number})"
        )
    servers.execute(
        "INSERT INTO sl_partitioned SELECT i, i % 11, repeat('y', 300) "
        "FROM generate_series(0, 2000) i"
    )
    servers.execute("CREATE TABLE sl_heirs (id int, v int)")
    servers.execute("CREATE TABLE sl_heirs_1 (pad text) INHERITS (sl_heirs)")
    servers.execute("INSERT INTO sl_heirs SELECT i, i FROM generate_series(1, 700) i")
    servers.execute(
        "INSERT INTO sl_heirs_1 SELECT i, i, repeat('z', 500) FROM generate_series(701, 1500) i"
    )
    servers.execute(
        "CREATE TABLE sl_deleted (id int, v int, pad text)"
        if not _exists(servers, "sl_deleted")
        else "TRUNCATE sl_deleted"
    )
    servers.execute(
        "INSERT INTO sl_deleted SELECT i, i, repeat('d', 300) FROM generate_series(1, 3000) i"
    )
    servers.execute("DELETE FROM sl_deleted WHERE id % 3 = 0 OR id BETWEEN 1000 AND 2000")


def _another_collation(servers):
    with servers.session("s1") as cursor:
        cursor.execute("SELECT collname FROM pg_collation WHERE collprovider = 'c'")
        for (name,) in cursor.fetchall():
            cursor.execute(f"SELECT 'a' < 'B' COLLATE \"{name}\"")
            if cursor.fetchone()[0]:
                return f'"{name}"'
    return '"C"'


def _exists(servers, name):
    with servers.session("s1") as cursor:
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (name,))
        return cursor.fetchone()[0]


def holding(servers, topology):
    """How many sessions of ours are idle in a transaction."""
    found = 0
    for shard in topology.shards:
        with servers.session(shard.name) as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' "
                "AND application_name LIKE 'dask_shardsql%'"
            )
            found += cursor.fetchone()[0]
    return found


def wait_until(condition, seconds=15):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows_of(frame):
    return sorted(map(repr, frame.astype(str).to_dict("records")))


@pytest.mark.parametrize("table", [*TABLES, "partitioned", "heirs", "deleted"])
def test_the_slices_together_are_the_rows(servers, two, table):
    name = f"sl_{table}"
    with servers.session("s1") as cursor:
        cursor.execute(f"SELECT id FROM {name}")
        ids = sorted(2 * cursor.fetchall())
    whole = dss.read_sharded_sql(f"SELECT * FROM {name}", two, shard_column="shard").compute()
    assert sorted((int(i),) for i in whole["id"]) == ids
    expected = rows_of(whole)
    by_table = set()
    for way, options in WAYS.items():
        ddf = dss.read_sharded_table(
            name, _unsharded(two), shard_column="shard", scheduler="threads", **options
        )
        assert ddf.npartitions == 2 * options["partitions_per_shard"]
        parts = dask.compute(*ddf.to_delayed(), scheduler="threads")
        found = [row for part in parts for row in map(repr, part.astype(str).to_dict("records"))]
        assert sorted(found) == expected, way
        by_table.add(sum(len(part) > 0 for part in parts))
        if "partition_by" in options:
            ddf = dss.read_sharded_sql(
                f"SELECT * FROM {name} WHERE id > %s -- %%",
                two,
                [-1],
                shard_column="shard",
                **options,
            )
            assert rows_of(ddf.compute()) == expected, way
    if len(ids) > 200:
        assert max(by_table) >= 4  # more than one slice of a shard has rows
    wait_until(lambda: holding(servers, two) == 0)


def _unsharded(topology):
    return dss.Topology(topology.shards, ())


def test_slices_are_even(two):
    def sizes(table, **options):
        ddf = dss.read_sharded_table(table, _unsharded(two), shards=["s1"], **options)
        return ddf.map_partitions(len).compute().tolist()

    with_pages = sizes("sl_partitioned", partitions_per_shard=3)
    assert max(with_pages) < 0.6 * sum(with_pages)
    assert sizes("sl_heirs", partitions_per_shard=3, partition_by="id") == [499, 500, 501]
    # 81 of 90 rows are NULL: they are a slice of their own
    assert sizes("sl_one_value_many_nulls", partitions_per_shard=4, partition_by="v")[3] == 81
    # 40 of 2000: they are not
    assert sizes("sl_skewed", partitions_per_shard=2, partition_by="v")[1] > 40
    hashed = sizes("sl_heirs", partitions_per_shard=3, partition_by="id", partition_method="hash")
    assert min(hashed) > 400


@pytest.mark.parametrize(
    ("pages", "slices", "bounds"),
    [
        ((10,), 2, [5]),
        ((10,), 3, [4, 7]),
        ((2, 10), 2, [4]),
        ((0, 0), 3, [0, 0]),
        ((), 2, [0]),
        ((1,), 4, [1, 1, 1]),
        ((3, 3, 3), 3, [1, 2]),
    ],
)
def test_pages_are_cut_evenly_over_all_tables(pages, slices, bounds):
    assert postgresql_slices.page_bounds(pages, slices) == bounds


def test_partition_size_is_of_the_table_or_of_the_estimated_answer(servers, two):
    with servers.session("s1") as cursor:
        cursor.execute("SELECT pg_table_size('sl_toasted'), pg_relation_size('sl_toasted')")
        whole, main = cursor.fetchone()
    assert whole > 3 * main
    topology = _unsharded(two)
    ddf = dss.read_sharded_table("sl_toasted", topology, partition_size=whole // 3 + 1)
    assert ddf.npartitions == 6
    assert len(ddf) == 80
    assert dss.read_sharded_table("sl_toasted", topology, partition_size="1 GiB").npartitions == 2
    servers.execute("ANALYZE sl_partitioned")
    sql = "SELECT id, v FROM sl_partitioned"  # 2001 rows of 8 bytes
    ddf = dss.read_sharded_sql(sql, two, partition_size="4 kiB", partition_by="id")
    assert ddf.npartitions == 8
    assert len(ddf) == 4002
    with pytest.raises(dss.ConfigurationError, match="'s1'.*partitions, where 10,000 are the most"):
        dss.read_sharded_sql(sql, two, partition_size=1, partition_by="id")


def test_shards_may_differ_in_their_slices(servers, two, table_name):
    servers.execute(f"CREATE TABLE {table_name} (id int, pad text)")
    with servers.session("s2") as cursor:
        cursor.execute(
            f"INSERT INTO {table_name} SELECT i, repeat('p', 900) FROM generate_series(1, 500) i"
        )
    ddf = dss.read_sharded_table(table_name, _unsharded(two), partition_size="128 KiB")
    with servers.session("s2") as cursor:
        cursor.execute(f"SELECT 1 + ceil(pg_table_size('{table_name}') / 131072.0)")
        assert ddf.npartitions == cursor.fetchone()[0] >= 4
    assert len(ddf.partitions[0].compute()) == 0
    assert len(ddf) == 500
    (found,) = ddf.expr.find_operations(Snapshots)
    assert [key[1] for key in found._layer()] == [1]  # one slice needs no snapshot


@contextmanager
def after_the_first_slice(do):
    """Call `do` once, when the first slice has been read."""
    done = []

    def hear(event):
        if event.state == "finished" and not done:
            done.append(event)
            do()

    with dss.listen(hear):
        yield done


@pytest.fixture
def accounts(servers, two, table_name):
    for shard in two.shards:
        with servers.session(shard.name) as cursor:
            cursor.execute(f"CREATE TABLE {table_name} (id int PRIMARY KEY, v int, pad text)")
            cursor.execute(
                f"INSERT INTO {table_name} SELECT i, i, repeat('a', 400) "
                "FROM generate_series(1, 1000) i"
            )
    yield table_name
    for shard in two.shards:
        with servers.session(shard.name) as cursor:
            cursor.execute(f"DROP TABLE {table_name}")


@pytest.mark.parametrize("way", ["ctid 3", "range 3", "hash 5"])
def test_what_is_committed_between_two_slices_is_not_seen(servers, two, accounts, way):
    def change():
        with servers.connect("s1") as connection, connection.cursor() as cursor:
            cursor.execute(f"UPDATE {accounts} SET v = 2000 - v, pad = 'b'")
            cursor.execute(f"DELETE FROM {accounts} WHERE id % 2 = 0")
            cursor.execute(
                f"INSERT INTO {accounts} SELECT i, i % 1000, 'c' FROM generate_series(5001, 7000) i"
            )
        connection.close()

    options = {**WAYS[way], "shards": ["s1"]}
    ddf = dss.read_sharded_table(accounts, _unsharded(two), **options)
    with after_the_first_slice(change) as done:
        frame = ddf.compute(scheduler="sync")
    assert done[0].slices == ddf.npartitions
    assert sorted(frame["id"]) == list(range(1, 1001))
    assert (frame["id"] == frame["v"]).all()
    assert len(ddf.compute()) == 2500  # the next computation has a snapshot of its own
    wait_until(lambda: holding(servers, two) == 0)


def test_rows_moved_by_a_writer_are_read_once(servers, two, accounts):
    """Money goes from one account to another, and accounts change their ids, all the time."""
    stop, errors, turns = threading.Event(), [], []

    def write():
        try:
            connection = servers.connect("s1")
            connection.autocommit = True
            with connection.cursor() as cursor:
                number = 0
                while not stop.is_set():
                    number += 1
                    turns.append(number)
                    cursor.execute(
                        f"UPDATE {accounts} SET v = v + CASE WHEN id % 2 = 0 THEN 1 ELSE -1 END * "
                        f"{number} WHERE id <= 1000"
                    )
                    cursor.execute(
                        f"WITH gone AS (DELETE FROM {accounts} WHERE id % 10 = {number % 10} "
                        f"RETURNING v) INSERT INTO {accounts} SELECT {10 * number * 1000} + "
                        f"10 * row_number() OVER () + {number % 10}, v, repeat('n', 400) FROM gone"
                    )
                    cursor.execute(f"VACUUM {accounts}")
            connection.close()
        except psycopg2.Error as error:
            errors.append(error)

    def consistent(sql):
        with servers.session("s1") as cursor:
            cursor.execute(sql)
            return cursor.fetchone()

    count, _ = consistent(f"SELECT count(*), sum(v) FROM {accounts}")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: len(turns) > 2)
        began = len(turns)
        for way in (*WAYS, *WAYS):
            options = {**WAYS[way], "shards": ["s1"]}
            frame = dss.read_sharded_table(accounts, _unsharded(two), **options).compute()
            assert len(frame) == count == 1000, way
            assert frame["id"].is_unique, way
    finally:
        stop.set()
        writer.join()
    assert not errors
    assert len(turns) > began


def test_a_session_that_waits_to_change_the_table_gives_a_clear_error(
    servers, two, accounts, monkeypatch
):
    monkeypatch.setattr(postgresql_script, "SLICE_SETTINGS", ("SET LOCAL lock_timeout = '300ms'",))
    emptied = threading.Event()

    def truncate():
        with servers.session("s1") as cursor:
            cursor.execute(f"TRUNCATE {accounts}")
        emptied.set()

    def begin():
        threading.Thread(target=truncate).start()
        time.sleep(0.5)
        assert not emptied.is_set()  # or the next slices would see nothing

    ddf = dss.read_sharded_table(accounts, _unsharded(two), shards=["s1"], partitions_per_shard=3)
    with after_the_first_slice(begin), pytest.raises(dss.QueryError, match="read again") as caught:
        ddf.compute(scheduler="sync")
    assert caught.value.sqlstate == "55P03"
    assert emptied.wait(10)
    wait_until(lambda: holding(servers, two) == 0)


def test_one_connection_a_process_is_enough(two, servers):
    topology = dss.Topology.from_dsns({s.name: servers.dsns[s.name] for s in two.shards})
    with dask.config.set({"shardsql.max-connections-per-worker": 1, "shardsql.pool-timeout": 20}):
        ddf = dss.read_sharded_table("sl_deleted", topology, partitions_per_shard=4)
        assert len(ddf) == 2 * ROWS


def test_types_params_names_and_backends_go_with_slices(two):
    sql = "SELECT id, v::float8 AS \"v%%s\", 'a%%b' AS t FROM sl_deleted WHERE id < %(top)s"
    ddf = dss.read_sharded_sql(
        sql,
        two,
        {"top": 500},
        dtype_backend="numpy",
        types={"id": "float64"},
        shard_column="shard",
        shards=["s2"],
        partitions_per_shard=3,
        partition_by="v%s",
    )
    assert [str(t) for t in ddf.dtypes][:2] == ["float64", "float64"]
    frame = ddf.compute()
    assert frame["v%s"].sum() == sum(i for i in range(500) if i % 3)
    assert set(frame["shard"]) == {"s2"}
    assert set(frame["t"]) == {"a%b"}


def test_bounds_may_hold_percent_signs_and_quotes(two):
    sql = "SELECT * FROM sl_bytes_first WHERE id > %s"
    options = {"partitions_per_shard": 5, "partition_by": "v"}
    assert len(dss.read_sharded_sql(sql, two, [0], **options)) == 600
    assert len(dss.read_sharded_sql("SELECT * FROM sl_bytes_first", two, **options)) == 600


def test_a_slice_tells_its_number(two):
    events = []
    ddf = dss.read_sharded_table(
        "sl_deleted", _unsharded(two), shards=["s1"], partitions_per_shard=3
    )
    with dss.listen(events.append):
        ddf.compute()
    ended = [event for event in events if event.state == "finished"]
    assert sorted((e.slice, e.slices) for e in ended) == [(0, 3), (1, 3), (2, 3)]
    assert sum(event.rows for event in ended) == ROWS


def test_the_progress_of_a_shard_is_that_of_its_slices():
    from dask_shardsql.cli.progress import ShardProgress

    def tell(number, state, rows, seconds=0.1):
        progress.hear(dss.ShardEvent("q", "s1", state, rows, 8 * rows, seconds, number, 2))

    progress = ShardProgress(["s1"])
    tell(0, "started", 0)
    tell(0, "finished", 10)
    assert progress.running == {"q"}
    assert not progress.wait(0)
    tell(1, "reading", 5)
    assert progress.rows == 15
    tell(1, "finished", 7)
    assert progress.rows == 17
    assert progress.wait(0)
    assert progress.running == set()


# the expression


def read(topology, table="sl_deleted", slices=3, **options):
    return dss.read_sharded_table(
        table, _unsharded(topology), partitions_per_shard=slices, **options
    )


def snapshots_in(ddf):
    graph = dict(ddf.optimize().__dask_graph__())
    return sorted(key for key in graph if str(key[0]).startswith("snapshot-"))


def test_without_the_options_nothing_changes(two):
    topology = _unsharded(two)
    for options in ({}, {"partitions_per_shard": 1}):
        ddf = dss.read_sharded_table("sl_deleted", topology, **options)
        assert ddf.npartitions == 2
        assert len(ddf.optimize().__dask_graph__()) == 2
        assert ddf.expr.operand("snapshots") is None
    named = [dss.read_sharded_table("sl_deleted", topology, snapshot="monday") for _ in "ab"]
    assert named[0]._name == named[1]._name
    split = [read(two, snapshot="monday", slices=k) for k in (2, 2, 3)]
    assert split[0]._name == split[1]._name != split[2]._name
    other = read(two, table="sl_heirs", snapshot="monday", slices=2)
    assert not {*snapshots_in(other)} & {*snapshots_in(split[0])}


def test_every_computation_has_a_snapshot_of_its_own(two):
    ddf = read(two)
    assert not {*snapshots_in(ddf)} & {*snapshots_in(ddf)}
    graphs = [ddf.expr.finalize_compute().optimize().__dask_graph__() for _ in "ab"]
    assert len({*graphs[0]} & {*graphs[1]}) == 0
    once = ddf.optimize()
    assert snapshots_in(once) == snapshots_in(once)


def test_dask_operations_on_slices(two, servers):
    ddf = read(two)
    ids = sorted(ddf.compute()["id"])
    assert ddf.npartitions == 6
    assert len(ddf) == len(ids) == 2 * ROWS
    assert len(ddf.head(5)) == 5
    assert len(ddf.head(900, npartitions=-1)) == 900
    assert sum(ddf.map_partitions(len).compute()) == 2 * ROWS
    assert ddf[["id"]].id.sum().compute() == sum(ids)
    assert (ddf.id + ddf.v).sum().compute() == 2 * sum(ids)
    assert len(ddf[ddf.id > 2000]) == 2 * 666
    assert ddf.groupby("v").id.count().compute().max() == 2
    persisted = ddf.persist()
    assert len(persisted) == 2 * ROWS
    assert sorted(i for part in ddf.partitions for i in part.compute()["id"]) == ids
    assert ddf.repartition(npartitions=2).compute().shape == (2 * ROWS, 3)
    assert dask.dataframe.concat([ddf, ddf]).compute().shape == (4 * ROWS, 3)
    wait_until(lambda: holding(servers, two) == 0)


def test_only_shards_that_are_read_have_a_snapshot(two):
    ddf = read(two)
    assert [key[1] for key in snapshots_in(ddf)] == [0, 1]
    assert [key[1] for key in snapshots_in(ddf.partitions[1])] == [0]
    assert [key[1] for key in snapshots_in(ddf.partitions[[4, 5]])] == [1]
    assert [key[1] for key in snapshots_in(ddf.partitions[4].id + 1)] == [1]


def test_parts_that_are_computed_together_are_of_one_snapshot(servers, two, accounts):
    def change():
        with servers.session("s1") as cursor:
            cursor.execute(f"UPDATE {accounts} SET pad = 'changed'")

    ddf = read(two, accounts, shards=["s1"])
    with after_the_first_slice(change):
        parts = dask.compute(*(ddf.partitions[n] for n in range(3)), scheduler="sync")
    assert sorted(i for part in parts for i in part["id"]) == list(range(1, 1001))
    with after_the_first_slice(change):
        ids, pads = dask.compute(ddf[["id"]], ddf.pad.nunique(), scheduler="sync")
    assert sorted(ids["id"]) == list(range(1, 1001))
    assert pads == 1


def test_slices_are_fused_with_what_follows(two):
    ddf = read(two)
    plan = (ddf.id + 1).optimize()
    assert not list(plan.expr.find_operations(ReadShards)) or plan.expr._name.startswith("fused")
    assert len(plan.__dask_graph__()) == 6 + 2


def test_no_login_is_in_graph_keys_or_snapshot(servers, two):
    password = servers.dsns["s1"].split("password=")[1].split()[0].strip("'")
    ddf = read(two).map_partitions(len)
    graph = dict(ddf.optimize().__dask_graph__())
    shown = [pickle.dumps(ddf.expr), cloudpickle.dumps(graph), repr(graph).encode()]
    ref = dss.engine.registry.register(two)
    query = Query("SELECT * FROM sl_deleted", query_id="shown")
    snapshot = slices.hold_snapshot(ref, "s1", query, Slicing("hash", "id"), 2, "key")
    shown += [pickle.dumps(snapshot), repr(snapshot).encode()]
    assert holding(servers, two) == 1
    copy = pickle.loads(pickle.dumps(snapshot))  # noqa: S301 - our own
    assert (copy.shard, copy.name, copy.bounds) == ("s1", snapshot.name, ("hashint8",))
    del copy
    assert holding(servers, two) == 1
    del snapshot
    wait_until(lambda: holding(servers, two) == 0)
    for shown_bytes in shown:
        assert password.encode() not in shown_bytes
        assert b"127.0.0.1" not in shown_bytes


# the session that holds the snapshot


def fail(frame):
    raise ArithmeticError("the user's own")


@pytest.mark.parametrize("scheduler", ["threads", "sync"])
def test_no_session_outlives_an_error(servers, two, scheduler):
    sql = "SELECT id, CASE WHEN id > 2500 THEN 1 / (id - id) END AS x FROM sl_deleted"
    ddf = dss.read_sharded_sql(sql, two, partitions_per_shard=3, partition_by="id")
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        ddf.compute(scheduler=scheduler)
    wait_until(lambda: holding(servers, two) == 0)
    with pytest.raises(ArithmeticError) as caught_too:
        read(two).map_partitions(fail, meta=object).compute(scheduler=scheduler)
    wait_until(lambda: holding(servers, two) == 0)
    assert caught.traceback
    assert caught_too.traceback  # they keep what was computed, but not its snapshots


def test_twenty_computations_leave_no_session(servers, two):
    ddf = read(two, slices=2)
    for _ in range(20):
        assert len(ddf) == 2 * ROWS
    wait_until(lambda: holding(servers, two) == 0)
    assert not snapshots._sessions


def test_a_snapshot_whose_session_was_ended_is_an_error(servers, two):
    def end_holder():
        with servers.session("s1") as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE state = "
                "'idle in transaction' AND application_name LIKE 'dask_shardsql%'"
            )

    ddf = read(two, shards=["s1"])
    with (
        after_the_first_slice(end_holder),
        pytest.raises(dss.SnapshotLostError, match="snapshot of shard 's1' is gone.*slice") as lost,
    ):
        ddf.compute(scheduler="sync")
    assert lost.value.shard == "s1"
    assert len(ddf.compute()) == ROWS


def test_an_error_of_the_querys_own_is_not_taken_for_a_lost_snapshot(two):
    sql = "SELECT id, set_config('lock_timeout', 'x', true) AS x FROM sl_one_row"
    ddf = dss.read_sharded_sql(sql, two, partitions_per_shard=2, partition_by="id")
    with pytest.raises(dss.QueryError, match="lock_timeout") as caught:
        ddf.compute()
    assert caught.value.sqlstate == "22023"  # as for a snapshot that is not there


# on a cluster


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as started:
        yield started


def test_slices_on_a_cluster(servers, two, cluster):
    with Client(cluster) as client:
        ddf = read(two, slices=4)
        assert len(ddf) == 2 * ROWS
        assert ddf.groupby("v").id.count().compute().max() == 2
        futures = client.compute(ddf.to_delayed())
        wait(futures)
        assert len({a for held in client.who_has(futures).values() for a in held}) == 2
        assert sum(map(len, client.gather(futures))) == 2 * ROWS
        persisted = ddf.persist()
        assert len(persisted) == 2 * ROWS
        wait_until(lambda: holding(servers, two) == 0)
        with pytest.raises(ArithmeticError):
            ddf.map_partitions(fail, meta=object).compute()
        wait_until(lambda: holding(servers, two) == 0)
        still_wanted, whole = client.compute(ddf.id.sum()), client.compute(ddf)
        for _ in range(20):  # nor does what an older computation left stand in the way
            assert len(ddf) == 2 * ROWS
            assert len(ddf.compute()) == len(whole.result()) == 2 * ROWS
        assert still_wanted.result() == persisted.id.sum().compute()
        wait_until(lambda: holding(servers, two) == 0)


SLOW = "SELECT id, pg_sleep(0.002)::text AS s FROM sl_deleted WHERE id < 900"


def slow(topology, slices=6, **options):
    """A read of one shard, 600 rows, of which each slice takes 0.2 s."""
    return dss.read_sharded_sql(
        SLOW,
        topology,
        shards=["s1"],
        partitions_per_shard=slices,
        partition_by="id",
        **options,
    )


def owner_of(client):
    """The address of the worker that holds the snapshot, if one does."""
    sessions = client.run(lambda: len(snapshots._sessions))
    return next((worker for worker, number in sessions.items() if number), None)


def test_no_session_outlives_a_cancellation_or_its_client(servers, two, cluster):
    with Client(cluster) as client:
        futures = client.compute(slow(two).to_delayed())
        wait_until(lambda: holding(servers, two) == 1)
        client.cancel(futures)
        wait_until(lambda: holding(servers, two) == 0)
        del futures
    with Client(cluster) as client:
        futures = client.compute(slow(two).to_delayed())
        wait_until(lambda: holding(servers, two) == 1)
        assert futures
    wait_until(lambda: holding(servers, two) == 0)


def test_the_session_stays_while_dask_keeps_a_copy_elsewhere(servers, two, cluster):
    """Workers spill what they hold to disk, and the scheduler drops copies: not our session."""

    def spill(dask_worker):
        data, found = dask_worker.data, 0
        for key in [key for key in data.fast if str(key[0]).startswith("snapshot-")]:
            data.fast.evict(key)
            found += 1
        return found

    with Client(cluster) as client:
        futures = client.compute(slow(two).to_delayed())
        wait_until(lambda: holding(servers, two) == 1)
        wait_until(lambda: owner_of(client))
        assert sum(client.run(spill).values()) >= 1
        assert sum(map(len, client.gather(futures))) == 600
        del futures
        wait_until(lambda: holding(servers, two) == 0)


@pytest.mark.parametrize("nanny", [True, False])
def test_a_worker_that_dies_with_the_snapshot_is_an_error_and_never_two_snapshots(
    servers, two, accounts, nanny
):
    sql = f"SELECT id, v, pg_sleep(0.002)::text AS s FROM {accounts}"
    ddf = dss.read_sharded_sql(sql, two, shards=["s1"], partitions_per_shard=8, partition_by="id")
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            worker_class=None if nanny else "distributed.Worker",
        )
        if nanny
        else separate_workers() as cluster,
        Client(cluster) as client,
    ):
        futures = client.compute(ddf.to_delayed())
        pids = client.run(os.getpid)
        wait_until(lambda: any(future.done() for future in futures))
        owner = owner_of(client)
        with servers.session("s1") as cursor:
            cursor.execute(f"UPDATE {accounts} SET v = -1")
        os.kill(pids[owner], signal.SIGKILL)
        wait(futures)
        errors = [future.exception() for future in futures if future.status == "error"]
        assert errors
        assert {type(error) for error in errors} == {dss.SnapshotLostError}
        assert "compute it again" in str(errors[0])
        for future in futures:
            if future.status == "finished":
                assert (future.result()["v"] > 0).all()
        wait_until(lambda: holding(servers, two) == 0)
        assert len(ddf.compute()) == 1000


def test_slices_that_are_lost_are_not_read_again_in_another_snapshot(servers, two, accounts):
    ddf = read(two, accounts, 8, shards=["s1"])
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as started,
        Client(started) as client,
    ):
        pids = client.run(os.getpid)
        futures = client.compute(ddf.to_delayed())
        wait(futures)
        with servers.session("s1") as cursor:
            cursor.execute(f"UPDATE {accounts} SET v = -1")
        (dies,) = client.who_has(futures)[futures[0].key]
        os.kill(pids[dies], signal.SIGKILL)
        wait_until(lambda: any(future.status == "error" for future in futures))
        wait(futures)
        kept = [future for future in futures if future.status == "finished"]
        errors = [future.exception() for future in futures if future.status == "error"]
        assert kept
        assert all((future.result()["v"] > 0).all() for future in kept)
        assert {type(error) for error in errors} == {dss.SnapshotLostError}
        assert "one of another time cannot take its place" in str(errors[0])
        wait_until(lambda: holding(servers, two) == 0)


@contextmanager
def separate_workers():
    """A scheduler and two workers that nobody starts again."""
    from test_distributed import tcp_cluster

    with tcp_cluster() as address:
        yield address


def test_a_task_that_runs_again_is_told_so():
    class Task:
        metadata = None
        state = "memory"

    class Scheduler:
        tasks: ClassVar = {("snapshot", 0): Task()}

    first_run = cloudpickle.loads(cloudpickle.dumps(snapshots._first_run()))
    assert first_run(Scheduler, key=("snapshot", 0))
    assert not first_run(Scheduler, key=("snapshot", 0))
    assert first_run(Scheduler, key=("forgotten", 0))
    code = (  # the scheduler need not have this package
        "import sys, pickle; sys.modules['dask_shardsql'] = None; "
        "print([pickle.loads(bytes.fromhex(word)).__name__ for word in sys.argv[1:]])"
    )
    sent = [cloudpickle.dumps(f()).hex() for f in (snapshots._first_run, snapshots._is_needed)]
    done = subprocess.run([sys.executable, "-c", code, *sent], capture_output=True, check=True)
    assert done.stdout.split() == [b"['first_run',", b"'is_needed']"]


@pytest.mark.parametrize("way", ["threads", "cluster", "cluster that loses memory"])
def test_collect_reads_slices_side_by_side(servers, two, cluster, way, monkeypatch):
    sql = "SELECT id, v, repeat(pad, 20) AS pad FROM sl_deleted"
    options = {"partitions_per_shard": 3, "partition_by": "id", "shard_column": "shard"}
    lost = []
    if way == "cluster that loses memory":
        received = union.received

        def receive(result):
            table = received(result)
            if table is not None and not lost:
                lost.append(table.num_rows)
                return None
            return table

        monkeypatch.setattr(union, "received", receive)
    with Client(cluster) if way != "threads" else nullcontext():
        table = dss.collect(sql, two, **options)
    expected = dss.collect(sql, two, shard_column="shard", scheduler="threads")
    assert table.sort_by([("shard", "ascending"), ("id", "ascending")]).equals(
        expected.sort_by([("shard", "ascending"), ("id", "ascending")])
    )
    assert bool(lost) == (way == "cluster that loses memory")
    wait_until(lambda: holding(servers, two) == 0)


def test_collect_ends_its_snapshots_when_it_fails(servers, two):
    sql = "SELECT id, CASE WHEN id > 2500 THEN 1 / (id - id) END AS x FROM sl_deleted"
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        dss.collect(sql, two, partitions_per_shard=3, partition_by="id")
    wait_until(lambda: holding(servers, two) == 0)
    assert caught.traceback


# what cannot be split


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"partitions_per_shard": 2, "partition_size": "1 MiB"}, "give one of them"),
        ({"partitions_per_shard": 0}, "whole number from 1, not 0"),
        ({"partitions_per_shard": True}, "whole number from 1, not True"),
        ({"partitions_per_shard": 2.0}, "whole number from 1, not 2.0"),
        ({"partition_size": "big"}, "such as '256 MiB'.*'big'"),
        ({"partition_size": 0}, "such as '256 MiB'"),
        ({"partition_by": "id"}, "needs partitions_per_shard or partition_size"),
        ({"partitions_per_shard": 2, "partition_method": "hash"}, "needs partition_by"),
        (
            {"partitions_per_shard": 2, "partition_by": "id", "partition_method": "modulo"},
            "'modulo', where 'hash' or 'range' is needed",
        ),
        ({"partitions_per_shard": 2, "partition_by": 3}, "the name of a column"),
    ],
)
def test_options_that_do_not_fit_are_refused(two, options, match):
    with pytest.raises(dss.ConfigurationError, match=match):
        dss.read_sharded_table("sl_deleted", _unsharded(two), **options)


def test_what_has_no_place_for_its_rows_names_the_remedy(servers, two, table_name):
    servers.execute(f"CREATE VIEW {table_name} AS SELECT * FROM sl_deleted")
    try:
        with pytest.raises(dss.ConfigurationError, match=f"{table_name} is a view.*partition_by="):
            read(two, table_name)
        assert len(read(two, table_name, partition_by="id")) == 2 * ROWS
    finally:
        servers.execute(f"DROP VIEW {table_name}")


def test_columns_that_are_not_there_or_have_no_order(two):
    with pytest.raises(dss.ConfigurationError, match="name the column of its answer"):
        dss.read_sharded_sql("SELECT * FROM sl_deleted", two, partitions_per_shard=2)
    with pytest.raises(dss.ColumnError, match="no column of the query; it has 'id'"):
        dss.read_sharded_sql(
            "SELECT id FROM sl_deleted", two, partitions_per_shard=2, partition_by="v"
        )
    for method in ("range", "hash"):
        with pytest.raises(dss.ColumnError, match="no column 'w' that partition_by"):
            read(two, partition_by="w", partition_method=method)
    sql = "SELECT id, json_build_object('a', id) AS j FROM sl_deleted"
    options = {"partitions_per_shard": 2, "partition_by": "j"}
    with pytest.raises(dss.ConfigurationError, match="'j' cannot be cut into ranges.*'hash'"):
        dss.read_sharded_sql(sql, two, **options)
    assert len(dss.read_sharded_sql(sql, two, **options, partition_method="hash")) == 2 * ROWS
    # a column that is not read can be cut by
    assert len(read(two, columns=["v"], partition_by="id").compute().columns) == 1


@pytest.mark.parametrize(
    ("sql", "clause"),
    [
        ("SELECT id FROM sl_deleted LIMIT 10", "LIMIT"),
        ("SELECT id FROM sl_deleted FETCH FIRST 10 ROWS ONLY", "FETCH"),
        ("SELECT DISTINCT ON (v) id FROM sl_deleted", "DISTINCT ON"),
        ("SELECT id FROM (SELECT * FROM sl_deleted limit 5) q", "LIMIT"),
        ("SELECT DISTINCT /* . */ ON (v) id FROM sl_deleted", "DISTINCT ON"),
    ],
)
def test_a_query_that_chooses_rows_is_refused(two, sql, clause):
    with pytest.raises(dss.QueryError, match=f"with {clause} cannot be split"):
        dss.read_sharded_sql(sql, two, partitions_per_shard=2, partition_by="id")


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT id, v AS limit, 1 AS "fetch" FROM sl_deleted -- limit 5',
        "SELECT id FROM sl_deleted WHERE 'limit 5' <> $$fetch$$ /* distinct on */",
        "SELECT DISTINCT id FROM sl_deleted",
    ],
)
def test_the_same_words_elsewhere_are_not(two, sql):
    assert (
        len(dss.read_sharded_sql(sql, two, partitions_per_shard=2, partition_by="id")) == 2 * ROWS
    )


def test_other_drivers_cannot_split(tmp_path):
    import sqlite3

    connection = sqlite3.connect(tmp_path / "one.db")
    connection.execute("CREATE TABLE t (id integer)")
    connection.commit()
    connection.close()
    topology = dss.Topology.from_dsns([f"sqlite:///{tmp_path}/one.db"])
    with pytest.raises(dss.ConfigurationError, match="'sqlite' cannot split a shard"):
        dss.read_sharded_table("t", topology, partitions_per_shard=2)


def test_processes_that_do_not_last_are_refused(two, servers):
    with pytest.raises(dss.ConfigurationError, match="scheduler='processes' cannot split"):
        read(two, slices=2).compute(scheduler="processes", num_workers=1)
    wait_until(lambda: holding(servers, two) == 0)


def test_a_predicate_holds_for_one_slice_only():
    slicing = Slicing("range", 'a"b')
    assert postgresql_slices.predicate(Part(slicing, 0, 2), ("'5'",)) == '("a""b" < \'5\')'
    last = postgresql_slices.predicate(Part(slicing, 1, 2), ("'5'",))
    assert last == '("a""b" >= \'5\' OR "a""b" IS NOT DISTINCT FROM NULL)'
