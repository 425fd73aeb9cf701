"""Every exception of the library, as one tree.

::

    ShardSQLError
    ├── TopologyError               the description of the shards is wrong
    │   └── TopologyNotFoundError   a process was asked for a topology it was never given
    ├── ConfigurationError          a setting, an option or an environment is wrong
    │   └── CredentialError         a password reference does not lead to a password
    ├── ConnectionFailedError       a server cannot be reached or refuses the login
    │   └── ConnectionLostError     a server went away while it was answering
    ├── PoolTimeoutError            no connection became free in time
    ├── QueryError                  a server refused or failed the query
    │   ├── StatementError          the text is not one single query
    │   └── ParameterError          the parameters do not fit the query
    ├── SchemaMismatchError         the shards describe the answer differently
    ├── MergeRefusedError           a query over all shards cannot be answered as one database would
    ├── SnapshotLostError           slices of a shard cannot all be of one snapshot
    ├── ColumnError                 the answer's columns cannot be used as they are
    └── UnrepresentableValueError   a value does not fit its column's Arrow type

Every class keeps its parts as attributes and formats them in ``__str__``, so that an exception
which crosses from a worker to the client arrives whole: ``super().__init__`` gets the raw values,
which is what pickle replays.
"""

from __future__ import annotations

import copy

__all__ = [
    "ColumnError",
    "ConfigurationError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "CredentialError",
    "MergeRefusedError",
    "ParameterError",
    "PoolTimeoutError",
    "QueryError",
    "SchemaMismatchError",
    "ShardSQLError",
    "SnapshotLostError",
    "StatementError",
    "TopologyError",
    "TopologyNotFoundError",
    "UnionSemanticsWarning",
    "UnrepresentableValueError",
]


class UnionSemanticsWarning(UserWarning):
    """The union of the shards' answers is not what one database would answer."""


class ShardSQLError(Exception):
    """Root of every error this library raises.

    Parameters
    ----------
    message : str
        What failed, what was found against what was needed, and what to do.
    shard : str, optional
        Name of the shard the error came from.
    server : str, optional
        Host and port (never a login) of the server the error came from.
    """

    def __init__(self, message: str, shard: str | None = None, server: str | None = None) -> None:
        super().__init__(message, shard, server)
        self.message = message
        self.shard = shard
        self.server = server

    def __str__(self) -> str:
        if self.shard is None or repr(self.shard) in self.message:
            return self.message
        return f"shard {self.shard!r}: {self.message}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class TopologyError(ShardSQLError):
    """The description of shards, servers and tables is wrong or incomplete."""


class TopologyNotFoundError(TopologyError):
    """A process was asked to read a topology that it was never given."""


class ConfigurationError(ShardSQLError):
    """A setting, an option or something in the environment is wrong."""


class CredentialError(ConfigurationError):
    """A password reference (variable, file, command, callable) does not lead to a password."""


class ConnectionFailedError(ShardSQLError):
    """A shard's server cannot be reached, or refuses the login."""

    def __init__(
        self,
        message: str,
        shard: str | None = None,
        server: str | None = None,
        sqlstate: str | None = None,
    ) -> None:
        super().__init__(message, shard, server)
        self.args = (message, shard, server, sqlstate)
        self.sqlstate = sqlstate


class ConnectionLostError(ConnectionFailedError):
    """A shard's server went away while it was answering."""


class PoolTimeoutError(ShardSQLError):
    """Every connection this process may have to a server stayed in use for too long."""


