"""Passwords by reference: found where the connection is made, never shown."""

from __future__ import annotations

import sys

import psycopg2.extensions as pgx
import pytest

import dask_shardsql as dss

WRONG = "wrong-4711"


@pytest.fixture
def login(servers):
    """Connection keywords of s1 without the password, and the password."""
    keywords = pgx.parse_dsn(servers.dsns["s1"])
    return keywords, keywords.pop("password")


def ask(keywords):
    topology = dss.Topology.from_mapping({"shards": {"one": keywords}})
    return dss.collect("SELECT 1 AS x", topology)["x"].to_pylist()


def test_from_the_environment(login, monkeypatch):
    keywords, password = login
    monkeypatch.setenv("SHARD_LOGIN", password)
    assert ask({**keywords, "password_env": "SHARD_LOGIN"}) == [1]


def test_from_a_file(login, tmp_path):
    keywords, password = login
    (tmp_path / "secret").write_text(password + "\n")
    assert ask({**keywords, "password_file": str(tmp_path / "secret")}) == [1]


@pytest.mark.parametrize("as_list", [True, False])
def test_from_a_command(login, tmp_path, as_list):
    keywords, password = login
    (tmp_path / "secret").write_text(password)
    words = ["cat", str(tmp_path / "secret")]
    assert ask({**keywords, "password_command": words if as_list else " ".join(words)}) == [1]


def test_from_a_callable(login, tmp_path, monkeypatch):
    keywords, password = login
    (tmp_path / "my_secrets.py").write_text(
        f"class Vault:\n    def get(shard): return {{'one': {password!r}}}[shard]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ask({**keywords, "password_callable": "my_secrets:Vault.get"}) == [1]


def test_from_a_password_file_of_libpq(login, tmp_path):
    keywords, password = login
    file = tmp_path / "pgpass"
    file.write_text(f"*:*:*:*:{password}\n")
    file.chmod(0o600)
    assert ask({**keywords, "passfile": str(file)}) == [1]


def test_from_a_service_file_of_libpq(login, tmp_path, monkeypatch):
    keywords, password = login
    lines = [f"{key}={value}" for key, value in {**keywords, "password": password}.items()]
    (tmp_path / "services").write_text("\n".join(["[shard_one]", *lines]) + "\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    topology = dss.Topology.from_dsns(["service=shard_one"])
    assert not topology.has_literal_secrets
    assert dss.collect("SELECT 1 AS x", topology)["x"].to_pylist() == [1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"password_env": "NO_SUCH_LOGIN"}, "NO_SUCH_LOGIN, which is not set"),
        ({"password_file": "/no/such/file"}, "/no/such/file: No such file"),
        ({"password_command": ["no-such-command-4711"]}, "no-such-command-4711.*No such file"),
        ({"password_command": [sys.executable, "-c", f"print('{WRONG}'); exit(3)"]}, "status 3"),
        ({"password_command": ["true"]}, "gave no password"),
        ({"password_callable": "no_such_module:get"}, "raised ModuleNotFoundError"),
        ({"password_callable": "os:getpid"}, "raised TypeError"),
        ({"password_callable": "builtins:len"}, "returned int"),
    ],
)
def test_references_that_lead_nowhere_are_named(login, reference, message):
    keywords, _ = login
    with pytest.raises(dss.CredentialError, match=message) as caught:
        ask({**keywords, **reference})
    assert "'one'" in str(caught.value)
    assert WRONG not in repr(caught.value) + str(caught.value.__context__)


def test_a_wrong_password_is_refused_by_the_server_and_not_shown(login, monkeypatch):
    keywords, _ = login
    monkeypatch.setenv("WRONG_LOGIN", WRONG)
    for given in ({"password": WRONG}, {"password_env": "WRONG_LOGIN"}):
        with pytest.raises(dss.ConnectionFailedError, match="'one'.*authentication") as caught:
            ask({**keywords, **given})
        error = caught.value
        while error is not None:
            assert WRONG not in f"{error} {error!r} {error.args}"
            error = error.__cause__ or error.__context__
