"""Parameters -> the text that is sent: psycopg2's placeholders, quoted by libpq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.rows import each_param, plain_value
from dask_shardsql.errors import ParameterError
from dask_shardsql.sql.statement import single_query

__all__ = ["merge_params", "read_strings_as_standard"]


def merge_params(cursor: Any, query: Query) -> str:
    """Put the parameters into the text, quoted by libpq for this connection."""
    if query.params is None:
        return query.sql
    problem, text = "", b""
    if "%" not in query.sql and query.params and not isinstance(query.params, Mapping):
        problem = "there are parameters, and no placeholder in the query"  # psycopg2 drops them
    try:
        text = cursor.mogrify(query.sql, each_param(query.params, _adapt))
    except (IndexError, TypeError) as error:
        problem = f"the parameters do not fit the placeholders: {_why(query.sql, error)}"
    except KeyError as error:
        problem = f"the query has a placeholder %({error.args[0]})s and no such parameter"
    except psycopg2.ProgrammingError as error:
        problem = f"a parameter has no SQL form: {error}"
    except (ValueError, UnicodeError) as error:
        problem = f"the parameters cannot be sent: {error}"
    if problem:
        raise ParameterError(
            problem,
            query=query.sql,
            hint="write one %s for each value of a sequence, or %(name)s for each key of a "
            "mapping, and %% for a percent sign",
        )
    # a placeholder inside quotes or a comment lets its value end them: look at the whole again
    return single_query(text.decode("utf-8"))


def _why(sql: str, error: IndexError | TypeError) -> str:
    """Return in words what psycopg2 says in Python's."""
    said = str(error)
    if isinstance(error, IndexError):
        return "there are fewer of them"
    if said.startswith("not all arguments"):
        return "there are more of them"
    if said.startswith("dict is not"):
        return "they have names, and the placeholders have none"
    if said.startswith("tuple indices") and "%(" in sql:
        return "the placeholders have names, and they have none"
    return said


def read_strings_as_standard(connection: Any) -> None:
    """Let the server read strings as single_query does.

    In a round trip of its own, as a text is lexed whole before any of it runs.
    """
    if connection.get_parameter_status("standard_conforming_strings") == "off":
        with connection.cursor() as cursor:
            cursor.execute("SET standard_conforming_strings = on")


def _adapt(value: Any) -> Any:
    """Return a NumPy, pandas, Arrow or UUID value as psycopg2 takes it."""
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | pd.Series | pd.Index):
        return [_adapt(item) for item in value]
    if isinstance(value, UUID):
        return pgx.AsIs(f"'{value}'::uuid")
    if type(value) in (list, tuple):
        return type(value)(_adapt(item) for item in value)
    return plain_value(value)
