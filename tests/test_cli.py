"""The command line against real servers: what goes to stdout, what to stderr, and the status."""

from __future__ import annotations

import csv
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.main

import dask_shardsql
from dask_shardsql.cli import app, main
from dask_shardsql.cli.outcome import exit_status
from dask_shardsql.errors import ConnectionFailedError, QueryError, UnrepresentableValueError

COMMAND = [sys.executable, "-m", "dask_shardsql.cli"]
COLUMNS = """
    id integer, big bigint, txt text, num numeric, price numeric(12,2), tiny numeric(30,20),
    d date, ts timestamp, tz timestamptz, tm time, iv interval, ba bytea, b boolean,
    ints integer[], texts text[], bools boolean[], f double precision, r real
"""
ROWS = [
    (1, 2**62, "plain", "1.50", "1.50", "0.00000000000000000001", "2020-02-29",
     "2020-01-01 12:00:00.5", "2020-01-01 12:00:00+02", "23:59:59.999999", "1 year 2 mons 3 days",
     b"\x00\xff", True, [1, None, -3], ["a", "", "NULL", 'q"\\,{} ', None], [True, False], 0.1,
     1.5),
    (2, -5, 'comma, "quote"\nnewline\r\n', "-0.00", "0", "0", "4714-11-24 BC",
     "0001-12-31 23:59:59.999999 BC", "12345-06-07 08:09:10+00", "00:00:00",
     "-1 mons +4 days -00:00:00.000001", b"", False, [], [], [None], float("nan"), float("inf")),
    (3, 0, "", "12345678901234567890123456789012345678.25", None, None, "5874897-12-31",
     None, "294246-12-31 23:59:59.5+00", None, "-14 mons", None, None, None, ["é\t"], None,
     float("-inf"), -0.0),
    (4, None, None, None, None, None, None, None, None, None, "00:00:00", None, None, None, None,
     None, 1e300, 1e-30),
    (5, 7, "\x1b[31mred 東京", "1e20", "-99999.99", "-1.5", "1970-01-01", "1970-01-01", None,
     "01:00:00", "3 days 100:00:00", b"\\x", True, [[]][0], ["x"], [], 1e21, 3.4e38),
]  # fmt: skip


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    defaults = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 60}
    return subprocess.run([*COMMAND, *arguments], **(defaults | options))


@pytest.fixture
def here(capfd, monkeypatch):
    """Run the command in this process, which takes a second less."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main replaces it

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = main(arguments)
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return call


def start(*arguments: str, **options: object) -> subprocess.Popen[bytes]:
    """Start the command as from a terminal: with SIGINT as it is by default."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def shards(servers, tmp_path_factory) -> list[str]:
    """Three of the shards as the command's options."""
    path = servers.write_toml(tmp_path_factory.mktemp("cli") / "shards.toml")
    path.write_text(path.read_text().partition("[sharded]")[0])  # these tables are none of them
    return ["--topology", str(path)]


@pytest.fixture(scope="module")
def values(servers) -> str:
    """A table with a column of every kind of type, on all shards."""
    servers.execute(f"CREATE TABLE cli_values ({COLUMNS})")
    servers.load("cli_values", ROWS, shard_of=lambda row: row[0] % 7)
    return "cli_values"


def ask(servers, sql: str, *params: object, on: str = "reference") -> list[tuple[object, ...]]:
    with servers.session(on) as cursor:
        cursor.execute("SET TimeZone = 'UTC'")
        cursor.execute(sql, params or None)
        return cursor.fetchall()


def names(servers) -> list[str]:
    return [row[0] for row in ask(
        servers, "SELECT attname::text FROM pg_attribute WHERE attrelid = 'cli_values'::regclass "
        "AND attnum > 0 ORDER BY attnum"
    )]  # fmt: skip


def texts(servers, columns: list[str]) -> list[tuple[object, ...]]:
    """What the reference server writes for every value, NULL as None; unscaled numeric trimmed."""
    written = ["trim_scale(num)::text" if c == "num" else f"{c}::text" for c in columns]
    return ask(servers, f"SELECT {', '.join(written)} FROM cli_values ORDER BY id")


