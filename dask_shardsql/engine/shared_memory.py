"""An answer from a worker to the client through memory, where the two share a host.

::

    client                                    worker
    with offered_memory() as offer:  ─────►   writer = SharedWriter(schema, offer)
                                              writer.write(batch) ...      into a memfd
                                              return writer.finish()       SharedTable, or the Table
    a Table over the same memory     ◄─────   dask sends pid, descriptor and nonce, not the rows

The memory has no name in any directory (``memfd_create(2)``), so the kernel frees it with the last
process that has it open or mapped, however that process ends: nothing can be left behind. The
client maps it while dask hands the message over; from then on the worker may end.

Where anything is missing (another host, container or user, another system than Linux, no memory
to be had) the answer travels as it is. Whether client and worker see each other is tried out, not
concluded from addresses: the offer names a memfd of the client's, which the worker has to find.

Only a message that dask sends now carries a reference. Whatever else takes a :class:`SharedTable`
apart (dask that spills to disk, pickle, copy) gets its rows, so it cannot point at memory that has
gone since. A reference that leads nowhere, or to anything but this very memory, becomes a
:class:`LostTable`, never other rows.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

__all__ = ["LostTable", "Offer", "SharedTable", "SharedWriter", "offered_memory", "received"]

_NAME = "dask_shardsql"
_NONCE_BYTES = 32
_HEADER_BYTES = 64  # what follows stays aligned as Arrow likes it
_NO_EXEC = 0x0008  # MFD_NOEXEC_SEAL, of Linux 6.3: some systems refuse memory without it
_WORTH_BYTES = 1 << 20  # less comes as fast through a socket, and takes no descriptor
_SAME = ("Uid:", "Gid:", "CapPrm:", "CapEff:")  # lines of /proc/<pid>/status, proc(5)


@dataclass(frozen=True)
class Offer:
    """A client's word that it can read the memory of workers on its host; goes into tasks.

    Parameters
    ----------
    pid : int
        The client's process id, as the client sees it.
    descriptor : int
        Its descriptor of a memfd that holds `nonce`.
    nonce : bytes
        32 random bytes.
    """

    pid: int
    descriptor: int
    nonce: bytes

    def reachable(self) -> bool:
        """Return whether this process and the client can open each other's memory; never raises.

        The kernel lets a process open another's descriptors if their user, group and capabilities
        allow it to read the other's state (``ptrace(2)``, "Ptrace access mode checking"). We ask
        that these be the same on both sides, so that what works in this direction works in the
        other. Where the client is this process there is nothing to send.
        """
        try:
            if self.pid == os.getpid():
                return False
            os.close(_open_memory(self.pid, self.descriptor, self.nonce))
            # a process that is not dumpable belongs to root, and others cannot look into it
            visible = os.stat("/proc/self/fd").st_uid == os.geteuid()
            return visible and _standing(str(self.pid)) == _standing("self")
        except (OSError, ValueError):
            return False


@contextmanager
def offered_memory() -> Iterator[Offer | None]:
    """Give the offer to put into tasks; None where the system has no such memory.

    Workers share only with a client whose block has not ended, so gather the answers inside it.
    """
    _teach_dask()
    offer = None
    with ExitStack() as stack:
        with suppress(OSError):
            memory = _Memory()
            stack.callback(memory.close)
            memory.seal()
            offer = Offer(os.getpid(), memory.descriptor, memory.nonce)
        yield offer


class SharedWriter:
    """Takes an answer's record batches as they arrive; use it in a ``with`` block.

    Parameters
    ----------
    schema : pyarrow.Schema
        The answer's schema.
    offer : Offer, optional
        The client's. Without one, or where it does not reach, the batches are kept as they are.

    Notes
    -----
    Memory that cannot be had (ENOSPC, ENOMEM, EMFILE, ...) is no error: what was written stays
    where it is, what follows is kept on the heap, and :meth:`finish` returns both as a table.
    """

    def __init__(self, schema: pa.Schema, offer: Offer | None = None) -> None:
        self._schema = schema
        self._offer = offer if offer is not None and offer.reachable() else None
        self._kept: list[pa.RecordBatch] = []
        self._kept_bytes = 0
        self._rows = 0
        self._memory: _Memory | None = None
        self._stream: Any = None
        self._whole = 0  # bytes of the memory that hold whole batches
        self._open = True

    def write(self, batch: pa.RecordBatch) -> None:
        """Take one record batch of the schema.

        Raises
        ------
        ValueError
            The writer is closed, or has finished.
        pyarrow.ArrowInvalid
            The batch has another schema; raised here or by :meth:`finish`.
        """
        self._check_open()
        self._kept.append(batch)
        self._kept_bytes += batch.nbytes
        self._rows += batch.num_rows
        if self._offer is not None and self._kept_bytes >= _WORTH_BYTES:
            try:
                self._move()
            except OSError:
                self._offer = None

    def finish(self) -> SharedTable | pa.Table:
        """Return all that was written: shared if it may and is worth it, else as a table.

        Raises
        ------
        ValueError
            The writer is closed, or has finished.
        OSError
            What is already in the memory cannot be mapped.
        """
        self._check_open()
        self._open = False
        try:
            if self._offer is not None and self._memory is not None:
                self._move()
                self._stream.close()
                self._memory.seal()
                shared = SharedTable(self._memory, self._rows, self._offer)
                self._memory = None
                return shared
        except OSError:
            self._offer = None
        batches = self._kept
        if self._memory is not None and self._whole > _HEADER_BYTES:
            batches = _map_table(self._memory.descriptor, self._whole).to_batches() + batches
        return pa.Table.from_batches(batches, self._schema)

    def close(self) -> None:
        """Let go of what no :meth:`finish` has handed on."""
        self._open = False
        self._kept = []
        self._stream = None
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def __enter__(self) -> SharedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("this SharedWriter is closed: its answer was handed on or dropped")

    def _move(self) -> None:
        """Move what is kept into the memory; a batch is let go when it is there as a whole."""
        if self._memory is None:
            memory = _Memory()
            self._stream = pa.ipc.new_stream(memory.sink, self._schema)
            self._memory = memory
        while self._kept:
            self._stream.write_batch(self._kept[0])
            self._whole = self._memory.sink.tell()
            del self._kept[0]


class SharedTable:
    """An answer in memory that the client can map; what a task returns in place of the table.

    Dask counts its real size, and the memory is freed when dask drops it, or when the client's
    table is dropped, whichever comes later.

    Parameters
    ----------
    memory : _Memory
        Sealed memory that holds an Arrow IPC stream.
    num_rows : int
        Rows in it.
    offer : Offer
        Of the client that is to get it.
    """

    __slots__ = ("__weakref__", "_memory", "_offer", "nbytes", "num_rows")

    def __init__(self, memory: _Memory, num_rows: int, offer: Offer) -> None:
        _teach_dask()
        self._memory = memory
        self._offer = offer
        self.num_rows = num_rows
        self.nbytes = os.fstat(memory.descriptor).st_size

    def table(self) -> pa.Table:
        """Return the table, as a view of the memory.

        Raises
        ------
        OSError
            The memory cannot be mapped.
        """
        return _map_table(self._memory.descriptor, self.nbytes)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self.nbytes

    def __reduce__(self) -> Any:
        return (_itself, (self.table(),))

    def __repr__(self) -> str:
        return f"<SharedTable: {self.num_rows} rows, {self.nbytes} bytes>"


@dataclass(frozen=True)
class LostTable:
    """What arrives in place of an answer whose worker ended or spilled it in the meantime.

    Parameters
    ----------
    reason : str
        Why the memory could not be mapped.
    """

    reason: str


def received(result: Any) -> pa.Table | None:
    """Return the table that a task's gathered result stands for; None if it must be read again."""
    if isinstance(result, SharedTable):
        return result.table()
    return None if isinstance(result, LostTable) else result


