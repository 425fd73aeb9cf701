"""Drivers: what one kind of database needs to be one of the shards."""

from __future__ import annotations

from dask_shardsql.engine.drivers.base import Driver, Query, driver_named

__all__ = ["Driver", "Query", "driver_named"]
