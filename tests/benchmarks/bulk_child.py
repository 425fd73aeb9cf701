"""One measured run of one way of ``bulk.py``, in a process of its own. For Linux."""

from __future__ import annotations

import gc
import json
import re
import resource
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from bulk_peers import MONEY_TYPE, Skip
from bulk_ways import WAYS, Query, Summary
from shards import logins

import dask_shardsql as dss


def run(name: str, table: str, topology_file: str) -> None:
    """Print what was measured as one line of JSON."""
    topology = dss.Topology.from_toml(topology_file)
    query = Query(table)
    try:
        with WAYS[name].open(topology, logins(topology)) as read:
            read(query.few)  # imports, connections and caches are not what is measured
            started = time.perf_counter()
            read(query.few)
            found = {"start": time.perf_counter() - started}
            gc.collect()
            meter = Meter()
            result = read(query)
            found |= meter.stop()
            found |= summarize(result)
    except (ImportError, Skip) as error:
        found = {"skip": str(error)}
    except Exception as error:  # noqa: BLE001 - one way's failure must not end the others' rounds
        found = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(found))


class Meter:
    """Seconds, CPU seconds and peak memory of this process and its children from here on."""

    def __init__(self) -> None:
        self.children = [child.pid for child in psutil.Process().children(recursive=True)]
        self.baselines = {pid: reset_peak(pid) for pid in ("self", *self.children)}
        self.children_cpu = {pid: cpu_of(pid) for pid in self.children}
        self.cpu = cpu_here()
        self.started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.started
        cpu = cpu_here() - self.cpu
        cpu += sum(cpu_of(pid) - before for pid, before in self.children_cpu.items())
        peaks = {
            pid: max(0.0, memory(pid, "VmHWM") - before) for pid, before in self.baselines.items()
        }
        own = peaks.pop("self")
        found = {"seconds": seconds, "cpu": cpu, "peak": own}
        return found | ({"worker_peak": max(peaks.values())} if peaks else {})


def cpu_here() -> float:
    """CPU seconds of this process, and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cpu_of(pid: int) -> float:
    """CPU seconds of a running child: /proc/<pid>/stat has only hundredths.

    The clock's number is what clock_getcpuclockid(3) computes.
    """
    return time.clock_gettime((~pid << 3) | 2)


def memory(pid: int | str, line: str) -> float:
    """A line of /proc/<pid>/status in MiB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{line}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024


def reset_peak(pid: int | str) -> float:
    """Forget the process's peak, and return the MiB that the next one is counted from."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    except OSError:  # the kernel cannot: only what goes beyond the peak so far will show
        return memory(pid, "VmHWM")
    return memory(pid, "VmRSS")


def summarize(result: Any) -> dict[str, Any]:
    """What is compared with the shards' own sums, and the size; nothing for what keeps no rows."""
    if result is None:
        return {}
    if not isinstance(result, Summary):
        result = summary_of(result)
    found = vars(result) | {"price": str(result.price)}
    return found | {"exact": isinstance(result.price, Decimal)}


def summary_of(result: Any) -> Summary:
    if isinstance(result, pa.Table):
        table = result
        kind = table.schema.field("l_extendedprice").type
        opaque = isinstance(kind, pa.BaseExtensionType)
        money = f"{kind.storage_type} (opaque)" if opaque else str(kind)
    elif hasattr(result, "to_arrow"):  # polars
        table = result.to_arrow()
        kind = result.schema["l_extendedprice"]
        money = f"{kind.ext_storage()} (opaque)" if hasattr(kind, "ext_storage") else str(kind)
    else:
        if result.index.name is not None:
            result = result.reset_index()
        table = pa.Table.from_pandas(result, preserve_index=False)
        column = result["l_extendedprice"]
        of = f" of {type(column.iloc[0]).__name__}" if column.dtype == object else ""
        money = f"{column.dtype}{of}"
    return Summary(
        table.num_rows,
        pc.sum(table.column("l_orderkey")).as_py(),
        total(table.column("l_extendedprice")),
        table.nbytes,
        money,
    )


def total(column: pa.ChunkedArray) -> Decimal | float:
    """The sum: exact of decimals and of their text, a float of floats."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks])
    if not (pa.types.is_decimal(column.type) or pa.types.is_floating(column.type)):
        column = column.cast(pa.string()).cast(MONEY_TYPE)
    return pc.sum(column).as_py()
