"""``dask.config`` -> :class:`Settings` and the default topology.

The defaults are in ``shardsql.yaml`` beside this file. As with every dask package, a YAML file
in dask's configuration directory, ``DASK_SHARDSQL__...`` variables and ``dask.config.set``
override them, in each process for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import dask
import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_shardsql.errors import ConfigurationError
from dask_shardsql.topology import Topology

__all__ = ["DTYPE_BACKENDS", "Settings", "default_topology", "register_defaults", "size_in_bytes"]

DTYPE_BACKENDS = ("numpy", "numpy_nullable", "pyarrow")
_UNREPRESENTABLE = ("null", "raise")


_latest: list[tuple[dict[str, object], Settings]] = []


def register_defaults() -> None:
    """Make the package's defaults known to ``dask.config``."""
    file = Path(__file__).with_name("shardsql.yaml")
    dask.config.ensure_file(source=str(file))
    dask.config.update_defaults(yaml.safe_load(file.read_text()))


@dataclass(frozen=True)
class Settings:
    """What this process does with connections and answers; times in seconds, sizes in bytes."""

    dtype_backend: str = "pyarrow"
    unrepresentable: str = "raise"
    check_schema: bool = True
    max_connections_per_worker: int = 8
    connect_timeout: float = 10.0
    pool_timeout: float = 60.0
    pool_idle: float = 300.0
    max_gather_bytes: int = 1 << 30
    pushdown: bool = True

    def __post_init__(self) -> None:
        if self.dtype_backend not in DTYPE_BACKENDS:
            raise _wrong("dtype-backend", self.dtype_backend, f"one of {', '.join(DTYPE_BACKENDS)}")
        if self.unrepresentable not in _UNREPRESENTABLE:
            raise _wrong("unrepresentable", self.unrepresentable, "'raise' or 'null'")
        if not isinstance(self.check_schema, bool):
            raise _wrong("check-schema", self.check_schema, "true or false")
        if not isinstance(self.pushdown, bool):
            raise _wrong("pushdown", self.pushdown, "true or false")
        limit = self.max_connections_per_worker
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise _wrong("max-connections-per-worker", limit, "a whole number from 1")

    @classmethod
    def current(cls, **overrides: object) -> Settings:
        """Read the settings from ``dask.config``; `overrides` that are not None come first.

        Raises
        ------
        ConfigurationError
            A setting has a value it cannot have.
        """
        configured = dask.config.get("shardsql", {}) or {}
        if not isinstance(configured, Mapping):
            raise ConfigurationError("dask.config 'shardsql' must be a mapping of settings")
        given = dict(configured)
        given.pop("topology", None)
        overrides = {key: value for key, value in overrides.items() if value is not None}
        if not overrides and _latest and _latest[0][0] == given:
            return _latest[0][1]  # each shard's task asks
        values = {str(key).replace("-", "_"): value for key, value in given.items()}
        values.update(overrides)
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            known = ", ".join(name.replace("_", "-") for name in cls.__dataclass_fields__)
            raise ConfigurationError(
                f"dask.config has unknown keys under 'shardsql': {', '.join(sorted(unknown))}; "
                f"known are topology, {known}"
            )
        for key in ("connect_timeout", "pool_timeout", "pool_idle"):
            if key in values:
                values[key] = _seconds(key.replace("_", "-"), values[key])
        if "max_gather_bytes" in values:
            size = values["max_gather_bytes"]
            values["max_gather_bytes"] = size_in_bytes("max_gather_bytes", size)
        settings = cls(**values)
        if not overrides:
            _latest[:] = [(given, settings)]
        return settings


def default_topology(topology: Topology | None) -> Topology:
    """Return `topology`, or the one that ``shardsql.topology`` in ``dask.config`` names.

    Raises
    ------
    ConfigurationError
        There is neither.
    """
    if isinstance(topology, Topology):
        return topology
    if topology is not None:
        raise ConfigurationError(
            f"the topology must be a dask_shardsql.Topology, not {type(topology).__name__}: make "
            "one with Topology.from_toml(path) or Topology.from_dsns([...])"
        )
    found = dask.config.get("shardsql.topology", None)
    if isinstance(found, Mapping):
        made = Topology.from_mapping(found, source="dask.config 'shardsql.topology'")
        if made.has_literal_secrets:
            raise ConfigurationError(
                "dask.config 'shardsql.topology' holds a literal password, and dask copies its "
                "configuration to workers and dumps: name the password by reference, or give the "
                "path of a TOML file"
            )
        return made
    if isinstance(found, str) and "://" in found:
        raise ConfigurationError(
            "dask.config 'shardsql.topology' must be the path of a TOML file or nested keys, not a "
            "connection string (not shown, as it may hold a password)"
        )
    if isinstance(found, str):
        return Topology.from_toml(Path(found).expanduser())
    raise ConfigurationError(
        "no topology was given, and dask.config has no 'shardsql.topology': pass one, or set it "
        "to the path of a TOML file"
    )


def size_in_bytes(name: str, size: str | int) -> int:
    """Return the size that the argument `name` gives.

    Parameters
    ----------
    name : str
        Of the argument, for the error.
    size : str or int
        ``"256 MiB"``, or a whole number of bytes; from 1 to what 63 bits hold.

    Raises
    ------
    ConfigurationError
        It is no such size.
    """
    try:
        # dask takes a unit without a number, and nothing at all, for one of it
        is_number = any(map(str.isdecimal, str(size))) and not isinstance(size, bool)
        found = int(parse_bytes(size)) if is_number and not _is_broken(size) else 0
    except (ValueError, TypeError, AttributeError, OverflowError):
        found = 0
    if not 1 <= found < 1 << 63:
        raise ConfigurationError(
            f"{name} must be a size such as '256 MiB', or a whole number of bytes, not {size!r}"
        )
    return found


def _is_broken(size: str | int) -> bool:
    """Whether a number without a unit is no whole one."""
    with suppress(ValueError):
        return not float(size).is_integer()
    return False


def _seconds(key: str, value: object) -> float:
    try:
        seconds = float(parse_timedelta(value))
    except (KeyError, TypeError, ValueError):
        seconds = -1.0
    if seconds <= 0:
        raise _wrong(key, value, "a time such as '10s' or '2 minutes'")
    return seconds


def _wrong(key: str, value: object, needed: str) -> ConfigurationError:
    return ConfigurationError(f"setting 'shardsql.{key}' is {value!r}; it must be {needed}")
