"""Parameters -> the text that is sent: psycopg2's placeholders, quoted by libpq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import psycopg2
import psycopg2.extensions as pgx

from dask_shardsql.engine.drivers.base import Query
from dask_shardsql.engine.drivers.rows import plain_value
from dask_shardsql.errors import ParameterError
from dask_shardsql.sql.statement import single_query

__all__ = ["merge_params", "read_strings_as_standard"]


def merge_params(cursor: Any, query: Query) -> str:
    """Put the parameters into the text, quoted by libpq for this connection."""
    if query.params is None:
        return query.sql
    problem, text = "", b""
    try:
        text = cursor.mogrify(query.sql, _adaptable(query.params))
    except (IndexError, TypeError) as error:
        problem = f"the parameters do not fit the placeholders: {error}"
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


def read_strings_as_standard(connection: Any) -> None:
    """Let the server read strings as single_query does.

    In a round trip of its own, as a text is lexed whole before any of it runs.
    """
    if connection.get_parameter_status("standard_conforming_strings") == "off":
        with connection.cursor() as cursor:
            cursor.execute("SET standard_conforming_strings = on")


def _adaptable(params: Any) -> Any:
    """Return the parameters with NumPy, pandas, Arrow and UUID values as psycopg2 takes them."""
    if isinstance(params, Mapping):
        return {key: _adapt(value) for key, value in params.items()}
    if isinstance(params, str | bytes) or not hasattr(params, "__iter__"):
        raise ParameterError(
            f"params must be a sequence or a mapping of values, not {type(params).__name__}"
        )
    return tuple(_adapt(value) for value in params)


def _adapt(value: Any) -> Any:
    import numpy as np
    import pandas as pd

    if isinstance(value, np.ndarray | pd.Series | pd.Index):
        return [_adapt(item) for item in value]
    if isinstance(value, UUID):
        return pgx.AsIs(f"'{value}'::uuid")
    if type(value) in (list, tuple):
        return type(value)(_adapt(item) for item in value)
    return plain_value(value)
