"""A driver is loaded when it is first needed; Ctrl-C at that moment leaves nothing half made."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, threading
import dask_shardsql as dss

signal.signal(signal.SIGINT, signal.default_int_handler)
topology = dss.Topology.from_dsns([sys.argv[1]])
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        dss.collect("SELECT 1 AS one", topology)
except KeyboardInterrupt:
    print("stopped")
print(dss.collect("SELECT 2 AS two", topology)["two"].to_pylist())
"""


@pytest.mark.parametrize("seconds", ["0.02", "0.1", "0.2", "0.35"])
def test_ctrl_c_while_a_driver_is_loaded(seconds, servers):
    command = [sys.executable, "-c", SCRIPT, servers.dsns["s1"], seconds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split("\n")[:2] == ["stopped", "[2]"], done.stderr
