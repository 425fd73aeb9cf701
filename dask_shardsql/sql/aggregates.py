"""How each aggregate splits: what a shard computes of its rows, and what is made of that.

The sums are computed in the database's own wide types, and divided and cast at the end, as
PostgreSQL itself does: the result is the same to the last digit, also of NUMERIC. For floating
point only the order of the additions differs, which no database promises either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SAME", "TYPED", "Split", "split_aggregate"]


@dataclass(frozen=True)
class Split:
    """How one aggregate splits.

    Parameters
    ----------
    partials : tuple of str
        What each shard computes; ``{x}`` is the argument, and ``{f}`` its FILTER.
    final : str
        What is made of their columns, ``{0}``, ``{1}``, ...
    """

    partials: tuple[str, ...]
    final: str


# of partial results they make what they make of rows
SAME = frozenset(
    ["min", "max", "bool_and", "bool_or", "every", "bit_and", "bit_or", "bit_xor", "any_value"]
)
# whose types decide
TYPED = frozenset({"sum", "avg", "var_pop", "var_samp", "stddev_pop", "stddev_samp"})
_COUNT = "count({x}){f}"
_INTEGERS = frozenset({"smallint", "integer", "bigint"})
_EXACT = _INTEGERS | {"numeric"}

# n, the sum, and the sum of squares; then n squares less the square of the sum
_SQUARES = (_COUNT, "sum({x}){f}", "sum(({x})::numeric * ({x})::numeric){f}")
_N = "sum({0})"
_D = "(sum({0}) * sum({2}) - sum({1}) * sum({1}))"


def _variance(least: int, divisor: str, *, is_root: bool) -> Split:
    """Return a variance as PostgreSQL divides it, or its root to as many digits."""
    value = f"{_D} / ({divisor})"
    if is_root:  # with digits more than are kept, so that it is rounded once
        root = f"sqrt(({value}) * 1.00000000000000000000)"
        value = f"round({root}, COALESCE(scale({value}), 0))"
    final = (
        f"CASE WHEN {_N} > {least}::numeric THEN CASE WHEN {_D} <= 0::numeric THEN 0::numeric "
        f"ELSE {value} END END"
    )
    return Split(_SQUARES, final)


_POPULATION = f"{_N} * {_N}"
_SAMPLE = f"{_N} * ({_N} - 1::numeric)"
_VARIANCES: Mapping[str, Split] = {
    "var_pop": _variance(0, _POPULATION, is_root=False),
    "var_samp": _variance(1, _SAMPLE, is_root=False),
    "stddev_pop": _variance(0, _POPULATION, is_root=True),
    "stddev_samp": _variance(1, _SAMPLE, is_root=True),
}


def split_aggregate(name: str, of_type: str) -> Split | None:
    """Return how an aggregate of one argument splits.

    Parameters
    ----------
    name : str
        Its name.
    of_type : str
        The type of the argument, as ``format_type`` writes it, where the aggregate is in `TYPED`.

    Returns
    -------
    Split or None
        None if its rows are needed.
    """
    if name == "count":
        return Split((_COUNT,), "COALESCE(sum({0}), 0::numeric)::bigint")
    if name in SAME:
        return Split((f"{name}({{x}}){{f}}",), f"{name}({{0}})")
    if name == "sum":
        cast = "::bigint" if of_type in ("smallint", "integer") else ""
        return Split(("sum({x}){f}",), f"sum({{0}}){cast}")
    if name == "avg":
        return _average(of_type)
    if of_type in _EXACT:
        return _VARIANCES.get(name)
    return None


def _average(of_type: str) -> Split | None:
    if of_type in _EXACT:
        return Split(("sum({x}){f}", _COUNT), "sum({0}) / NULLIF(sum({1}), 0::numeric)")
    if of_type in ("double precision", "real", "interval"):
        wide = "interval" if of_type == "interval" else "double precision"
        total = f"sum(({{x}})::{wide}){{f}}"
        count = "NULLIF(sum({1}), 0::numeric)::double precision"
        return Split((total, _COUNT), f"sum({{0}}) / {count}")
    return None
