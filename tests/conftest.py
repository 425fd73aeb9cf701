"""Real PostgreSQL servers for the tests: seven shards and a reference, started once."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
import uuid

os.environ["DASK_CONFIG"] = tempfile.mkdtemp(prefix="dask-config-")  # leave the user's alone
atexit.register(shutil.rmtree, os.environ["DASK_CONFIG"], ignore_errors=True)
for name in [name for name in os.environ if name.startswith("PG")]:
    del os.environ[name]
# a shell that starts the tests in the background has them ignore Ctrl-C, which some of them press
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from dask_shardsql import Topology
from dask_shardsql.engine import pools
from dask_shardsql.testing import ShardServers, find_binaries, start_shards

SHARDED = {"orders": "o_orderkey", "lineitem": "l_orderkey"}


def pytest_report_header() -> str:
    binaries = find_binaries()
    return f"postgresql: {binaries.version} from {binaries.source}"


@pytest.fixture(scope="session")
def servers():
    """Seven shards s1..s7 and a reference server."""
    with start_shards(7, sharded=SHARDED) as started:
        yield started


@pytest.fixture(scope="session")
def topology(servers: ShardServers) -> Topology:
    """The first four of the shards."""
    return first_shards(servers, 4)


@pytest.fixture(scope="module", autouse=True)
def _no_idle_connections():
    """What one module's tests leave idle must not use up the servers' connections."""
    yield
    pools.close_all()


@pytest.fixture
def pools_of_its_own():
    """Leave no idle connections to the next test."""
    yield
    pools.close_all()


@pytest.fixture
def table_name() -> str:
    """A name no other test uses."""
    return f"t_{uuid.uuid4().hex[:10]}"


def first_shards(servers: ShardServers, n: int) -> Topology:
    """A topology of the first n of the servers' shards."""
    names = [shard.name for shard in servers.topology.shards[:n]]
    return Topology.from_dsns({name: servers.dsns[name] for name in names}, sharded=SHARDED)


@pytest.fixture(scope="session")
def tpch(tmp_path_factory):
    """A directory with the shards.toml of four shards that hold TPC-H data, scale 0.01."""
    from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

    with start_shards(4, sharded=TPCH_SHARDED) as started:
        load_tpch(started, scale=0.01)
        directory = tmp_path_factory.mktemp("tpch")
        started.write_toml(directory / "shards.toml")
        started.toml_directory = directory
        yield started
