"""What is asked of every shard, when a DataFrame needs less, or more, than its query's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dask_shardsql.engine.drivers.narrowing import Computed, Narrowing
from dask_shardsql.engine.fetch import Answer
from dask_shardsql.sql.predicates import Node
from dask_shardsql.sql.types import Column

__all__ = ["narrowed", "narrowest"]


def narrowed(
    answer: Answer,
    columns: Sequence[str] | None,
    where: tuple[Node, ...],
    limit: int | None,
    computed: tuple[Computed, ...],
) -> Answer:
    """Return what is read of an answer.

    Parameters
    ----------
    answer : Answer
        What the query answers.
    columns : sequence of str, optional
        Names of the columns that are read, in their order; all by default.
    where : tuple of Node
        Conditions that all rows meet.
    limit : int, optional
        How many rows of each partition at the most.
    computed : tuple of Computed
        Further columns, behind those of the answer.
    """
    if columns is None and not where and limit is None and not computed:
        return answer
    own = [Column(one.name, one.type_name, one.arrow_type) for one in computed]
    described, typed = (*answer.described, *own), (*answer.columns, *own)
    names = [column.name for column in typed]
    wanted = names if columns is None else columns
    chosen = [names.index(name) for name in wanted if name in names]
    has_shard = columns is None or answer.shard_column in columns
    return replace(
        answer,
        described=tuple(described[number] for number in chosen),
        columns=tuple(typed[number] for number in chosen),
        shard_column=answer.shard_column if has_shard else None,
        narrowing=Narrowing(
            tuple(names[number] for number in chosen), where, limit, computed=computed
        ),
    )


def narrowest(answer: Answer) -> str:
    """Return the name of a column that is read for nothing but the number of rows."""
    return min(answer.columns, key=_width).name


def _width(column: Column) -> int:
    """Return about how many bytes a value has."""
    try:
        return int(column.arrow_type.bit_width) // 8
    except ValueError:
        return 1000