class QueryError(ShardSQLError):
    """A server refused the query, or failed while it ran.

    Parameters
    ----------
    message : str
        The server's own primary message.
    shard, server : str, optional
        Where it happened.
    sqlstate : str, optional
        The five-character SQLSTATE code (PostgreSQL manual, appendix A).
    position : int, optional
        Position of the error in `query`, counted in characters from 1.
    detail, hint : str, optional
        The server's DETAIL and HINT.
    query : str, optional
        The text that was sent, with its parameters in place.
    note : str, optional
        What other shards said of the same query.
    """

    def __init__(
        self,
        message: str,
        shard: str | None = None,
        server: str | None = None,
        sqlstate: str | None = None,
        position: int | None = None,
        detail: str | None = None,
        hint: str | None = None,
        query: str | None = None,
        note: str | None = None,
    ) -> None:
        super().__init__(message, shard, server)
        self.args = (message, shard, server, sqlstate, position, detail, hint, query, note)
        self.sqlstate = sqlstate
        self.position = position
        self.detail = detail
        self.hint = hint
        self.query = query
        self.note = note

    def with_note(self, note: str) -> QueryError:
        """Return the same error with another `note`."""
        error = copy.copy(self)
        error.note = note
        return error

    def __str__(self) -> str:
        where = f"shard {self.shard!r}: " if self.shard else ""
        state = f" (SQLSTATE {self.sqlstate})" if self.sqlstate else ""
        lines = [f"{where}{self.message}{state}"]
        if self.query and self.position:
            lines += _point_at(self.query, self.position)
        if self.detail:
            lines.append(f"detail: {self.detail}")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        if self.note:
            lines.append(self.note)
        return "\n".join(lines)


class StatementError(QueryError):
    """The text is not one single query: it is empty, or holds several statements."""


class ParameterError(QueryError):
    """The parameters do not fit the query's placeholders, or have no SQL form."""


class SchemaMismatchError(ShardSQLError):
    """The shards describe the columns of the answer differently.

    Parameters
    ----------
    message : str
        The whole explanation.
    differences : tuple of (str, str, str, str)
        ``(shard, column, found, expected)`` for every difference.
    """

    def __init__(
        self, message: str, differences: tuple[tuple[str, str, str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.args = (message, differences)
        self.differences = differences


class MergeRefusedError(ShardSQLError):
    """A query cannot be answered as one database with all the rows would; nothing was answered.

    Parameters
    ----------
    reason : str
        A word for why, which stays the same: see the README.
    message : str
        Why, and what to do.
    shard, server : str, optional
        As in :class:`ShardSQLError`.
    """

    def __init__(
        self, reason: str, message: str, shard: str | None = None, server: str | None = None
    ) -> None:
        super().__init__(message, shard, server)
        self.args = (reason, message, shard, server)
        self.reason = reason

    def __str__(self) -> str:
        return f"the query cannot be answered over all shards ({self.reason}): {self.message}"


class SnapshotLostError(ShardSQLError):
    """The session that held a shard's snapshot is gone before all slices were read in it."""


class ColumnError(ShardSQLError):
    """The answer's columns cannot be used as they are: duplicate or missing names, unknown types.

    Parameters
    ----------
    message : str
        The whole explanation.
    columns : tuple of str
        The columns it is about.
    """

    def __init__(self, message: str, columns: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.args = (message, columns)
        self.columns = columns


class UnrepresentableValueError(ShardSQLError):
    """A value of the answer does not fit the Arrow type of its column.

    Parameters
    ----------
    column : str
        The column's name.
    value : str
        The first such value, as the server writes it (cut at 80 characters).
    arrow_type : str
        The Arrow type it does not fit.
    shard : str, optional
        The shard it came from.
    """

    def __init__(self, column: str, value: str, arrow_type: str, shard: str | None = None) -> None:
        super().__init__("", shard)
        self.args = (column, value, arrow_type, shard)
        self.column = column
        self.value = value
        self.arrow_type = arrow_type

    def __str__(self) -> str:
        where = f" of shard {self.shard!r}" if self.shard else ""
        return (
            f"cannot hold {self.value!r} of column {self.column!r}{where} as {self.arrow_type}. "
            f"Select it as text (CAST({self.column} AS text)), give the column another type with "
            f"types={{{self.column!r}: ...}}, or read such values as NULL with "
            'unrepresentable="null"'
        )


def _point_at(query: str, position: int) -> list[str]:
    """Return the line of `query` around `position` and a caret under it, as psql prints them."""
    before = query[: position - 1]
    number = before.count("\n") + 1
    start = before.rfind("\n") + 1
    end = query.find("\n", start)
    line = query[start : end if end >= 0 else len(query)]
    column = position - 1 - start
    left = max(0, column - 50)
    shown = line[left : left + 100]
    prefix = f"LINE {number}: " + ("..." if left else "")
    return [prefix + shown, " " * (len(prefix) + column - left) + "^"]