class _Memory:
    """Anonymous memory that begins with a nonce, and the sink that fills it.

    Raises
    ------
    OSError
        The system has none, or none left.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memfd_create")
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            self.descriptor = os.memfd_create(_NAME, flags | _NO_EXEC)
        except OSError:  # an older kernel
            self.descriptor = os.memfd_create(_NAME, flags)
        self._closer = weakref.finalize(self, os.close, self.descriptor)
        self.nonce = os.urandom(_NONCE_BYTES)
        # write(2) takes half the time that filling a mapping takes, which faults on every page
        self.sink = pa.OSFile(f"/proc/self/fd/{self.descriptor}", "wb")
        self.sink.write(self.nonce.ljust(_HEADER_BYTES, b"\0"))

    def seal(self) -> None:
        """Make sure that nobody changes or shortens what others have mapped."""
        self.sink.close()
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _seals())

    def close(self) -> None:
        """Close the descriptor; mappings stay."""
        self.sink.close()
        self._closer()


def _seals() -> int:
    return fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def _open_memory(pid: int, descriptor: int, nonce: bytes) -> int:
    """Return a descriptor of ours, for reading, of another process' memory.

    Raises
    ------
    OSError
        It is not to be opened, or not the one that begins with `nonce`.
    """
    path = f"/proc/{pid}/fd/{descriptor}"
    # the number may be of another file by now, and opening, say, a pipe has effects
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise OSError(f"{path} is no memory of dask_shardsql")
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if os.pread(opened, _NONCE_BYTES, 0) != nonce or len(nonce) != _NONCE_BYTES:
        os.close(opened)
        raise OSError(f"{path} is not the memory that was meant")
    return opened


def _map_table(descriptor: int, nbytes: int) -> pa.Table:
    """Return the table in the first `nbytes` of the memory; its buffers keep the mapping."""
    with pa.memory_map(f"/proc/self/fd/{descriptor}", "r") as mapped:
        buffer = mapped.read_buffer(nbytes)
    return pa.ipc.open_stream(buffer.slice(_HEADER_BYTES)).read_all()


def _standing(process: str) -> tuple[Any, ...]:
    """Return what decides which processes `process` may look into.

    Raises
    ------
    OSError
        It is not to be seen.
    """
    with open(f"/proc/{process}/status", encoding="utf-8", errors="replace") as file:
        lines = [line for line in file if line.startswith(_SAME)]
    spaces = [os.stat(f"/proc/{process}/ns/{kind}") for kind in ("pid", "user")]
    return (lines, [(space.st_dev, space.st_ino) for space in spaces])


def _dump(shared: SharedTable, context: Mapping[str, Any] | None = None) -> Any:
    """Take a shared table apart for dask: a reference if it is sent to the client, else its rows.

    Dask gives a context (of sender and recipient) to what goes into a message, and none to what
    it spills. ``NotImplementedError`` makes it pickle.
    """
    if context is None or not shared._offer.reachable():
        raise NotImplementedError
    memory = shared._memory
    where = {"pid": os.getpid(), "descriptor": memory.descriptor, "nonce": memory.nonce}
    return where | {"nbytes": shared.nbytes, "num_rows": shared.num_rows}, []


def _load(reference: Mapping[str, Any], frames: Any) -> pa.Table | LostTable:
    """Map the memory of a reference; never raises, as dask's connection would end with it."""
    try:
        opened = _open_memory(reference["pid"], reference["descriptor"], reference["nonce"])
        try:
            seals = fcntl.fcntl(opened, fcntl.F_GET_SEALS)
            if seals & _seals() == _seals() and os.fstat(opened).st_size == reference["nbytes"]:
                table = _map_table(opened, reference["nbytes"])
                if table.num_rows == reference["num_rows"]:
                    return table
            return LostTable("the memory is not as it was left")
        finally:
            os.close(opened)
    except (OSError, pa.ArrowException) as error:
        return LostTable(str(error))


def _itself(table: pa.Table) -> pa.Table:
    return table


@functools.cache
def _teach_dask() -> None:
    """Tell dask, once a process, how shared tables are sent."""
    from distributed.protocol import dask_deserialize, dask_serialize

    dask_serialize.register(SharedTable, _dump)
    dask_deserialize.register(SharedTable, _load)


if "distributed.protocol" in sys.modules:  # dask imports this module to read what it was sent
    _teach_dask()
