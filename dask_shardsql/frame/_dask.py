"""The only door to dask's private classes.

dask gives no stability promise for them: ``pyproject.toml`` pins the minor releases that the
tests have seen, and ``tests/test_dask_contract.py`` fails loudly when one of them moves.
"""

from __future__ import annotations

from dask._task_spec import List, Task, TaskRef
from dask.dataframe import groupby as groupby_module
from dask.dataframe.dask_expr._accessor import FunctionMap, PropertyMap
from dask.dataframe.dask_expr._expr import (
    EQ,
    GE,
    GT,
    LE,
    LT,
    NE,
    Add,
    And,
    Assign,
    Between,
    Blockwise,
    BlockwiseHead,
    Expr,
    Filter,
    Head,
    Index,
    Invert,
    Isin,
    IsNa,
    Mul,
    NotNull,
    Or,
    PartitionsFiltered,
    Projection,
    Query,
    RenameSeries,
    Sub,
    determine_column_projection,
)
from dask.dataframe.dask_expr._expr import _DelayedExpr as DelayedExpr
from dask.dataframe.dask_expr._groupby import (
    GroupbyAggregation,
    GroupByApplyConcatApply,
    GroupByChunk,
    GroupByReduction,
)
from dask.dataframe.dask_expr._groupby import Mean as GroupByMean
from dask.dataframe.dask_expr._reductions import (
    Chunk,
    Count,
    Len,
    Max,
    MeanAggregate,
    Min,
    Prod,
    Sum,
    TreeReduce,
)
from dask.dataframe.dask_expr.io.io import BlockwiseIO
from dask.dataframe.dispatch import meta_nonempty
from dask.dataframe.extensions import make_scalar
from dask.tokenize import normalize_token

__all__ = [
    "EQ",
    "GE",
    "GT",
    "LE",
    "LT",
    "NE",
    "Add",
    "And",
    "Assign",
    "Between",
    "Blockwise",
    "BlockwiseHead",
    "BlockwiseIO",
    "Chunk",
    "Count",
    "DelayedExpr",
    "Expr",
    "Filter",
    "FunctionMap",
    "GroupByApplyConcatApply",
    "GroupByChunk",
    "GroupByMean",
    "GroupByReduction",
    "GroupbyAggregation",
    "Head",
    "Index",
    "Invert",
    "IsNa",
    "Isin",
    "Len",
    "List",
    "Max",
    "MeanAggregate",
    "Min",
    "Mul",
    "NotNull",
    "Or",
    "PartitionsFiltered",
    "Prod",
    "Projection",
    "PropertyMap",
    "Query",
    "RenameSeries",
    "Sub",
    "Sum",
    "Task",
    "TaskRef",
    "TreeReduce",
    "determine_column_projection",
    "groupby_module",
    "make_scalar",
    "meta_nonempty",
    "normalize_token",
]
