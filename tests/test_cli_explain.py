"""``dask-shardsql explain``: on stdout what ``explain`` says, and nothing else."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

import dask_shardsql as dss

COMMAND = [sys.executable, "-m", "dask_shardsql.cli"]
COUNT = "SELECT count(*) AS n FROM ce_orders"


@pytest.fixture(scope="module")
def file(servers, tmp_path_factory):
    """Three shards with a sharded table."""
    servers.execute("CREATE TABLE ce_orders (id int PRIMARY KEY, name text)")
    names = list(servers.dsns)[:3]
    rows = [(n, f"n{n}") for n in range(60)]
    servers.load("ce_orders", rows, shard_of=lambda row: row[0] % 3)
    servers.execute("ANALYZE ce_orders")
    path = tmp_path_factory.mktemp("explain") / "shards.toml"
    shards = (f'[[shards]]\nname = "{name}"\ndsn = "{servers.dsns[name]}"' for name in names)
    path.write_text("\n".join(shards) + '\n[sharded]\nce_orders = "id"\n')
    path.chmod(0o600)
    return path


def run(command, sql, file, *more, **options):
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([*COMMAND, command, sql, "-t", str(file), *more], **options)


@pytest.mark.parametrize("merge", ["union", "global"])
def test_it_says_what_explain_says(merge, file):
    done = run("explain", COUNT, file, "--merge", merge)
    found = dss.explain(COUNT, dss.Topology.from_toml(file), merge=merge)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{found}\n"


def test_a_union_is_what_is_explained_by_default(file):
    done = run("explain", COUNT, file)
    assert "union (asked-for)" in done.stdout
    assert "it is not what one database would answer" in done.stdout


def test_as_json(file):
    sql = "SELECT count(*) AS n FROM ce_orders WHERE name <> %(name)s"
    options = ("--merge", "global", "--max-gather-bytes", "1 MiB", "-p", "name=Äpfel")
    done = run("explain", sql, file, *options, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = dss.explain(
        sql,
        dss.Topology.from_toml(file),
        {"name": "Äpfel"},
        merge="global",
        max_gather_bytes=1 << 20,
    )
    assert json.loads(done.stdout) == found.to_dict()
    assert found.strategy == "merge"
    assert "Äpfel" in json.loads(done.stdout)["gathered"][0]["select"]


def test_it_can_measure(file):
    done = run("explain", COUNT, file, "--merge", "global", "--analyze", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    actual = json.loads(done.stdout)["actual"]
    assert [one["rows"] for one in actual if one["part"] == "answer"] == [1]
    assert len(actual) == 4
    assert "\nanswer " in run("explain", COUNT, file, "--analyze").stdout


def test_progress_is_drawn_on_stderr_only(file):
    ours, theirs = pty.openpty()
    command = ("explain", COUNT, file, "--analyze", "--json")
    with os.fdopen(ours, "rb", 0):
        environment = {**os.environ, "TERM": "xterm"}
        options = {"stdout": subprocess.PIPE, "stderr": theirs, "capture_output": False}
        done = run(*command, env=environment, **options)
        os.close(theirs)
        drawn = os.read(ours, 65536)
    assert len(json.loads(done.stdout)["actual"]) == 3
    assert b"s1" in drawn


def test_what_is_refused_is_explained_too(file):
    done = run("explain", "SELECT 'ce_orders'::regclass", file, "--merge", "global")
    assert (done.returncode, done.stderr) == (0, "")
    assert "refuse (table-as-object)" in done.stdout


@pytest.mark.parametrize(
    ("sql", "options", "status", "said"),
    [
        ("SELECT nope FROM ce_orders", ["--merge", "global"], 2, "SQLSTATE 42703"),
        ("SELECT 1; SELECT 2", [], 2, "only one statement"),
        ("SELECT %(a)s", ["-p", "b=1"], 2, "--param b: the query has no %(b)s"),
        ("SELECT 1 AS a", ["--merge", "none"], 2, "'none'"),
        (
            COUNT,
            ["--max-gather-bytes", "1kB"],
            2,
            "error: --max-gather-bytes says how much",
        ),
        (
            COUNT,
            ["--merge", "global", "--max-gather-bytes", "1.5"],
            2,
            "error: --max-gather-bytes must be a size",
        ),
        (COUNT, ["--scheduler", "nowhere"], 2, "'nowhere' is no address"),
    ],
)
def test_what_is_wrong_is_an_error(sql, options, status, said, file):
    done = run("explain", sql, file, *options)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


def test_what_is_too_much_to_gather_is_not_run(file):
    options = ["--merge", "global", "--max-gather-bytes", "1", "--analyze"]
    done = run("explain", COUNT, file, *options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "which is refused" in done.stdout
    assert "answer " not in done.stdout


def test_a_query_names_options_as_they_are_typed(file):
    sql = "SELECT string_agg(name, ',' ORDER BY id) AS s FROM ce_orders"
    done = run("query", sql, file, "--merge", "global", "--max-gather-bytes", "10")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--max-gather-bytes is 10: " in done.stderr
    done = run("query", sql, file, "--merge", "global", "--shard-column", "shard")
    assert done.stderr.startswith("error: --shard-column says something of single shards, and --me")
    quoted = run("query", "SELECT 1 AS one WHERE merge='global'", file, "--merge", "global")
    assert "LINE 1: SELECT 1 AS one WHERE merge='global'" in quoted.stderr


def test_a_full_disk_and_a_closed_pipe(file):
    with open("/dev/full", "wb") as full:
        done = run("explain", COUNT, file, capture_output=False, stdout=full,
                   stderr=subprocess.PIPE)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
    ours, theirs = os.pipe()
    os.close(ours)
    done = run("explain", COUNT, file, capture_output=False, stdout=theirs,
               stderr=subprocess.PIPE)  # fmt: skip
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, "")
