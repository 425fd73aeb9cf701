"""What the benchmarks share: shards with TPC-H data, and how each client logs in to them."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlencode

import psycopg2
from psycopg2.extensions import make_dsn

import dask_shardsql as dss
from dask_shardsql.engine.credentials import resolve_password
from dask_shardsql.testing import find_binaries, start_shards
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch


@dataclass(frozen=True)
class Login:
    """One shard, and what the various clients want to be told to reach it."""

    shard: str
    keywords: dict[str, str]  # libpq's, without the password
    password: str | None = field(repr=False)

    @property
    def public_dsn(self) -> str:
        return make_dsn(**self.keywords)

    @property
    def dsn(self) -> str:
        return make_dsn(**self.keywords, password=self.password or None)

    @property
    def url(self) -> str:
        rest = dict(self.keywords)
        user, host = rest.pop("user", ""), rest.pop("host", "localhost")
        port, dbname = rest.pop("port", "5432"), rest.pop("dbname", "")
        login = quote(user, safe="") + (
            f":{quote(self.password, safe='')}" if self.password else ""
        )
        options = f"?{urlencode(rest)}" if rest else ""
        return f"postgresql://{login}@{host}:{port}/{quote(dbname, safe='')}{options}"

    @property
    def environment(self) -> dict[str, str]:
        """For a child process: a password on its command line would be seen by others."""
        return os.environ | ({"PGPASSWORD": self.password} if self.password else {})


def logins(topology: dss.Topology) -> list[Login]:
    return [
        Login(
            shard.name,
            {key: str(value) for key, value in shard.primary.keywords},
            resolve_password(shard.primary, shard.name),
        )
        for shard in topology.shards
    ]


def ask(login: Login, *statements: str) -> list[tuple]:
    """Run statements on one shard, each by itself, and return the last one's rows."""
    with closing(psycopg2.connect(login.dsn)) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for statement in statements:
            cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def tpch_shards(topology: Path | None, scale: float) -> Iterator[Path]:
    """Give the file that describes four shards with TPC-H data: `topology`, or new ones."""
    if topology is not None:
        yield topology
        return
    with (
        tempfile.TemporaryDirectory() as directory,
        start_shards(4, sharded=TPCH_SHARDED, reference=False) as servers,
    ):
        say(f"loading TPC-H at scale {scale:g} into 4 shards")
        load_tpch(servers, scale=scale)
        servers.execute("VACUUM ANALYZE")  # or autovacuum might do it in the middle of a round
        yield servers.write_toml(f"{directory}/shards.toml")


def find_psql() -> str | None:
    """Return a psql that runs: beside the server's programs, on PATH, or of the system."""
    places = []
    try:
        binaries = find_binaries()
    except dss.ConfigurationError:  # the servers run elsewhere
        binaries = None
    if binaries is not None and binaries.path is not None:
        places.append(str(binaries.path / "psql"))
    places.append(shutil.which("psql") or "")
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin/psql"), reverse=True)
    for place in filter(os.path.exists, places):
        if subprocess.run([place, "--version"], capture_output=True, check=False).returncode == 0:
            return place
    return None
