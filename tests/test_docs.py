"""Documentation that cannot drift: README's blocks and the examples run against real shards."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from datetime import date
from io import StringIO
from pathlib import Path

import pytest
from distributed import LocalCluster

import dask_shardsql as dss

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def python_blocks():
    """Each Python block with the text block behind it, which is what it prints."""
    for number, (language, code) in enumerate(BLOCKS):
        if language == "python":
            following, text = BLOCKS[number + 1]
            yield code, text if following == "text" else ""


def test_readme_python_blocks_print_what_they_say(tpch, monkeypatch):
    monkeypatch.chdir(tpch.toml_directory)
    names = {"__name__": "__main__"}
    blocks = list(python_blocks())
    assert len(blocks) >= 5
    for code, expected in blocks:
        printed = StringIO()
        with redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own README
        assert printed.getvalue() == expected


def test_readme_toml_is_a_topology(tmp_path):
    (text,) = (code for language, code in BLOCKS if language == "toml")
    topology = dss.Topology.from_mapping(tomllib.loads(text))
    assert [shard.name for shard in topology.shards] == ["north", "south", "east"]


def test_readme_sharding_functions_are_part_of_such_a_topology():
    (text,) = (code for language, code in BLOCKS if language == "toml")
    (functions,) = (code for _, code in BLOCKS if code.startswith("[sharded.orders]"))
    together = tomllib.loads(text.partition("[sharded]")[0] + functions)
    orders, lineitem = dss.Topology.from_mapping(together).sharded
    assert orders.function == dss.ShardByModulo(["north", "south", "east"])
    assert lineitem.function.shard_of(date(1997, 1, 1)) == "east"


def run_example(name, *arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / name, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def reference(tpch, sql):
    with tpch.session("reference") as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


def test_example_union_read(tpch):
    printed = run_example("union_read.py", tpch.toml_directory / "shards.toml")
    rows = reference(
        tpch,
        "SELECT o_orderpriority, sum(o_totalprice) FROM orders WHERE o_totalprice > 200000 "
        "GROUP BY 1",
    )
    assert len(rows) == 5
    for priority, total in rows:
        assert re.search(rf"^{priority} +{total}$", printed, re.MULTILINE)
    ((count,),) = reference(tpch, "SELECT count(*) FROM orders WHERE o_custkey = 370")
    assert f"customer 370 has {count} orders" in printed


def test_example_join_reference_tables(tpch):
    printed = run_example("join_reference_tables.py", tpch.toml_directory / "shards.toml")
    rows = reference(
        tpch,
        "SELECT n_name, sum(l_extendedprice * (1 - l_discount)) FROM lineitem "
        "JOIN orders ON l_orderkey = o_orderkey JOIN customer ON o_custkey = c_custkey "
        "JOIN nation ON c_nationkey = n_nationkey "
        "WHERE o_orderdate >= '1995-01-01' AND o_orderdate < '1996-01-01' "
        "GROUP BY 1 ORDER BY 2 DESC LIMIT 5",
    )
    for nation, revenue in rows:
        assert re.search(rf"{nation} .*{revenue}$", printed, re.MULTILINE)


def test_example_remote_scheduler(tpch):
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        printed = run_example(
            "remote_scheduler.py", tpch.toml_directory / "shards.toml", cluster.scheduler_address
        )
    rows = reference(
        tpch, "SELECT l_returnflag, round(avg(l_quantity), 16) FROM lineitem GROUP BY 1"
    )
    for flag, mean in rows:
        assert re.search(rf"^{flag} +{mean}$", printed, re.MULTILINE)
    counts = [int(n) for n in re.search(r"shard: \[(.*)\]", printed)[1].split(",")]
    assert [sum(counts)] == [n for (n,) in reference(tpch, "SELECT count(*) FROM lineitem")]


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    for example in (ROOT / "examples").glob("*.py"):
        assert f'"{example.name}"' in tested


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)", README))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()
