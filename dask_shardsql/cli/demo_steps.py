"""What the demo does and says, step by step."""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from decimal import ROUND_HALF_UP, Decimal
from importlib.util import find_spec
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

import dask_shardsql as dss
from dask_shardsql.cli.outcome import say
from dask_shardsql.cli.progress import ShardProgress, drawn
from dask_shardsql.testing import PostgreSQLBinaries, ShardServers, start_shards
from dask_shardsql.testing.tpch import TPCH_SHARDED, load_tpch

__all__ = ["Demo"]

_WORKERS = 2
_EVENTS_SECONDS = 2.0
_PLACES = Decimal("0.000001")
_INDENT = "    "

_READ = """\
import dask_shardsql as dss

topology = dss.Topology.from_toml("shards.toml")
orders = dss.read_sharded_sql("SELECT * FROM orders", topology)
orders.groupby("o_orderpriority").o_totalprice.sum().compute()"""
_JOIN_SQL = "SELECT * FROM orders JOIN customer ON o_custkey = c_custkey WHERE o_totalprice > %(p)s"
_JOIN = '''\
sql = """SELECT * FROM orders JOIN customer ON o_custkey = c_custkey
         WHERE o_totalprice > %(p)s"""
ddf = dss.read_sharded_sql(sql, topology, params={"p": 100_000})
ddf.groupby("c_mktsegment").o_totalprice.mean().compute()'''
_JOIN_REFERENCE = (
    "SELECT c_mktsegment, round(avg(o_totalprice), 6) FROM orders "
    "JOIN customer ON o_custkey = c_custkey WHERE o_totalprice > 100000 GROUP BY c_mktsegment"
)
_POINT_SQL = (
    "SELECT c_name, o_orderdate, o_totalprice FROM orders "
    "JOIN customer ON o_custkey = c_custkey WHERE o_orderkey = %(key)s"
)
_POINT = '''\
sql = """SELECT c_name, o_orderdate, o_totalprice
         FROM orders JOIN customer ON o_custkey = c_custkey
         WHERE o_orderkey = %(key)s"""
dss.collect(sql, topology, params={"key": 7}, shard_column="shard")'''
_TRY_SQL = "SELECT o_orderstatus, count(*) FROM orders GROUP BY o_orderstatus"


class _StoppingError(Exception):
    """No further step is wanted."""