def test_csv_holds_the_text_that_the_server_writes_for_every_type(servers, shards, values):
    answer = run("query", f"SELECT * FROM {values}", *shards, "--output", "csv", text=False,
                 encoding=None)  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, b"")
    rows = list(csv.reader(io.StringIO(answer.stdout.decode(), newline="")))
    columns = names(servers)
    assert rows[0] == columns
    found = sorted(rows[1:], key=lambda row: int(row[0]))
    expected = texts(servers, columns)
    blank = [tuple("" if v is None else v for v in row) for row in expected]
    assert [[*r[:-2], *map(_float, r[-2:])] for r in found] == [
        [*r[:-2], *map(_float, r[-2:])] for r in blank
    ]


def _float(text: str) -> str:
    return str(float(text)) if text else ""


def test_csv_is_read_back_by_copy(servers, shards, values, table_name):
    answer = run("query", f"SELECT * FROM {values}", *shards, "--output", "csv", text=False,
                 encoding=None)  # fmt: skip
    with servers.session("reference") as cursor:
        cursor.execute(f"CREATE TEMP TABLE {table_name} (LIKE {values})")
        copy = f"COPY {table_name} FROM STDIN (FORMAT csv, HEADER MATCH)"
        cursor.copy_expert(copy, io.BytesIO(answer.stdout))
        one, other = f"SELECT * FROM {values}", f"SELECT * FROM {table_name}"
        cursor.execute(f"({one} EXCEPT ALL {other}) UNION ALL ({other} EXCEPT ALL {one})")
        assert cursor.fetchall() == []
        cursor.execute(f"SELECT count(*) FROM {table_name}")
        assert cursor.fetchone() == (len(ROWS),)


def test_csv_tells_null_from_empty_text_and_quotes_only_what_needs_it(here, shards):
    sql = """SELECT * FROM (VALUES (NULL, '', 'a', 'b,c', E'\\\\.')) AS v ("a""b", c, d, e, f)"""
    answer = here("query", sql, *shards, "-f", "csv")
    assert answer.stdout.splitlines()[:2] == ['"a""b",c,d,e,f', ',"",a,"b,c","\\."']


def test_arrow_is_the_table_that_collect_returns(servers, shards, values):
    answer = run("query", f"SELECT * FROM {values}", *shards, "--output", "arrow", text=False,
                 encoding=None)  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, b"")
    table = pa.ipc.open_stream(answer.stdout).read_all()
    direct = dask_shardsql.collect(f"SELECT * FROM {values}", servers.topology)
    assert table.schema.equals(direct.schema)
    assert repr(table.column("f").to_pylist()) == repr(direct.column("f").to_pylist())  # NaN
    assert table.drop_columns("f").equals(direct.drop_columns("f"))
    simple = ["id", "big", "txt", "price", "tiny", "ba", "b", "ints", "texts", "bools"]
    found = table.select(simple).sort_by("id").to_pydict()
    expected = ask(servers, f"SELECT {', '.join(simple)} FROM {values} ORDER BY id")
    rows = [tuple(bytes(v) if isinstance(v, memoryview) else v for v in row) for row in expected]
    assert list(zip(*found.values(), strict=True)) == rows


def test_parquet_keeps_types_and_writes_intervals_as_text_with_a_note(servers, shards, values):
    answer = run("query", f"SELECT * FROM {values}", *shards, "--output", "parquet", text=False,
                 encoding=None)  # fmt: skip
    assert answer.returncode == 0
    assert answer.stderr.decode().splitlines() == [
        "note: column 'iv' is written as text: Parquet has no month_day_nano_interval"
    ]
    found = pq.read_table(pa.BufferReader(answer.stdout)).sort_by("id")
    direct = dask_shardsql.collect(f"SELECT * FROM {values}", servers.topology).sort_by("id")
    assert found.column("iv").to_pylist() == [
        row[0] for row in ask(servers, f"SELECT iv::text FROM {values} ORDER BY id")
    ]
    for name in set(names(servers)) - {"iv", "f", "r"}:
        assert found.column(name).cast(direct.column(name).type).equals(direct.column(name)), name


def test_a_table_is_aligned_and_shows_what_is_there(here, servers, shards):
    sql = (
        "SELECT * FROM (VALUES (1, 'a', 1.5::numeric), (20, NULL, 0.25), "
        "(300, E'x\\ny\\x1b', NULL)) AS v (n, word, amount)"
    )
    answer = here("query", sql, "--topology", one_shard(servers, shards))
    assert answer.stderr == ""
    assert answer.stdout.splitlines() == [
        "  n  word      amount",
        "───  ────────  ──────",
        "  1  a            1.5",
        " 20  NULL        0.25",
        "300  x\\ny\\x1b    NULL",
        "(3 rows)",
    ]


