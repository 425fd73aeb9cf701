"""Single loads and stores at any address, and calls of the system and of libpq, for the kernel.

Addresses and not arrays, as Numba counts references to arrays, atomically and at every call: that
would cost more than the decoding. Nothing here checks a bound: the callers do, once for a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "consume_input",
    "copy",
    "copy_exactly",
    "free_memory",
    "get8",
    "get32",
    "get64",
    "get_copy_data",
    "item",
    "load16",
    "load32",
    "load64",
    "poll",
    "put8",
    "put16",
    "put32",
    "put64",
    "receive",
    "set_item",
    "signed16",
    "signed32",
]

_POLLIN = 1
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_POINTER = ir.IntType(8).as_pointer()
_VOID = ir.VoidType()


def _pointer(builder: Any, args: Any, bits: int, scale: int = 1) -> Any:
    """Return base + scale * index as a pointer to an integer of so many bits."""
    offset = builder.mul(args[1], ir.Constant(_I64, scale)) if scale != 1 else args[1]
    return builder.inttoptr(builder.add(args[0], offset), ir.IntType(bits).as_pointer())


def _loader(bits: int, *, swap: bool = False, scale: int = 1) -> Any:
    @intrinsic
    def load(typingctx: Any, base: Any, index: Any) -> Any:
        """Return the integer at an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(_pointer(builder, args, bits, scale), align=1)
            value = builder.bswap(value) if swap else value
            return builder.zext(value, _I64) if bits < 64 else value

        return types.int64(types.int64, types.int64), codegen

    return load


def _storer(bits: int, *, scale: int = 1) -> Any:
    @intrinsic
    def store(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
        """Write the low bits of an integer to an address."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.trunc(args[2], ir.IntType(bits)) if bits < 64 else args[2]
            builder.store(value, _pointer(builder, args, bits, scale), align=1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), codegen

    return store


# of the stream, which is big-endian: an address and an offset in bytes
load16, load32, load64 = (_loader(bits, swap=True) for bits in (16, 32, 64))
# of Arrow's buffers, in the machine's order: likewise
get8, get32, get64 = (_loader(bits) for bits in (8, 32, 64))
put8, put16, put32, put64 = (_storer(bits) for bits in (8, 16, 32, 64))
# elements of an array of int64: an address and an index
item, set_item = _loader(64, scale=8), _storer(64, scale=8)


@intrinsic
def receive(typingctx: Any, fd: Any, target: Any, size: Any) -> Any:
    """Call recv(2): at most `size` bytes to the address `target`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [_I32, _POINTER, _I64, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "recv")
        target = builder.inttoptr(args[1], _POINTER)
        arguments = [builder.trunc(args[0], _I32), target, args[2], _I32(0)]
        return builder.call(function, arguments)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def poll(typingctx: Any, fd: Any, timeout: Any) -> Any:
    """Call poll(2) for reading from one descriptor; the timeout is in milliseconds."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i16 = ir.IntType(16)
        entry = cgutils.alloca_once(builder, ir.LiteralStructType([_I32, i16, i16]))
        builder.store(builder.trunc(args[0], _I32), cgutils.gep_inbounds(builder, entry, 0, 0))
        builder.store(i16(_POLLIN), cgutils.gep_inbounds(builder, entry, 0, 1))
        builder.store(i16(0), cgutils.gep_inbounds(builder, entry, 0, 2))
        kind = ir.FunctionType(_I32, [_POINTER, _I64, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "poll")
        pointer = builder.bitcast(entry, _POINTER)
        result = builder.call(function, [pointer, _I64(1), builder.trunc(args[1], _I32)])
        return builder.sext(result, _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def get_copy_data(typingctx: Any, function: Any, connection: Any, target: Any) -> Any:
    """Call PQgetCopyData, without waiting; it writes the address of the data to `target`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [_POINTER, _POINTER, _I32])
        return builder.sext(_call(builder, kind, *args, _I32(1)), _I64)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def consume_input(typingctx: Any, function: Any, connection: Any) -> Any:
    """Call PQconsumeInput."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_call(builder, ir.FunctionType(_I32, [_POINTER]), *args), _I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def free_memory(typingctx: Any, function: Any, address: Any) -> Any:
    """Call PQfreemem."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, ir.FunctionType(_VOID, [_POINTER]), *args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def copy_exactly(typingctx: Any, target: Any, source: Any, length: Any) -> Any:
    """Copy so many bytes from one address to another, and touch no others."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, start = (builder.inttoptr(address, _POINTER) for address in args[:2])
        cgutils.raw_memcpy(builder, to, start, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _call(builder: Any, kind: Any, function: Any, *args: Any) -> Any:
    """Call the function at an address; so are those arguments given that are pointers."""
    given = [
        builder.inttoptr(value, _POINTER) if wanted == _POINTER else value
        for value, wanted in zip(args, kind.args, strict=True)
    ]
    return builder.call(builder.inttoptr(function, kind.as_pointer()), given)


@njit(inline="always")
def signed32(array, index):
    """Return the big-endian signed integer of 32 bits at a byte index."""
    return np.int64(np.int32(load32(array, index)))


@njit(inline="always")
def signed16(array, index):
    """Return the big-endian signed integer of 16 bits at a byte index."""
    return np.int64(np.int16(load16(array, index)))


@njit(nogil=True)
def copy(source, start, length, target, to):
    """Copy bytes and return whether one of them is not ASCII.

    Copies whole words: both buffers have 8 bytes to spare behind what is used.
    """
    seen = np.int64(0)
    done = 0
    while length - done >= 8:
        word = get64(source, start + done)
        put64(target, to + done, word)
        seen |= word
        done += 8
    rest = length - done
    if rest > 0:
        word = get64(source, start + done)
        put64(target, to + done, word)
        seen |= word & ((np.int64(1) << (8 * rest)) - 1)
    return (seen & np.int64(-0x7F7F7F7F7F7F7F80)) != 0
