"""An answer that is interrupted, cut, delayed or broken on its way: all its rows, or one error."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import threading
import time
from contextlib import closing, suppress

import psycopg2
import pyarrow as pa
import pytest
from copy_streams import message
from psycopg2.extensions import make_dsn, parse_dsn

import dask_shardsql as dss
from dask_shardsql import ConnectionLostError, QueryError, Topology
from dask_shardsql.config import Settings
from dask_shardsql.engine.drivers import postgresql_libpq
from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.postgresql import PostgreSQLDriver
from dask_shardsql.engine.drivers.postgresql_libpq import CopyOut, Session
from dask_shardsql.sql.types import arrow_schema

DRIVER = PostgreSQLDriver()
ROWS = "SELECT n, n::text || repeat('x', n % 50) AS t FROM generate_series(1, 2000) AS n"
ROW_MESSAGES = (b"D", b"d")  # DataRow, CopyData
MANY = "SELECT n, repeat('x', 100) AS t FROM generate_series(1, 1000000) AS n"


@pytest.fixture(params=["socket", "libpq", "copy_expert"])
def way(request, monkeypatch):
    """The ways to read an answer: its messages, or a COPY out of libpq or out of psycopg2."""
    if request.param != "socket":
        monkeypatch.setattr(Session, "is_plain", False)
    if request.param == "copy_expert":
        monkeypatch.setattr(CopyOut, "is_possible", lambda: False)
    return request.param


@pytest.fixture
def dsn(servers):
    return make_dsn(servers.dsns["s1"], sslmode="disable", gssencmode="disable")


@pytest.fixture
def connection(dsn):
    with closing(connect(dsn)) as opened:
        yield opened


def connect(dsn):
    server = Topology.from_dsns({"s": dsn}).shards[0].primary
    return DRIVER.connect(server, None, Settings.current())


def read(connection, sql, on_batch=None, **options):
    """Return the answer as the driver reads it."""
    found, batches = [], []

    def resolve(columns):
        found.extend(columns)
        return columns

    def take(batch):
        if on_batch is not None:
            on_batch(batch)
        batches.append(batch)

    DRIVER.read(connection, Query(sql, **options), resolve, take)
    table = pa.Table.from_batches(batches, arrow_schema(found))
    table.validate(full=True)
    return table


def own(error):
    """Return this package's error for one that the driver raised."""
    return error if isinstance(error, dss.ShardSQLError) else DRIVER.translate(error)


def failure_of(connection, sql, on_batch=None, **options):
    """Return the error that a query ends with."""
    with pytest.raises((dss.ShardSQLError, psycopg2.Error)) as caught:
        read(connection, sql, on_batch, **options)
    return own(caught.value)


ENCODINGS = [
    "SELECT set_config('client_encoding', 'LATIN1', false) AS a, 'Ã©' AS b",
    "SELECT CASE n WHEN 1 THEN set_config('client_encoding', 'LATIN1', false) END AS a, 'Ã©' AS b "
    "FROM generate_series(1, 100000) AS n",
]


@pytest.mark.parametrize("sql", ENCODINGS)
def test_texts_in_another_encoding_are_refused(connection, way, sql):
    """Two characters of one, in Latin 1, are one of another, in UTF-8."""
    error = failure_of(connection, sql, batch_bytes=1 << 16)
    assert isinstance(error, QueryError)
    assert error.sqlstate == "0A000"
    assert "sets client_encoding to LATIN1" in str(error)
    if DRIVER.is_usable(connection):
        assert read(connection, "SELECT 'Ã©' AS b").to_pylist() == [{"b": "Ã©"}]


def test_a_request_to_cancel_is_not_waited_for_without_end(connection, monkeypatch):
    functions = dict(postgresql_libpq._libpq())
    ended = threading.Event()
    functions["PQcancel"] = lambda *_: ended.wait(10)
    monkeypatch.setattr(postgresql_libpq, "_libpq", lambda: functions)
    started = time.monotonic()
    connection.request_cancel()
    assert time.monotonic() - started < 3
    assert not DRIVER.is_usable(connection)
    ended.set()


