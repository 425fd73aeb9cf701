"""A text that was read before is asked for at once: the same answers, whatever has changed."""

from __future__ import annotations

import random
import time
from contextlib import suppress

import psycopg2.extensions as pgx
import pytest
from sessions import check_that_sessions_are_left_well, own_shards, wait_until

import dask_shardsql as dss
from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers import postgresql, postgresql_script
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.postgresql import PostgreSQLDriver
from dask_shardsql.engine.drivers.postgresql_stage import PostgreSQLStage

pytestmark = pytest.mark.usefixtures("pools_of_its_own")


@pytest.fixture
def shards(servers):
    topology = own_shards(servers)
    yield topology
    check_that_sessions_are_left_well(servers, topology)


@pytest.fixture
def table(servers, table_name):
    servers.execute(f"CREATE TABLE {table_name} (a int4, b text)")
    servers.execute(f"INSERT INTO {table_name} VALUES (1, 'x'), (2, NULL)")
    yield table_name
    servers.execute(f"DROP TABLE IF EXISTS {table_name}")


@pytest.fixture
def stages(monkeypatch):
    """How each shard was asked: True where at once."""
    seen = []
    real = PostgreSQLStage.__init__

    def init(self, *args, **options):
        real(self, *args, **options)
        seen.append(self._at_once)

    monkeypatch.setattr(PostgreSQLStage, "__init__", init)
    return seen


def asked(stages):
    """Return how the shards were asked since the last time."""
    found = stages[:]
    stages.clear()
    return found


def test_the_second_time_all_is_asked_at_once(shards, table, stages):
    sql = f"SELECT a, b FROM {table} WHERE a < %s ORDER BY a"
    first = dss.collect(sql, shards, (3,))
    assert asked(stages) == [False] * 4
    assert dss.collect(sql, shards, (3,)) == first
    assert asked(stages) == [True] * 4
    assert dss.collect(sql, shards, (2,)).to_pylist() == [{"a": 1, "b": "x"}] * 4
    assert dss.collect(sql, shards, (0,)).schema == first.schema
    assert dss.collect(sql, shards, (3,), types={"a": "int64"})["a"].to_pylist() == [1, 2] * 4
    assert asked(stages) == [True] * 8 + [False] * 4
    assert dss.collect(sql, shards, (3,), shard_column="s").num_columns == 3
    assert dss.collect(sql, shards, (3,), check_schema=False) == first
    assert asked(stages) == [True] * 8


def test_a_text_that_needs_text_columns_is_asked_in_steps(shards, stages):
    sql = "SELECT '10.0.0.1'::inet AS a, 1 AS b"
    for _ in range(2):
        assert dss.collect(sql, shards)["a"].to_pylist() == ["10.0.0.1"] * 4
    assert asked(stages) == [False] * 8


@pytest.mark.parametrize("rows", ["2", "100000"])
def test_a_type_that_has_changed_in_between(servers, shards, table, stages, rows):
    servers.execute(
        f"INSERT INTO {table} SELECT 1, repeat('y', 90) FROM generate_series(3, {rows})"
    )
    sql = f"SELECT * FROM {table}"
    for _ in range(2):
        assert dss.collect(sql, shards).num_rows == 4 * int(rows)
    for kind, arrow, how in (
        ("int8", "int64", [True] * 4),
        ("inet USING ('10.0.0.' || a)::inet", "string", [True] * 4 + [False] * 4),
        ("text", "string", [False] * 4),
        ("text[] USING ARRAY[a]", "list<item: string>", [True] * 4),
    ):
        servers.execute(f"ALTER TABLE {table} ALTER a TYPE {kind}")
        stages.clear()
        found = dss.collect(sql, shards)
        assert (found.num_rows, str(found.schema.field("a").type)) == (4 * int(rows), arrow)
        assert asked(stages) == how
    servers.execute(f"ALTER TABLE {table} DROP a")
    assert dss.collect(sql, shards).column_names == ["b"]


def test_the_parameters_may_change_the_type(shards, stages):
    sql = "SELECT %s AS v"
    for value, expected in (
        (5, 5),
        (6, 6),
        ("x", "x"),
        (pgx.AsIs("'10.0.0.1'::inet"), "10.0.0.1"),
        (True, True),
        ([1, 2], [1, 2]),
        (None, None),
    ):
        assert dss.collect(sql, shards, (value,))["v"].to_pylist() == [expected] * 4
    assert True in stages
    assert False in stages


