"""Read the union of all shards as a lazy dask DataFrame, and compute on it.

python examples/union_read.py shards.toml
"""

import sys

import dask_shardsql as dss


def main(path: str) -> None:
    topology = dss.Topology.from_toml(path)

    # lazy: only the description of the columns has run
    ddf = dss.read_sharded_sql(
        "SELECT o_orderkey, o_orderpriority, o_totalprice FROM orders WHERE o_totalprice > %s",
        topology,
        params=[200_000],
        shard_column="shard",
    )
    print(ddf.dtypes)
    print("orders on each shard:")
    print(ddf.groupby("shard").o_orderkey.count().compute())
    print("value by priority:")
    print(ddf.groupby("o_orderpriority").o_totalprice.sum().compute())

    # eager: everything at once, as an Arrow table
    table = dss.collect("SELECT * FROM orders WHERE o_custkey = %s", topology, [370])
    print(f"customer 370 has {table.num_rows} orders, on all shards together")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
