"""COPY BINARY into Arrow: what was encoded arrives, and a broken stream is refused, never believed.

The memory that the kernel reads and writes is watched (`watched_memory`), as it works on addresses.
"""

from __future__ import annotations

import decimal
import random
import struct
import subprocess
import sys
from pathlib import Path

import copy_streams
import pyarrow as pa
import pytest
import values
from copy_streams import HEADER, SCALARS, TRAILER, list_of, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watched_memory import WatchedMemory

from dask_shardsql import ColumnError, ConnectionLostError, UnrepresentableValueError
from dask_shardsql.engine import copy_arena, copy_binary
from dask_shardsql.engine.copy_binary import CopyFile
from dask_shardsql.engine.copy_kernel.layout import Status

FUZZ = Path(__file__).parent / "fuzz" / "copy_binary.py"
common = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=values.EXAMPLES * 3,
    suppress_health_check=list(HealthCheck),
)
randoms = st.integers(0, 2**64).map(random.Random)


def stream_of(fields, rows):
    return b"".join([HEADER, *copy_streams.encode_rows(fields, rows), TRAILER])


def decode(fields, pieces, **options):
    """Feed a stream; return the batches."""
    batches = []
    decoder = copy_streams.new_decoder(fields, batches.append, **options)
    for piece in pieces:
        decoder.feed(piece)
    decoder.finish()
    for batch in batches:
        batch.validate(full=True)
    return batches


def take(fields, pieces, **options):
    """Give out a stream as libpq does; return the batches."""
    batches = []
    decoder = copy_streams.new_decoder(fields, batches.append, **options)
    copy_streams.FakeLibpq(pieces).take_all(decoder)
    for batch in batches:
        batch.validate(full=True)
    return batches


def receive(fields, wire, **options):
    """Send messages through a socket; return the batches."""
    batches = []
    copy_streams.receive_all(copy_streams.new_decoder(fields, batches.append, **options), wire)
    for batch in batches:
        batch.validate(full=True)
    return batches


def in_messages(fields, rows):
    """Return the DataRow messages."""
    return b"".join(message(b"D", row) for row in copy_streams.encode_rows(fields, rows))


@pytest.mark.parametrize("how", [decode, take])
@given(rng=randoms)
@common
def test_random_rows_arrive_from_a_stream_cut_anywhere(how, rng):
    fields, rows = copy_streams.random_table(rng)
    expected = copy_streams.expected_arrays(fields, rows)
    stream = stream_of(fields, rows)
    with WatchedMemory(guard=False, source_bytes=rng.choice([1, 64, 4096])):
        batches = how(
            fields, copy_streams.pieces(rng, stream), batch_bytes=rng.choice([1 << 10, 1 << 26])
        )
        assert copy_streams.raw_arrays(fields, batches) == expected


@given(rng=randoms)
@common
def test_random_rows_arrive_through_a_socket(rng):
    fields, rows = copy_streams.random_table(rng)
    expected = copy_streams.expected_arrays(fields, rows)
    wire = in_messages(fields, rows)
    with WatchedMemory(guard=False, source_bytes=rng.choice([16, 64, 4096])):
        batches = receive(
            fields, copy_streams.pieces(rng, wire), batch_bytes=rng.choice([1 << 10, 1 << 26])
        )
        assert copy_streams.raw_arrays(fields, batches) == expected


def test_a_broken_stream_is_refused_and_nothing_beyond_it_is_read_or_written(tmp_path):
    """In a process of its own, as what it looks for ends the process."""
    last = tmp_path / "seed"
    runs = str(max(values.EXAMPLES * 3, 60))
    command = [sys.executable, FUZZ, "--runs", runs, "--seconds", "250", "--last", last]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    seed = last.read_text() if last.exists() else "none"
    again = f"{sys.executable} {FUZZ} --seed {seed} --runs 1"
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}\nagain: {again}"
    assert done.stdout.startswith(f"{runs} runs")


@st.composite
def numerics(draw):
    """Draw a numeric as it may be sent, and its value; zeros may lead and trail."""
    groups = draw(
        st.lists(
            st.sampled_from([0, 1, 9, 10, 99, 100, 999, 1000, 9999]) | st.integers(0, 9999),
            max_size=22,
        )
    )
    weight = draw(st.sampled_from([-32768, 32767, -1, 0, 9, 18]) | st.integers(-22, 22))
    negative = draw(st.booleans())
    scale = draw(st.sampled_from([0, 2, 38, 0xFFFF]))
    data = struct.pack(">hhHH", len(groups), weight, 0x4000 * negative, scale)
    data += b"".join(struct.pack(">H", group) for group in groups)
    whole = sum(group * 10_000 ** (len(groups) - 1 - i) for i, group in enumerate(groups))
    power = 4 * (weight - len(groups) + 1)
    return data, (-whole if negative else whole), power, groups


