"""Topologies with pools of their own, and whether a call left their sessions as they must be."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from contextlib import contextmanager

import dask_shardsql as dss
from dask_shardsql.engine import pools

LARGE = "SELECT g AS id, repeat(md5(g::text), 8) AS t FROM generate_series(1, 20000) g"  # 5 MiB
ENDLESS = (
    "SELECT g AS id, repeat(md5(g::text), 8) AS t FROM (SELECT generate_series(1, 1e8::int8) g) x"
)


def own_shards(servers, n=4, **more):
    """A topology of n shards whose pools nobody else uses; `more` are further ones."""
    mark = uuid.uuid4().hex[:8]
    names = list(servers.dsns)
    dsns = {
        f"s{i + 1}": f"{servers.dsns[names[i % len(names)]]} application_name=own-{mark}-{i}"
        for i in range(n)
    }
    return dss.Topology.from_dsns({**dsns, **more})


def wait_until(condition, seconds=3.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "that did not come true"
        time.sleep(0.02)


def pools_of(topology):
    return [pools.pool_of(topology, shard.name) for shard in topology.shards]


def transactions(servers):
    """What this package has open on the servers: their transactions carry the query's name."""
    found = []
    for name in servers.dsns:
        with servers.session(name) as cursor:
            cursor.execute(
                "SELECT state, query FROM pg_stat_activity "
                "WHERE application_name LIKE 'dask_shardsql:%'"
            )
            found += cursor.fetchall()
    return found


def check_that_sessions_are_left_well(servers, topology, seconds=3.0):
    wait_until(lambda: not any(pool._busy or pool._opening for pool in pools_of(topology)), seconds)
    wait_until(lambda: not transactions(servers), seconds)


@contextmanager
def interrupt_when(condition):
    """Press Ctrl-C in the block as soon as the condition holds."""

    def run():
        wait_until(condition, 10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
