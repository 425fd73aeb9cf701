"""How a computation begins: the snapshots that the slices of shards are read in, new each time."""

from __future__ import annotations

import functools
import uuid
from typing import Any, ClassVar

from dask.tokenize import tokenize

from dask_shardsql.engine.slices import hold_snapshot
from dask_shardsql.engine.stoppable import Stoppable
from dask_shardsql.frame._dask import Expr, Task
from dask_shardsql.split import snapshot_task

__all__ = ["Beginning", "Snapshots"]


class Snapshots(Expr):  # type: ignore[misc]
    """For each shard that is split, the snapshot that its slices are read in.

    Operands: ``ref``, ``shards`` (their names), ``query``, ``split``, the read's ``token``;
    ``run``, which is new for every computation: what Dask kept of an older one (persisted
    slices, results that are still wanted) was read in another snapshot; and ``only``: the numbers
    of the shards that are needed (None: all). They leave a snapshot's key as it is, so that all of
    one computation that reads a shard does so in one snapshot.
    """

    _parameters: ClassVar = ["ref", "shards", "query", "split", "token", "run", "only"]
    _defaults: ClassVar = {"run": None, "only": None}

    @property
    def ndim(self) -> int:
        """There are no rows."""
        return 0

    def _divisions(self) -> tuple[None, ...]:
        return (None,) * (len(self.operand("shards")) + 1)

    @functools.cached_property
    def _token(self) -> str:
        names = [name for name in self._parameters if name != "only"]
        return str(tokenize(*map(self.operand, names), ensure_deterministic=True))

    def key_of(self, shard: int) -> tuple[str, int]:
        """Return the key of the snapshot of the shard of that number."""
        return (f"snapshot-sharded-sql-{self._token}", shard)

    def _layer(self) -> dict[Any, Task]:
        ref, shards, query = self.operand("ref"), self.operand("shards"), self.operand("query")
        only = self.operand("only")
        first = {n: part for n, part in self.operand("split").parts if part.number == 0}
        tasks = [
            snapshot_task(self.key_of(n), ref, shards[n], query, part, Stoppable(hold_snapshot))
            for n, part in first.items()
            if part.slices > 1 and (only is None or n in only)
        ]
        return {task.key: task for task in tasks}


class Beginning(Expr):  # type: ignore[misc]
    """What reads shards, and has an operand ``snapshots``."""

    def lower_once(self, lowered: dict[str, Any]) -> Any:
        """Begin a computation; `lowered` is Dask's own memory of one, so that all share a run."""
        snapshots = self.operand("snapshots")
        if snapshots is None or snapshots.operand("run") is not None:
            return super().lower_once(lowered)
        run = lowered.setdefault("dask_shardsql-run", uuid.uuid4().hex)
        begun = self.substitute_parameters(
            {"snapshots": snapshots.substitute_parameters({"run": run})}
        )
        return lowered.setdefault(self._name, begun.lower_once(lowered))
