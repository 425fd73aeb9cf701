"""The two commands say what they need where Python is too old or cannot make an environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parent.parent / "ci"


def run(script, tmp_path, python):
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "DASK_SHARDSQL_PYTHON": str(python),
        "DASK_SHARDSQL_VENV": str(tmp_path / "venv"),
    }
    return subprocess.run(
        ["bash", CI / script], env=environment, cwd=tmp_path, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["demo", "test"])
def test_an_old_python_is_refused_with_what_is_needed(script, tmp_path):
    old = executable(tmp_path / "python", "#!/bin/sh\nexit 1\n")
    done = run(script, tmp_path, old)
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "DASK_SHARDSQL_PYTHON" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("script", ["demo", "test"])
def test_a_python_without_venv_is_refused_with_the_remedy(script, tmp_path):
    python = executable(
        tmp_path / "python",
        f'#!/bin/sh\n[ "$2" = venv ] && echo "No module named venv" >&2 && exit 1\n'
        f'exec "{sys.executable}" "$@"\n',
    )
    done = run(script, tmp_path, python)
    assert done.returncode == 2
    assert "No module named venv" in done.stderr
    assert "python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_continuous_integration_runs_the_test_command():
    script = (CI.parent / ".ci" / "run").read_text()
    assert "ci/test" in script