def test_what_has_changed_on_one_shard_only(servers, shards, table, stages):
    sql = f"SELECT * FROM {table}, generate_series(1, 1000000)"
    few = sql + " LIMIT 2"
    for _ in range(2):
        dss.collect(few, shards)
    with servers.session("s2") as cursor:
        cursor.execute(f"ALTER TABLE {table} ALTER a TYPE int8")
    with pytest.raises(dss.SchemaMismatchError, match="s2"):
        dss.collect(few, shards)
    with pytest.raises(dss.SchemaMismatchError, match="s2"):
        dss.collect(sql, shards)
    with servers.session("s2") as cursor:
        cursor.execute(f"DROP TABLE {table}")
    for _ in range(2):
        with pytest.raises(dss.QueryError, match="does not exist") as caught:
            dss.collect(few, shards)
        assert caught.value.shard == "s2"
        assert caught.value.sqlstate == "42P01"


@pytest.mark.parametrize("when", ["described", "begun", "read"])
def test_an_error_says_the_same_at_once(shards, stages, when):
    sql = {
        "described": "SELECT 1 AS v\nWHERE 1 = ",
        "begun": "SELECT 1 / (1 - ",
        "read": "SELECT 1 / (g - 500) AS v FROM generate_series(1, 1000) g WHERE g < ",
    }[when]
    good, bad = {"described": ("1", "nope"), "begun": ("0)", "1)"), "read": ("9", "999")}[when]

    def failure():
        with pytest.raises(dss.QueryError) as caught:
            dss.collect(sql + "%s", shards, (pgx.AsIs(bad),))
        # of shards that fail alike, whichever is the first is named
        return caught.value.message, caught.value.position, caught.value.query

    expected = failure()
    for _ in range(2):
        dss.collect(sql + "%s", shards, (pgx.AsIs(good),))
    stages.clear()
    assert failure() == expected
    assert asked(stages) == [True] * 4
    assert failure() == expected


@pytest.mark.parametrize(
    "value",
    [
        "x\n'; DROP TABLE {table}; --",
        "x\n*/ ; DROP TABLE {table} ; SELECT $q$\n/* $q$ --",
        "x\n) TO STDOUT; DROP TABLE {table}; COPY (SELECT 1 --",
        "x\n",
    ],
)
def test_a_comment_that_a_parameter_leaves_reaches_nothing_else(shards, table, value):
    sql = f"SELECT a FROM {table} -- %s"
    for _ in range(2):
        dss.collect(sql, shards, ("x",))
    with pytest.raises((dss.QueryError, dss.StatementError)):
        dss.collect(sql, shards, (value.format(table=table),))
    assert dss.collect(sql, shards, ("x",)).num_rows == 8


def test_what_a_query_sets_is_reset_at_once_too(shards):
    sql = "SELECT current_setting('work_mem') AS before, set_config('work_mem', %s, false) AS after"
    found = [dss.collect(sql, shards, (f"{n}MB",)).to_pylist() for n in (11, 12, 13)]
    assert [{row["after"] for row in rows} for rows in found] == [{"11MB"}, {"12MB"}, {"13MB"}]
    assert len({row["before"] for rows in found for row in rows}) == 1


def test_what_is_abandoned_at_any_moment_stops_on_the_server(servers):
    """A request to cancel may come before what it is to stop, and BEGIN is answered by itself."""
    driver = PostgreSQLDriver()
    server = dss.Topology.from_dsns({"s": servers.dsns["s1"]}).shards[0].primary
    sql = "SELECT pg_sleep(%s)::text AS s, count(*) AS n FROM pg_class"
    for number in range(30):
        connection = driver.connect(server, None, Settings.current())
        pid = connection.info.backend_pid
        driver.read(connection, Query(sql, (0,)), lambda columns: columns, lambda batch: None)
        requests = [connection.request_cancel] * 20
        if number % 2:  # the first one comes too early
            requests.insert(0, lambda: None)
        connection.request_cancel = lambda r=requests: r.pop(0)()
        query = Query(sql, (20,))
        stage = driver.stage(connection, query, driver.script(connection, query), at_once=True)
        time.sleep(random.choice([0, 0, 1e-4, 5e-4, 5e-3]))  # noqa: S311
        started = time.monotonic()
        stage.abandon()
        assert time.monotonic() - started < 0.9, number
        assert connection.closed
        with servers.session("s1") as cursor:
            running = f"SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND state = 'active'"
            wait_until(lambda c=cursor, q=running: c.execute(q) or not c.fetchall())


