"""What a review of merge="global" found: right, or refused."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import dask
import psycopg2
import pytest
from one_database import check

import dask_shardsql as dss
from dask_shardsql.engine import pools, sending
from dask_shardsql.engine.drivers.postgresql_merge import PostgreSQLMerging, PostgreSQLReceiving
from dask_shardsql.engine.sending import Sender

SCHEMA = """
CREATE TABLE mr_o (id int8 NOT NULL, kind text, n int4, a text, b text COLLATE "POSIX");
CREATE TABLE mr_i (oid int8 NOT NULL, qty int4);
CREATE TABLE mr_ref (w int4, kind text);
CREATE TABLE mr_t (code text NOT NULL, v int4);
CREATE VIEW mr_bits AS SELECT id, n, B'101'::text AS x, length(B'101') AS l FROM mr_o;
CREATE VIEW mr_some AS SELECT id FROM mr_o WHERE id::int::bit(3) = B'101';
CREATE SCHEMA mr_mine;
CREATE DOMAIN mr_mine.name AS text;
CREATE OPERATOR mr_mine.= (LEFTARG = int8, RIGHTARG = int8, FUNCTION = int8ne);
"""
DROP = """
DROP SCHEMA mr_mine CASCADE;
DROP VIEW mr_bits, mr_some;
DROP TABLE mr_o, mr_i, mr_ref, mr_t;
"""
KEYS = {"mr_o": "id", "mr_i": "oid", "mr_t": "code"}
NAMES = ["s1", "s2", "s3"]  # of which the third is empty


def of_two(row):
    return row[0] % 2


@pytest.fixture(scope="module")
def loaded(servers):
    servers.execute(SCHEMA)
    orders = [(n, "abc"[n % 3], n % 5, chr(97 + n), chr(110 - n)) for n in range(12)]
    servers.load("mr_o", orders, shard_of=of_two)
    servers.load("mr_i", [(n % 15, n) for n in range(30)], shard_of=of_two)
    servers.load("mr_ref", [(n, kind) for n, kind in enumerate("abcd")])
    codes = [(code, n) for n, code in enumerate("abbAB")]
    servers.load("mr_t", codes, shard_of=lambda row: row[0].isupper())
    yield servers
    pools.close_all()
    servers.execute(DROP)


def topology_of(servers, *, options="", sharded=KEYS):
    return dss.Topology.from_dsns({n: servers.dsns[n] + options for n in NAMES}, sharded=sharded)


@pytest.fixture
def topology(loaded):
    return topology_of(loaded)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT x, count(*) AS n FROM mr_bits GROUP BY x",
        "SELECT sum(l) AS s FROM mr_bits",
        "SELECT count(*) AS n FROM mr_some",
    ],
)
def test_bit_strings_in_views(sql, topology, loaded):
    check(sql, topology, loaded.reference)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT length((repeat(kind, 100)::name)::text) AS n, count(*) FROM mr_o GROUP BY 1",
        "SELECT count(*) AS n FROM mr_o WHERE id = 5::int8",
        "SELECT count(*) AS n FROM mr_o o JOIN mr_i i ON i.oid = o.id",
    ],
)
def test_own_types_and_operators_of_the_same_name(sql, loaded):
    options = " options='-c search_path=mr_mine,pg_catalog,public'"
    topology = topology_of(loaded, options=options)
    reference = dss.Topology.from_dsns({"reference": loaded.reference_dsn + options})
    check(sql, topology, reference)


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT max(a COLLATE "C") > max(b) AS x FROM mr_o',
        'SELECT b COLLATE "C" AS k FROM mr_o GROUP BY b COLLATE "C" HAVING b COLLATE "C" >= max(b)',
    ],
)
def test_explicit_collations(sql, topology, loaded):
    check(sql, topology, loaded.reference)


# The collations of ICU are needed, which PostgreSQL may have been built without.
@pytest.fixture(scope="module")
def folded(loaded):
    """A reference table of a collation for which "a" and "A" are equal."""
    try:
        loaded.execute(
            "CREATE COLLATION mr_ci "
            "(provider = icu, locale = 'und-u-ks-level2', deterministic = false); "
            "CREATE TABLE mr_folded (code text COLLATE mr_ci)"
        )
    except dss.QueryError:
        pytest.skip("PostgreSQL was built without ICU")
    loaded.load("mr_folded", [("a",), ("B",)])
    yield
    pools.close_all()
    loaded.execute("DROP TABLE mr_folded; DROP COLLATION mr_ci")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT r.code, count(*) AS n FROM mr_t t JOIN mr_folded r ON r.code = t.code "
        "GROUP BY r.code",
        "SELECT count(*) AS n FROM mr_t t JOIN mr_folded r ON r.code = t.code "
        "JOIN mr_t u ON u.code = r.code",
        "SELECT count(*) AS n FROM mr_t t JOIN mr_folded r ON r.code = t.code "
        "WHERE EXISTS (SELECT FROM mr_t u WHERE u.code = r.code AND u.v <> t.v)",
        "SELECT t.v, row_number() OVER (PARTITION BY r.code ORDER BY t.v) AS n "
        "FROM mr_t t JOIN mr_folded r ON r.code = t.code",
    ],
)
@pytest.mark.usefixtures("folded")
def test_nondeterministic_reference_columns(sql, topology, loaded):
    check(sql, topology, loaded.reference)


@pytest.fixture(scope="module")
def sorted_by_icu(servers):
    """Databases whose own order is not that of the code points: a topology and the reference."""
    dsns = {}
    for name in [*NAMES, "reference"]:
        dsn = servers.dsns.get(name, servers.reference_dsn)
        dsns[name] = psycopg2.extensions.make_dsn(dsn, dbname="mr_icu")
        try:
            with servers.session(name, autocommit=True) as cursor:
                cursor.execute(
                    "CREATE DATABASE mr_icu TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en'"
                )
        except dss.QueryError:
            pytest.skip("PostgreSQL was built without ICU")
        with (
            contextlib.closing(psycopg2.connect(dsns[name])) as connection,
            connection,
            connection.cursor() as cursor,
        ):
            cursor.execute('CREATE TABLE mr_s (id int8 NOT NULL, a text, c text COLLATE "C")')
            rows = [(0, "b", "B"), (2, "a", "C"), (1, "c", "D")]
            shard = {"s1": (0,), "s2": (1,), "s3": ()}.get(name, (0, 1))
            chosen = [row for row in rows if row[0] % 2 in shard]
            cursor.executemany("INSERT INTO mr_s VALUES (%s, %s, %s)", chosen)
    reference = dss.Topology.from_dsns({"reference": dsns.pop("reference")})
    yield dss.Topology.from_dsns(dsns, sharded={"mr_s": "id"}), reference
    pools.close_all()
    for name in [*NAMES, "reference"]:
        with servers.session(name, autocommit=True) as cursor:
            cursor.execute("DROP DATABASE mr_icu")


@pytest.mark.parametrize(
    "sql",
    [
        'SELECT max(a COLLATE "default") > max(c) AS x FROM mr_s',
        'SELECT a COLLATE "default" AS k FROM mr_s GROUP BY a COLLATE "default" '
        'HAVING a COLLATE "default" < max(c)',
    ],
)
def test_explicit_default_collation(sql, sorted_by_icu):
    check(sql, *sorted_by_icu)


# A sender fails at once where nobody reads its rows any more, and its connection is lent again; or
# it waits for a connection, while another query waits for one that a sender has.
BUSY = "SELECT pg_sleep(0.15)::text AS s"
ROWS = "SELECT t FROM mr_big WHERE id % 1 = 0 ORDER BY t, id"


@pytest.fixture
def of_one_connection(loaded):
    """Return a function that gives a topology in the order in which pools are asked, or back."""
    loaded.execute(
        "CREATE TABLE mr_big (id int8 NOT NULL, t text); "
        "INSERT INTO mr_big SELECT i, repeat('x', 200) FROM generate_series(1, 3000) i"
    )
    topology = topology_of(loaded)

    def make(*, is_turned):
        names = sorted(NAMES, key=lambda name: id(pools.pool_of(topology, name)))
        dsns = {name: loaded.dsns[name] for name in (names[::-1] if is_turned else names)}
        return dss.Topology.from_dsns(dsns, sharded={"mr_big": "id"})

    settings = {"shardsql.max-connections-per-worker": 1, "shardsql.pool-timeout": 3}
    with dask.config.set(settings):
        yield make
    pools.close_all()
    loaded.execute("DROP TABLE mr_big")


def run_beside(merges, topology):
    """Run others while that runs in a thread."""
    merging = threading.Thread(target=merges)
    merging.start()
    try:
        while merging.is_alive():
            dss.collect(BUSY, topology, merge="union")
    finally:
        merging.join()


def test_what_is_refused_does_not_cancel_another(of_one_connection, monkeypatch):
    topology = of_one_connection(is_turned=True)
    cancel = PostgreSQLReceiving.cancel

    def slow_cancel(self, source):
        time.sleep(0.05)  # as a network may be; it fails without, too, but not always
        cancel(self, source)

    monkeypatch.setattr(PostgreSQLReceiving, "cancel", slow_cancel)

    def merges():
        for _ in range(6):
            with pytest.raises(dss.MergeRefusedError):
                dss.collect(ROWS, topology, merge="global", max_gather_bytes=300_000)

    run_beside(merges, topology)


def test_senders_and_others_do_not_wait_for_each_other(of_one_connection, monkeypatch):
    topology, errors, begin = of_one_connection(is_turned=False), [], Sender._run
    asked, is_sending = [], threading.Event()

    def run(self):  # the first one's thread is late, as on a busy machine
        asked.append(self.shard)
        if self.shard != asked[0]:
            begin(self)
        elif is_sending.wait(10):
            time.sleep(0.5)
            begin(self)

    send = PostgreSQLReceiving.send

    def told(self, source, extract, file):
        is_sending.set()
        send(self, source, extract, file)

    monkeypatch.setattr(Sender, "_run", run)
    monkeypatch.setattr(PostgreSQLReceiving, "send", told)

    def merge():
        try:
            dss.collect(ROWS, topology, merge="global")
        except dss.PoolTimeoutError as error:
            errors.append(error)

    merging = threading.Thread(target=merge)
    merging.start()
    assert is_sending.wait(30)
    dss.collect(BUSY, topology, merge="union")  # it waits for the second, and has the first
    merging.join()
    assert not errors


@pytest.fixture(scope="module")
def guarded(loaded):
    """Policies: of a view's owner, and of a reference table that look at a sharded one."""
    loaded.execute(
        "CREATE TABLE mr_own (id int8 NOT NULL, own text); CREATE TABLE mr_seen (w int); "
        "CREATE TABLE mr_free (id int8 NOT NULL); CREATE ROLE mr_login LOGIN PASSWORD 'mr'; "
        "GRANT SELECT ON mr_own, mr_seen, mr_free TO mr_login; "
        "CREATE POLICY p ON mr_own USING (own = 'me'); "
        "ALTER TABLE mr_own ENABLE ROW LEVEL SECURITY; "
        "CREATE POLICY p ON mr_seen USING (EXISTS (SELECT FROM mr_free f WHERE f.id = w)); "
        "ALTER TABLE mr_seen ENABLE ROW LEVEL SECURITY; "
        "CREATE VIEW mr_mine_only AS SELECT id, own FROM mr_own; "
        "GRANT CREATE ON SCHEMA public TO mr_login; "
        "ALTER VIEW mr_mine_only OWNER TO mr_login"
    )
    loaded.load("mr_own", [(n, ("me", "you")[n % 3 > 0]) for n in range(12)], shard_of=of_two)
    loaded.load("mr_free", [(n,) for n in range(12)], shard_of=of_two)
    loaded.load("mr_seen", [(n,) for n in range(12)])
    yield {"mr_own": "id", "mr_free": "id"}
    pools.close_all()
    loaded.execute(
        "DROP VIEW mr_mine_only; DROP TABLE mr_own, mr_seen, mr_free; "
        "REVOKE ALL ON SCHEMA public FROM mr_login; DROP ROLE mr_login"
    )


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) AS n FROM mr_mine_only",
        "SELECT id, row_number() OVER (ORDER BY id) AS n FROM mr_mine_only",
        "SELECT mode() WITHIN GROUP (ORDER BY own) AS m FROM mr_mine_only WHERE random() < 2",
    ],
)
def test_policies_for_the_owner_of_a_view(sql, loaded, guarded):
    check(sql, topology_of(loaded, sharded=guarded), loaded.reference)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) AS n FROM mr_seen",
        "SELECT f.id FROM mr_free f JOIN mr_seen s ON s.w = f.id + 1",
    ],
)
def test_policies_of_reference_tables(sql, loaded, guarded):
    login = " user=mr_login password=mr"
    reference = dss.Topology.from_dsns({"reference": loaded.reference_dsn + login})
    check(sql, topology_of(loaded, options=login, sharded=guarded), reference)


