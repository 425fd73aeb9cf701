"""What is made of an expression, as Dask knows it while it simplifies."""

from __future__ import annotations

from typing import Any

__all__ = ["is_known", "parents_of"]

_KNOWN = "dask_shardsql-known"


def is_known(expr: Any, dependents: Any) -> bool:
    """Whether Dask knows all that is made of an expression.

    While it simplifies it adds what it comes across: of what is made meanwhile it has seen a part.
    """
    if (known := dependents.get(_KNOWN)) is None:  # nothing of ours was made until now
        known = dependents[_KNOWN] = frozenset(dependents)
    return expr._name in known


def parents_of(expr: Any, dependents: Any) -> list[Any]:
    """Return the different expressions that are made of one."""
    known = (ref() for ref in dependents.get(expr._name, ()))
    found = {one._name: one for one in known if one is not None}
    return list(found.values())
