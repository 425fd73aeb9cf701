"""Random rows in PostgreSQL's binary form, written in plain Python, and ways to have them decoded.

The encoder shares no code with the decoder. Expected values are plain numbers and texts, which
``pa.array`` makes arrays of: what arrives is viewed as such (`raw`), so that the bits of floats,
dates and times are what is compared.
"""

from __future__ import annotations

import ctypes
import decimal
import json
import os
import random
import socket
import struct
import threading
import uuid
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dask_shardsql import ColumnError, ConnectionLostError, UnrepresentableValueError
from dask_shardsql.engine.copy_binary import CopyDecoder
from dask_shardsql.engine.copy_kernel.layout import COPY, Kind, Status
from dask_shardsql.sql.types import Column

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
TRAILER = b"\xff\xff"
REFUSALS = (ColumnError, ConnectionLostError, UnrepresentableValueError)
EPOCH_DAYS = 10_957
EPOCH_MICROSECONDS = EPOCH_DAYS * 86_400_000_000
_MOST = 2**63 - 1


class Field(NamedTuple):
    """A column: its kinds, its Arrow type, what it is compared as, random values, their bytes."""

    kinds: tuple[Kind, ...]
    arrow: pa.DataType
    raw: pa.DataType
    draw: Callable[[random.Random], Any]
    encode: Callable[[Any], bytes]


def numeric_bytes(value: decimal.Decimal, scale: int) -> bytes:
    """Write a number as ``numeric_send`` does."""
    sign, digits, exponent = value.as_tuple()
    text = "".join(map(str, digits))
    text, places = (text + "0" * exponent, 0) if exponent > 0 else (text, -exponent)
    text = text.rjust(places, "0")
    whole, fraction = text[: len(text) - places], text[len(text) - places :]
    whole = whole.rjust(-(-len(whole) // 4) * 4, "0")
    fraction = fraction.ljust(-(-len(fraction) // 4) * 4, "0")
    groups = [int((whole + fraction)[i : i + 4]) for i in range(0, len(whole + fraction), 4)]
    weight = len(whole) // 4 - 1
    while groups and groups[0] == 0:
        groups, weight = groups[1:], weight - 1
    while groups and groups[-1] == 0:
        groups = groups[:-1]
    if not groups:
        weight, sign = 0, 0
    head = struct.pack(">hhHH", len(groups), weight, 0x4000 * sign, scale)
    return head + b"".join(struct.pack(">H", group) for group in groups)


def _signed(bits: int, *, least: int | None = None, most: int | None = None) -> Any:
    low = -(2 ** (bits - 1)) if least is None else least
    high = 2 ** (bits - 1) - 1 if most is None else most
    return lambda rng: rng.choice([low, high, max(low, -1), 0, 1, rng.randint(low, high)])


def _text(rng: random.Random) -> str:
    alphabet = rng.choice(["ab", 'a\\"{},\n\0', "aé€𝄞\U0010ffff\ud7ff\ufeff", "x"])
    text = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 7, 8, 9, rng.randint(0, 60)])))
    return text * rng.choice([1] * 30 + [100])


def _decimal(precision: int, scale: int) -> Callable[[random.Random], decimal.Decimal]:
    def draw(rng: random.Random) -> decimal.Decimal:
        digits = rng.choice([precision, rng.randint(0, precision)])
        unit = rng.choice([10**digits - 1, 10 ** max(digits - 1, 0), rng.randrange(10**digits)])
        unit *= rng.choice([1, 1, 10**4, 0]) if digits < precision - 4 else 1
        sign = int(rng.random() < 0.5)
        return decimal.Decimal((sign if unit else 0, tuple(map(int, str(unit))), -scale))

    return draw


def _numeric(precision: int, scale: int) -> Field:
    wide = precision > 38
    arrow = (pa.decimal256 if wide else pa.decimal128)(precision, scale)
    kind = Kind.NUMERIC256 if wide else Kind.NUMERIC128
    return Field(
        (kind,), arrow, arrow, _decimal(precision, scale), lambda v: numeric_bytes(v, scale)
    )


def _plain(kind: Kind, arrow: Any, raw: Any, draw: Any, form: str, shift: int = 0) -> Field:
    return Field((kind,), arrow, raw, draw, lambda v: struct.pack(form, v - shift))


def _interval(rng: random.Random) -> pa.MonthDayNano:
    month, day = _signed(32)(rng), _signed(32)(rng)
    most = _MOST // 1000
    return pa.MonthDayNano([month, day, 1000 * _signed(64, least=-most, most=most)(rng)])


