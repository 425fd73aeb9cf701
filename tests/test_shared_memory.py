"""Answers through shared memory, between real processes: what arrives, and what is left behind."""

from __future__ import annotations

import copy
import ctypes
import datetime as dt
import fcntl
import gc
import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from decimal import Decimal
from unittest import mock

import dask
import pyarrow as pa
import pytest
from dask.sizeof import sizeof
from distributed import Client, LocalCluster, protocol
from distributed.protocol import to_serialize
from distributed.protocol.serialize import deserialize_bytes, serialize_bytelist

from dask_shardsql.engine import shared_memory
from dask_shardsql.engine.shared_memory import (
    LostTable,
    Offer,
    SharedTable,
    SharedWriter,
    offered_memory,
    received,
)
from dask_shardsql.sql import types

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux's")

VALUES = {
    pa.bool_(): True,
    pa.int16(): -(2**15),
    pa.int32(): -(2**31),
    pa.int64(): -(2**63),
    pa.uint32(): 2**32 - 1,
    pa.float32(): 0.5,
    pa.float64(): float("inf"),
    pa.date32(): dt.date(1, 1, 1),
    pa.time64("us"): dt.time(23, 59, 59, 999999),
    pa.timestamp("us"): dt.datetime(9999, 12, 31, 23, 59, 59, 999999),
    pa.timestamp("us", "UTC"): dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    pa.month_day_nano_interval(): pa.MonthDayNano([1, -2, 3]),
    pa.binary(): b"\0\xff",
    pa.string(): "größer 🐘",
    pa.large_string(): "large",
    pa.decimal128(38, 4): Decimal("-" + "9" * 34 + ".9999"),
    types.unconstrained_numeric(): Decimal("9" * 38 + "." + "1" * 38),
    pa.dictionary(pa.int8(), pa.string()): "mood",
}
EVERY_TYPE = {kind: [None, value, None, value] for kind, value in VALUES.items()}
EVERY_TYPE |= {
    pa.list_(kind): [None, [value, None], [], [value]]
    for kind, value in VALUES.items()
    if not pa.types.is_dictionary(kind)
}


def every_type():
    arrays = [pa.array(values, kind) for kind, values in EVERY_TYPE.items()]
    return pa.table(dict(zip(map(str, EVERY_TYPE), arrays, strict=True)))


