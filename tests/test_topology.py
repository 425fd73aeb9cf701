"""Topologies: every form they are written in, and every mistake in them."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import sqlite3
import subprocess
import sys

import dask
import pytest
from dask.tokenize import tokenize

import dask_shardsql as dss
from dask_shardsql import Topology, TopologyError
from dask_shardsql.config import default_topology
from dask_shardsql.secret import Secret

SECRET = "hush-4711"

TOML = """
[defaults]
user = "app"
dbname = "shop"
password_env = "SHOP_PASSWORD"

[[shards]]
name = "north"
host = "db1"
port = 5433

[[shards]]
name = "south"
dsn = "postgresql://reader@db2/other"

[[shards]]
name = "east"
service = "shard3"
password_command = ["pass", "show", "east"]

[sharded]
orders = "o_orderkey"
"sales.lineitem" = { key = "l_orderkey" }
"""


@pytest.fixture
def write(tmp_path):
    def write(text, mode=0o600):
        file = tmp_path / "shards.toml"
        file.write_text(text)
        file.chmod(mode)
        return file

    return write


def texts_of(error: BaseException) -> str:
    """Everything a log could show of an error: it, and whatever it is chained to."""
    shown = []
    while error is not None:
        shown += [str(error), repr(error), repr(error.args)]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


def test_toml_gives_shards_in_order_with_defaults_under_their_own_keys(write):
    topology = Topology.from_toml(write(TOML, 0o644))
    north, south, east = topology.shards
    assert [shard.name for shard in topology.shards] == ["north", "south", "east"]
    assert dict(north.primary.keywords) == {
        "host": "db1", "port": "5433", "user": "app", "dbname": "shop",
    }  # fmt: skip
    assert dict(south.primary.keywords) == {"host": "db2", "user": "reader", "dbname": "other"}
    assert north.primary.password.kind == "password_env"
    assert east.primary.password.target == ("pass", "show", "east")
    assert {table.name: table.key for table in topology.sharded} == {
        "orders": "o_orderkey",
        "sales.lineitem": "l_orderkey",
    }


def test_dsns_may_be_keywords_urls_services_and_files():
    topology = Topology.from_dsns(
        [
            "service=shard1",
            "host=db2 dbname=shop",
            "postgresql://db3:6000/shop?sslmode=require",
            "postgres:///shop?host=/run/postgresql",
        ],
        sharded={"orders": "o_orderkey", "lineitem": "l_orderkey"},
    )
    assert [shard.name for shard in topology.shards] == ["s1", "s2", "s3", "s4"]
    keywords = [dict(shard.primary.keywords) for shard in topology.shards]
    assert keywords[0] == {"service": "shard1"}
    assert keywords[2] == {"host": "db3", "port": "6000", "dbname": "shop", "sslmode": "require"}
    assert keywords[3] == {"host": "/run/postgresql", "dbname": "shop"}
    assert topology.shards[0].primary.address == "service shard1"
    files = Topology.from_dsns({"a": "sqlite:///rel.db", "b": "duckdb:////abs/x.duckdb"})
    assert [dict(s.primary.keywords) for s in files.shards] == [
        {"database": "rel.db"},
        {"database": "/abs/x.duckdb"},
    ]


def test_numbers_and_texts_make_equal_topologies():
    mapped = Topology.from_mapping({"shards": {"a": {"host": "h", "port": 5432}}})
    assert mapped == Topology.from_dsns({"a": "host=h port=5432"})
    assert mapped.fingerprint == Topology.from_dsns({"a": "host=h port=5432"}).fingerprint


def test_objects_are_frozen():
    topology = Topology.from_dsns(["host=a"])
    for thing in (topology, topology.shards[0], topology.shards[0].primary):
        with pytest.raises(dataclasses.FrozenInstanceError):
            thing.name = "other"


def test_from_dsns_names_shards_and_refuses_a_bare_text():
    assert Topology.from_dsns(["host=a"], names=["x"]).shard("x").name == "x"
    with pytest.raises(TopologyError, match="in a list"):
        Topology.from_dsns("host=a")
    with pytest.raises(TopologyError, match="2 names for 1"):
        Topology.from_dsns(["host=a"], names=["x", "y"])
    with pytest.raises(TopologyError, match="no shard is named 'z'.*'s1'"):
        Topology.from_dsns(["host=a"]).shard("z")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one shard"),
        ("[[shards]]\nhost = 'a'", "shard 1 of .* has no name"),
        ("[[shards]]\nname = ''\nhost = 'a'", "not empty"),
        ("[[shards]]\nname = 'a'\n[[shards]]\nname = 'a'", "two shards are named 'a'"),
        ("[[shards]]\nname = 'a'\nhots = 'x'", "'a'.*unknown key 'hots'; did you mean 'host'"),
        ("[[shard]]\nname = 'a'", "unknown key 'shard'.*did you mean 'shards'"),
        ("[[shards]]\nname = 'a'\n[sharded]\nt = 3", "'t'.*must be a table"),
        ("[[shards]]\nname = 'a'\n[sharded]\nt = {}", "'t'.*names no shard key"),
        ("[[shards]]\nname = 'a'\n[sharded]\nt = {key='k', kei='j'}", "unknown key 'kei'"),
        ("[[shards]]\nname = 'a'\nport = 'x'", "'a'.*port"),
        ("[[shards]]\nname = 'a'\ndsn = ''", "'a'.*not empty"),
        ("[[shards]]\nname = 'a'\npassword_callable = 'nocolon'", "module:function"),
        ("[[shards]]\nname = 'a'\npassword_env = 3", "environment variable"),
        ("[[shards]]\nname = 'a'\nhost = ['b']", "'host' must be a text"),
        ("defaults = 3\n[[shards]]\nname = 'a'", "must be a table"),
        ("[[shards]", "not valid TOML .at line 1"),
    ],
)
def test_mistakes_are_named(write, text, message):
    with pytest.raises(TopologyError, match=message):
        Topology.from_toml(write(text))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TopologyError, match=r"No such file.*none\.toml"):
        Topology.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_file_with_a_literal_password_must_be_private(write, mode):
    text = f'[[shards]]\nname = "a"\nhost = "h"\npassword = "{SECRET}"'
    with pytest.raises(TopologyError, match="chmod 600") as caught:
        Topology.from_toml(write(text, mode))
    assert SECRET not in texts_of(caught.value)
    assert Topology.from_toml(write(text, 0o600)).has_literal_secrets


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://u:{SECRET}@h:port/x",
        f"postgresql://u:{SECRET}@h:99999/x",
        f"postgresql://u:x@{SECRET}@h/db",
        f"postgresql://u:{SECRET}@[h/x",
        f"postgresql://u:{SECRET}%zz@h/x",
        f"host=h password={SECRET} passwort=x",
        f"host=h password='{SECRET}",
        f"host=h {SECRET}",
        f"mysql://u:{SECRET}@h:port/x",
        f"mysql://u:{SECRET}@[h/x",
        f"sqlite://{SECRET}",
        f"postgresql://u:12/{SECRET}@h/d",
        f"host=h dbname=postgresql://u:{SECRET}@h/d",
        f"host=h user=u:{SECRET}@x",
        f"host=h:{SECRET}",
        f"sqlite:///a#{SECRET}.db",
        f"{SECRET}",
        f"postgresql://u:{SECRET}\0@h/x",
    ],
)
def test_malformed_connection_strings_are_refused_without_echo(dsn):
    with pytest.raises(TopologyError, match="'bad'") as caught:
        Topology.from_dsns({"good": "host=a", "bad": dsn})
    assert SECRET not in texts_of(caught.value)


def test_toml_errors_do_not_echo_the_file(write):
    with pytest.raises(TopologyError) as caught:
        Topology.from_toml(write(f'[[shards]]\npassword = "{SECRET}'))
    assert SECRET not in texts_of(caught.value)


LITERAL = [
    {"a": f"host=h password={SECRET}"},
    {"a": f"postgresql://u:{SECRET}@h/x"},
    {"a": f"host=h sslpassword={SECRET}"},
    {"a": f"mysql://u:{SECRET}@h/x"},
    {"a": f"mysql://h/x?auth_token={SECRET}"},
    {"a": f"mysql://h/x?api_key={SECRET}&private_key_passphrase=y"},
    {"a": f"mysql://h/x?user_pwd={SECRET}"},
]


@pytest.mark.parametrize("dsns", LITERAL)
def test_literal_secrets_are_masked_hashed_apart_and_never_pickled(dsns):
    topology = Topology.from_dsns(dsns)
    server = topology.shards[0].primary
    for shown in (
        *(repr(topology), str(topology), repr(topology.shards), repr(server), server.address),
        *(repr(dataclasses.asdict(server)), topology.fingerprint, tokenize(topology)),
    ):
        assert SECRET not in shown
    for thing in (topology, server, server.secrets[0][1]):
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(thing)
        with pytest.raises(TypeError, match="never pickled"):
            pickle.dumps(dask.delayed(id)(thing))
    other = Topology.from_dsns({k: v.replace(SECRET, "other") for k, v in dsns.items()})
    assert other != topology
    assert other.fingerprint != topology.fingerprint
    assert copy.deepcopy(topology) == topology


def test_topologies_without_literal_secrets_pickle_and_keep_their_fingerprint(write):
    topology = Topology.from_toml(write(TOML))
    again = pickle.loads(pickle.dumps(topology))  # noqa: S301 - our own bytes
    assert again == topology
    assert again.fingerprint == topology.fingerprint


def test_secret_formats_as_stars():
    secret = Secret(SECRET)
    assert SECRET not in f"{secret} {secret!r} {secret!s} {secret:>20}"
    assert secret.reveal() == SECRET


def test_what_a_shard_says_of_its_password_replaces_the_default(write):
    topology = Topology.from_toml(write(TOML))
    assert topology.shard("north").primary.password.target == "SHOP_PASSWORD"
    assert topology.shard("east").primary.password.kind == "password_command"
    with pytest.raises(TopologyError, match="only one of password, password_env"):
        Topology.from_mapping({"shards": {"a": {"password": "x", "password_env": "Y"}}})


def test_dask_configuration_names_the_default_topology(write):
    with dask.config.set({"shardsql.topology": str(write(TOML))}):
        assert default_topology(None).shard("north")
    with dask.config.set({"shardsql.topology": {"shards": {"a": {"host": "h"}}}}):
        assert default_topology(None).shard("a")
    with pytest.raises(dss.ConfigurationError, match="no topology was given"):
        dss.collect("SELECT 1")
    with pytest.raises(dss.ConfigurationError, match="must be a dask_shardsql.Topology"):
        dss.collect("SELECT 1", "shards.toml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype-backend", "arrow", "pyarrow"),
        ("unrepresentable", "ignore", "'raise' or 'null'"),
        ("max-connections-per-worker", 0, "from 1"),
        ("connect-timeout", "soon", "a time"),
        ("no-such-key", 1, "unknown keys"),
        ("check-schema", "yes", "true or false"),
    ],
)
def test_wrong_settings_are_named(key, value, message):
    with (
        dask.config.set({f"shardsql.{key}": value}),
        pytest.raises(dss.ConfigurationError, match=message),
    ):
        dss.collect("SELECT 1", Topology.from_dsns(["host=a"]))


def test_unknown_drivers_are_named():
    topology = Topology.from_dsns({"a": "oracle://h/x"})
    with pytest.raises(dss.ConfigurationError, match="no driver 'oracle'.*postgresql"):
        dss.collect("SELECT 1", topology)


def test_defaults_are_in_dasks_configuration_and_variables_override_them():
    assert dask.config.get("shardsql.dtype-backend") == "pyarrow"
    code = (
        "import dask_shardsql; from dask_shardsql.config import Settings; "
        "s = Settings.current(); print(s.dtype_backend, s.max_connections_per_worker, "
        "s.connect_timeout)"
    )
    variables = {
        "DASK_SHARDSQL__DTYPE_BACKEND": "numpy",
        "DASK_SHARDSQL__MAX_CONNECTIONS_PER_WORKER": "3",
        "DASK_SHARDSQL__CONNECT_TIMEOUT": "2 minutes",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["numpy", "3", "120.0"]


def test_a_driver_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "their_driver.py").write_text(
        "from dask_shardsql.engine.drivers.sqlite import SQLiteDriver\n"
        "class Theirs(SQLiteDriver):\n    name = 'theirs'\n"
    )
    info = tmp_path / "their_driver-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-driver\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[dask_shardsql.drivers]\ntheirs = their_driver:Theirs\nbroken = no_such_module:X\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    database = sqlite3.connect(tmp_path / "x.db")
    database.execute("CREATE TABLE t (id INTEGER)")
    database.execute("INSERT INTO t VALUES (5)")
    database.commit()
    database.close()
    topology = Topology.from_dsns([f"theirs:///{tmp_path}/x.db"])
    assert dss.collect("SELECT id FROM t", topology).to_pylist() == [{"id": 5}]
    with pytest.raises(dss.ConfigurationError, match="'broken' cannot be loaded.*no_such_module"):
        dss.collect("SELECT 1", Topology.from_dsns(["broken:///x"]))


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: Topology.from_dsns(None), lambda: Topology.from_dsns(5)),
        *(lambda: Topology.from_dsns(["host=a"], names=5), lambda: Topology.from_toml(None)),
        *(lambda: Topology.from_toml("a\0b"), lambda: Topology.from_mapping(None)),
        *(lambda: Topology.from_mapping({"shards": 5}), lambda: Topology("abc")),
        *(lambda: Topology.from_mapping({"shards": None}), lambda: dss.Shard("a", "x")),
        *(lambda: dss.Server.from_dsn(None), lambda: dss.Server(role="boss")),
        lambda: Topology.from_mapping({"defaults": {"name": "x"}, "shards": {"a": {}}}),
        lambda: Topology.from_dsns(["host=a client_encoding=LATIN1"]),
    ],
)
def test_values_of_the_wrong_kind_are_topology_errors(make):
    with pytest.raises(TopologyError):
        make()


def test_a_secret_among_a_servers_keywords_is_refused():
    with pytest.raises(TopologyError, match="'password' belongs in its secrets") as caught:
        dss.Server(keywords=(("host", "h"), ("password", SECRET)))
    assert SECRET not in texts_of(caught.value)


def test_a_pasted_password_in_place_of_a_callable_is_not_echoed():
    with pytest.raises(TopologyError, match="module:function") as caught:
        Topology.from_mapping({"shards": {"a": {"password_callable": SECRET}}})
    assert SECRET not in texts_of(caught.value)


def test_dasks_configuration_may_not_hold_a_literal_password():
    shards = {"shards": {"a": {"host": "h", "password": SECRET}}}
    with (
        dask.config.set({"shardsql.topology": shards}),
        pytest.raises(dss.ConfigurationError, match="by reference") as caught,
    ):
        default_topology(None)
    assert SECRET not in texts_of(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: dss.Server(keywords=(("dbname", f"postgresql://u:{SECRET}@h"),)),
        lambda: Topology.from_dsns([f"host=h dbname='host=x password={SECRET}'"]),
        lambda: Topology.from_dsns([f"host=h user='u password={SECRET}'"]),
        lambda: Topology.from_dsns([f"host=h options='-c x.password={SECRET}'"]),
        lambda: dss.Server(secrets=(("password", SECRET),)),
    ],
)
def test_passwords_in_the_wrong_place_are_refused_without_echo(make):
    with pytest.raises(TopologyError) as caught:
        make()
    assert SECRET not in texts_of(caught.value)


def test_a_url_in_place_of_a_topologys_path_is_not_echoed():
    with (
        dask.config.set({"shardsql.topology": f"postgresql://u:{SECRET}@h/db"}),
        pytest.raises(dss.ConfigurationError, match="path of a TOML file") as caught,
    ):
        default_topology(None)
    assert SECRET not in texts_of(caught.value)
