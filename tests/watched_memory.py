"""Memory for the decoder that shows when the kernel reads or writes where it must not."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from dask_shardsql.engine import copy_arena, copy_binary
from dask_shardsql.engine.copy_arena import SPARE, Arena
from dask_shardsql.engine.copy_kernel.layout import PLAN


class WatchedMemory:
    """Gives the decoder memory whose surroundings are watched, filled with bytes of one's choice.

    With `guard`, memory ends exactly where no page is mapped, and a page that may not be touched
    is before it: a read or write behind it ends the process. Without, canaries are before and
    behind it. In both cases the gaps between the parts of an arena are canaries too.
    """

    def __init__(self, *, guard: bool, fill: int = 0xA5, source_bytes: int | None = None) -> None:
        self._guard, self._fill = guard, fill
        self._source_bytes = source_bytes
        self._kept: list[tuple[np.ndarray, int, int]] = []
        self._saved: list[tuple[Any, str, Any]] = []
        self.arenas = 0

    def __enter__(self) -> WatchedMemory:
        real = Arena._take_memory

        def take_memory(arena: Arena, layout: Any) -> None:
            check_gaps(arena)
            real(arena, layout)
            arena.watched = arena.plan.copy(), arena.memory.copy()
            self.arenas += 1

        def arrays(arena: Arena, rows: int, real: Any = Arena.arrays) -> Any:
            check_gaps(arena)
            return real(arena, rows)

        shim = _NumPy(self._allocate)
        self._patch(copy_arena, "_allocate", lambda size: self._allocate(size, np.uint8))
        self._patch(copy_binary, "np", shim)
        self._patch(Arena, "_take_memory", take_memory)
        self._patch(Arena, "arrays", arrays)
        if self._source_bytes is not None:
            self._patch(copy_binary, "_FIRST_SOURCE_BYTES", self._source_bytes)
            self._patch(copy_binary, "_SOURCE_BYTES", 2 * self._source_bytes)
        return self

    def __exit__(self, *_: Any) -> None:
        for where, name, value in self._saved:
            setattr(where, name, value)
        self.check()

    def check(self) -> None:
        """Fail if a canary has changed."""
        for whole, start, size in self._kept:
            assert (whole[:start] == self._fill).all(), "written before the memory"
            assert (whole[start + size :] == self._fill).all(), "written behind the memory"

    def _patch(self, where: Any, name: str, value: Any) -> None:
        self._saved.append((where, name, getattr(where, name)))
        setattr(where, name, value)

    def _allocate(self, size: int, dtype: Any) -> np.ndarray:
        assert dtype is np.uint8
        if self._guard:
            return _guarded(size, self._fill)
        whole = np.full(size + 2 * 256, self._fill, np.uint8)
        self._kept.append((whole, 256, size))
        return whole[256 : 256 + size]


class _NumPy:
    """NumPy with another `empty`."""

    def __init__(self, empty: Any) -> None:
        self.empty = empty

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _guarded(size: int, fill: int) -> np.ndarray:
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    whole = mmap.mmap(-1, inner + 2 * page)
    memory = np.frombuffer(whole, np.uint8)
    for start in (0, page + inner):
        if _LIBC.mprotect(ctypes.c_void_p(memory.ctypes.data + start), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    memory[page : page + inner] = fill
    return memory[page + inner - size : page + inner]


_LIBC = ctypes.CDLL(None, use_errno=True)


def check_gaps(arena: Arena) -> None:
    """Fail if something was written between the parts of an arena, beyond the bytes to spare."""
    if not hasattr(arena, "watched"):
        return
    plan, before = arena.watched  # of the layout, before the next one is planned
    free = np.ones(len(arena.memory), bool)
    for node, kind in enumerate(arena._kinds):
        capacity = int(plan[node, PLAN.CAPACITY])
        if kind in copy_arena._BITS:
            sizes = [(PLAN.VALUES, -(-capacity * copy_arena._BITS[kind] // 8))]
        else:
            sizes = [(PLAN.VALUES, 4 * (capacity + 1))]
        if kind in copy_arena._TEXTS:
            sizes.append((PLAN.DATA, int(plan[node, PLAN.DATA_SIZE]) + SPARE - 1))
        for field, size in [*sizes, (PLAN.VALIDITY, -(-capacity // 8))]:
            start = int(plan[node, field])
            assert free[start : start + size].all(), "parts of an arena overlap"
            free[start : start + size] = False
    assert (arena.memory[free] == before[free]).all(), "written between the parts of an arena"