@given(
    number=numerics(),
    name=st.sampled_from([name for name in SCALARS if name.startswith("numeric")]),
)
@settings(common, max_examples=values.EXAMPLES * 10)
def test_numerics_are_exact_or_do_not_fit(number, name):
    data, unscaled, power, groups = number
    field = SCALARS[name]
    precision, scale = field.arrow.precision, field.arrow.scale
    fits, units = True, 0
    if unscaled:
        shift = power + scale
        fits = -200 < shift < 200
        if fits and shift >= 0:
            units = unscaled * 10**shift
        elif fits:
            units, rest = divmod(abs(unscaled), 10**-shift)
            units, fits = (-units if unscaled < 0 else units), rest == 0
        fits = fits and abs(units) < 10**precision
    row = struct.pack(">hi", 1, len(data)) + data
    with WatchedMemory(guard=False):
        (batch,) = decode([field], [HEADER, row, TRAILER], unrepresentable="null")
    (found,) = batch.column(0).to_pylist()
    if found is None:
        # one that the server would not send, as it begins with a zero, may be refused as well
        assert not fits or groups[:1] == [0]
        with pytest.raises(UnrepresentableValueError):
            decode([field], [HEADER, row, TRAILER])
    else:
        assert fits
        with decimal.localcontext(prec=100):
            assert found.scaleb(scale) == units


BROKEN_VALUES = {
    "bool": [b"", b"\2", b"\0\0"],
    "int2": [b"\0", b"\0\0\0"],
    "int4": [b"\0" * 3, b"\0" * 8, b""],
    "int8": [b"\0" * 4, b"\0" * 9, b""],
    "date": [b"\0" * 3, b"\0" * 8],
    "time": [b"\0" * 7, b"\0" * 12],
    "timestamp": [b"\0" * 7, b"\0" * 9],
    "interval": [b"\0" * 8, b"\0" * 15, b"\0" * 17],
    "numeric(10,2)": [
        *[b"", b"\0" * 7, b"\0" * 9, struct.pack(">hhHHH", 1, 0, 0, 0, 10_000)],
        *[struct.pack(">hhHH", count, 0, 0, 0) for count in (-1, 3, 32767)],
        struct.pack(">hhHH", 0, 0, 0x1234, 0),
    ],
    "jsonb": [b"", b"\2{}"],
    "uuid": [b"", b"\0" * 15, b"\0" * 17],
}
BROKEN_VALUES["numeric(76,38)"] = BROKEN_VALUES["numeric(10,2)"]


@pytest.mark.parametrize("name", BROKEN_VALUES)
def test_a_value_of_a_wrong_form_is_refused(name):
    for data in BROKEN_VALUES[name]:
        value = struct.pack(">i", len(data)) + data
        array = struct.pack(">iiiii", 1, 0, 25, 1, 1) + value
        in_array = struct.pack(">i", len(array)) + array
        for field, sent in ((SCALARS[name], value), (list_of(SCALARS[name]), in_array)):
            row = struct.pack(">h", 1) + sent
            for unrepresentable in ("raise", "null"):
                with pytest.raises(ConnectionLostError):
                    decode([field], [HEADER + row + TRAILER], unrepresentable=unrepresentable)
                with pytest.raises(ConnectionLostError):
                    receive([field], [message(b"D", row)])


@pytest.mark.parametrize(
    "array",
    [
        *[b"", bytes(11), bytes(13), struct.pack(">iii", -1, 0, 23), struct.pack(">iii", 7, 0, 23)],
        *[struct.pack(">iiiii", 1, 0, 23, n, 1) for n in (-1, 1, 2**29, 2**31 - 1, -(2**31))],
        struct.pack(">iiiiii", 1, 0, 23, 1, 1, -2),
        struct.pack(">iiiiii", 1, 0, 23, 1, 1, 4),
        struct.pack(">iiiiii", 1, 0, 23, 1, 1, 2**31 - 1),
        struct.pack(">iiiiiii", 1, 0, 23, 2, 1, 4, 7),
        struct.pack(">iiiiiiii", 1, 0, 23, 1, 1, 4, 7, 7),
    ],
)
def test_an_array_of_a_wrong_form_is_refused(array):
    row = struct.pack(">hi", 1, len(array)) + array
    for name in ("int4", "text"):
        with WatchedMemory(guard=False), pytest.raises(ConnectionLostError):
            decode([list_of(SCALARS[name])], [HEADER + row + TRAILER])


