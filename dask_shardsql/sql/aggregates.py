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


# of floating point, one argument: n, the sum, and the sum of squared deviations from the mean
_FLOATS = frozenset({"double precision", "real"})
_DEVIATIONS = (
    _COUNT,
    "sum(({x})::double precision){f}",
    "regr_sxx(({x})::double precision, ({x})::double precision){f}",
)
# of two, the dependent one first: n, both sums, and the sums of squared deviations, of products
_PAIRS = (
    "regr_count({x}, {y}){f}",
    "sum({y}) FILTER (WHERE {x} IS NOT NULL{and_f})",
    "sum({x}) FILTER (WHERE {y} IS NOT NULL{and_f})",
    "regr_sxx({x}, {y}){f}",
    "regr_syy({x}, {y}){f}",
    "regr_sxy({x}, {y}){f}",
)
_DIGITS = "1." + "0" * 60  # a quotient has as many digits as its dividend


def _total(column: int) -> str:
    """Return the sum of a floating-point column, to the last digit."""
    return f"sum((({{{column}}})::text)::numeric)"


def _deviations(one: int, other: int, within: int) -> str:
    """Return the sum of products of deviations: those of each shard's rows, and of their means.

    In exact numbers, as the squares of sums are much larger than their difference.
    """
    a, b = (f"(({{{column}}})::text)::numeric" for column in (one, other))
    between = (
        f"sum({a} * {b} * {_DIGITS} / NULLIF({{0}}, 0)::numeric) "
        f"- {_total(one)} * {_total(other)} * {_DIGITS} / NULLIF({_N}, 0::numeric)"
    )
    found = f"{_total(within)} + ({between})"
    if one == other:  # rounded, it might be a little less
        found = f"CASE WHEN ({found}) < 0::numeric THEN 0::numeric ELSE {found} END"
    return f"(round({found}, 320))::double precision"  # less than that is none


def _from(least: int, value: str) -> str:
    return f"CASE WHEN {_N} >= {least}::numeric THEN {value} END"


def _floating_variance(least: int, divisor: str, *, is_root: bool) -> Split:
    value = f"({_deviations(1, 1, 2)} / ({divisor})::double precision)"
    return Split(_DEVIATIONS, _from(least, f"sqrt({value})" if is_root else value))


_LESS_ONE = f"{_N} - 1::numeric"
_FLOATING_VARIANCES: Mapping[str, Split] = {
    "var_pop": _floating_variance(1, _N, is_root=False),
    "var_samp": _floating_variance(2, _LESS_ONE, is_root=False),
    "stddev_pop": _floating_variance(1, _N, is_root=True),
    "stddev_samp": _floating_variance(2, _LESS_ONE, is_root=True),
}
_SXX, _SYY, _SXY = _deviations(1, 1, 3), _deviations(2, 2, 4), _deviations(1, 2, 5)
_SLOPE = f"({_SXY} / NULLIF({_SXX}, 0::double precision))"
_MEAN_X, _MEAN_Y = (
    f"(({_total(column)} * {_DIGITS} / NULLIF({_N}, 0::numeric))::double precision)"
    for column in (1, 2)
)
_OF_PAIRS: Mapping[str, str] = {
    "regr_count": f"COALESCE({_N}, 0::numeric)::bigint",
    "regr_avgx": _from(1, _MEAN_X),
    "regr_avgy": _from(1, _MEAN_Y),
    "regr_sxx": _from(1, _SXX),
    "regr_syy": _from(1, _SYY),
    "regr_sxy": _from(1, _SXY),
    "covar_pop": _from(1, f"{_SXY} / ({_N})::double precision"),
    "covar_samp": _from(2, f"{_SXY} / ({_LESS_ONE})::double precision"),
    "corr": _from(
        1,
        f"CASE WHEN {_SXX} <> 0::double precision AND {_SYY} <> 0::double precision "
        f"THEN {_SXY} / (sqrt({_SXX}) * sqrt({_SYY})) END",
    ),
    "regr_slope": _from(1, _SLOPE),
    "regr_intercept": _from(1, f"{_MEAN_Y} - {_MEAN_X} * {_SLOPE}"),
    "regr_r2": _from(
        1,
        f"CASE WHEN {_SYY} = 0::double precision AND {_SXX} <> 0::double precision "
        f"THEN 1::double precision ELSE {_SLOPE} * ({_SXY} / NULLIF({_SYY}, 0::double precision)) "
        "END",
    ),
}


def split_aggregate(name: str, of_type: str, *, arguments: int = 1) -> Split | None:
    """Return how an aggregate splits.

    Parameters
    ----------
    name : str
        Its name.
    of_type : str
        The type of the argument, as ``format_type`` writes it, where the aggregate is in `TYPED`.
    arguments : int, default 1
        How many it has. The second one of ``string_agg`` is the same for all rows.

    Returns
    -------
    Split or None
        None if its rows are needed.
    """
    if arguments == 2:
        if name == "string_agg":
            return Split(("string_agg({x}, {y}){f}",), "string_agg({0}, {y})")
        return Split(_PAIRS, _OF_PAIRS[name]) if name in _OF_PAIRS else None
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
    if of_type in _FLOATS:
        return _FLOATING_VARIANCES.get(name)
    return None


def _average(of_type: str) -> Split | None:
    if of_type in _EXACT:
        return Split(("sum({x}){f}", _COUNT), "sum({0}) / NULLIF(sum({1}), 0::numeric)")
    if of_type in (*_FLOATS, "interval"):
        wide = "interval" if of_type == "interval" else "double precision"
        total = f"sum(({{x}})::{wide}){{f}}"
        count = "NULLIF(sum({1}), 0::numeric)::double precision"
        return Split((total, _COUNT), f"sum({{0}}) / {count}")
    return None