class Demo:
    """One run of the demo.

    Parameters
    ----------
    console : rich.console.Console
        Where to write.
    binaries : PostgreSQLBinaries
        What to start servers from.
    shards : int
        Number of shards.
    scale : float
        TPC-H's scale factor.
    keep : path, optional
        Where to write the topology of shards that are to stay.

    Attributes
    ----------
    error : BaseException or None
        What went wrong, once :meth:`run` has returned.
    agreed : bool
        Whether the answer that was compared is the reference server's.
    handed_over : bool
        Whether the shards were left running, for the user to stop.
    """

    def __init__(
        self,
        console: Console,
        binaries: PostgreSQLBinaries,
        shards: int,
        scale: float,
        keep: Path | None,
    ) -> None:
        self.error: BaseException | None = None
        self.agreed = False
        self.handed_over = False
        self._console = console
        self._binaries = binaries
        self._shards = shards
        self._scale = scale
        self._keep = keep
        self._servers: ShardServers | None = None
        self._client: Any = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Do all steps, and remove all that is not to be kept."""
        began = time.monotonic()
        try:
            with ExitStack() as cleanup:
                cleanup.callback(self._stop_servers)
                self._steps(cleanup)
            end = "" if self.handed_over else " The servers are stopped and their data is removed."
            self._say(f"\nDone in {time.monotonic() - began:.0f} s.{end}")
        except _StoppingError:
            pass
        except BaseException as error:  # noqa: BLE001 - the caller raises it again
            if not self._stopping.is_set():  # else it is only that the servers are gone
                self.error = error

    def stop(self) -> bool:
        """Make :meth:`run` return soon: without servers, whatever uses them fails.

        Returns
        -------
        bool
            False when the shards were handed over already, and nothing is left to stop.
        """
        with self._lock:
            if self.handed_over:
                return False
            self._stopping.set()
        say("stopping ...")
        # psycopg2 prints, through this hook, what it meets when a server ends within a COPY.
        sys.excepthook = lambda *error: None
        if self._servers is not None:
            self._servers.stop()
        return True

    def abandon(self) -> None:
        """Give up what :meth:`run` waits for, such as workers that are gone."""
        if self._client is not None:
            with suppress(Exception):
                self._client.close(timeout=2)

    def _stop_servers(self) -> None:
        if self._servers is not None and not self.handed_over:
            self._servers.stop()

    def _check(self) -> None:
        if self._stopping.is_set():
            raise _StoppingError

    def _steps(self, cleanup: ExitStack) -> None:
        version, shards = self._binaries.version, f"{self._shards} shard{'s'[: self._shards != 1]}"
        self._say(
            f"One SQL text over {shards}: TPC-H data at scale {self._scale:g}, read with Dask.\n",
            "bold",
        )
        with self._step("Starting PostgreSQL servers") as done, deaf_children():
            servers = self._servers = start_shards(
                self._shards,
                sharded=TPCH_SHARDED,
                binaries=self._binaries,
                keep=self._keep is not None,
            )
            done(f"PostgreSQL {version}: {shards}, and a reference server with all the rows")
        with self._step("Making and loading the data") as done:
            counts = load_tpch(servers, self._scale, progress=lambda line: self._check())
            done(
                f"{counts['orders']:,} orders and {counts['lineitem']:,} line items over the "
                "shards by order key, the other tables copied"
            )
        with self._step("Starting a Dask cluster") as done:
            self._client = _start_cluster(cleanup)
            done(f"Dask cluster: {_WORKERS} workers, dashboard {_dashboard(self._client)}")

        topology = servers.topology
        self._title("1. A sharded table as a lazy dask DataFrame", _READ)
        self._pairs(self._timed(topology, _read))
        self._title("2. A JOIN with a table that every shard has, and a parameter", _JOIN)
        means = self._timed(topology, _join)
        self._pairs(means)
        self._compare(servers, means)
        self._title("3. One row, as an Arrow table", _POINT)
        self._pairs(self._timed(topology, _point))
        self._check()
        if self._keep is not None:
            self._hand_over(servers, self._keep)

    @contextmanager
    def _step(self, what: str) -> Iterator[Callable[[str], None]]:
        """Say what goes on while it does, and then what came of it and how long it took."""
        self._check()
        said: list[str] = []
        started = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(f"{what} ..."):
                yield said.append
        else:
            yield said.append
        self._say(f"{time.monotonic() - started:6.1f} s  {said[0]}")
        self._check()

    def _title(self, title: str, code: str) -> None:
        """Head a section: what comes, and the code that a user would write for it."""
        self._say(f"\n{title}\n", "bold")
        text = Text(code)
        if self._console.is_terminal:
            text = Syntax("", "python", theme="ansi_dark").highlight(code)
            text.rstrip()
        for line in text.split("\n", allow_blank=True):
            self._console.print(Text(_INDENT) + line if line else "")
        self._say("")

    def _timed(self, topology: dss.Topology, call: Callable[[dss.Topology], Any]) -> Any:
        """Run one of the queries, and show each shard's part in it and the time."""
        self._check()
        progress = ShardProgress([shard.name for shard in topology.shards])
        started = time.monotonic()
        with drawn(progress, self._console, erase=True):
            answer = call(topology)
            seconds = time.monotonic() - started
            progress.wait(_EVENTS_SECONDS)
        self._console.print(Padding(progress, (0, 0, 0, len(_INDENT)), expand=False))
        self._say(f"\n{_INDENT}answered in {seconds:.2f} s:", "dim")
        return answer

    def _pairs(self, values: Mapping[str, Any]) -> None:
        width = max(map(len, values))
        shown = {n: f"{v:,.2f}" if isinstance(v, Decimal) else str(v) for n, v in values.items()}
        right = max(map(len, shown.values()))
        for name, text in shown.items():
            self._say(f"{_INDENT}{name:<{width}}  {text:>{right}}")

    def _compare(self, servers: ShardServers, means: Mapping[str, Decimal]) -> None:
        """Compare the means of the JOIN with those that one database computes from all rows."""
        with servers.session("reference") as cursor:
            cursor.execute(_JOIN_REFERENCE)
            expected = {name.strip(): mean for name, mean in cursor.fetchall()}
        found = {n: mean.quantize(_PLACES, rounding=ROUND_HALF_UP) for n, mean in means.items()}
        self.agreed = found == expected
        if self.agreed:
            self._say(
                f"\n{_INDENT}✓ The reference server's avg(o_totalprice) is the same for all "
                f"{len(expected)} segments, to 6 decimals.",
                "green",
            )
            return
        self._say(f"\n{_INDENT}✗ The reference server's avg(o_totalprice) differs:", "bold red")
        for name in sorted(expected | found):
            here, there = found.get(name), expected.get(name)
            if here != there:
                self._say(f"{_INDENT}  {name}: {here} from the shards, {there} from the reference")

    def _hand_over(self, servers: ShardServers, file: Path) -> None:
        """Leave the shards running, and say how to use and to stop them."""
        with self._lock:
            self._check()
            servers.write_toml(file)
            self.handed_over = True
        name = shlex.quote(str(file))
        self._say("\nThe shards stay up. Query them, and stop them when you are done:\n", "bold")
        self._say(f'{_INDENT}{_command()} query "{_TRY_SQL}" --topology {name}')
        self._say(f"{_INDENT}{servers.stop_command} && rm {name}")
        self._say(f"\n{file} names them; it holds their password, so only you can read it.")

    def _say(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style))


