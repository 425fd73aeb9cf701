"""How server processes are started: as whom, with which environment, and tied to whose life."""

from __future__ import annotations

import contextlib
import os
import pwd
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# A wrapper and not preexec_fn: running Python between fork and exec can deadlock in a process
# with threads, and a Dask process has many. The death signal is set after the user switch, which
# clears it (prctl(2)); the parent's pid is compared after that, in case it died in between.
_TIED_TO_PARENT = """
import ctypes, os, signal, sys
parent, uid, gid = map(int, sys.argv[1:4])
os.umask(0o077)
if uid >= 0:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if ctypes.CDLL(None).prctl(1, signal.SIGQUIT, 0, 0, 0) != 0:
    sys.exit("prctl(PR_SET_PDEATHSIG) failed")
if os.getppid() != parent:
    sys.exit("the parent died while the server started")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
os.execv(sys.argv[4], sys.argv[4:])
"""


@dataclass(frozen=True)
class Account:
    """The unprivileged account that servers run as when this process is root."""

    uid: int
    gid: int


def unprivileged_account() -> Account | None:
    """Return the account to run PostgreSQL as, or None to run it as this process's own user.

    PostgreSQL refuses to run as root.
    """
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    return Account(65534, 65534)


def clean_environment(home: Path) -> dict[str, str]:
    """Return the environment of a server: no PG* variable and no secret of this process."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {"PATH": os.defpath, **kept, "HOME": str(home), "LANG": "C", "LC_ALL": "C"}


def switch_user(account: Account | None) -> dict[str, Any]:
    """Return the `subprocess` arguments that run a child as `account`."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


def run_all(
    commands: Iterable[Sequence[str | Path]], *, account: Account | None, cwd: Path = Path("/")
) -> list[tuple[int, str]]:
    """Run `commands` side by side as `account`; return each one's exit code and output.

    Each is in a session of its own: a terminal's Ctrl-C must not make it fail before this process
    has had the same signal and can tell that from an error.
    """
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(
                    [str(part) for part in command],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    env=clean_environment(cwd),
                    cwd=cwd,
                    umask=0o077,
                    start_new_session=True,
                    **switch_user(account),
                )
            )
            for command in commands
        ]
        outputs = [child.communicate()[0].strip() for child in children]
        return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def spawn_server(
    command: Sequence[str | Path],
    *,
    account: Account | None,
    cwd: Path,
    log: IO[bytes],
    outlive: bool,
    register: Callable[[subprocess.Popen[bytes]], None],
) -> None:
    """Start a long-running server in a session of its own and hand its process to `register`.

    The session keeps a terminal's Ctrl-C from the server until the Python side is done with it.
    Unless `outlive`, the kernel shuts the server down when this process ends, however it ends
    (Linux only; elsewhere the caller's exit handler is all there is).
    """
    arguments = [str(part) for part in command]
    options: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": log,
        "stderr": subprocess.STDOUT,
        "env": clean_environment(cwd),
        "cwd": cwd,
        "start_new_session": True,
    }
    if sys.platform == "linux" and sys.executable and not outlive:
        uid, gid = (account.uid, account.gid) if account else (-1, -1)
        # The wrapper starts as this process's user, who can read the interpreter for certain.
        wrapper = [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, os.getpid(), uid, gid]
        arguments = [str(part) for part in wrapper] + arguments
    else:
        options |= {"umask": 0o077, **switch_user(account)}

    # Registered in the spawning thread, so that a Ctrl-C in the caller cannot lose the process.
    _spawner().call(lambda: register(subprocess.Popen(arguments, **options)))


class _Spawner:
    """One thread that starts every server and lives as long as the process.

    The death signal fires when the *thread* that forked ends, so a caller's thread will not do.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]]
        self._calls = queue.SimpleQueue()
        threading.Thread(target=self._work, name="dask-shardsql-spawner", daemon=True).start()

    def _work(self) -> None:
        while True:
            call, done = self._calls.get()
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                done.set_exception(error)
            else:
                done.set_result(None)

    def call(self, call: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._calls.put((call, done))
        done.result()


_spawner_lock = threading.Lock()
_the_spawner: _Spawner | None = None


def _spawner() -> _Spawner:
    global _the_spawner
    with _spawner_lock:
        if _the_spawner is None or _the_spawner.pid != os.getpid():  # threads do not survive fork
            _the_spawner = _Spawner()
        return _the_spawner


def settle_spawner() -> None:
    """Return when every process asked for so far has been registered."""
    if _the_spawner is not None and _the_spawner.pid == os.getpid():
        _the_spawner.call(lambda: None)


def process_start(pid: int) -> str | None:
    """Return what tells process `pid` from a later one with the same number; None if it is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "running"  # no /proc here: the number is all there is
    return None if fields[0] in "ZX" else fields[19]