def numbers(rows=300_000, batches=4):
    part = {"n": range(rows // batches), "t": [f"text {i}" for i in range(rows // batches)]}
    return pa.concat_tables([pa.table(part)] * batches)


TABLES = {
    "every type": every_type,
    "without rows": lambda: every_type().schema.empty_table(),
    "a batch without rows": lambda: pa.Table.from_batches([every_type().to_batches()[0].slice(4)]),
    "slices of bigger arrays": lambda: pa.concat_tables([every_type()] * 3).slice(1, 9),
    "a slice of long arrays": lambda: numbers(1000, 1).slice(501, 7),
    "many batches": lambda: pa.concat_tables([every_type()] * 100),
    "columns that hold no NULL": lambda: pa.table(
        [pa.array([1, 2])], pa.schema([pa.field("id", pa.int64(), False)], {"k": "v"})
    ),
}


# --- what runs in the other process: "worker" and, once, "client"


def serve(pipe):
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((function(*arguments), None))
        except Exception as error:  # noqa: BLE001 - for the caller
            pipe.send((None, error))


@contextmanager
def another_process():
    """Give a function that calls another one in a process of its own; its pid is an attribute."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()

    def call(function, *arguments):
        ours.send((function, arguments))
        value, error = ours.recv()
        if error is not None:
            raise error
        return value

    def kill():
        process.kill()
        process.join()

    call.pid, call.kill = process.pid, kill
    try:
        yield call
    finally:
        kill()
        ours.close()


@pytest.fixture
def worker():
    with another_process() as call:
        yield call


@pytest.fixture(scope="module")
def long_lived_worker():
    with another_process() as call:
        yield call


@pytest.fixture
def offer():
    with offered_memory() as made:
        yield made


KEPT = ExitStack()
HELD = []


def written(offer, table, worth=0):
    smallest = mock.patch.object(shared_memory, "_WORTH_BYTES", worth)
    with smallest, SharedWriter(table.schema, offer) as writer:
        for batch in table.to_batches():
            writer.write(batch)
        return writer.finish()


def message_of(result):
    """The bytes that dask would send."""
    return [bytes(f) for f in protocol.dumps({"x": to_serialize(result)}, context={})]


def arrived(message):
    return protocol.loads(message)["x"]


def share(offer, table, worth=0):
    result = written(offer, table, worth)
    HELD[:] = [result]
    return message_of(result)


def share_some_rows(offer):
    return share(offer, numbers())


def reference_of_held():
    return shared_memory._dump(HELD[0], {})[0]


def drop_held():
    HELD.clear()


def make_offer():
    return KEPT.enter_context(offered_memory())


def reach(offer):
    return offer.reachable()


def become_nobody(dumpable):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    ctypes.CDLL(None).prctl(4, int(dumpable), 0, 0, 0)  # PR_SET_DUMPABLE: setuid cleared it


def open_memories(process="self"):
    found = 0
    for number in os.listdir(f"/proc/{process}/fd"):
        try:
            found += os.readlink(f"/proc/{process}/fd/{number}").startswith("/memfd:dask_shardsql")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def mappings():
    with open("/proc/self/maps", encoding="utf-8") as file:
        lines = [line for line in file if "/memfd:dask_shardsql" in line]
    return [tuple(int(x, 16) for x in re.match(r"(\w+)-(\w+)", line).groups()) for line in lines]


def is_mapped(table):
    """Whether every buffer of the table lies in shared memory."""
    ranges = mappings()
    arrays = [chunk for column in table.columns for chunk in column.chunks]
    buffers = [b for array in arrays for b in array.buffers() if b is not None and b.size]
    return bool(buffers) and all(
        any(low <= buffer.address and buffer.address + buffer.size <= high for low, high in ranges)
        for buffer in buffers
    )


# --- what arrives


def test_every_type_of_the_package_is_among_the_values():
    assert set(types._ARROW_TYPES.values()) <= set(VALUES)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_arrives_as_it_was(long_lived_worker, offer, name):
    table = TABLES[name]()
    result = arrived(long_lived_worker(share, offer, table))
    assert isinstance(result, pa.Table)
    assert result.schema.equals(table.schema, check_metadata=True)
    assert result.num_rows == table.num_rows
    assert result.equals(table)
    result.validate(full=True)


def test_rows_without_columns_are_counted():
    rows = every_type().select([])  # which pickle forgets, so they cannot come from a worker
    with another_process() as client:
        assert written(client(make_offer), rows).table().num_rows == 4
    assert written(None, rows).num_rows == 4


def test_the_table_is_a_view_of_the_memory(long_lived_worker, offer):
    message = long_lived_worker(share_some_rows, offer)
    assert sum(map(len, message)) < 2000
    before = pa.total_allocated_bytes()
    table = arrived(message)
    assert pa.total_allocated_bytes() - before < 10_000
    assert is_mapped(table)


def test_the_table_outlives_the_worker_and_the_offer(worker):
    gc.collect()
    before = set(mappings())  # what other tests have left
    with offered_memory() as offer:
        table = arrived(worker(share_some_rows, offer))
    worker.kill()
    gc.collect()
    part = table["t"].chunk(2).slice(5, 2)
    assert table.equals(numbers())
    del table
    assert part.to_pylist() == ["text 5", "text 6"]
    assert set(mappings()) - before
    del part
    assert not set(mappings()) - before


def test_little_is_not_worth_sharing(worker, offer):
    message = worker(share, offer, numbers(1000), shared_memory._WORTH_BYTES)
    assert arrived(message).equals(numbers(1000))
    assert worker(open_memories) == 0


def test_the_memory_is_sealed(offer):
    with another_process() as client:
        shared = written(client(make_offer), numbers())
        descriptor = shared._memory.descriptor
        for change in (
            lambda: os.pwrite(descriptor, b"x", 100),
            lambda: os.ftruncate(descriptor, 10),
            lambda: os.ftruncate(descriptor, 10**9),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0),
        ):
            with pytest.raises(PermissionError):
                change()
        assert shared.table().equals(numbers())


# --- what does not arrive: never other rows


def test_a_worker_that_ended_too_early_gives_a_lost_table(worker, offer):
    message = worker(share_some_rows, offer)
    worker.kill()
    result = arrived(message)
    assert isinstance(result, LostTable)
    assert result.reason
    assert received(result) is None


def test_memory_that_was_dropped_too_early_gives_a_lost_table(long_lived_worker, offer):
    message = long_lived_worker(share_some_rows, offer)
    long_lived_worker(drop_held)
    assert isinstance(arrived(message), LostTable)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nonce": b"x" * 32}, "not the memory that was meant"),
        ({"nonce": b""}, "not the memory that was meant"),
        ({"descriptor": 0}, "no memory of dask_shardsql"),
        ({"descriptor": 9999}, "No such file"),
        ({"pid": 2**22}, "No such file"),
        ({"nbytes": 100}, "not as it was left"),
        ({"num_rows": 299_999}, "not as it was left"),
    ],
)
def test_a_reference_to_anything_else_gives_a_lost_table(long_lived_worker, offer, change, reason):
    long_lived_worker(share_some_rows, offer)
    reference = long_lived_worker(reference_of_held)
    assert isinstance(shared_memory._load(reference, []), pa.Table)
    result = shared_memory._load(reference | change, [])
    assert isinstance(result, LostTable)
    assert reason in result.reason


def test_a_number_that_is_of_other_memory_by_now_gives_a_lost_table(long_lived_worker, offer):
    long_lived_worker(drop_held)
    message = long_lived_worker(share_some_rows, offer)
    old = long_lived_worker(reference_of_held)
    long_lived_worker(drop_held)
    long_lived_worker(share, offer, every_type())
    assert long_lived_worker(reference_of_held)["descriptor"] == old["descriptor"]
    assert isinstance(arrived(message), LostTable)


def test_memory_that_is_not_sealed_is_not_mapped():
    with mock.patch.object(shared_memory, "_seals", return_value=fcntl.F_SEAL_WRITE):
        with another_process() as client:
            HELD[:] = [written(client(make_offer), numbers())]
            message = message_of_held()
        assert arrived(message).equals(numbers())
    assert arrived(message) == LostTable("the memory is not as it was left")
    drop_held()


# --- who is reachable


def test_offers_reach_other_processes_only_while_their_block_runs(worker):
    with offered_memory() as offer:
        assert worker(reach, offer)
        assert pickle.loads(pickle.dumps(offer)) == offer  # noqa: S301
        assert not offer.reachable()  # in its own process there is nothing to send
        assert not worker(reach, replace(offer, nonce=b"x" * 32))
        assert not worker(reach, replace(offer, descriptor=0))
    assert not worker(reach, offer)


def test_rows_travel_when_the_client_has_stopped_waiting(worker):
    with offered_memory() as offer:
        pass
    with another_process() as client:
        worker(share_some_rows, client(make_offer))
    assert worker(open_memories) == 1
    message = worker(message_of_held)
    assert sum(map(len, message)) > 1_000_000
    assert arrived(message).equals(numbers())
    assert isinstance(worker(written, offer, numbers()), pa.Table)


def message_of_held():
    return message_of(HELD[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_not_reachable(worker, offer):
    with another_process() as client:
        assert worker(reach, offer)
        theirs = client(make_offer)
        client(become_nobody, True)
        assert not client(reach, offer)
        assert not worker(reach, theirs)  # though root could open it: the client could not
        worker(become_nobody, True)
        assert not worker(reach, offer)
        assert worker(reach, theirs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_processes_that_are_not_dumpable_do_not_share(worker):
    with another_process() as client:
        theirs = client(make_offer)
        client(become_nobody, True)
        worker(become_nobody, False)
        assert not worker(reach, theirs)


def test_another_pid_namespace_is_not_reachable(offer):
    made = f"Offer{offer.pid, offer.descriptor, offer.nonce}"
    code = f"from {Offer.__module__} import Offer; print({made}.reachable())"
    command = [sys.executable, "-c", code]
    run = {"capture_output": True, "text": True}
    assert subprocess.run(command, **run).stdout == "True\n"
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], **run).returncode:
        pytest.skip("this system lets us make no pid namespace")
    assert subprocess.run([*unshare, *command], **run).stdout == "False\n"
    keep_proc = unshare[:3]  # sees the client under its number, but is not seen itself
    assert subprocess.run([*keep_proc, *command], **run).stdout == "False\n"


# --- where there is no memory


@pytest.mark.parametrize("missing", ["memfd_create", "/proc", "descriptors"])
def test_systems_without_such_memory_send_tables(monkeypatch, missing):
    def refuse(*_):
        raise OSError(24, "Too many open files")

    with another_process() as client:
        offer = client(make_offer)
        if missing == "memfd_create":
            monkeypatch.delattr(os, "memfd_create")
        elif missing == "/proc":
            monkeypatch.setattr(pa, "OSFile", refuse)
        else:
            monkeypatch.setattr(os, "memfd_create", refuse)
        with offered_memory() as ours:
            assert ours is None
        for there in (offer, None):
            result = written(there, numbers(1000))
            assert isinstance(result, pa.Table)
            assert result.equals(numbers(1000))
    gc.collect()
    assert open_memories() == 0


def shared_below_limits(offer, table, limits):
    """The classes of what comes back when the memory may only have so many bytes."""
    found = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            result = written(offer, table)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert received(result).equals(table), limit
        found.append(type(result).__name__)
    del result
    assert open_memories() == 0
    return found


def test_memory_that_runs_out_loses_no_row(long_lived_worker, offer):
    table = pa.concat_tables([every_type()] * 20)
    size = written_bytes(table)
    limits = [0, 10, 64, 65, 1000, *range(0, size, size // 60), size - 8, size - 1, size, 2 * size]
    long_lived_worker(drop_held)
    found = long_lived_worker(shared_below_limits, offer, table, limits)
    assert found == ["SharedTable" if limit >= size else "Table" for limit in limits]


def written_bytes(table):
    with another_process() as client:
        return written(client(make_offer), table).nbytes


def test_memory_that_cannot_be_sealed_is_not_shared(monkeypatch):
    with another_process() as client:
        offer = client(make_offer)
        monkeypatch.setattr(shared_memory, "_seals", lambda: -1)
        assert written(offer, numbers()).equals(numbers())
        assert isinstance(written(offer, numbers()), pa.Table)


def test_a_writer_leaves_nothing_when_it_is_left_unfinished():
    batch = numbers().to_batches()[0]
    with another_process() as client:
        with SharedWriter(batch.schema, client(make_offer)) as writer:
            writer.write(batch)
            writer.write(batch)
            assert open_memories() == 2  # the memory's and the sink's
        assert open_memories() == 0


def test_a_writer_is_used_once():
    batch = numbers().to_batches()[0]
    writer = SharedWriter(batch.schema)
    writer.write(batch)
    writer.finish()
    for use in (writer.finish, lambda: writer.write(batch)):
        with pytest.raises(ValueError, match="closed"):
            use()


def test_no_descriptor_or_mapping_is_left_after_many_rounds(worker, offer):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    table = every_type()
    worker(share, offer, table)
    before = descriptors(), worker(count_descriptors)
    for _ in range(200):
        assert arrived(worker(share, offer, table)).num_rows == 4
    assert (descriptors(), worker(count_descriptors)) == before
    assert not mappings()
    worker(drop_held)
    assert worker(open_memories) == 0


def count_descriptors():
    return len(os.listdir("/proc/self/fd"))


# --- dask


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as started:
        yield started


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_dask_counts_the_real_size_and_copies_the_rows():
    with another_process() as client:
        shared = written(client(make_offer), numbers())
        assert sizeof(shared) >= shared.nbytes > numbers().nbytes * 0.9
        assert shared.num_rows == 300_000
        for taken in (
            pickle.loads(pickle.dumps(shared)),  # noqa: S301
            copy.deepcopy(shared),
            deserialize_bytes(b"".join(serialize_bytelist(shared, on_error="raise"))),
        ):
            assert isinstance(taken, pa.Table)
            assert taken.equals(numbers())


def test_a_task_hands_its_answer_to_the_client(cluster, offer):
    with Client(cluster) as client:
        futures = [client.submit(written, offer, numbers(), pure=False) for _ in range(3)]
        tables = client.gather(futures)
        assert all(is_mapped(table) and table.equals(numbers()) for table in tables)
        kinds = [client.submit(type, future) for future in futures]
        assert client.gather(kinds) == [SharedTable] * 3
        del futures, kinds
        wait_until(lambda: set(client.run(open_memories).values()) == {0})
        assert tables[2]["t"][299_999].as_py() == "text 74999"


def test_another_worker_gets_the_rows_too(cluster, offer):
    with Client(cluster) as client:
        one, other = client.scheduler_info()["workers"]
        future = client.submit(written, offer, numbers(), workers=[one])
        assert client.submit(pa.Table.equals, future, numbers(), workers=[other]).result()


def test_a_client_that_is_killed_leaves_nothing(cluster):
    with Client(cluster) as client, another_process() as dying:
        dying(gather_and_hold, cluster.scheduler_address)
        assert sum(client.run(open_memories).values()) == 1
        assert open_memories(dying.pid) == 1  # its offer; the table is mapped, not open
        dying.kill()
        wait_until(lambda: set(client.run(open_memories).values()) == {0})


def gather_and_hold(address):
    client = KEPT.enter_context(Client(address))
    offer = make_offer()
    HELD[:] = [client.submit(written, offer, numbers(), pure=False)]
    HELD.append(HELD[0].result())
    assert is_mapped(HELD[1])


def test_a_worker_that_is_killed_leaves_the_table_and_nothing_else(offer):
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        table = client.submit(written, offer, numbers()).result()
        (pid,) = client.run(os.getpid).values()
        os.kill(pid, 9)
        wait_until(lambda: not os.path.exists(f"/proc/{pid}/fd/0"))
        assert is_mapped(table)
        assert table.equals(numbers())


def test_an_answer_that_dask_spills_arrives_in_full(offer):
    with (
        dask.config.set({"distributed.worker.memory.target": 1e-6}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="2GB", dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
    ):
        future = client.submit(written, offer, numbers())
        table = future.result()
        assert client.run(spilled) == {address: [future.key] for address in client.nthreads()}
        assert set(client.run(open_memories).values()) == {0}
        assert table.equals(numbers())
        assert not mappings()


def spilled(dask_worker):
    return list(dask_worker.data.disk)