_STAMP = _signed(64, least=-(2**63) + 1 + EPOCH_MICROSECONDS)
_STRING = pa.string()
SCALARS = {
    "bool": Field(
        (Kind.BOOL,), pa.bool_(), pa.bool_(), lambda r: r.random() < 0.5, lambda v: b"\0\1"[v:][:1]
    ),
    "int2": _plain(Kind.INT16, pa.int16(), pa.int16(), _signed(16), ">h"),
    "int4": _plain(Kind.INT32, pa.int32(), pa.int32(), _signed(32), ">i"),
    "int8": _plain(Kind.INT64, pa.int64(), pa.int64(), _signed(64), ">q"),
    "oid": _plain(Kind.INT32, pa.uint32(), pa.int32(), _signed(32), ">i"),
    "float4": _plain(Kind.INT32, pa.float32(), pa.int32(), _signed(32), ">i"),
    "float8": _plain(Kind.INT64, pa.float64(), pa.int64(), _signed(64), ">q"),
    "date": _plain(
        Kind.DATE,
        pa.date32(),
        pa.int32(),
        _signed(32, least=-(2**31) + 1 + EPOCH_DAYS),
        ">i",
        EPOCH_DAYS,
    ),
    "time": _plain(
        Kind.TIME, pa.time64("us"), pa.int64(), _signed(64, least=0, most=86_399_999_999), ">q"
    ),
    "timestamp": _plain(
        Kind.TIMESTAMP, pa.timestamp("us"), pa.int64(), _STAMP, ">q", EPOCH_MICROSECONDS
    ),
    "timestamptz": _plain(
        Kind.TIMESTAMP, pa.timestamp("us", "UTC"), pa.int64(), _STAMP, ">q", EPOCH_MICROSECONDS
    ),
    "interval": Field(
        (Kind.INTERVAL,),
        pa.month_day_nano_interval(),
        pa.month_day_nano_interval(),
        _interval,
        lambda v: struct.pack(">qii", v.nanoseconds // 1000, v.days, v.months),
    ),
    **{
        f"numeric({p},{s})": _numeric(p, s)
        for p, s in (
            (1, 0),
            (10, 2),
            (38, 10),
            (38, 38),
            (37, 3),
            (39, 1),
            (50, 49),
            (76, 38),
            (76, 76),
            (76, 0),
        )
    },
    "text": Field((Kind.TEXT,), _STRING, _STRING, _text, str.encode),
    "bytea": Field(
        (Kind.TEXT,),
        pa.binary(),
        pa.binary(),
        lambda r: r.randbytes(r.choice([0, 1, 8, 40])),
        bytes,
    ),
    "jsonb": Field(
        (Kind.JSONB,),
        _STRING,
        _STRING,
        lambda r: json.dumps(_text(r)),
        lambda v: b"\1" + v.encode(),
    ),
    "uuid": Field(
        (Kind.UUID,),
        _STRING,
        _STRING,
        lambda r: str(uuid.UUID(bytes=r.choice([r.randbytes(16), bytes(16)]))),
        lambda v: uuid.UUID(v).bytes,
    ),
    "as text": Field((), _STRING, _STRING, _text, str.encode),
}


def list_of(field: Field) -> Field:
    """Return the field of one-dimensional arrays of `field`."""

    def draw(rng: random.Random) -> list[Any]:
        count = rng.choice([0, 1, 2, rng.randint(0, 20)])
        return [None if rng.random() < 0.2 else field.draw(rng) for _ in range(count)]

    def encode(items: list[Any]) -> bytes:
        if not items:
            return struct.pack(">iii", 0, 0, 25)
        head = struct.pack(">iiiii", 1, int(None in items), 25, len(items), 1)
        return head + b"".join(framed_value(item, field) for item in items)

    arrow, raw = pa.list_(field.arrow), pa.list_(field.raw)
    return Field((Kind.LIST, *field.kinds), arrow, raw, draw, encode)


FIELDS = [*SCALARS.values(), *(list_of(field) for field in SCALARS.values() if field.kinds)]


def framed_value(value: Any, field: Field) -> bytes:
    """Write a value, or NULL, with its length before it."""
    if value is None:
        return struct.pack(">i", -1)
    data = field.encode(value)
    return struct.pack(">i", len(data)) + data


def encode_rows(fields: Sequence[Field], rows: Sequence[Sequence[Any]]) -> list[bytes]:
    """Write each row."""
    return [
        struct.pack(">h", len(fields)) + b"".join(map(framed_value, row, fields)) for row in rows
    ]


def random_table(rng: random.Random) -> tuple[list[Field], list[list[Any]]]:
    """Return fields, and rows of their values."""
    fields = rng.choices(FIELDS, k=rng.choice([1, 1, 2, 3, rng.randint(1, 12)]))
    nulls = [rng.choice([0.0, 0.1, 1.0]) for _ in fields]
    rows = [
        [None if rng.random() < n else f.draw(rng) for f, n in zip(fields, nulls, strict=True)]
        for _ in range(rng.choice([0, 1, 2, 8, 9, rng.randint(0, 100)]))
    ]
    return fields, rows


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """Cut bytes at random places."""
    count = rng.choice([0, 1, 5, 40, min(len(data), 400)])
    cuts = sorted(rng.choices(range(len(data) + 1), k=count))
    return [data[i:j] for i, j in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def message(kind: bytes, body: bytes) -> bytes:
    """Write one message of the protocol."""
    return kind + struct.pack(">i", len(body) + 4) + body


def expected_arrays(fields: Sequence[Field], rows: Sequence[Sequence[Any]]) -> list[pa.Array]:
    """Return what `raw_arrays` gives where the decoder is right."""
    return [pa.array([row[i] for row in rows], field.raw) for i, field in enumerate(fields)]


def raw_arrays(fields: Sequence[Field], batches: Sequence[pa.RecordBatch]) -> list[pa.Array]:
    """Return the columns of all batches, as what they are compared as."""
    table = pa.Table.from_batches(batches, arrow_schema(fields))
    return [
        _raw(column.combine_chunks(), field.raw)
        for column, field in zip(table.columns, fields, strict=True)
    ]


def _raw(array: pa.Array, raw: pa.DataType) -> pa.Array:
    if not pa.types.is_list(raw):
        return array.view(raw)
    offsets = pa.array(array.offsets.to_pylist(), pa.int32())
    return pa.ListArray.from_arrays(
        offsets, _raw(array.values, raw.value_type), mask=array.is_null()
    )


def arrow_schema(fields: Sequence[Field]) -> pa.Schema:
    """Return the schema of the batches."""
    return pa.schema([(f"c{i}", field.arrow) for i, field in enumerate(fields)])


def new_decoder(
    fields: Sequence[Field], take: Any, unrepresentable: str = "raise", **options: Any
) -> CopyDecoder:
    """Return a decoder of these fields."""
    columns = tuple(Column(f"c{i}", "?", field.arrow) for i, field in enumerate(fields))
    kinds = [field.kinds for field in fields]
    return CopyDecoder(columns, kinds, unrepresentable, take, **options)


def receive_all(decoder: CopyDecoder, wire: Sequence[bytes]) -> None:
    """Send messages, cut anywhere, through a socket to a decoder; CommandComplete behind them."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:

        def send() -> None:
            try:
                for piece in [*wire, message(b"C", b"SELECT 1\0")]:
                    theirs.sendall(piece)
            except OSError:
                pass  # the decoder has refused it
            finally:
                theirs.close()

        thread = threading.Thread(target=send)
        thread.start()
        try:
            while (status := decoder.receive(ours.fileno())) == Status.WAITING:
                pass
            if status != Status.MESSAGE:
                raise ConnectionLostError("the connection was lost")
            rest = decoder.take_rest()
            if rest[:1] != b"C":
                raise ConnectionLostError("another message")
            decoder.deliver()
        finally:
            ours.close()
            thread.join()


class FakeLibpq:
    """Gives out pieces as libpq gives out a COPY: `PQgetCopyData` and what belongs to it."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]  # libpq drops what is empty
        self._readable = os.eventfd(1)
        self._is_there, self._given = False, 0
        self._functions = (
            _GET(self._get),
            _FREE(self._free),
            _CONSUME(self._consume),
        )
        facts = {COPY.CONNECTION: 1, COPY.DESCRIPTOR: self._readable}
        names = (COPY.GET, COPY.FREE, COPY.CONSUME)
        for name, function in zip(names, self._functions, strict=True):
            facts[name] = ctypes.cast(function, ctypes.c_void_p).value
        self._facts = array("q", [facts[name] for name in COPY])
        self.address = self._facts.buffer_info()[0]

    def take_all(self, decoder: CopyDecoder) -> None:
        """Let a decoder take all of it; fail if anything that was given out is not freed."""
        try:
            while (status := decoder.receive_copy(self.address)) == Status.WAITING:
                pass
            assert status == Status.CLOSED
            decoder.finish()
        finally:
            if held := decoder.take_held():
                self._free(held)
            os.close(self._readable)
        assert self._given == 0, "what libpq has given out was not freed, or freed twice"

    def _get(self, connection: int, slot: int, is_async: int) -> int:
        assert (connection, is_async) == (1, 1)
        if not self._pieces:
            return -1
        if not self._is_there:
            return 0
        piece = self._pieces.pop(0)
        self._is_there = len(piece) % 3 > 0
        memory = _LIBC.malloc(len(piece))
        ctypes.memmove(memory, piece, len(piece))
        ctypes.c_void_p.from_address(slot).value = memory
        self._given += 1
        return len(piece)

    def _free(self, address: int) -> None:
        self._given -= 1
        _LIBC.free(address)

    def _consume(self, connection: int) -> int:
        self._is_there = True
        return 1


_GET = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_CONSUME = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype, _LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
_LIBC.free.restype, _LIBC.free.argtypes = None, [ctypes.c_void_p]