INT4 = [SCALARS["int4"]]
ROW = struct.pack(">hii", 1, 4, 7)


@pytest.mark.parametrize(
    "stream",
    [
        *[b"", HEADER[:18], HEADER, HEADER + ROW, HEADER + ROW[:5], HEADER + b"\xff", b"x" * 40],
        *[HEADER + TRAILER + ROW, HEADER + TRAILER + TRAILER, HEADER + ROW + TRAILER + b"\0"],
        *[HEADER + struct.pack(">h", n) + ROW[2:] + TRAILER for n in (0, 2, -2, 32767)],
        *[HEADER + struct.pack(">hi", 1, n) + ROW[6:] + TRAILER for n in (-2, 5, 2**31 - 1)],
        HEADER[:11] + b"\0\1\0\0" + HEADER[15:] + ROW + TRAILER,  # with OIDs
        HEADER[:15] + struct.pack(">i", -1) + ROW + TRAILER,
        HEADER[:15] + struct.pack(">i", 2**31 - 1) + ROW + TRAILER,
        HEADER.replace(b"\n", b"\r\n") + ROW + TRAILER,
    ],
)
def test_what_is_no_copy_of_these_columns_is_refused(stream):
    with WatchedMemory(guard=False):
        for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
            with pytest.raises(ConnectionLostError):
                decode(INT4, pieces)


@pytest.mark.parametrize(
    "row",
    [
        *[b"", b"\0", ROW[:-1], ROW + b"\0", ROW + ROW, TRAILER, HEADER + ROW],
        *[struct.pack(">h", n) + ROW[2:] for n in (0, 2, -2, 32767)],
        *[struct.pack(">hi", 1, n) + ROW[6:] for n in (-2, 5, 2**31 - 1)],
    ],
)
def test_what_is_no_row_of_these_columns_is_refused(row):
    with WatchedMemory(guard=False):
        for before in (0, 1, 300):
            with pytest.raises(ConnectionLostError, match="cannot be read"):
                receive(INT4, [message(b"D", part) for part in [ROW] * before + [row]])
    assert sum(batch.num_rows for batch in receive(INT4, [message(b"D", ROW)] * 300)) == 300


def test_the_headers_extension_is_skipped():
    header = HEADER[:15] + struct.pack(">i", 5000) + bytes(5000)
    with WatchedMemory(guard=False, source_bytes=16):
        (batch,) = decode(INT4, [(header + ROW + TRAILER)[i : i + 7] for i in range(0, 5100, 7)])
        assert batch.column(0).to_pylist() == [7]


def test_no_rows_make_no_batch():
    assert decode(INT4, [HEADER + TRAILER]) == []
    assert receive(INT4, []) == []


def test_1600_columns_of_every_type():
    rng = random.Random(1)  # noqa: S311
    fields = (copy_streams.FIELDS * 40)[:1600]
    rows = [[None if rng.random() < 0.3 else f.draw(rng) for f in fields] for _ in range(20)]
    with WatchedMemory(guard=False):
        batches = decode(fields, [stream_of(fields, rows)], batch_bytes=1 << 20)
        assert copy_streams.raw_arrays(fields, batches) == copy_streams.expected_arrays(
            fields, rows
        )


@pytest.mark.parametrize("name", ["int4", "bool", "text", "numeric(50,49)", "uuid"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65])
def test_batches_filled_to_the_last_row(name, count):
    """However many rows an arena has room for, the next one goes to another."""
    rng = random.Random(count)  # noqa: S311
    field = SCALARS[name]
    rows = [[None if i % 8 == 7 else field.draw(rng)] for i in range(400)]
    with WatchedMemory(guard=False, source_bytes=16):
        batches = decode([field], [stream_of([field], rows)], batch_bytes=count * 8)
        assert len(batches) > 1
        assert copy_streams.raw_arrays([field], batches) == copy_streams.expected_arrays(
            [field], rows
        )