def test_not_null_that_is_not_valid(loaded):
    loaded.execute("CREATE TABLE mr_late (id int8, v int4)")
    try:
        rows = [(n, n) for n in range(4)] + [(None, 0), (None, 1)]
        loaded.load("mr_late", rows, shard_of=lambda row: row[1] % 2)
        try:
            loaded.execute("ALTER TABLE mr_late ADD CONSTRAINT nn NOT NULL id NOT VALID")
        except dss.QueryError:
            pytest.skip("PostgreSQL 18 or newer has it")
        topology = topology_of(loaded, sharded={"mr_late": "id"})
        check("SELECT id, count(*) AS n FROM mr_late GROUP BY id", topology, loaded.reference)
    finally:
        loaded.execute("DROP TABLE mr_late")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM mr_span WHERE span @> 'z'::mr_step ORDER BY id",
        "SELECT count(*) AS n FROM mr_span WHERE span @> 'z'::mr_step",
    ],
)
def test_ranges_of_another_order(sql, loaded):
    try:
        for name in [*loaded.dsns, "reference"]:
            labels = "'x', 'z', 'y'" if name == "s2" else "'x', 'y', 'z'"
            with loaded.session(name) as cursor:
                cursor.execute(
                    f"CREATE TYPE mr_step AS ENUM ({labels}); "
                    "CREATE TYPE mr_steps AS RANGE (subtype = mr_step); "
                    "CREATE TABLE mr_span (id int8 NOT NULL, span mr_steps)"
                )
        rows = [(0, "[x,y]"), (1, "[x,y]"), (2, "[x,z]")]
        loaded.load("mr_span", rows, shard_of=of_two)
        check(sql, topology_of(loaded, sharded={"mr_span": "id"}), loaded.reference)
    finally:
        loaded.execute("DROP TABLE mr_span; DROP TYPE mr_steps, mr_step")


