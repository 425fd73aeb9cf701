"""The memory that the kernel writes a record batch to, laid out as Arrow's columnar format.

How much room each column gets is guessed from the rows before; a column that is full ends the
batch, and the next one is laid out better. Arenas grow from the size of the first bytes that
arrive, so that one row costs little.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dask_shardsql.engine.copy_kernel.layout import PLAN, Kind
from dask_shardsql.engine.drivers.base import Columns
from dask_shardsql.errors import ColumnError
from dask_shardsql.sql.types import Column

__all__ = ["BATCH_BYTES", "SPARE", "Arena", "Kinds"]

BATCH_BYTES = 64 << 20
"""How large a record batch may become, in bytes; a single row may exceed it."""

SPARE = 8
"""Bytes that must be free behind whatever the kernel reads and writes: it does so by words."""

Kinds = tuple[Kind, ...]
"""What a column's values are in the stream: one kind, or ``LIST`` and the kind of its elements.

None at all where they are sent in their text form, to be read from that.
"""

_GROWTH = 8  # of an arena, from one to the next
_ROOM = 1.1  # for texts that are longer than those before
_LEAST_ROOM = 256
_LEAST_WAITING = 1 << 10
_ALIGNMENT = 64
_LARGE = 1 << 20
_MOST_TEXT = 2**31 - 1  # of one batch, as its offsets have 32 bits
_BITS = {
    Kind.BOOL: 1,
    Kind.INT16: 16,
    Kind.INT32: 32,
    Kind.INT64: 64,
    Kind.DATE: 32,
    Kind.TIME: 64,
    Kind.TIMESTAMP: 64,
    Kind.INTERVAL: 128,
    Kind.NUMERIC128: 128,
    Kind.NUMERIC256: 256,
}  # of a value; the others have offsets
_OFFSET_BITS = 32
_TEXTS = (Kind.TEXT, Kind.JSONB, Kind.UUID)


class Arena:
    """What the kernel writes a record batch to.

    It has a node for each column and, behind them, one for the elements of each column of lists.

    Parameters
    ----------
    columns : tuple of Column
        The columns with the Arrow types to deliver.
    kinds : sequence of Kinds
        What each of them is in the stream.
    batch_bytes : int
        How large a record batch may become.

    Attributes
    ----------
    plan : numpy.ndarray of int64, shape (nodes, len(PLAN))
        For the kernel.
    memory : numpy.ndarray of uint8
        The memory of the batch that is being written.
    address, plan_address : int
        Where they are.
    is_laid_out : bool
        Whether there is room for any row at all.
    rows : int
        How many were written to all of its memories before this one.
    """

    def __init__(self, columns: Columns, kinds: Sequence[Kinds], batch_bytes: int) -> None:
        self._columns = columns
        self._batch_bytes = batch_bytes
        self._by_column = tuple(kinds)
        self._of, self._kinds, self._types, plan = _nodes(columns, self._by_column)
        self.plan = plan.copy()
        self.memory = np.empty(SPARE, np.uint8)
        self.address = self.memory.ctypes.data
        self.plan_address = self.plan.ctypes.data
        self.is_laid_out = False
        self.rows = 0
        self._values = [0] * len(self._of)  # in these rows
        self._text = [0] * len(self._of)  # bytes of it

    def column_of(self, node: int) -> tuple[Column, Kind]:
        """Return the column of a node, and the kind of the node's values."""
        return self._columns[self._of[node]], self._kinds[node]

    def renew(self, waiting: int) -> None:
        """Take new memory.

        Parameters
        ----------
        waiting : int
            How many bytes wait to be decoded: the first arena has room for all of their rows.
        """
        plan, width = self.plan, len(self._columns)
        if not self.rows:
            rounded = max(_LEAST_WAITING, 1 << (waiting - 1).bit_length())
            layout = _first_layout(self._columns, self._by_column, rounded, self._batch_bytes)
            plan[:] = layout.plan
            self._take_memory(layout)
            return
        size = min(self._batch_bytes, _GROWTH * len(self.memory))
        per_row = (
            sum(
                _ROOM * (self._values[node] * (_bits(kind) + 1) / 8 + self._text[node])
                for node, kind in enumerate(self._kinds)
            )
            / self.rows
        )
        rows = max(1, int(size / per_row))
        values = [int(_ROOM * rows * n / self.rows) + _LEAST_ROOM for n in self._values]
        values[:width] = [rows] * width
        text = [int(_ROOM * rows * n / self.rows) + _LEAST_ROOM for n in self._text]
        plan[:, PLAN.CAPACITY] = values
        plan[:, PLAN.DATA_SIZE] = [min(size, _MOST_TEXT) for size in text]
        self._take_memory(_lay_out(plan, self._kinds))

    def widen(self, node: int, amount: int, waiting: int) -> None:
        """Make more room in a node, for a row that no arena has room for.

        Parameters
        ----------
        node : int
            The node.
        amount : int
            What the kernel needs at the least.
        waiting : int
            How many bytes wait to be decoded: elements and their text need no more than those.

        Raises
        ------
        ColumnError
            There cannot be that much.
        """
        plan = self.plan[node]
        capacity, size = int(plan[PLAN.CAPACITY]), int(plan[PLAN.DATA_SIZE])
        room = amount
        if node >= len(self._columns):  # elements of a list may lack either
            plan[PLAN.CAPACITY] = max(capacity, min(max(amount, 2 * capacity), waiting // 4 + 1))
            room = max(amount, min(2 * size, 2 * waiting))
        if self._kinds[node] in _TEXTS:
            plan[PLAN.DATA_SIZE] = max(size, min(room, _MOST_TEXT))
        if (capacity, size) == (plan[PLAN.CAPACITY], plan[PLAN.DATA_SIZE]):
            name = self._columns[self._of[node]].name
            raise ColumnError(f"column {name!r}: a value has more than 2 GiB", (name,))
        self._take_memory(_lay_out(self.plan, self._kinds))

    def arrays(self, rows: int) -> list[pa.Array]:
        """Return the columns of what was written, without copying it.

        Raises
        ------
        ColumnError
            A text is not UTF-8.
        """
        plans, memory = self.plan.tolist(), pa.py_buffer(self.memory)
        arrays = [self._array(node, rows, plans, memory) for node in range(len(self._columns))]
        self.rows += rows
        return arrays

    def _take_memory(self, layout: _Layout) -> None:
        self.memory = memory = _allocate(layout.size + SPARE)
        self.address = memory.ctypes.data
        memory[: layout.validities] = 0xFF  # the kernel writes only NULLs
        if len(layout.offsets):  # the first of each
            memory[: layout.size].view(np.int32)[layout.offsets] = 0
        self.is_laid_out = True

    def _array(self, node: int, length: int, plans: list[list[int]], memory: pa.Buffer) -> pa.Array:
        kind, plan, part = self._kinds[node], plans[node], memory.slice

        self._values[node] += length
        validity = part(plan[PLAN.VALIDITY], -(-length // 8)) if plan[PLAN.HAS_NULL] else None
        values = plan[PLAN.VALUES]
        nulls = -1 if validity is not None else 0
        if kind in _BITS:
            buffers = [validity, part(values, -(-length * _BITS[kind] // 8))]
            return pa.Array.from_buffers(self._types[node], length, buffers, nulls)
        end = int(self.memory[values + 4 * length : values + 4 * length + 4].view(np.int32)[0])
        buffers = [validity, part(values, 4 * (length + 1))]
        if kind == Kind.LIST:
            elements = self._array(plan[PLAN.CHILD], end, plans, memory)
            kind_of_list = pa.list_(elements.type)
            return pa.Array.from_buffers(kind_of_list, length, buffers, nulls, children=[elements])
        self._text[node] += end
        buffers.append(part(plan[PLAN.DATA], end))
        array = pa.Array.from_buffers(self._types[node], length, buffers, nulls)
        if plan[PLAN.NOT_ASCII] and pa.types.is_string(array.type):
            self._check_utf8(array, node)
        return array

    def _check_utf8(self, array: pa.Array, node: int) -> None:
        try:
            array.validate(full=True)
        except pa.ArrowInvalid as error:
            name = self._columns[self._of[node]].name
            raise ColumnError(
                f"cannot read column {name!r} as UTF-8 text: {error}. Is the database's encoding "
                "SQL_ASCII, with bytes in it that are not UTF-8?",
                (name,),
            ) from error


class _Nodes(NamedTuple):
    """Of each node its column, its kind and its Arrow type; and a plan that knows these."""

    of: list[int]
    kinds: list[Kind]
    types: list[pa.DataType]
    plan: Any


class _Layout(NamedTuple):
    """A plan with a place for each node in a memory of some size.

    It starts with the validity bitmaps; the offsets that must be zero are elements of 32 bits.
    """

    plan: Any
    size: int
    validities: int
    offsets: Any


@functools.lru_cache(maxsize=256)
def _nodes(columns: Columns, kinds: tuple[Kinds, ...]) -> _Nodes:
    types = [column.arrow_type for column in columns]
    nested = [number for number, kind in enumerate(kinds) if len(kind) > 1]
    of = [*range(len(kinds)), *nested]
    node_kinds = [kind[0] if kind else Kind.TEXT for kind in kinds]
    node_kinds += [kinds[number][1] for number in nested]
    node_types = [
        wanted if kind else pa.string() for wanted, kind in zip(types, kinds, strict=True)
    ]
    node_types += [types[number].value_type for number in nested]
    plan = np.zeros((len(of), len(PLAN)), np.int64)
    plan[:, PLAN.KIND] = node_kinds
    for node, kind in enumerate(node_types):
        if node >= len(kinds):
            plan[of[node], PLAN.CHILD] = node
        if pa.types.is_decimal(kind):
            plan[node, PLAN.SCALE] = kind.scale
            plan[node, PLAN.DIGITS] = kind.precision - kind.scale
    return _Nodes(of, node_kinds, node_types, plan)


@functools.lru_cache(maxsize=256)
def _first_layout(
    columns: Columns, kinds: tuple[Kinds, ...], waiting: int, batch_bytes: int
) -> _Layout:
    """Return a layout with room for all rows of as many bytes."""
    nodes, width = _nodes(columns, kinds), len(columns)
    # two bytes a row and four a value at the least; a UUID's 20 bytes become 36
    bits = sum(_bits(kind) + 1 for kind in nodes.kinds[:width])
    rows = min(waiting // (2 + 4 * width), 8 * batch_bytes // bits) + 1
    values = [rows] * width
    # but no large row's size times the number of columns: see widen
    most = max(_LEAST_ROOM, 4 * batch_bytes // len(nodes.of))
    values += [min(waiting // 4 + 1, most)] * (len(nodes.of) - width)
    plan = nodes.plan.copy()
    plan[:, PLAN.CAPACITY] = values
    plan[:, PLAN.DATA_SIZE] = min(2 * waiting, most, _MOST_TEXT)
    return _lay_out(plan, nodes.kinds)


def _lay_out(plan: Any, kinds: Sequence[Kind]) -> _Layout:
    """Give each node of a plan its place."""
    at = 0

    def place(size: int) -> int:
        nonlocal at
        start, at = at, at + -(-(size + SPARE) // _ALIGNMENT) * _ALIGNMENT
        return start

    capacities = plan[:, PLAN.CAPACITY].tolist()
    sizes = plan[:, PLAN.DATA_SIZE].tolist()
    plan[:, PLAN.VALIDITY] = [place(-(-capacity // 8)) for capacity in capacities]
    validities, offsets = at, []
    values, texts = [], [0] * len(sizes)
    for node, kind in enumerate(kinds):
        bits = _BITS.get(kind)
        if bits is not None:
            values.append(place(-(-capacities[node] * bits // 8)))
            continue
        values.append(place(4 * (capacities[node] + 1)))
        offsets.append(values[-1] // 4)
        if kind in _TEXTS:
            texts[node] = place(sizes[node])
    plan[:, PLAN.VALUES], plan[:, PLAN.DATA] = values, texts
    plan[:, PLAN.HAS_NULL] = plan[:, PLAN.NOT_ASCII] = 0
    return _Layout(plan, at, validities, np.array(offsets, np.intp))


def _allocate(size: int) -> Any:
    """Return fresh memory.

    Large pieces in small pages: NumPy asks for huge ones, and clearing those took the kernel three
    times as long, more than receiving and decoding together (TPC-H lineitem, scale 1).
    """
    if size < _LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.empty(size, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _bits(kind: Kind) -> int:
    return _BITS.get(kind, _OFFSET_BITS)
