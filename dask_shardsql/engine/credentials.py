"""Passwords by reference, resolved in the process that connects, when it connects.

No error shows what a variable, a file or a command held, nor carries an exception that might.
"""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from pathlib import Path

from dask_shardsql.errors import CredentialError
from dask_shardsql.secret import PasswordReference
from dask_shardsql.topology import Server

__all__ = ["resolve_password"]

_COMMAND_SECONDS = 30.0


def resolve_password(server: Server, shard: str) -> str | None:
    """Return the password for `server`, or None where libpq's own means are to find it.

    Parameters
    ----------
    server : Server
        Its literal password, or its reference, is followed.
    shard : str
        The shard's name, which a ``password_callable`` gets.

    Raises
    ------
    CredentialError
        The reference leads to nothing; the message names it and the shard.
    """
    literal = dict(server.secrets).get("password")
    if literal is not None:
        return literal.reveal()
    if server.password is None:
        return None
    problem, password = _follow(server.password, shard)
    if password is None:
        raise CredentialError(
            f"cannot find the password of shard {shard!r} in this process: "
            f"{server.password.kind} {problem}",
            shard=shard,
            server=server.address,
        )
    return password


def _follow(reference: PasswordReference, shard: str) -> tuple[str, str | None]:
    """Return a description of what went wrong, or the password."""
    kind, target = reference.kind, reference.target
    if kind == "password_env":
        return f"names {target}, which is not set", os.environ.get(str(target))
    if kind == "password_file":
        return _from_file(Path(str(target)).expanduser())
    if kind == "password_command":
        try:
            words = shlex.split(target) if isinstance(target, str) else list(target)
        except ValueError as error:
            return f"is no command: {error}", None
        return _from_command(words)
    return _from_callable(str(target), shard)


def _from_file(path: Path) -> tuple[str, str | None]:
    try:
        password = path.read_text(encoding="utf-8").rstrip("\r\n")
        return f"names {path}, which is empty", password or None
    except UnicodeDecodeError:
        return f"names {path}, which is not UTF-8 text", None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"names {path}: {getattr(error, 'strerror', None) or 'not a path'}", None


def _from_command(words: list[str]) -> tuple[str, str | None]:
    shown = repr(words[0]) if words else "an empty command"
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
        text = done.stdout.decode("utf-8").rstrip("\r\n")
    except subprocess.TimeoutExpired:
        return f"runs {shown}, which took more than {_COMMAND_SECONDS:.0f} s", None
    except (OSError, IndexError, ValueError) as error:
        return (
            f"runs {shown}: {getattr(error, 'strerror', None) or 'there is no such command'}",
            None,
        )
    except UnicodeDecodeError:
        return f"runs {shown}, which printed something else than UTF-8 text", None
    if done.returncode or not text:
        return f"runs {shown}, which ended with status {done.returncode} and gave no password", None
    return "", text


def _from_callable(target: str, shard: str) -> tuple[str, str | None]:
    module, _, attributes = target.partition(":")
    try:
        function = importlib.import_module(module)
        for attribute in attributes.split("."):
            function = getattr(function, attribute)
        password = function(shard)  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 - the user's own code; its text may hold the secret
        return f"calls {target}, which raised {type(error).__name__}", None
    if not isinstance(password, str):
        return f"calls {target}, which returned {type(password).__name__}, not a text", None
    return "", password