def test_tables_named_in_strings(loaded):
    loaded.execute("CREATE TABLE mr_empty (id int8 NOT NULL)")
    try:
        loaded.load("mr_empty", [(1,)], shard_of=of_two)
        topology = topology_of(loaded, sharded={"mr_empty": "id"})
        for spaces in range(9):  # whichever shard is to answer
            sql = "SELECT pg_relation_size(to_regclass('mr_empty')) > 0 AS b" + " " * spaces
            check(sql, topology, loaded.reference)
    finally:
        loaded.execute("DROP TABLE mr_empty")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM mr_made WHERE c < ROW('a')::mr_field",
        "SELECT id FROM mr_made ORDER BY c",
        "SELECT id FROM mr_made WHERE r @> 'b'::text",
    ],
)
def test_types_of_other_collations(sql, loaded):
    with loaded.session("s1") as cursor:
        cursor.execute("SELECT count(*) FROM pg_collation WHERE collname = 'en-x-icu'")
        if cursor.fetchone() == (0,):
            pytest.skip("PostgreSQL was built without ICU")
    try:
        for name in [*loaded.dsns, "reference"]:
            collation = '"en-x-icu"' if name == "s2" else '"C"'
            with loaded.session(name) as cursor:
                cursor.execute(
                    f"CREATE TYPE mr_field AS (t text COLLATE {collation}); "
                    f"CREATE TYPE mr_words AS RANGE (subtype = text, collation = {collation}); "
                    "CREATE TABLE mr_made (id int8 NOT NULL, c mr_field, r mr_words)"
                )
        rows = [(0, "(B)", "[A,Z]"), (2, "(c)", "[A,z]"), (1, "(a)", "[A,Z]"), (3, "(D)", "[A,Z]")]
        loaded.load("mr_made", rows, shard_of=of_two)
        topology = topology_of(loaded, sharded={"mr_made": "id"})
        for spaces in range(6):  # whichever shard is to answer
            check(sql + " " * spaces, topology, loaded.reference)
    finally:
        loaded.execute("DROP TABLE mr_made; DROP TYPE mr_field, mr_words")