@contextmanager
def deaf_children() -> Iterator[None]:
    """Keep a terminal's Ctrl-C from processes that are started in this block: we stop them.

    Threads and processes inherit the signal mask; PostgreSQL's servers then set their own.
    """
    # Starting this process of its own would lift the mask, in whichever thread first needs it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_cluster(cleanup: ExitStack) -> Any:
    """Start a local cluster and return its client, which is then current."""
    from distributed import Client, LocalCluster

    scratch = tempfile.TemporaryDirectory(prefix="dask-shardsql-demo-", ignore_cleanup_errors=True)
    with deaf_children():
        cluster = LocalCluster(
            n_workers=_WORKERS,
            threads_per_worker=2,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            local_directory=cleanup.enter_context(scratch),
        )
        cleanup.enter_context(cluster)
        return cleanup.enter_context(Client(cluster))


def _dashboard(client: Any) -> str:
    return "not there without bokeh" if find_spec("bokeh") is None else str(client.dashboard_link)


def _read(topology: dss.Topology) -> dict[str, Decimal]:
    orders = dss.read_sharded_sql("SELECT * FROM orders", topology)
    sums = orders.groupby("o_orderpriority").o_totalprice.sum().compute()
    return {name.strip(): value for name, value in sorted(sums.items())}


def _join(topology: dss.Topology) -> dict[str, Decimal]:
    ddf = dss.read_sharded_sql(_JOIN_SQL, topology, params={"p": 100_000})
    means = ddf.groupby("c_mktsegment").o_totalprice.mean().compute()
    return {name.strip(): value for name, value in sorted(means.items())}


def _point(topology: dss.Topology) -> dict[str, Any]:
    table = dss.collect(_POINT_SQL, topology, {"key": 7}, shard_column="shard")
    row: dict[str, Any]
    (row,) = table.to_pylist()
    return row


def _command() -> str:
    """Return how this command is called in the user's shell."""
    name = "dask-shardsql"
    return name if shutil.which(name) else shlex.quote(str(Path(sys.executable).with_name(name)))
