"""A table's keys in a TOML file or mapping -> its sharding function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from dask_shardsql.errors import TopologyError
from dask_shardsql.server import as_table, did_you_mean, known_keys
from dask_shardsql.sharding.function import ShardingFunction
from dask_shardsql.sharding.key_types import KEY_TYPES, read_key, type_of_value
from dask_shardsql.sharding.kinds import ShardByHash, ShardByList, ShardByModulo, ShardByRange
from dask_shardsql.sharding.own import ShardByCallable

__all__ = ["function_from_options"]

_HEADER = ["value", "shard"]
_KNOWN = {
    "hash": ("shards",),
    "list": ("values", "default", "null", "type"),
    "lookup": ("table", "file", "default", "null", "type"),
    "modulo": ("shards", "null"),
    "range": ("bounds", "shards", "null", "type"),
}


def function_from_options(
    options: Mapping[str, Any], where: str, shards: Sequence[str], directory: Path
) -> ShardingFunction | None:
    """Make the sharding function that a table's keys describe.

    Parameters
    ----------
    options : mapping
        ``function`` (a kind, ``"module:function"``, a callable or a :class:`ShardingFunction`),
        and what that kind takes.
    where : str
        What errors call it.
    shards : sequence of str
        The topology's shards, in their order: those of a function that names none.
    directory : Path
        What the path of a lookup table's file starts from.

    Raises
    ------
    TopologyError
        A key is unknown or missing, or a value cannot be used.
    """
    options = dict(options)
    named = options.pop("function", None)
    is_code = callable(named) or (isinstance(named, str) and ":" in named)
    if named is None or is_code or isinstance(named, ShardingFunction):
        if options:
            raise TopologyError(
                f"{where}: {', '.join(map(repr, options))} cannot be given beside this 'function', "
                f"only beside one of {', '.join(_KNOWN)}: leave that out"
            )
        return _made(lambda: ShardByCallable(named), where) if is_code else named
    if not isinstance(named, str) or named not in _KNOWN:
        hint = did_you_mean(named, _KNOWN) if isinstance(named, str) else ""
        raise TopologyError(
            f"{where}: no sharding function is called {named!r}{hint} (known: "
            f"{', '.join(_KNOWN)}; or your own as 'module:function')"
        )
    known_keys(options, _KNOWN[named], where)
    kind = options.pop("type", None)
    if kind is not None and kind not in KEY_TYPES:
        raise TopologyError(f"{where}: type is {kind!r}; it must be one of {', '.join(KEY_TYPES)}")
    if named in ("hash", "modulo", "range"):
        options.setdefault("shards", list(shards))
    if named == "hash":
        return _made(lambda: ShardByHash(**options), where)
    if named == "modulo":
        return _made(lambda: ShardByModulo(**options), where)
    if named == "range":
        bounds = options.pop("bounds", None)
        if not isinstance(bounds, list | tuple):
            raise TopologyError(
                f"{where}: 'range' needs the bounds between the shards' ranges: bounds = [1000]"
            )
        typed = tuple(_typed(bounds, kind, where))
        return _made(lambda: ShardByRange(typed, **options), where)
    pairs = _listed(options, where) if named == "list" else _looked_up(options, where, directory)
    values = _typed([value for value, _ in pairs], kind, where)
    table = list(zip(values, [shard for _, shard in pairs], strict=True))
    return _made(lambda: ShardByList(table, **options), where)


def _made(make: Callable[[], ShardingFunction], where: str) -> ShardingFunction:
    try:
        return make()
    except TopologyError as error:
        said = str(error)
    raise TopologyError(f"{where}: {said}")


def _typed(values: Iterable[Any], kind: str | None, where: str) -> list[Any]:
    """Return the values as `kind`, if that is given, of which texts are read."""
    found = []
    for value in values:
        taken = value
        if kind == "numeric" and type(value) is int:
            taken = Decimal(value)
        elif kind is not None and isinstance(value, str):
            taken = read_key(value.lower() if kind == "uuid" else value, kind)
        if kind is not None and type_of_value(taken) != kind:
            raise TopologyError(
                f"{where}: {value!r} cannot be read as {kind}: write it as PostgreSQL does, in "
                "quotes unless it is an integer"
            )
        found.append(taken)
    return found


def _listed(options: dict[str, Any], where: str) -> list[tuple[Any, str]]:
    by_shard = as_table(
        options.pop("values", None), f"{where}: 'values' (each shard's name, and its list)"
    )
    for shard, values in by_shard.items():
        if not isinstance(values, list | tuple):
            raise TopologyError(f"{where}: the values of shard {shard!r} must be a list")
    return [(value, shard) for shard, values in by_shard.items() for value in values]


def _looked_up(options: dict[str, Any], where: str, directory: Path) -> list[tuple[Any, str]]:
    table, file = options.pop("table", None), options.pop("file", None)
    if (table is None) == (file is None):
        raise TopologyError(
            f"{where}: 'lookup' needs either a table, as in table = {{ DE = \"s1\" }}, or the file "
            'of one, as in file = "countries.csv"'
        )
    if file is None:
        return list(as_table(table, f"{where}: 'table' (each value, and its shard)").items())
    if not isinstance(file, str) or not file or "\0" in file:
        raise TopologyError(f"{where}: file must be the path of a CSV file, not {file!r}")
    path = directory / Path(file).expanduser()
    problem, lines = "", []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = [line for line in csv.reader(stream, strict=True) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problem = getattr(error, "strerror", None) or f"it is no CSV file in UTF-8 ({error})"
    if not problem and (not lines or lines[0] != _HEADER):
        problem = f"its first line must be {','.join(_HEADER)}"
    if not problem and (wrong := next((line for line in lines if len(line) != 2), None)):
        problem = f"each line needs a value and a shard, not {wrong!r}"
    if problem:
        raise TopologyError(f"{where}: cannot read {path}: {problem}")
    return [(value, shard) for value, shard in lines[1:]]
