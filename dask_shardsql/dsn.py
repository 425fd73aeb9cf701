"""Connection strings: libpq keywords, URLs and file URLs -> driver and connection keywords.

No error here repeats the text it is about, nor is one raised while another is handled: a
connection string may hold a password, and libpq's own messages quote it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from dask_shardsql.errors import TopologyError

__all__ = ["LIBPQ_HINTS", "POSTGRESQL", "check_address", "is_libpq_keyword", "parse_dsn"]

POSTGRESQL = "postgresql"

#: The keys people most often mean; libpq itself says which others exist.
LIBPQ_HINTS = (
    *("name", "dsn", "driver", "host", "hostaddr", "port", "dbname", "user", "password", "service"),
    *("passfile", "sslmode", "sslrootcert", "sslcert", "sslkey", "options", "connect_timeout"),
)

_FILE_DRIVERS = ("duckdb", "sqlite")
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*)://")


def parse_dsn(dsn: Any, where: str) -> tuple[str, dict[str, Any]]:
    """Split a connection string into the driver's name and its connection keywords.

    Parameters
    ----------
    dsn : str
        libpq keywords or URL (PostgreSQL manual, section 34.1.1), or another driver's URL.
    where : str
        What errors call it.

    Raises
    ------
    TopologyError
        When it cannot be read.
    """
    if not isinstance(dsn, str) or not dsn.strip() or "\0" in dsn:
        raise TopologyError(f"{where}: the connection string must be a text that is not empty")
    scheme = _URL.match(dsn)
    if scheme and scheme[1].lower() not in ("postgresql", "postgres"):
        return _parse_url(scheme[1].lower(), dsn.strip(), where)
    from psycopg2 import ProgrammingError
    from psycopg2.extensions import parse_dsn as parse_libpq

    try:
        return POSTGRESQL, parse_libpq(dsn)
    except (ProgrammingError, UnicodeError, ValueError):
        pass
    raise _malformed(where, "URL" if scheme else "list of libpq keywords (key=value ...)")


def check_address(keywords: Mapping[str, Any], where: str) -> None:
    """Refuse values that can only hold a piece of a badly escaped password.

    Raises
    ------
    TopologyError
        The host holds ``@`` or blanks, the port is not a number, the database or the user looks
        like a connection string of its own.
    """
    for key, value in keywords.items():
        if key != "password" and re.search(r"passw\w*\s*=", str(value), re.IGNORECASE):
            raise _malformed(where, f"{key} in it")
    # 'user' may hold '@' (user@server, as some hosted services want it), but no ':'
    for key, wrong in (("dbname", "[@:]"), ("user", ":")):
        if re.search(wrong, str(keywords.get(key, ""))):
            raise _malformed(where, f"{key} in it")
    for key in ("host", "hostaddr"):
        for host in str(keywords.get(key, "")).split(","):
            named = key == "host" and not host.startswith(("/", "@"))
            if not re.fullmatch(r"@?[^@\s]*", host) or (
                named and re.search(r"^[^:]*:[^:]*$", host)
            ):
                raise _malformed(where, f"{key} in it")
    for port in str(keywords.get("port", "")).split(","):
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise _malformed(where, "port in it (a number from 1 to 65535)")


@functools.cache
def is_libpq_keyword(key: str) -> bool:
    """Whether libpq knows a connection keyword of that name."""
    from psycopg2 import ProgrammingError
    from psycopg2.extensions import parse_dsn as parse_libpq

    if not re.fullmatch(r"[a-z_]+", key):
        return False
    try:
        return bool(parse_libpq(f"{key}=1"))
    except ProgrammingError:
        return False


def _parse_url(scheme: str, url: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        parts = urlsplit(url)
        keywords: dict[str, Any] = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
        login = {"user": parts.username, "password": parts.password}
        host = {"host": parts.hostname, "port": parts.port}
    except ValueError:
        parts = None
    if parts is None:
        raise _malformed(where, f"{scheme} URL")
    if parts.fragment:
        raise _malformed(where, f"{scheme} URL: write '#' as %23")
    path = unquote(parts.path[1:])
    if scheme in _FILE_DRIVERS and (parts.netloc or not path):
        raise TopologyError(
            f"{where}: write {scheme}:///relative/path or {scheme}:////absolute/path"
        )
    keywords |= {key: unquote(value) for key, value in login.items() if value}
    keywords |= {key: value for key, value in host.items() if value}
    if path:
        keywords["database"] = path
    return scheme, keywords


def _malformed(where: str, what: str) -> TopologyError:
    return TopologyError(
        f"{where}: malformed connection string, not a valid {what}. It is not shown, as it may "
        "hold a password. In a URL write special characters percent-encoded ('@' is %40, ':' is "
        "%3A, '/' is %2F); in a list of keywords quote values that hold blanks ('...')"
    )
