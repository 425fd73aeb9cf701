"""Fuzz the decoder of rows in binary form, in memory that ends where no page is mapped.

    python tests/fuzz/copy_binary.py --seconds 60             # a plain random loop over seeds
    python tests/fuzz/copy_binary.py --seed 7 --runs 1        # one of its runs again
    python tests/fuzz/copy_binary.py -max_total_time=60       # libFuzzer: pip install atheris

A run makes a valid stream, breaks it most of the time, and decodes it twice in memory filled with
different bytes. It fails if the process crashes (the last line printed, or the file that --last
names, tells the seed), if something is written between the parts of an arena, if the two outcomes
differ (then bytes were read that nobody sent), if a batch is not valid, or if any other exception
than a refusal comes out. libFuzzer sees nothing of the compiled kernel, so it is guided by the
Python code around it alone: it is a second source of mutations, not better than the loop.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copy_streams
from watched_memory import WatchedMemory

_NUMBERS = [
    -(2**31),
    -2,
    -1,
    0,
    1,
    2,
    4,
    8,
    12,
    16,
    20,
    0xC000,
    2**16,
    2**24,
    2**29,
    2**30,
    2**31 - 1,
]


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Break a stream somewhere, or leave it as it is."""
    found = bytearray(data)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        at = rng.randrange(len(found) + 1)
        if rng.random() < 0.3:
            at = min(at, 40)
        action = rng.randrange(9)
        if action == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[at:]
        elif action == 2:
            found[at:at] = found[rng.randrange(len(found) + 1) :][: rng.randrange(60)]
        elif action == 3:
            del found[at : at + rng.randrange(1, 20)]
        elif action == 4:
            found[at : at + 4] = struct.pack(">I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        elif action == 5:
            found[at : at + 2] = struct.pack(">H", rng.choice(_NUMBERS) & 0xFFFF)
        elif action == 6:
            found[at:at] = rng.choice([copy_streams.TRAILER, b"\0", rng.randbytes(9)])
        elif action == 7:  # a length or a count: a small number where there is one
            places = [i for i in range(len(found) - 3) if found[i : i + 3] == b"\0\0\0"]
            if places:
                where = rng.choice(places)
                found[where : where + 4] = struct.pack(">I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        elif action == 8:
            found[at : at + 8] = rng.choice(
                [b"\x7f" + b"\xff" * 7, b"\x80" + bytes(7), b"\xff" * 8]
            )
    return bytes(found)


def outcome(
    fields: list[copy_streams.Field],
    how: Callable[[Any], None],
    fill: int,
    source_bytes: int,
    **options: Any,
) -> Any:
    """Return what comes of a stream: arrays, or the refusal's text."""
    batches = []

    def take(batch: Any) -> None:
        batch.validate(full=True)
        batches.append(batch)

    with WatchedMemory(guard=True, fill=fill, source_bytes=source_bytes):
        try:
            how(copy_streams.new_decoder(fields, take, **options))
        except copy_streams.REFUSALS as error:
            return type(error), str(error)
        return copy_streams.raw_arrays(fields, batches)


def twice(
    fields: list[copy_streams.Field], how: Callable[[Any], None], *more: Any, **o: Any
) -> Any:
    """Return what comes of a stream, which must not depend on what was in the memory before."""
    first, second = (outcome(fields, how, fill, *more, **o) for fill in (0xFF, 0))
    if first != second:
        raise AssertionError(f"other bytes than those sent were read: {first} and {second}")
    return first


def check(
    rng: random.Random, fields: list[copy_streams.Field], stream: bytes, wire: bytes
) -> tuple[Any, Any]:
    """Decode a COPY, in two ways, and messages, each in two memories; return what came of both."""
    options = {
        "unrepresentable": rng.choice(["raise", "null"]),
        "batch_bytes": rng.choice([1 << 10] * 5 + [1 << 14] * 4 + [64 << 20]),
    }
    exact = rng.random() < 0.5
    cuts = [stream] if exact else copy_streams.pieces(rng, stream)
    size = max(1, len(stream)) if exact else rng.choice([1, 19, 64, 300])

    def feed(decoder: Any) -> None:
        for piece in cuts:
            decoder.feed(piece)
        decoder.finish()

    def take(decoder: Any) -> None:
        copy_streams.FakeLibpq(cuts).take_all(decoder)

    first = twice(fields, feed, size, **options)
    taken = twice(fields, take, size, **options)
    if isinstance(first, list) != isinstance(taken, list) or (
        isinstance(first, list) and first != taken
    ):
        raise AssertionError(f"fed it becomes {first}, taken from libpq {taken}")
    cuts_of_wire = copy_streams.pieces(rng, wire)

    def receive(decoder: Any) -> None:
        copy_streams.receive_all(decoder, cuts_of_wire)

    framed = twice(fields, receive, rng.choice([32, 64, 300, 1 << 16]), **options)
    return first, framed


def run(seed: int) -> bool:
    """Make one run; return whether the stream was read to its end."""
    rng = random.Random(seed)  # noqa: S311
    fields, rows = copy_streams.random_table(rng)
    encoded = copy_streams.encode_rows(fields, rows)
    parts = [copy_streams.HEADER, *encoded, copy_streams.TRAILER]
    stream = mutate(rng, b"".join(parts))
    whole = b"".join(copy_streams.message(b"D", row) for row in encoded)
    wire = b"".join(copy_streams.message(b"D", mutate(rng, row)) for row in encoded)
    if (dice := rng.random()) < 0.4:
        wire = whole if dice < 0.2 else mutate(rng, wire)
    found, framed = check(rng, fields, stream, wire)
    expected = copy_streams.expected_arrays(fields, rows)
    if stream == b"".join(parts) and found != expected:
        raise AssertionError(f"a valid COPY became {found}")
    if wire == whole and framed != expected:
        raise AssertionError(f"valid messages became {framed}")
    return isinstance(found, list)


def fuzz_one_input(data: bytes) -> None:
    """Take a run from libFuzzer: four bytes choose columns, the others follow a valid start."""
    rng = random.Random(data[:4])  # noqa: S311
    fields, rows = copy_streams.random_table(rng)
    head = copy_streams.HEADER + b"".join(copy_streams.encode_rows(fields, rows[:2]))
    stream = head[: len(head) - len(data) % 40] + data[4:]
    check(rng, fields, stream, copy_streams.message(b"D", stream[len(copy_streams.HEADER) :]))


def main() -> None:
    """Run the loop, or libFuzzer if there are options of its own."""
    faulthandler.enable()
    if any(word.startswith("-") and not word.startswith("--") for word in sys.argv[1:]):
        import atheris

        atheris.Setup(sys.argv, fuzz_one_input)
        atheris.Fuzz()
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--last", type=Path, help="a file that holds the seed of the last run")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    runs = read = 0
    seed = options.seed
    try:
        while runs < options.runs and time.monotonic() < deadline:
            seed = options.seed + runs
            if options.last is not None:
                options.last.write_text(str(seed))
            read += run(seed)
            runs += 1
    except BaseException:
        print(f"failed: --seed {seed} --runs 1", flush=True)
        raise
    print(f"{runs} runs, {read} of them read to the end")


if __name__ == "__main__":
    main()
