"""A Python function of the user's as a sharding function."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask_shardsql.errors import TopologyError
from dask_shardsql.sharding.function import ShardingFunction

__all__ = ["ShardByCallable"]


@dataclass(frozen=True, init=False, repr=False)
class ShardByCallable(ShardingFunction):
    """Your own Python function, from the shard key to the shard's name.

    Parameters
    ----------
    function : callable or str
        Called with an int, str, date, datetime (without a time zone), UUID, or None for NULL; or
        its name, ``"module:function"``, which is imported when it is first called. A lambda, or
        what cannot be imported by its name, is kept and sent as its code.

    Notes
    -----
    It must give the same answer for the same value, in every process (not Python's ``hash`` of a
    text), and depend on nothing else. What it raises for a value, the value's shard is unknown.
    Numeric keys are not given to it: 1.0 and 1.00 are the same for PostgreSQL only.

    Examples
    --------
    >>> ShardByCallable(lambda key: "s2" if key % 7 == 0 else "s1").shard_of(14)
    's2'
    """

    function: str | bytes
    label: str = ""
    kind = "callable"
    _takes = ("date", "integer", "text", "timestamp", "uuid")

    def __init__(self, function: Callable[[Any], str] | str) -> None:
        if isinstance(function, str):
            module, _, name = function.partition(":")
            if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
                self._refuse(f"needs a function, or its name 'module:function', not {function!r}")
            self._set(function=function, label=function)
        elif callable(function):
            label = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
            self._set(function=_reference(function, label) or self._code(function), label=label)
        else:
            self._refuse(f"needs a function, or its name 'module:function', not {function!r}")

    def _code(self, function: Any) -> bytes:
        import cloudpickle

        try:
            code: bytes = cloudpickle.dumps(function)
        except Exception as error:
            raise TopologyError(
                f"the sharding function {function!r} cannot be sent to workers ({error}): define "
                "it in a module that they can import"
            ) from error
        return code

    @functools.cached_property
    def _call(self) -> Callable[[Any], Any]:
        if isinstance(self.function, bytes):
            import cloudpickle

            loaded: Callable[[Any], Any] = cloudpickle.loads(self.function)
            return loaded
        found: Any = _imported(self.function)
        if not callable(found):
            raise TypeError(f"{self.function} is no function")
        return found  # type: ignore[no-any-return]

    def _find(self, value: Any) -> str | None:
        try:
            shard = self._call(value)
        except Exception as error:
            raise TopologyError(
                f"{self!r} failed for {value!r}: {type(error).__name__}: {error}"
            ) from error
        return shard if isinstance(shard, str) else None

    def _of_range(
        self, low: Any, high: Any, low_inclusive: bool, high_inclusive: bool
    ) -> frozenset[str] | None:
        try:
            return super()._of_range(low, high, low_inclusive, high_inclusive)
        except TopologyError:
            return None

    def __repr__(self) -> str:
        return f"ShardByCallable({self.label!r})"


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in path.split("."):
        found = getattr(found, attribute)
    return found


def _reference(function: Any, label: str) -> str | None:
    """Return the name by which any process can import a function; None if it has none."""
    module = label.partition(":")[0]
    if module in ("", "__main__"):  # another process's __main__ is another one
        return None
    try:
        return label if _imported(label) is function else None
    except (ImportError, AttributeError):  # a lambda's name, or one in a function's body
        return None
