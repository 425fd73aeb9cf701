"""One endpoint that serves a shard, and how its keys in a TOML file or mapping are read.

Literal secrets are kept apart from the other connection keywords, so that all the rest can be
shown, hashed and sent.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dask_shardsql.dsn import LIBPQ_HINTS, POSTGRESQL, check_address, is_libpq_keyword, parse_dsn
from dask_shardsql.errors import TopologyError
from dask_shardsql.secret import PASSWORD_REFERENCES, PasswordReference, Secret, is_secret_keyword

__all__ = ["Server", "as_table", "did_you_mean", "known_keys", "server_from_mapping"]

Keyword = str | int | float | bool


@dataclass(frozen=True)
class Server:
    """One endpoint that serves a shard.

    Parameters
    ----------
    driver : str, default "postgresql"
        Name of the driver: ``postgresql``, ``sqlite``, ``duckdb``, ``dbapi``, or one that an
        installed package offers as entry point ``dask_shardsql.drivers``.
    keywords : tuple of (str, value)
        Connection keywords without any secret, sorted by name.
    secrets : tuple of (str, Secret)
        Literal secrets by keyword. Only for local use: they are never part of a task.
    password : PasswordReference, optional
        Where the process that connects finds the password.
    role : str, default "primary"
        ``primary`` or ``replica``.
    """

    driver: str = POSTGRESQL
    keywords: tuple[tuple[str, Keyword], ...] = ()
    secrets: tuple[tuple[str, Secret], ...] = ()
    password: PasswordReference | None = None
    role: str = "primary"

    def __post_init__(self) -> None:
        if self.role not in ("primary", "replica"):
            raise TopologyError(f"a server's role is 'primary' or 'replica', not {self.role!r}")
        for key, _ in self.keywords:
            if is_secret_keyword(key):
                raise TopologyError(
                    f"a server's {key!r} belongs in its secrets, as a Secret, not in its keywords"
                )
        for key, secret in self.secrets:
            if not isinstance(secret, Secret):
                raise TopologyError(f"a server's {key!r} must be a Secret, which masks itself")
        if self.driver == POSTGRESQL:
            check_address(dict(self.keywords), "the server")

    @classmethod
    def from_dsn(cls, dsn: str) -> Server:
        """Make a server from a connection string.

        Parameters
        ----------
        dsn : str
            libpq keywords (``host=db2 dbname=shop``, ``service=shard1``), a URL
            (``postgresql://db3/shop``), or ``sqlite:///file``, ``duckdb:///file``. See the
            PostgreSQL manual, section 34.1.1.

        Raises
        ------
        TopologyError
            When it cannot be read. The text itself is never repeated, as it may hold a password.
        """
        if not isinstance(dsn, str):
            raise TopologyError(f"a connection string must be a text, not {type(dsn).__name__}")
        return server_from_mapping({"dsn": dsn}, "the connection string")

    @property
    def address(self) -> str:
        """Where the server is, for people: host and port, service or file; never a login."""
        known = dict(self.keywords)
        if "service" in known and "host" not in known and "hostaddr" not in known:
            return f"service {known['service']}"
        if self.driver == POSTGRESQL or "host" in known:
            host = known.get("host") or known.get("hostaddr") or "local socket"
            port = known.get("port", 5432 if self.driver == POSTGRESQL else None)
            return f"{host}:{port}" if port else str(host)
        return str(known.get("database", self.driver))

    def __repr__(self) -> str:
        known = " ".join(f"{key}={value}" for key, value in self.keywords)
        masked = "".join(f" {key}=***" for key, _ in self.secrets)
        reference = f" {self.password.kind}=..." if self.password else ""
        return f"<Server {self.driver} {self.role}: {known}{masked}{reference}>"


def server_from_mapping(
    entry: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> Server:
    """Make a server from the keys of a shard's table over those of ``[defaults]``.

    Parameters
    ----------
    entry, defaults : mapping
        ``dsn``, ``driver``, connection keywords, and at most one key that says what the password
        is; one that `entry` has replaces whichever `defaults` has.
    where : str
        What errors call it.

    Raises
    ------
    TopologyError
        A key is unknown, a value has the wrong type, or the connection string is malformed.
    """
    driver = POSTGRESQL
    keywords: dict[str, Any] = {}
    login: dict[str, Any] = {}
    for layer in (defaults or {}, entry):
        driver, given = _expand_dsn(layer, driver, where)
        said = {key: given.pop(key) for key in ("password", *PASSWORD_REFERENCES) if key in given}
        if len(said) > 1:
            raise TopologyError(f"{where}: only one of {', '.join(said)} can give the password")
        login = said or login
        keywords.update(given)
    for key, value in (keywords | login).items():
        if key not in PASSWORD_REFERENCES and not isinstance(value, str | int | float | bool):
            raise TopologyError(f"{where}: the value of {key!r} must be a text or a number")
    if driver == POSTGRESQL:
        for key in keywords:
            if not is_libpq_keyword(key):
                hint = did_you_mean(key, (*LIBPQ_HINTS, *PASSWORD_REFERENCES))
                raise TopologyError(f"{where}: unknown key {key!r}{hint}")
        if "client_encoding" in keywords:
            raise TopologyError(f"{where}: 'client_encoding' cannot be chosen, sessions use UTF8")
        # one form of each value, so that 5432 and "5432" make equal topologies
        keywords = {k: str(int(v) if isinstance(v, bool) else v) for k, v in keywords.items()}
        check_address(keywords, where)
    secrets = {k: Secret(str(v)) for k, v in keywords.items() if is_secret_keyword(k)}
    plain = {k: v for k, v in keywords.items() if k not in secrets}
    reference = None
    if "password" in login:
        secrets["password"] = Secret(str(login["password"]))
    elif login:
        ((kind, target),) = login.items()
        reference = PasswordReference(kind, _reference_target(kind, target, where))
    ordered = tuple(sorted(plain.items())), tuple(sorted(secrets.items(), key=lambda kv: kv[0]))
    return Server(driver, *ordered, reference)


def _expand_dsn(layer: Mapping[str, Any], driver: str, where: str) -> tuple[str, dict[str, Any]]:
    """Return the driver a table is for, and its keys over those of its connection string."""
    given = dict(layer)
    named, dsn = given.pop("driver", None), given.pop("dsn", None)
    if named is not None and (not isinstance(named, str) or not named):
        raise TopologyError(f"{where}: driver must be the name of a driver")
    if dsn is None:
        return named or driver, given
    found, keywords = parse_dsn(dsn, where)
    if named and named != found:
        raise TopologyError(f"{where}: driver is {named!r}, but its dsn is for {found!r}")
    return found, {**keywords, **given}


def _reference_target(kind: str, target: Any, where: str) -> str | tuple[str, ...]:
    words = kind == "password_command" and isinstance(target, list | tuple) and target
    if words and all(isinstance(word, str) for word in target):
        return tuple(target)
    if not isinstance(target, str) or not target:
        raise TopologyError(f"{where}: {kind} must be {PASSWORD_REFERENCES[kind]}")
    if kind == "password_callable" and not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise TopologyError(f"{where}: {kind} must be {PASSWORD_REFERENCES[kind]}")
    return target


def known_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse any key that is not one of `known`, naming it and the nearest known one."""
    known = tuple(known)
    for key in mapping:
        if key not in known:
            raise TopologyError(
                f"unknown key {key!r} in {where}{did_you_mean(str(key), known)} "
                f"(known: {', '.join(known)})"
            )


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` or nothing."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def as_table(value: Any, where: str) -> dict[str, Any]:
    """Return a copy of a nested table, or refuse what is none."""
    if not isinstance(value, Mapping):
        raise TopologyError(f"{where} must be a table of keys and values")
    return dict(value)