def one_shard(servers, shards: list[str]) -> str:
    """A topology file of shard s1 alone."""
    path = Path(shards[1])
    head, *entries = path.read_text().split("[[shards]]")
    target = path.with_name("one.toml")
    target.touch(0o600)
    target.write_text(head + "[[shards]]" + entries[0])
    return str(target)


def test_a_table_of_very_many_rows_is_cut_and_stderr_says_so(servers, shards):
    sql = "SELECT generate_series(1, 1001) AS n"
    answer = run("query", sql, "--topology", one_shard(servers, shards))
    lines = answer.stdout.splitlines()
    assert lines[2:4] == ["   1", "   2"]
    assert lines[-2:] == ["1000", "(1,001 rows, the first 1,000 shown)"]
    assert "the first 1,000 rows" in answer.stderr
    assert "1,001" in answer.stderr


def test_a_table_survives_every_type(servers, shards, values):
    answer = run("query", f"SELECT * FROM {values}", *shards)
    assert answer.returncode == 0
    for text in (
        "4714-11-24 BC",
        "5874897-12-31",
        "294246-12-31 23:59:59.5+00",
        "\\x1b[31mred 東京",
    ):
        assert text in answer.stdout
    assert answer.stdout.endswith(f"\n({len(ROWS)} rows)\n")
    assert "\x1b" not in answer.stdout


def test_an_answer_without_rows_has_its_columns(here, shards, values, tmp_path):
    sql = f"SELECT id, iv FROM {values} WHERE id < 0"
    assert here("query", sql, *shards).stdout == "id  iv\n──  ──\n(0 rows)\n"
    assert here("query", sql, *shards, "-f", "csv").stdout == "id,iv\n"
    for name in ("empty.arrow", "empty.parquet"):
        assert here("query", sql, *shards, "-o", str(tmp_path / name)).returncode == 0
    assert pa.ipc.open_stream((tmp_path / "empty.arrow").read_bytes()).read_all().num_rows == 0
    assert pq.read_table(tmp_path / "empty.parquet").column_names == ["id", "iv"]


def test_parameters_are_texts_that_the_server_casts(here, shards, values):
    sql = f"SELECT id, txt FROM {values} WHERE id >= %(least)s AND txt LIKE %(like)s || '%%'"
    answer = here("query", sql, *shards, "-p", "least=1", "--param", "like=pla", "-f", "csv")
    assert answer.stdout == "id,txt\n1,plain\n"
    quoted = here("query", "SELECT %(v)s AS v", *shards, "-p", 'v=it\'s = "1"; --', "-f", "csv")
    assert list(csv.reader(io.StringIO(quoted.stdout)))[1:] == [['it\'s = "1"; --']] * 7


def test_without_parameters_a_percent_sign_is_itself(here, shards):
    answer = here("query", "SELECT 7 % 4 AS n, 'a%(b)s' AS t", *shards, "-f", "csv")
    assert answer.stdout == "n,t\n" + "3,a%(b)s\n" * 7


def test_the_shard_column_names_the_shards(here, shards, values):
    answer = here("query", f"SELECT id FROM {values}", *shards, "--shard-column", "s", "-f", "csv")
    assert answer.stdout == "id,s\n1,s2\n2,s3\n3,s4\n4,s5\n5,s6\n"


def test_the_topology_may_come_from_dasks_configuration(shards):
    environment = {**os.environ, "DASK_SHARDSQL__TOPOLOGY": shards[1]}
    answer = run("query", "SELECT 1 AS n", "-f", "csv", env=environment)
    assert answer.stdout == "n\n" + "1\n" * 7