def test_a_text_is_never_run_outside_of_its_transaction(servers, shards, table, monkeypatch):
    """A request to cancel may hit what begins the transaction."""
    writes = f"WITH x AS (INSERT INTO {table} VALUES (7) RETURNING a) SELECT a FROM x"
    for sql in (writes, f"SELECT a FROM {table}"):
        for _ in range(2):
            with suppress(dss.QueryError):
                dss.collect(sql, shards)
    real = postgresql.begin
    for broken in (lambda q: ("SELECT 1/0", *real(q)), lambda q: (*real(q), "SELECT 1/0")):
        monkeypatch.setattr(postgresql, "begin", broken)
        for sql in (writes, f"SELECT a FROM {table}"):
            with pytest.raises(dss.QueryError, match="division by zero"):
                dss.collect(sql, shards)
    monkeypatch.undo()
    assert set(dss.collect(f"SELECT a FROM {table}", shards)["a"].to_pylist()) == {1, 2}


@pytest.mark.parametrize("end", ["SELECT 1/0; {}", "COMMIT; SELECT 1/0; {}"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_session_that_could_not_be_reset_is_not_lent_again(shards, monkeypatch, end, times):
    sql = f"SELECT set_config('work_mem', '{10 + times}MB', false) AS x, pg_advisory_lock(77)::text"
    for _ in range(times):
        dss.collect(sql, shards)
    monkeypatch.setattr(postgresql_script, "_COMMIT", end.format(postgresql_script._COMMIT))
    with pytest.raises(dss.QueryError, match="division by zero"):
        dss.collect(sql, shards)
    monkeypatch.undo()
    left = "SELECT current_setting('work_mem') AS m, (SELECT count(*) FROM pg_locks WHERE "
    left += "locktype = 'advisory' AND pid = pg_backend_pid()) AS n"
    assert {(row["m"], row["n"]) for row in dss.collect(left, shards).to_pylist()} == {("4MB", 0)}


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("notice", [True, False])
def test_an_error_does_not_wait_for_a_slow_shard(servers, shards, table_name, times, notice):
    say = "RAISE NOTICE 'hm';" if notice else ""
    servers.execute(
        f"CREATE FUNCTION {table_name}(s float8, n int4) RETURNS int4 LANGUAGE plpgsql AS $$BEGIN "
        f"{say} PERFORM pg_sleep(s); RETURN 1 / n; END$$"
    )
    sql = f"SELECT {table_name}(s, n) AS x FROM {table_name}_of"
    servers.execute(f"CREATE TABLE {table_name}_of (s float8, n int4)")
    for _ in range(times):
        dss.collect(sql, shards)
    with servers.session("s1") as cursor:
        cursor.execute(f"INSERT INTO {table_name}_of VALUES (6, 1)")
    with servers.session("s2") as cursor:
        cursor.execute(f"INSERT INTO {table_name}_of VALUES (0.3, 0)")
    started = time.monotonic()
    with pytest.raises(dss.QueryError, match="division by zero") as caught:
        dss.collect(sql, shards)
    assert caught.value.shard == "s2"
    assert time.monotonic() - started < 4


def test_parameters_where_strings_are_not_read_as_the_standard_has_them(servers):
    """libpq quotes for what it believes of the server when it connects."""
    dsns = [
        f"{dsn} options='-c standard_conforming_strings=off'" for dsn in list(servers.dsns.values())
    ][:2]
    topology = dss.Topology.from_dsns(dsns)
    sql = "SELECT %s AS a, length(%s) AS n, %s AS b"
    for text in (r"C:\new", r"\' OR 1 = 1 --", "'", r"\\", r"a\'||'b"):
        for _ in range(2):
            found = dss.collect(sql, topology, (text, text, b"x\\ny\0")).to_pylist()
            assert found == [{"a": text, "n": len(text), "b": b"x\\ny\0"}] * 2
