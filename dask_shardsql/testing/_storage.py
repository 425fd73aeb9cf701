"""Directories of the servers: made with an owner's mark, filled from a template, swept up."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dask_shardsql.errors import ConfigurationError
from dask_shardsql.testing._process import Account, process_start, run_all
from dask_shardsql.testing.binaries import PostgreSQLBinaries

_PREFIX = "dask-shardsql"
_NAME = re.compile(rf"{_PREFIX}-(\d+)-\w+")
_MARKER = ".dask-shardsql.json"
SUPERUSER = "postgres"


@dataclass(frozen=True)
class Template:
    """An initialised data directory that is copied for every server."""

    path: Path
    password: str


def _base(account: Account | None) -> Path:
    """Return the temp directory, or another one when `account` cannot walk to it."""
    places = [Path(place).resolve() for place in (tempfile.gettempdir(), "/tmp", "/var/tmp")]  # noqa: S108
    if account is not None:
        for place in places:
            if all(part.stat().st_mode & 0o001 for part in (place, *place.parents)):
                return place
    return places[0]


def _pid_namespace() -> str:
    """Return what process ids are unique in: containers may share a temp directory."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def make_directory(account: Account | None, *, keep: bool) -> Path:
    """Make a directory for servers, named after this process and marked as ours."""
    path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{os.getpid()}-", dir=_base(account)))
    marker = {
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "namespace": _pid_namespace(),
        "keep": keep,
    }
    (path / _MARKER).write_text(json.dumps(marker))
    (path / _MARKER).chmod(0o600)
    if account is not None:
        path.chmod(0o711)  # the servers' account must be able to walk through it
    return path


def make_private(path: Path, account: Account | None) -> Path:
    """Make directory `path`, which only `account` can read."""
    path.mkdir(mode=0o700)
    if account is not None:
        os.chown(path, account.uid, account.gid)
    return path


def remove_directory(path: Path) -> None:
    """Remove `path` and all in it; the mark goes last, so that half a removal can be resumed."""
    with contextlib.suppress(FileNotFoundError):
        for entry in path.iterdir():
            if entry.name == _MARKER:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_stale(account: Account | None) -> list[Path]:
    """Remove the directories that killed processes of this user left in the temp directory."""
    removed = []
    for path in _base(account).glob(f"{_PREFIX}-*"):
        if _NAME.fullmatch(path.name) and _is_stale(path):
            remove_directory(path)
            removed.append(path)
    return removed


def _is_stale(path: Path) -> bool:
    try:
        status = path.lstat()
        mark_status = (path / _MARKER).lstat()
        marker = json.loads((path / _MARKER).read_text())
        owner, started = int(marker["pid"]), marker["started"]
        here = marker["namespace"] == _pid_namespace()
    except (OSError, ValueError, KeyError, TypeError):
        return False  # not ours, or being removed at this moment
    if status.st_uid != os.geteuid() or mark_status.st_uid != os.geteuid():
        return False
    if not here or process_start(owner) == started:
        return False
    return not any(postmaster_runs(data) for data in path.iterdir() if data.is_dir())