BAD_INPUT = {
    "no command": ([], "Missing command"),
    "unknown command": (["qurey"], "No such command 'qurey'"),
    "unknown option": (["query", "SELECT 1", "--outptu"], "No such option"),
    "unknown form": (["query", "SELECT 1", "--output", "xml"], "'xml'"),
    "param without =": (["query", "SELECT %(a)s AS a", "-p", "a"], "--param 'a' is not NAME=VALUE"),
    "param twice": (["query", "SELECT %(a)s AS a", "-p", "a=1", "-p", "a=2"], "given twice"),
    "param not used": (["query", "SELECT 1 AS a", "-p", "a=1"], "the query has no %(a)s"),
    "param missing": (["query", "SELECT %(a)s, %(b)s", "-p", "a=1"], "no such parameter"),
    "two statements": (["query", "SELECT 1; SELECT 2"], "only one statement"),
    "no query": (["query", "DROP TABLE t"], "only a query can be read"),
    "syntax": (["query", "SELEC 1"], "only a query"),
    "syntax further on": (["query", "SELECT 1 FRM t"], "SQLSTATE 42601"),
    "undefined column": (["query", "SELECT nope"], "SQLSTATE 42703"),
    "two columns of a name": (["query", "SELECT 1 AS a, 2 AS a"], "more than one column named 'a'"),
    "shard column clashes": (["query", "SELECT 1 AS a", "--shard-column", "a"], "error: --shard-"),
    "no such directory": (["query", "SELECT 1 AS a", "-o", "/nope/x.csv"], "no directory /nope"),
    "no form for a name": (["query", "SELECT 1 AS a", "-o", "answer.xml"], "add --output"),
    "no address": (["query", "SELECT 1 AS a", "--scheduler", "nowhere"], "'nowhere' is no address"),
    "no shards": (["demo", "--shards", "0"], "--shards"),
    "no number": (["demo", "--scale", "much"], "--scale"),
    "no scale": (["demo", "--scale", "0"], "--scale 0 must be above 0"),
    "not a scale": (["demo", "--scale", "nan"], "--scale nan must be above 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_status_2_and_one_message(shards, here, arguments, message):
    answer = here(*arguments, *(shards if arguments[:1] == ["query"] else []))
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_bad_topology_is_status_2(here, tmp_path):
    missing = here("query", "SELECT 1", "-t", str(tmp_path / "none.toml"))
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr.startswith("error: cannot read the topology: No such file")
    none = here("query", "SELECT 1")
    assert none.returncode == 2
    assert "--topology" in none.stderr


def test_failures_are_status_1(here, servers, shards, tmp_path):
    division = here("query", "SELECT 1/0 AS n", *shards)
    assert (division.returncode, division.stdout) == (1, "")
    assert "SQLSTATE 22012" in division.stderr
    infinite = here("query", "SELECT 'infinity'::date AS d", *shards)
    assert (infinite.returncode, infinite.stdout) == (1, "")
    assert "cannot hold 'infinity'" in infinite.stderr
    gone = tmp_path / "gone.toml"
    gone.write_text('[[shards]]\nname = "s1"\ndsn = "host=127.0.0.1 port=1 dbname=x user=y"\n')
    refused = here("query", "SELECT 1 AS n", "-t", str(gone))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: cannot connect to shard 's1' (127.0.0.1:1)")
    for answer in (division, infinite, refused):
        assert "Traceback" not in answer.stderr


def test_a_status_is_the_processs(shards):
    answer = run("query", "SELECT nope", *shards)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.splitlines()[1:3] == ["LINE 1: SELECT nope", "               ^"]


def test_statuses_follow_the_sqlstate():
    assert exit_status(QueryError("", sqlstate="42P01")) == 2
    assert exit_status(QueryError("", sqlstate="57014")) == 1
    assert exit_status(ConnectionFailedError("")) == 1
    assert exit_status(UnrepresentableValueError("c", "v", "t")) == 1
    assert exit_status(KeyboardInterrupt()) == 130


def test_nothing_is_written_when_a_late_row_fails(here, shards, tmp_path):
    sql = "SELECT 1 / (50000 - n) AS x FROM generate_series(1, 50000) AS n"
    file = tmp_path / "answer.csv"
    for options in (["-f", "csv"], ["-o", str(file)]):
        answer = here("query", sql, *shards, *options)
        assert (answer.returncode, answer.stdout) == (1, "")
    assert list(tmp_path.iterdir()) == []


def test_an_output_file_is_whole_replaces_and_takes_its_form_from_its_name(here, shards, tmp_path):
    file = tmp_path / "answer.parquet"
    file.write_text("old")
    file.chmod(0o640)
    answer = here("query", "SELECT 1 AS n", *shards, "-o", str(file))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert pq.read_table(file).to_pydict() == {"n": [1] * 7}
    assert file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_a_closed_pipe_is_quiet(shards):
    sql = "SELECT generate_series(1, 200000) AS n"
    for form in ("csv", "arrow", "parquet"):
        child = start("query", sql, *shards, "-f", form, stdout=subprocess.PIPE,
                      stderr=subprocess.PIPE)  # fmt: skip
        assert child.stdout.read(4)
        child.stdout.close()
        assert child.stderr.read() == b"", form
        assert child.wait(20) == 128 + signal.SIGPIPE


def test_a_full_disk_is_an_error(shards):
    with open("/dev/full", "wb") as full:
        for form in ("csv", "arrow", "table"):
            answer = run("query", "SELECT 1 AS n", *shards, "-f", form, capture_output=False,
                         stdout=full, stderr=subprocess.PIPE)  # fmt: skip
            assert answer.returncode == 1
            assert answer.stderr.startswith("error: No space left on device")


def backends(servers, mark: str) -> int:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE %s AND pid <> pg_backend_pid()"
    return sum(ask(servers, sql, f"%{mark}%", on=s.name)[0][0] for s in servers.topology.shards)


def wait_for(condition, seconds: float = 15.0) -> float | None:
    """Return the time until `condition` held, or None."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if condition():
            return time.monotonic() - began
        time.sleep(0.05)
    return None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_the_backends(servers, shards, table_name, number):
    sql = f"SELECT pg_sleep(30)::text AS {table_name}"
    child = start("query", sql, *shards, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert wait_for(lambda: backends(servers, f"SELECT pg_sleep%{table_name}") == 7) is not None
        child.send_signal(number)
        assert wait_for(lambda: backends(servers, table_name) == 0, 2) is not None
        out, err = child.communicate(timeout=5)
    finally:
        child.kill()
    assert child.returncode == 128 + number
    assert (out, err) == (b"", b"stopped\n")


class Terminal:
    """A command whose stdout, stderr or both are a terminal of 80 x 24."""

    def __init__(self, *arguments: str, streams: str = "both") -> None:
        import fcntl
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color"}
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            environment.pop(name, None)
        out = slave if streams in ("both", "out") else subprocess.PIPE
        err = slave if streams in ("both", "err") else subprocess.PIPE
        self.child = start(*arguments, stdout=out, stderr=err, stdin=slave, env=environment)
        os.close(slave)

    def finish(self) -> tuple[int, str, bytes]:
        """Return the status, what the terminal got, and what a pipe got."""
        shown = b""
        pipe = self.child.stdout or self.child.stderr
        piped = b""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.master], [], [], 0.1)
            if ready:
                try:
                    shown += os.read(self.master, 65536)
                except OSError:  # the other side is closed
                    break
            elif self.child.poll() is not None:
                break
        piped = pipe.read() if pipe else b""
        status = self.child.wait(10)
        os.close(self.master)
        return status, shown.decode(), piped


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n")


def test_progress_is_drawn_on_a_terminals_stderr_and_data_stay_on_stdout(shards):
    sql = "SELECT 1 AS n, pg_sleep(0.5)::text AS t"
    status, shown, piped = Terminal("query", sql, *shards, "-f", "csv", streams="err").finish()
    assert status == 0
    assert piped == b"n,t\n" + b'1,""\n' * 7
    for shard in ("s1", "s7"):
        assert shard in shown
    assert "1 row" in shown
    assert "7 rows from 7 shards in " in plain(shown)
    assert shown.rstrip().endswith(" s")
    assert "\x1b[?25l" in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2], "the cursor is hidden for good"


def test_no_progress_is_drawn_where_stderr_is_no_terminal(shards):
    sql = "SELECT 1 AS n, pg_sleep(0.3)::text AS t"
    status, shown, piped = Terminal("query", sql, *shards, "-f", "csv", streams="out").finish()
    assert (status, piped) == (0, b"")
    assert shown.replace("\r\n", "\n") == "n,t\n" + '1,""\n' * 7


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_binary_is_refused_on_a_terminal(shards, form):
    status, shown, _ = Terminal("query", "SELECT 1 AS n", *shards, "-f", form).finish()
    assert status == 2
    assert f"error: {form} is binary, and stdout is a terminal: redirect it (> " in plain(shown)
    assert "PAR1" not in shown


def test_a_table_fits_the_terminal(servers, shards):
    one = ["--topology", one_shard(servers, shards)]
    wide = "SELECT 1 AS n, repeat('x', 200) AS long, 'y' AS last"
    status, shown, _ = Terminal("query", wide, *one, streams="out").finish()
    lines = plain(shown).splitlines()
    assert status == 0
    assert max(map(len, lines)) <= 80
    assert re.fullmatch(r"1  x+…  y", lines[2])
    many = "SELECT " + ", ".join(f"{n} AS column_{n}" for n in range(20))
    _, shown, _ = Terminal("query", many, *one, streams="out").finish()
    assert "column_19  19" in plain(shown).splitlines()


def test_ctrl_c_on_a_terminal_restores_it(servers, shards, table_name):
    sql = f"SELECT pg_sleep(30)::text AS {table_name}"
    terminal = Terminal("query", sql, *shards)
    assert wait_for(lambda: backends(servers, f"SELECT pg_sleep%{table_name}") == 7) is not None
    os.killpg(terminal.child.pid, signal.SIGINT)
    status, shown, _ = terminal.finish()
    assert status == 130
    assert "Traceback" not in shown
    assert "\x1b[?25h" in shown.rpartition("\x1b[?25l")[2]
    assert wait_for(lambda: backends(servers, table_name) == 0, 2) is not None


@pytest.fixture(scope="module")
def scheduler():
    """The address of a Dask scheduler with a worker, each a process of its own."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=1, threads_per_worker=8, dashboard_address=None, silence_logs=50
    ) as cluster:
        yield cluster.scheduler_address


def test_a_scheduler_runs_the_query(servers, shards, values, scheduler):
    sql = f"SELECT id, txt FROM {values}"
    answer = run("query", sql, *shards, "--scheduler", scheduler, "-f", "arrow", text=False,
                 encoding=None)  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, b"")
    found = pa.ipc.open_stream(answer.stdout).read_all().sort_by("id").to_pydict()
    expected = ask(servers, f"SELECT id, txt FROM {values} ORDER BY id")
    assert list(zip(*found.values(), strict=True)) == expected