class Proxy:
    """Forwards bytes to a server; what comes back goes through `shape`, message by message.

    `shape` gets a message and how many rows came before it, and returns the bytes to send
    instead, or None to close the connection. `size` says how many bytes to send at a time.
    """

    def __init__(self, dsn, shape=lambda data, number: data, size=lambda: 1 << 20):
        keywords = parse_dsn(dsn)
        self._to = (keywords["host"], int(keywords["port"]))
        self._shape, self._size = shape, size
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads, self._sockets = [], [self._listening]
        port = self._listening.getsockname()[1]
        self.dsn = make_dsn(dsn, host="127.0.0.1", port=port)
        self.forwarded = 0
        self._start(self._accept)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self._sockets:
            hang_up(one)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, run, *args):
        self._threads.append(threading.Thread(target=run, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server = socket.create_connection(self._to)
            self._sockets += [client, server]
            self._start(self._up, client, server)
            self._start(self._down, client, server)

    def _up(self, client, server):
        try:
            while data := client.recv(1 << 16):
                server.sendall(data)
        except OSError:
            pass
        hang_up(server)

    def _down(self, client, server):
        buffer, number = b"", 0
        try:
            while data := server.recv(1 << 16):
                buffer += data
                ready, at = [], 0
                while len(buffer) - at >= 5:
                    end = at + 1 + struct.unpack_from(">i", buffer, at + 1)[0]
                    if end > len(buffer):
                        break
                    ready.append(self._shape(buffer[at:end], number))
                    number += buffer[at : at + 1] in ROW_MESSAGES
                    at = end
                    if ready[-1] is None:
                        break
                buffer = buffer[at:]
                self._send(client, b"".join(part for part in ready if part))
                if ready and ready[-1] is None:
                    break
        except OSError:
            pass
        hang_up(client)
        hang_up(server)

    def _send(self, client, data):
        at = 0
        while at < len(data):
            piece = data[at : at + self._size()]
            client.sendall(piece)
            at += len(piece)
            self.forwarded += len(piece)


def hang_up(one):
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def test_an_error_in_the_middle_is_one_error_and_the_connection_stays_usable(connection, way):
    sql = "SELECT n, 1 / (100000 - n) AS v FROM generate_series(1, 200000) AS n"
    rows = []
    error = failure_of(connection, sql, lambda b: rows.append(b.num_rows), batch_bytes=1 << 16)
    assert isinstance(error, QueryError)
    assert error.sqlstate == "22012"
    assert sum(rows) < 100_000
    assert DRIVER.is_usable(connection)
    assert read(connection, "SELECT 7 AS v").to_pylist() == [{"v": 7}]
    error = failure_of(connection, "SELECT 1 AS a,\n nope AS b")
    assert (error.sqlstate, error.position) == ("42703", 17)
    assert read(connection, "SELECT 7 AS v").to_pylist() == [{"v": 7}]


def test_an_error_of_one_query_reaches_the_user_once(servers, way):
    topology = Topology.from_dsns({"s": servers.dsns["s1"]})
    with pytest.raises(QueryError) as caught:
        dss.collect("SELECT 1 / (50000 - n) AS v FROM generate_series(1, 100000) AS n", topology)
    assert caught.value.sqlstate == "22012"
    assert dss.collect("SELECT 7 AS v", topology).to_pylist() == [{"v": 7}]


def test_a_backend_that_is_terminated_in_the_middle(connection, way, servers):
    def terminate(_, pid=connection.info.backend_pid):
        with servers.session("s1") as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))

    error = failure_of(connection, MANY, once(terminate), batch_bytes=1 << 16)
    assert isinstance(error, ConnectionLostError)
    assert not DRIVER.is_usable(connection)


def test_a_query_that_is_cancelled_in_the_middle(connection, way):
    cancel = once(lambda _: DRIVER.cancel(connection))
    error = failure_of(connection, MANY, cancel, batch_bytes=1 << 16)
    assert isinstance(error, QueryError)
    assert error.sqlstate == "57014"
    assert DRIVER.is_usable(connection)
    assert read(connection, "SELECT 7 AS v").to_pylist() == [{"v": 7}]


def test_an_exception_out_of_on_batch_comes_through_once_and_closes(connection, way):
    calls = []

    def refuse(batch):
        calls.append(batch)
        raise LookupError("not wanted")

    with pytest.raises(LookupError, match="not wanted"):
        read(connection, MANY, refuse, batch_bytes=1 << 16)
    assert len(calls) == 1
    assert connection.closed
    assert not DRIVER.is_usable(connection)


def once(call):
    """Return a function that calls `call` the first time only."""
    done = []

    def maybe(batch):
        if not done:
            done.append(True)
            call(batch)

    return maybe


@pytest.mark.parametrize("sent", [0, 1, 5, 18])
def test_a_connection_cut_in_mid_message_is_lost(dsn, way, sent):
    def cut(data, number):
        return (
            data[:sent]
            if number == 1000 and data[:1] in ROW_MESSAGES
            else None
            if number > 1000
            else data
        )

    with Proxy(dsn, cut) as proxy, closing(connect(proxy.dsn)) as connection:
        error = failure_of(connection, ROWS)
        assert isinstance(error, ConnectionLostError)
        assert not DRIVER.is_usable(connection)


