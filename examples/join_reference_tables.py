"""JOIN a sharded table with reference tables: every shard does its part of the join.

python examples/join_reference_tables.py shards.toml
"""

import sys

import dask_shardsql as dss

SQL = """
SELECT r_name AS region, n_name AS nation, l_extendedprice * (1 - l_discount) AS revenue
FROM lineitem
JOIN orders ON l_orderkey = o_orderkey          -- colocated: both sharded by the order's key
JOIN customer ON o_custkey = c_custkey          -- reference tables: whole on every shard
JOIN nation ON c_nationkey = n_nationkey
JOIN region ON n_regionkey = r_regionkey
WHERE o_orderdate >= %(start)s AND o_orderdate < %(end)s
"""


def main(path: str) -> None:
    topology = dss.Topology.from_toml(path)
    ddf = dss.read_sharded_sql(
        SQL,
        topology,
        params={"start": "1995-01-01", "end": "1996-01-01"},
        # a product of numerics has no declared scale; this one needs four places
        types={"revenue": "decimal128(38, 4)"},
    )
    revenue = ddf.groupby(["region", "nation"]).revenue.sum().compute()
    print(revenue.sort_values(ascending=False).head(5))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
