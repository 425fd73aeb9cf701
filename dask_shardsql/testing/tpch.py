"""TPC-H data on running shards.

Schema and types follow the TPC-H specification, revision 3.0.1, clause 1.4; the rows come from
``tpchgen-cli``, whose output is that of the specification's own generator, dbgen.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from dask_shardsql.errors import ConfigurationError
from dask_shardsql.testing.servers import ShardServers

__all__ = ["TPCH_SHARDED", "load_tpch"]

TPCH_SHARDED = {"orders": "o_orderkey", "lineitem": "l_orderkey"}
"""The sharded tables of :func:`load_tpch` and their shard keys; the other six are copied."""

_COLUMNS = {
    "region": "r_regionkey bigint, r_name char(25), r_comment varchar(152)",
    "nation": "n_nationkey bigint, n_name char(25), n_regionkey bigint, n_comment varchar(152)",
    "supplier": (
        "s_suppkey bigint, s_name char(25), s_address varchar(40), s_nationkey bigint, "
        "s_phone char(15), s_acctbal decimal(15,2), s_comment varchar(101)"
    ),
    "customer": (
        "c_custkey bigint, c_name varchar(25), c_address varchar(40), c_nationkey bigint, "
        "c_phone char(15), c_acctbal decimal(15,2), c_mktsegment char(10), c_comment varchar(117)"
    ),
    "part": (
        "p_partkey bigint, p_name varchar(55), p_mfgr char(25), p_brand char(10), "
        "p_type varchar(25), p_size integer, p_container char(10), p_retailprice decimal(15,2), "
        "p_comment varchar(23)"
    ),
    "partsupp": (
        "ps_partkey bigint, ps_suppkey bigint, ps_availqty integer, "
        "ps_supplycost decimal(15,2), ps_comment varchar(199)"
    ),
    "orders": (
        "o_orderkey bigint, o_custkey bigint, o_orderstatus char(1), o_totalprice decimal(15,2), "
        "o_orderdate date, o_orderpriority char(15), o_clerk char(15), o_shippriority integer, "
        "o_comment varchar(79)"
    ),
    "lineitem": (
        "l_orderkey bigint, l_partkey bigint, l_suppkey bigint, l_linenumber integer, "
        "l_quantity decimal(15,2), l_extendedprice decimal(15,2), l_discount decimal(15,2), "
        "l_tax decimal(15,2), l_returnflag char(1), l_linestatus char(1), l_shipdate date, "
        "l_commitdate date, l_receiptdate date, l_shipinstruct char(25), l_shipmode char(10), "
        "l_comment varchar(44)"
    ),
}
_PRIMARY_KEYS = {
    "region": "r_regionkey",
    "nation": "n_nationkey",
    "supplier": "s_suppkey",
    "customer": "c_custkey",
    "part": "p_partkey",
    "orders": "o_orderkey",
    "lineitem": "l_orderkey, l_linenumber",
}


def load_tpch(
    servers: ShardServers,
    scale: float = 0.01,
    *,
    progress: Callable[[str], None] | None = None,
) -> dict[str, int]:
    """Create and fill the eight TPC-H tables on running shards.

    ``orders`` and ``lineitem`` are sharded: a row goes to shard number ``orderkey % n``, so that an
    order and its items are on one shard. The other six tables are copied to every shard. The
    reference server, if there is one, gets every row of every table.

    Parameters
    ----------
    servers : ShardServers
        The servers. For a topology that knows the shard keys, start them with
        ``start_shards(n, sharded=TPCH_SHARDED)``.
    scale : float, default 0.01
        The scale factor: 1 is about 6 million rows of ``lineitem`` and 1 GB of text.
    progress : callable, optional
        Called with a line of text at each step, by one thread at a time.

    Returns
    -------
    dict of str to int
        The number of rows of each table.

    Raises
    ------
    ConfigurationError
        ``tpchgen-cli`` is not installed, or fails.
    QueryError
        A server refused a statement, such as when a table exists already.
    """
    lock = threading.Lock()

    def say(line: str) -> None:
        if progress is not None:
            with lock:
                progress(line)

    shards = list(servers.dsns)
    counts = dict.fromkeys(_COLUMNS, 0)
    with tempfile.TemporaryDirectory(prefix="dask-shardsql-tpch-") as name:
        directory = Path(name)
        say(f"generating TPC-H at scale {scale:g}")
        _generate(directory, scale)
        for table, key in TPCH_SHARDED.items():
            say(f"splitting {table} by {key}")
            counts[table] = _split(directory / f"{table}.csv", key, len(shards))

        def fill(server: str) -> None:
            for table in _COLUMNS:
                path = directory / f"{table}.csv"
                if table in TPCH_SHARDED and server in shards:
                    path = _part(path, shards.index(server))
                rows = _copy(servers, server, table, path)
                say(f"{server}: {rows:,} rows of {table}")
                if table not in TPCH_SHARDED:
                    counts[table] = rows

        servers.for_each(fill)
    servers.execute(f"ANALYZE {', '.join(_COLUMNS)}")
    return counts


def find_generator() -> str:
    """Return the path of ``tpchgen-cli``.

    Raises
    ------
    ConfigurationError
        It is neither beside this interpreter nor on ``PATH``.
    """
    scripts = [Path(sys.executable).parent, Path(sysconfig.get_path("scripts"))]
    found = [str(path / "tpchgen-cli") for path in scripts if (path / "tpchgen-cli").exists()]
    program = found[0] if found else shutil.which("tpchgen-cli")
    if program is None:
        raise ConfigurationError(
            "cannot generate TPC-H data: 'tpchgen-cli' is neither next to the interpreter nor on "
            "PATH. Install it with: pip install 'dask_shardsql[demo]'"
        )
    return program


def _generate(directory: Path, scale: float) -> None:
    program = find_generator()
    answer = subprocess.run(
        [program, "csv", f"--scale-factor={scale}", f"--output-dir={directory}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise ConfigurationError(
            f"cannot generate TPC-H data at scale {scale:g}: exit code {answer.returncode} of "
            f"'{program}': {answer.stderr.strip()}"
        )


def _part(path: Path, number: int) -> Path:
    return path.with_suffix(f".{number}.csv")


def _split(path: Path, key: str, n: int) -> int:
    """Write the rows of CSV file `path` whose `key` % `n` is i to the i-th part; return how many.

    All but the key stays text, so that every value reaches the shard as it was generated.
    """
    with open(path) as handle:
        columns = handle.readline().strip().split(",")
    types = {column: pa.int64() if column == key else pa.string() for column in columns}
    count = 0
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(
            pacsv.open_csv(
                path,
                read_options=pacsv.ReadOptions(block_size=8 << 20),
                convert_options=pacsv.ConvertOptions(column_types=types),
            )
        )
        writers = [
            stack.enter_context(pacsv.CSVWriter(str(_part(path, number)), batches.schema))
            for number in range(n)
        ]
        for batch in batches:
            count += batch.num_rows
            shard = np.asarray(batch.column(key)) % n
            for number, writer in enumerate(writers):
                writer.write_batch(batch.filter(pa.array(shard == number)))
    return count


def _copy(servers: ShardServers, server: str, table: str, path: Path) -> int:
    """Create `table` on `server` and fill it from CSV file `path`; return the number of rows."""
    with servers.session(server) as cursor, open(path, "rb") as handle:
        cursor.execute(f"CREATE TABLE {table} ({_COLUMNS[table]})")
        cursor.copy_expert(f"COPY {table} FROM STDIN (FORMAT csv, HEADER)", handle, 1 << 18)
        rows = int(cursor.rowcount)
        # After the rows: building an index once is quicker than growing it.
        if table in _PRIMARY_KEYS:
            cursor.execute(f"ALTER TABLE {table} ADD PRIMARY KEY ({_PRIMARY_KEYS[table]})")
        else:  # the generator repeats pairs of partsupp where there are few suppliers
            cursor.execute(f"CREATE INDEX ON {table} (ps_partkey, ps_suppkey)")
    return rows