def test_bytes_that_come_one_by_one(dsn, way):
    sql = "SELECT * FROM (" + ROWS + ") AS q LIMIT 100"
    with closing(connect(dsn)) as direct:
        expected = read(direct, sql)
    with Proxy(dsn, size=lambda: 1) as proxy, closing(connect(proxy.dsn)) as connection:
        assert read(connection, sql).equals(expected)
        assert DRIVER.is_usable(connection)


def test_segments_of_any_size(dsn, way):
    rng = random.Random(3)  # noqa: S311
    sizes = [1, 2, 3, 4, 5, 6, 7, 100, 1448, 4096, 65536]
    with closing(connect(dsn)) as direct:
        expected = read(direct, ROWS)
    with Proxy(dsn, size=lambda: rng.choice(sizes)) as proxy, closing(connect(proxy.dsn)) as slow:
        for size in (1 << 10, 1 << 20):
            assert read(slow, ROWS, batch_bytes=size).equals(expected)


NOTICE = message(b"N", b"SWARNING\0VWARNING\0C01000\0Mhm\0\0")
ASIDES = [
    NOTICE,
    message(b"S", b"application_name\0x\0"),
    message(b"A", struct.pack(">i", 7) + b"channel\0payload\0"),
]


def test_messages_between_the_rows_are_no_rows(dsn, way):
    def add(data, number):
        return (
            data + b"".join(ASIDES[: number % 5])
            if data[:1] in ROW_MESSAGES and number % 7
            else data
        )

    with closing(connect(dsn)) as direct:
        expected = read(direct, ROWS)
    with Proxy(dsn, add) as proxy, closing(connect(proxy.dsn)) as connection:
        assert read(connection, ROWS).equals(expected)
        assert DRIVER.is_usable(connection)
        assert read(connection, "SELECT 7 AS v").to_pylist() == [{"v": 7}]


@pytest.mark.parametrize("change", ["dropped", "twice"])
def test_a_row_that_is_lost_or_comes_twice_is_an_error(dsn, way, change):
    if way == "copy_expert":
        pytest.skip("psycopg2 does not tell how many rows the server says it has sent")

    def spoil(data, number):
        if number == 1000 and data[:1] in ROW_MESSAGES:
            return b"" if change == "dropped" else data + data
        return data

    with Proxy(dsn, spoil) as proxy, closing(connect(proxy.dsn)) as connection:
        with pytest.raises(ConnectionLostError, match="rows have come"):
            read(connection, ROWS)
        assert not DRIVER.is_usable(connection)


def test_a_function_that_raises_notices_loses_no_rows(connection, way, servers):
    with servers.session("s1") as cursor:
        cursor.execute(
            "CREATE OR REPLACE FUNCTION loud(n int4) RETURNS int4 LANGUAGE plpgsql AS "
            "$$BEGIN RAISE NOTICE 'here %', n; RETURN n; END$$"
        )
    sql = "SELECT loud(n) AS v FROM generate_series(1, 5000) AS n"
    assert read(connection, sql)["v"].to_pylist() == list(range(1, 5001))
    assert read(connection, "SELECT 7 AS v").to_pylist() == [{"v": 7}]


