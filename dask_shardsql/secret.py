"""Passwords: a value that masks itself, and references that say where a worker finds one."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["PASSWORD_REFERENCES", "PasswordReference", "Secret", "is_secret_keyword"]

#: Keys of a topology that say where the password is, with what their value means.
PASSWORD_REFERENCES = {
    "password_env": "the name of an environment variable",
    "password_file": "the path of a file that holds the password alone",
    "password_command": "a command (text or list of words) that prints the password",
    "password_callable": "a function 'module:function', called with the shard's name",
}

_SALT = os.urandom(16)
_SECRET_KEYWORD = re.compile(
    r"pass(?!file)|pwd|secret|token|credential|api_?key|private_?key|scram_.*_key|conn\w*str",
    re.IGNORECASE,
)
_NOT_SECRET = {"passfile", *PASSWORD_REFERENCES}


def is_secret_keyword(keyword: str) -> bool:
    """Whether the value of a connection keyword must never be shown."""
    return keyword not in _NOT_SECRET and _SECRET_KEYWORD.search(keyword) is not None


class Secret:
    """A literal secret: shown as ``***``, and refused by pickle and so by every task.

    Parameters
    ----------
    value : str
        The secret itself, which only :meth:`reveal` gives back.
    """

    __slots__ = ("_digest", "_value")

    def __init__(self, value: str) -> None:
        self._value = str(value)
        self._digest = hmac.new(_SALT, self._value.encode(), hashlib.sha256).hexdigest()[:16]

    def reveal(self) -> str:
        """Return the secret itself."""
        return self._value

    def digest(self) -> str:
        """Return what tells two secrets apart in this process, and nothing outside it."""
        return self._digest

    def __repr__(self) -> str:
        return "'***'"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._digest)

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Secret:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a literal password is never pickled, so that no task can carry it. Pass the "
            "topology to dask_shardsql's own functions, which bring it to the workers "
            "another way, or give the password by reference "
            f"({', '.join(PASSWORD_REFERENCES)}, service, passfile)"
        )

    def __dask_tokenize__(self) -> Any:
        return ("dask_shardsql.Secret", self.digest())


@dataclass(frozen=True)
class PasswordReference:
    """Where the process that connects finds the password.

    Parameters
    ----------
    kind : str
        A key of :data:`PASSWORD_REFERENCES`.
    target : str or tuple of str
        The variable, path, command or ``module:function`` it names.
    """

    kind: str
    target: str | tuple[str, ...]
