"""Run the same calls on a remote Dask scheduler; only the current client is another.

dask scheduler &
dask worker tcp://127.0.0.1:8786 &
python examples/remote_scheduler.py shards.toml tcp://127.0.0.1:8786
"""

import sys

from distributed import Client

import dask_shardsql as dss


def main(path: str, scheduler: str) -> None:
    topology = dss.Topology.from_toml(path)
    with Client(scheduler) as client:
        workers = client.scheduler_info()["workers"]
        print(f"{len(workers)} workers at {client.scheduler.address}")
        ddf = dss.read_sharded_sql("SELECT * FROM lineitem", topology)
        print(ddf.groupby("l_returnflag").l_quantity.mean().compute())
        table = dss.collect("SELECT count(*) AS lines FROM lineitem", topology)
        print("lines on each shard:", table["lines"].to_pylist())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