def test_a_schedulers_errors_and_progress_reach_the_user(shards, scheduler):
    answer = run("query", "SELECT 1/0 AS n", *shards, "--scheduler", scheduler)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: shard 's1': division by zero (SQLSTATE 22012)")
    sql = "SELECT 1 AS n, pg_sleep(1)::text AS t"
    terminal = Terminal("query", sql, *shards, "--scheduler", scheduler, "-f", "csv", streams="err")
    status, shown, _ = terminal.finish()
    assert status == 0
    assert shown.count("0 rows") > 3  # drawn by events: before any, a shard is 'waiting'


def test_ctrl_c_reaches_the_backends_of_a_schedulers_workers(
    servers, shards, scheduler, table_name
):
    sql = f"SELECT pg_sleep(30)::text AS {table_name}"
    child = start("query", sql, *shards, "--scheduler", scheduler, stdout=subprocess.PIPE,
                  stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert wait_for(lambda: backends(servers, f"SELECT pg_sleep%{table_name}") == 7) is not None
        child.send_signal(signal.SIGINT)
        assert wait_for(lambda: backends(servers, table_name) == 0, 3) is not None
        out, err = child.communicate(timeout=10)
    finally:
        child.kill()
    assert (child.returncode, out, err) == (130, b"", b"stopped\n")


def test_a_scheduler_that_is_not_there_is_status_1(here, shards, monkeypatch):
    monkeypatch.setattr("dask_shardsql.cli.asking._CONNECT_SECONDS", 1)
    answer = here("query", "SELECT 1 AS n", *shards, "--scheduler", "tcp://127.0.0.1:9")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: cannot reach the Dask scheduler at tcp://127.0.0.1:9")
    assert len(answer.stderr.splitlines()) == 1


def test_version_and_help(here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("--version").stdout == f"dask-shardsql {dask_shardsql.__version__}\n"
    root = typer.main.get_command(app)
    assert set(root.commands) == {"query", "explain", "demo"}
    assert set(root.commands) <= set(here("--help").stdout.split())
    for name, command in root.commands.items():
        shown = here(name, "--help")
        assert shown.returncode == 0
        assert len(command.help) > 100
        for parameter in command.params:
            if parameter.name == "help":
                continue
            assert parameter.help, f"{name} {parameter.name} is not documented"
            if parameter.opts[0].startswith("--"):
                assert parameter.opts[0] in shown.stdout.split()


def test_the_installed_script_is_this_command():
    from importlib.metadata import entry_points

    (script,) = entry_points(group="console_scripts", name="dask-shardsql")
    assert script.load() is dask_shardsql.cli.main