GARBAGE = {
    "unknown message": message(b"!", b"abc"),
    "zeros": bytes(64),
    "length below four": b"d\0\0\0\3",
    "negative length": b"d\xff\xff\xff\xff",
    "length below four of a notice": b"N\0\0\0\0",
    "short row": message(b"D", struct.pack(">hi", 2, 4)),
    "no columns": message(b"D", struct.pack(">h", 0)),
    "long row": message(b"D", struct.pack(">hiiii", 2, 4, 7, 0, 9)),
    "negative size": message(b"D", struct.pack(">hii", 2, -2, -1)),
    "a COPY's end": message(b"D", b"\xff\xff"),
    "the end too early": message(b"C", b"SELECT 7\0"),
    "the end too early, with the right count": message(b"C", b"SELECT 1000\0"),
    "a row of a COPY": message(b"d", struct.pack(">hiiii", 2, 4, 7, 1, 9)),
    "an empty row": message(b"D", b""),
    "parameter without a value": message(b"S", b"x"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_between_the_rows_is_an_error(dsn, garbage):
    def add(data, number):
        return GARBAGE[garbage] + data if number == 1000 and data[:1] in ROW_MESSAGES else data

    with Proxy(dsn, add) as proxy, closing(connect(proxy.dsn)) as connection:
        try:
            table = read(connection, ROWS)
        except ConnectionLostError:
            assert not DRIVER.is_usable(connection)
        else:  # what is no row may be passed over
            assert garbage == "parameter without a value"
            assert table.num_rows == 2000


COPY_ROW = struct.pack(">hii", 2, 4, 7) + struct.pack(">i", 1) + b"x"
COPY_GARBAGE = {
    "the end too early": message(b"d", b"\xff\xff"),
    "the end in a row": message(b"d", COPY_ROW + b"\xff\xff"),
    "half a row": message(b"d", COPY_ROW[:9]),
    "negative size": message(b"d", struct.pack(">hii", 2, -2, -1)),
    "too many columns": message(b"d", struct.pack(">hiiii", 3, 4, 7, -1, -1)),
    "no COPY any more": message(b"c", b""),
    "the command's end": message(b"C", b"COPY 1000\0"),
    "a length that is none": b"d\0\0\0\3",
    "a message that is none": message(b"!", b"abc"),
}


@pytest.mark.parametrize("way", ["libpq", "copy_expert"], indirect=True)
@pytest.mark.parametrize("garbage", COPY_GARBAGE)
def test_garbage_in_a_copy_is_an_error(dsn, way, garbage):
    def add(data, number):
        at = number == 1000 and data[:1] in ROW_MESSAGES
        return COPY_GARBAGE[garbage] + data if at else data

    with Proxy(dsn, add) as proxy, closing(connect(proxy.dsn)) as connection:
        assert isinstance(failure_of(connection, ROWS), ConnectionLostError)
        assert way == "copy_expert" or not DRIVER.is_usable(connection)


def test_rows_of_any_size(connection, way):
    sizes = [1, 40_000, 20_000, 3_000_000, 0, 300_000, 32_760, 32_768, 100, 1_300_000, 5]
    sql = f"SELECT repeat('x', n) AS t FROM unnest(ARRAY{sizes}) AS n"
    for batch_bytes in (1 << 10, 1 << 16, 64 << 20):
        table = read(connection, sql, batch_bytes=batch_bytes)
        assert [len(text) for text in table["t"].to_pylist()] == sizes


def test_what_libpq_has_given_out_is_freed(dsn, monkeypatch):
    """After a long row libpq's buffer has room for three others, the decoder's for one."""
    monkeypatch.setattr(Session, "is_plain", False)
    freed, free = [], CopyOut.free
    monkeypatch.setattr(CopyOut, "free", lambda self, held: (freed.append(held), free(self, held)))

    def refuse_at(number):
        batches = []

        def take(batch):
            time.sleep(0.05)
            batches.append(batch)
            if len(batches) == number:
                raise LookupError("not wanted")

        return take

    size = "CASE WHEN n = 1 THEN 530000 ELSE 340000 END"
    sql = f"SELECT repeat('x', {size}) AS t FROM generate_series(1, 100) AS n"
    for number in range(3, 9):
        with closing(connect(dsn)) as connection, pytest.raises(LookupError):
            read(connection, sql, refuse_at(number), batch_bytes=1 << 10)
    assert len(freed) == 6
    assert any(freed)


@pytest.mark.parametrize("way", ["socket", "libpq"], indirect=True)
def test_the_servers_last_words_are_told(dsn, way):
    """FATAL: the server says why, and closes without a ReadyForQuery."""
    words = message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mgoing down\0P\xc2\xb2\0\0")

    def end(data, number):
        return words if number == 1000 else None if number > 1000 else data

    with Proxy(dsn, end) as proxy, closing(connect(proxy.dsn)) as connection:
        error = failure_of(connection, ROWS)
        assert isinstance(error, ConnectionLostError)
        assert error.sqlstate == "57P01"
        assert "going down" in str(error)


def test_a_key_press_ends_waiting_within_a_second(connection, way):
    if way == "copy_expert":
        pytest.skip("libpq waits in C: psycopg2's own limitation")
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        read(connection, "SELECT n, pg_sleep(4) AS s FROM generate_series(1, 3) AS n")
    assert time.monotonic() - started < 1.5
    assert connection.closed


def test_signals_with_handlers_of_their_own_lose_nothing(connection, way):
    """poll(2) returns for each of them, whatever is then to be done."""
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        sql = "SELECT n, pg_sleep(0.2)::text AS s FROM generate_series(1, 4) AS n"
        assert read(connection, sql)["n"].to_pylist() == [1, 2, 3, 4]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > (10 if way != "copy_expert" else 0)


def test_while_a_batch_is_taken_the_server_waits(dsn):
    """100 MB are asked for: what is on the way meanwhile is what sockets' buffers hold."""
    counts = []

    def block(_):
        for _ in range(4):
            time.sleep(0.5)
            counts.append(proxy.forwarded)

    with Proxy(dsn) as proxy, closing(connect(proxy.dsn)) as connection:
        table = read(connection, MANY, once(block), batch_bytes=1 << 20)
        assert table.num_rows == 1_000_000
    assert counts[3] == counts[1]
    assert counts[3] < 40 << 20
    assert proxy.forwarded > 100 << 20