def postmaster_runs(data: Path) -> bool:
    """Tell whether a server still runs on data directory `data`."""
    try:
        pid = int((data / "postmaster.pid").read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return False
    if process_start(pid) is None:
        return False
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in {"postgres", "postmaster"}
    except OSError:
        return True  # no /proc here: better to leave a directory than to pull it from a server


class ProcessCache:
    """What one process makes once: a template for each (binaries, locale), readable binaries."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._directory: Path | None = None
        self._templates: dict[tuple[Path, str], Template] = {}
        self._readable: dict[Path, Path] = {}

    def _forget_after_fork(self) -> None:
        if self._pid != os.getpid():  # the parent removes them when it ends
            self._pid, self._directory = os.getpid(), None
            self._templates, self._readable = {}, {}

    def _own_directory(self, account: Account | None) -> Path:
        if self._directory is None or not self._directory.exists():
            self._directory = make_directory(account, keep=False)
            self._templates, self._readable = {}, {}
        return self._directory

    def template(
        self, binaries: PostgreSQLBinaries, bin_path: Path, locale: str, account: Account | None
    ) -> Template:
        """Return the template for `binaries` and `locale`, made by ``initdb`` when it is new."""
        with self._lock:
            self._forget_after_fork()
            directory = self._own_directory(account)
            key = (bin_path, locale)
            if key not in self._templates:
                path = make_private(directory / f"template{len(self._templates)}", account)
                try:
                    self._templates[key] = _initdb(binaries, bin_path, path, locale, account)
                except BaseException:
                    shutil.rmtree(path, ignore_errors=True)
                    raise
            return self._templates[key]

    def readable(self, bin_path: Path, account: Account | None) -> Path:
        """Return a directory of the programs that `account` can run: their own, or a copy."""
        if account is None or _can_run(bin_path, account):
            return bin_path
        with self._lock:
            self._forget_after_fork()
            directory = self._own_directory(account)
            if bin_path not in self._readable:
                target = directory / f"postgresql{len(self._readable)}"
                self._readable[bin_path] = copy_installation(bin_path, target)
            return self._readable[bin_path]

    def remove(self) -> None:
        """Remove everything this process made."""
        if self._pid == os.getpid() and self._directory is not None:
            remove_directory(self._directory)
            self._directory = None


CACHE = ProcessCache()


def _can_run(bin_path: Path, account: Account) -> bool:
    try:
        commands = [(bin_path / program, "--version") for program in ("initdb", "postgres")]
        return all(code == 0 for code, _ in run_all(commands, account=account))
    except OSError:
        return False


def copy_installation(bin_path: Path, target: Path) -> Path:
    """Copy the tree `bin_path` belongs to under `target`, readable by all; return its bin."""
    tree = bin_path.parent
    copied = target / tree.parent.name / tree.name
    for part in ("bin", "lib", "lib64", "share"):
        if (tree / part).is_dir():
            shutil.copytree(tree / part, copied / part, symlinks=True)
    # A wheel's programs find the libraries that came with it next to the package ($ORIGIN).
    libraries = tree.parent.parent / f"{tree.parent.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    for folder, _, files in os.walk(target):
        Path(folder).chmod(0o755)
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
    return copied / bin_path.name


def _initdb(
    binaries: PostgreSQLBinaries,
    bin_path: Path,
    path: Path,
    locale: str,
    account: Account | None,
) -> Template:
    password = secrets.token_urlsafe(24)
    password_file = path.with_suffix(".password")
    descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as handle:
        handle.write(password)
        if account is not None:
            os.fchown(descriptor, account.uid, account.gid)
    command: list[str | Path] = [
        bin_path / "initdb",
        f"--pgdata={path}",
        f"--username={SUPERUSER}",
        f"--pwfile={password_file}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        f"--locale={locale}",
        "--lc-messages=C",
        "--no-sync",
        "--no-instructions",
        "--wal-segsize=1",
    ]
    try:
        [(code, output)] = run_all([command], account=account, cwd=path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot run '{bin_path / 'initdb'}' as {_who(account)}: {error}"
        ) from error
    finally:
        password_file.unlink()
    if code != 0:
        raise ConfigurationError(
            f"cannot initialise a data directory in '{path}' as {_who(account)} with PostgreSQL "
            f"{binaries.version} ({binaries.source}): exit code {code} of "
            f"{shlex.join(map(str, command))}\n{output}"
        )
    return Template(path, password)


def _who(account: Account | None) -> str:
    uid = os.geteuid() if account is None else account.uid
    return f"uid {uid}"


def copy_template(template: Template, targets: Iterable[Path], account: Account | None) -> None:
    """Fill the new private directories `targets` with copies of `template`."""
    paths = [make_private(target, account) for target in targets]
    commands = [("cp", "-Rp", f"{template.path}/.", path) for path in paths]
    for path, (code, output) in zip(paths, run_all(commands, account=account), strict=True):
        if code != 0:
            raise ConfigurationError(
                f"cannot fill data directory '{path}': exit code {code} of cp: {output}"
            )


_STOP_SCRIPT = """\
#!/bin/sh
# Stops the PostgreSQL servers whose data is in this script's directory, and removes it all.
cd "$(dirname "$0")" || exit 1
for file in */postmaster.pid; do
    [ -f "$file" ] || continue
    kill -INT "$(head -n 1 "$file")"
done
for attempt in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    set -- */postmaster.pid
    [ -e "$1" ] || break
    sleep 0.5
done
if [ -e "$1" ]; then
    echo "servers still run in $PWD: $*" >&2
    exit 1
fi
directory=$PWD
cd / && rm -rf "$directory"
"""


def write_stop_script(directory: Path) -> None:
    """Write ``stop.sh``, which stops the servers in `directory` and removes it."""
    (directory / "stop.sh").write_text(_STOP_SCRIPT)
    (directory / "stop.sh").chmod(0o700)