@pytest.mark.parametrize("limit", [1 << 12, 1 << 16, 1 << 20])
def test_batches_are_bounded(limit):
    rng = random.Random(limit)  # noqa: S311
    fields = [SCALARS["int8"], SCALARS["text"], list_of(SCALARS["text"]), SCALARS["as text"]]
    rows = [[f.draw(rng) for f in fields] for _ in range(4000)]
    most_of_a_row = max(map(len, copy_streams.encode_rows(fields, rows)))
    batches = decode(fields, copy_streams.pieces(rng, stream_of(fields, rows)), batch_bytes=limit)
    assert max(batch.nbytes for batch in batches) <= 1.25 * limit + 3 * most_of_a_row + 2048
    assert len(batches) <= 8 + 3 * sum(batch.nbytes for batch in batches) / limit
    assert copy_streams.raw_arrays(fields, batches) == copy_streams.expected_arrays(fields, rows)


def test_a_large_row_among_many_columns_takes_no_memory_for_each_of_them():
    """The first arena once had room for the whole row in every column: 60 GB here."""
    fields = [SCALARS["text"]] * 1000
    rows = [["x" * 30_000_000, *[""] * 999], ["y"] * 1000]
    batches = decode(fields, [stream_of(fields, rows)])
    assert pa.Table.from_batches(batches).column(0).to_pylist() == [rows[0][0], "y"]
    assert max(len(b.column(1).buffers()[2]) for b in batches) < 10


def test_a_long_list_of_long_texts_after_short_ones_takes_little_memory(monkeypatch):
    """Room for elements was once doubled whenever their text lacked any."""
    field = list_of(SCALARS["text"])
    items = ["x" * 1000] * 50_000
    sizes = []
    real = copy_arena._allocate
    monkeypatch.setattr(copy_arena, "_allocate", lambda n: sizes.append(n) or real(n))
    batches = decode(
        [field], [HEADER, *copy_streams.encode_rows([field], [[["a"]]] * 200 + [[items]]), TRAILER]
    )
    table = pa.Table.from_batches(batches)
    assert table.column(0)[200].as_py() == items
    assert max(sizes) < 4 * 50_000 * 1004


def test_after_an_error_a_buffer_that_is_flushed_again_changes_nothing():
    """psycopg2's copy_expert writes to a BufferedWriter, which flushes once more when closed."""
    calls = []

    def take(batch):
        calls.append(batch)
        raise KeyError("no")

    stream = stream_of(INT4, [[i] for i in range(200_000)])
    file = CopyFile(copy_streams.new_decoder(INT4, take, batch_bytes=1 << 10))
    with pytest.raises(KeyError):
        file.write(stream)
    assert file.write(stream) == len(stream)
    assert len(calls) == 1


def test_text_that_is_no_utf_8_is_refused():
    for data in (
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\xf4\x90\x80\x80",
        b"a" * 9 + b"\xe9",
    ):
        row = struct.pack(">hi", 1, len(data)) + data
        with pytest.raises(ColumnError, match="UTF-8"):
            decode([SCALARS["text"]], [HEADER + row + TRAILER])
        array = struct.pack(">iiiiii", 1, 0, 25, 1, 1, len(data)) + data
        row = struct.pack(">hi", 1, len(array)) + array
        with pytest.raises(ColumnError, match="UTF-8"):
            decode([list_of(SCALARS["text"])], [HEADER + row + TRAILER])


def test_a_closed_socket_is_told_from_one_that_says_nothing():
    import socket

    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    decoder = copy_streams.new_decoder(INT4, lambda batch: None)
    with ours, theirs:
        theirs.sendall(message(b"D", ROW) + message(b"D", ROW)[:6])
        assert decoder.receive(ours.fileno()) == Status.WAITING
        theirs.close()
        assert decoder.receive(ours.fileno()) == Status.CLOSED


def test_a_header_that_promises_much_takes_no_memory_before_it_comes(monkeypatch):
    """Found by the fuzzer: 1.8 GB were made ready for what nobody had sent."""
    sizes = []
    grow = copy_binary.CopyDecoder._grow_source
    monkeypatch.setattr(
        copy_binary.CopyDecoder, "_grow_source", lambda self, n: sizes.append(n) or grow(self, n)
    )
    promise = HEADER[:15] + b"kkkk"
    for how in (decode, take):
        with pytest.raises(ConnectionLostError):
            how(INT4, [promise, b"x" * 100])
    assert max(sizes, default=0) < 1 << 20