def test_a_sender_that_is_closed_as_it_begins(of_one_connection, monkeypatch):
    topology, pipe = of_one_connection(is_turned=True), os.pipe

    def slow_pipe():  # as any thread may have to wait in between
        if threading.current_thread().name == "dask_shardsql-send":
            time.sleep(0.5)
        return pipe()

    def fail(self):
        time.sleep(0.2)
        raise dss.QueryError("of the shard that gathers")

    with monkeypatch.context() as patched:
        patched.setattr(sending.os, "pipe", slow_pipe)
        patched.setattr(PostgreSQLMerging, "prepare", fail)
        with pytest.raises(dss.QueryError, match="gathers"):
            dss.collect(ROWS, topology, merge="global")
        time.sleep(1)
    try:
        dss.collect(BUSY, topology, merge="union")
    finally:  # the test's own: let the rest of the tests have these connections
        for thread in threading.enumerate():
            if thread.name == "dask_shardsql-send":
                end = thread._target.__self__._ends.get()
                end.close()
                thread.join(5)


def test_functions_with_a_name_in_another_word(topology, loaded):
    loaded.execute(
        "CREATE FUNCTION mr_twice(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS "
        "'DECLARE mr_item int := $1; BEGIN RETURN mr_item * 2; END'"
    )
    try:
        sql = "SELECT sum(mr_twice(n)) AS s FROM mr_o"
        found = dss.collect(sql, topology, merge="global")
        assert found.equals(dss.collect(sql, loaded.reference))
    finally:
        pools.close_all()
        loaded.execute("DROP FUNCTION mr_twice")
