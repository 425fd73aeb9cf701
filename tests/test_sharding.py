"""Sharding functions: where a value is, how a topology describes them, and every mistake there."""

from __future__ import annotations

import dataclasses
import pickle
import random
import subprocess
import sys
import tomllib
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal

import cloudpickle
import pytest
from dask.tokenize import tokenize
from distributed import Client, LocalCluster

import dask_shardsql as dss
from dask_shardsql import (
    ShardByCallable,
    ShardByHash,
    ShardByList,
    ShardByModulo,
    ShardByRange,
    ShardedTable,
    Topology,
    TopologyError,
)
from dask_shardsql.engine import registry
from dask_shardsql.sharding.key_types import KEY_TYPES, read_key, type_of_column
from dask_shardsql.sharding.partition_hash import partition_hash

S = ("s1", "s2", "s3")
DAY = date(2024, 5, 1)
AT = datetime(2024, 5, 1, 12)
ID = uuid.UUID(int=7)


def by_length(value):
    """A sharding function of a user's, which can be imported."""
    return S[len(value) % 3]


FUNCTIONS = [
    ShardByModulo(S),
    ShardByModulo(S, null="s1"),
    ShardByModulo(("s1", "s2", "s3", "s1")),
    ShardByHash(S),
    ShardByRange([10, 20], S),
    ShardByRange([10, 30], S),
    ShardByRange([Decimal(10), Decimal("20.5")], S),
    ShardByRange([date(2024, 1, 1)], ["s1", "s2"]),
    ShardByRange([datetime(2024, 1, 1)], ["s1", "s2"]),
    ShardByRange(["g", "p"], S, null="s3"),
    ShardByList({1: "s1", 2: "s2"}),
    ShardByList({"1": "s1", "2": "s2"}),
    ShardByList({1: "s1", 2: "s2"}, default="s3"),
    ShardByList({1: "s1", 2: "s2"}, null="s3"),
    ShardByList({ID: "s1"}),
    ShardByCallable(by_length),
    ShardByCallable(lambda value: "s1"),
    ShardByCallable("some.module:function"),
]


# -- where a value is ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "text", "varchar", "uuid"])
def test_hash_is_what_postgresql_partitions_by(servers, kind):
    rng = random.Random(kind)  # noqa: S311
    if kind.startswith("int"):
        bits = 8 * int(kind[3:]) - 1
        values = [0, 1, -1, (1 << bits) - 1, -(1 << bits)]
        values += [rng.randrange(-(1 << n), 1 << n) for n in range(1, bits + 1) for _ in range(6)]
    elif kind == "uuid":
        values = [uuid.UUID(int=rng.getrandbits(128)) for _ in range(300)]
    else:
        letters = "abcXYZ 0'\\\n\u00e9\u00df\u4e2d\U0001f600\u0301"
        values = ["".join(rng.choices(letters, k=n)) for n in range(40) for _ in range(8)]
    table = f"sh_hash_{kind}"
    with servers.session("reference") as cursor:
        cursor.execute(f"CREATE TABLE {table} (k {kind}) PARTITION BY HASH (k)")
        for modulus in (1, 3, 8, 1000):
            remainders = [partition_hash(value) % modulus for value in values]
            cursor.execute(
                "SELECT count(*) FILTER (WHERE satisfies_hash_partition(%s::regclass, %s, r, k)) "
                f"FROM unnest(%s::int4[], %s::text[]::{kind}[]) AS t(r, k)",
                (table, modulus, remainders, [str(value) for value in values]),
            )
            assert cursor.fetchone() == (len(values),)
            shards = [f"s{r}" for r in range(modulus)]
            assert ShardByHash(shards).shard_of(values[-1]) == f"s{remainders[-1]}"
        cursor.execute(
            f"SELECT satisfies_hash_partition(%s::regclass, 1000, 0, NULL::{kind})", (table,)
        )
        assert cursor.fetchone() == (True,)
    assert ShardByHash(S).shard_of(None) == "s1"


def test_hash_of_numeric_is_another_one(servers):
    """So that an integer is never looked for where a Decimal would be."""
    with servers.session("reference") as cursor:
        cursor.execute("CREATE TABLE sh_hash_numeric (k numeric) PARTITION BY HASH (k)")
        cursor.execute(
            "SELECT satisfies_hash_partition('sh_hash_numeric'::regclass, 1000, %s, 5::numeric)",
            (partition_hash(5) % 1000,),
        )
        assert cursor.fetchone() == (False,)
    with pytest.raises(TopologyError, match="numeric|Decimal"):
        ShardByHash(S).shard_of(Decimal(5))


def test_modulo_counts_through_the_shards_below_zero_too():
    assert [ShardByModulo(S).shard_of(key) for key in range(-4, 4)] == [
        *("s3", "s1", "s2", "s3", "s1", "s2", "s3", "s1")
    ]
    assert ShardByModulo(["a", "b", "a"]).shard_of(2) == "a"


def test_a_bound_belongs_to_the_range_above_it():
    function = ShardByRange([10, 20], S)
    assert [function.shard_of(key) for key in (-5, 9, 10, 19, 20, 1 << 70)] == [
        *("s1", "s1", "s2", "s2", "s3", "s3")
    ]
    days = ShardByRange([date(2024, 1, 1)], ["old", "new"])
    assert (days.shard_of(date(2023, 12, 31)), days.shard_of(date(2024, 1, 1))) == ("old", "new")
    words = ShardByRange(["Z", "a"], S)
    assert [words.shard_of(word) for word in ("M", "Z", "b", "\u00e4")] == ["s1", "s2", "s3", "s3"]


def test_a_list_knows_its_values_and_perhaps_the_rest():
    plain = ShardByList({"DE": "s1", "AT": "s1", "FR": "s2"})
    assert plain.shard_of("AT") == "s1"
    with pytest.raises(TopologyError, match="knows no shard for 'IT'"):
        plain.shard_of("IT")
    assert ShardByList({"DE": "s1"}, default="s3").shard_of("IT") == "s3"
    with pytest.raises(TopologyError, match="NULL"):
        ShardByList({"DE": "s1"}, default="s3").shard_of(None)
    assert ShardByList({"DE": "s1"}, null="s2").shard_of(None) == "s2"
    assert ShardByList({Decimal("1.0"): "s1"}).shard_of(Decimal("1.00")) == "s1"


def test_ones_own_function_is_asked_and_its_failure_named():
    function = ShardByCallable(by_length)
    assert function.shard_of("four") == "s2"
    with pytest.raises(TopologyError, match=r"by_length.*failed for 5.*TypeError"):
        function.shard_of(5)
    with pytest.raises(TopologyError, match="knows no shard"):
        ShardByCallable(lambda value: 3).shard_of(5)
    with pytest.raises(TopologyError, match="ModuleNotFoundError"):
        ShardByCallable("no.such.module:f").shard_of(5)
    assert ShardByCallable("bisect:bisect").shards_of_range(1, 2) is None


WRONG = [True, 5.0, Decimal(5), b"5", ("5",), datetime(2024, 1, 1, tzinfo=UTC)]


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_values_of_another_type_are_never_guessed(function, value):
    if isinstance(function, ShardByRange) and type(function.bounds[0]) is type(value) is Decimal:
        return
    with pytest.raises(TopologyError, match="knows no shard"):
        function.shard_of(value)
    assert function.shards_of_range(value, None) is None
    assert function.shards_of_range(None, value) is None


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_values_of_subclasses_are_never_guessed(function):
    class Number(int):
        pass

    class Word(str):
        pass

    for value in (Number(5), Word("5")):
        with pytest.raises(TopologyError):
            function.shard_of(value)


@pytest.mark.parametrize("value", [1 << 63, "a\0b", "\ud800"])
def test_hash_refuses_what_no_server_has(value):
    with pytest.raises(TopologyError, match="knows no shard"):
        ShardByHash(S).shard_of(value)


RANGES = [
    *((ShardByModulo(S), 4, 5, {"s2", "s3"}), (ShardByModulo(S), 4, None, set(S))),
    *((ShardByModulo(S), -1, 0, {"s3", "s1"}), (ShardByModulo(S), 0, 1 << 80, set(S))),
    *((ShardByHash(S), 5, 5, {ShardByHash(S).shard_of(5)}), (ShardByHash(S), 0, 5000, None)),
    *((ShardByHash(S), "a", "b", None), (ShardByHash(S), ID, ID, None)),
    *((ShardByRange([10, 20], S), None, 5, {"s1"}), (ShardByRange([10, 20], S), 10, 19, {"s2"})),
    *((ShardByRange([10, 20], S), 15, None, {"s2", "s3"}),),
    *((ShardByRange([10, 20], S), None, None, None), (ShardByRange([10, 20], S), 1, DAY, None)),
    *((ShardByRange(["g"], ["s1", "s2"]), "a", "b", None),),
    *((ShardByRange([DAY], ["s1", "s2"]), None, date(2024, 4, 30), {"s1"}),),
    *((ShardByRange([DAY], ["s1", "s2"]), AT, None, None),),
    *((ShardByList({1: "s1", 2: "s2"}), 1, 2, {"s1", "s2"}),),
    *((ShardByList({1: "s1", 2: "s2"}), 1, 3, None), (ShardByList({1: "s1"}), 1, None, None)),
    *((ShardByList({1: "s1", 2: "s2"}, default="s3"), 2, None, {"s2", "s3"}),),
    *((ShardByList({1: "s1", 2: "s2"}, default="s3"), 1, 2, {"s1", "s2"}),),
    *((ShardByList({DAY: "s1"}, default="s3"), DAY, DAY, {"s1"}),),
    *((ShardByCallable(lambda v: S[v % 3]), 3, 4, {"s1", "s2"}),),
    *((ShardByCallable(lambda v: S[v % 3]), 3, None, None),),
]


@pytest.mark.parametrize(("function", "low", "high", "shards"), RANGES)
def test_a_range_may_need_these_shards(function, low, high, shards):
    assert function.shards_of_range(low, high) == shards


def test_bounds_that_are_left_out_and_empty_ranges():
    function = ShardByRange([10, 20], S)
    assert function.shards_of_range(5, 10) == {"s1", "s2"}
    assert function.shards_of_range(5, 10, high_inclusive=False) == {"s1"}
    modulo = ShardByModulo(S)
    assert modulo.shards_of_range(3, 5, low_inclusive=False, high_inclusive=False) == {"s2"}
    for empty in (function, modulo, ShardByHash(S), ShardByCallable(by_length)):
        assert empty.shards_of_range(6, 5) == frozenset()
        assert empty.shards_of_range(5, 5, low_inclusive=False) == frozenset()
    last = ShardByList({date.max: "s1"}, default="s2")
    assert last.shards_of_range(date.max, date.max, high_inclusive=True) == {"s1"}


# -- as values -----------------------------------------------------------------------------------


def over(function, names=S):
    table = ShardedTable("t", "k", function)
    shards = Topology.from_dsns({name: f"host={name}" for name in names}).shards
    return Topology(shards, (table,))


@pytest.mark.parametrize("function", FUNCTIONS, ids=repr)
def test_functions_are_values(function):
    hash(function)
    with pytest.raises(dataclasses.FrozenInstanceError):
        function.kind = "other"
    for dumps in (pickle.dumps, cloudpickle.dumps):
        again = pickle.loads(dumps(function))  # noqa: S301 - our own bytes
        assert again == function
        assert hash(again) == hash(function)
        assert tokenize(again) == tokenize(function)
        assert again.token() == function.token()
    topology = over(function)
    again = pickle.loads(pickle.dumps(topology))  # noqa: S301 - our own bytes
    assert (again, again.fingerprint) == (topology, topology.fingerprint)
    brought = registry.unpack(registry.pack(topology))
    assert (brought, brought.fingerprint) == (topology, topology.fingerprint)
    assert repr(function) in repr(topology)


def test_other_functions_make_other_topologies():
    topologies = [over(None), *map(over, FUNCTIONS)]
    n = len(topologies)
    assert len(set(topologies)) == n
    assert len({one.fingerprint for one in topologies}) == n
    assert len({tokenize(one.sharded) for one in topologies}) == n


def test_tables_are_sharded_alike_by_equal_functions():
    one = ShardedTable("a", "x", ShardByModulo(S))
    assert one.is_sharded_like(ShardedTable("b", "y", ShardByModulo(list(S))))
    assert not one.is_sharded_like(ShardedTable("b", "y", ShardByModulo(S[::-1])))
    assert not one.is_sharded_like(ShardedTable("b", "y"))
    assert ShardedTable("a", "x").is_sharded_like(ShardedTable("b", "y"))
    listed = ShardByList({1: "s1", 2: "s2"})
    assert listed == ShardByList([(2, "s2"), (1, "s1")])


def test_large_tables_are_not_shown_whole():
    function = ShardByList({n: S[n % 3] for n in range(10_000)}, default="s1")
    assert repr(function) == "ShardByList(10000 values over ['s1', 's2', 's3'], default='s1')"


def test_a_lambda_and_its_topology_reach_another_process():
    factor = 2
    topology = over(ShardByCallable(lambda key: S[key * factor % 3]))
    code = (
        "import sys, pickle; t = pickle.load(sys.stdin.buffer); "
        "print(t.sharded[0].function.shard_of(2), t.fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(topology), capture_output=True, check=True
    )
    assert done.stdout.decode().split() == ["s2", topology.fingerprint]


def test_workers_are_given_the_function(servers, table_name):
    servers.execute(f"CREATE TABLE {table_name} (k int)")
    servers.load(table_name, [(n,) for n in range(9)], shard_of=lambda row: row[0] % 3)
    dsns = {name: servers.dsns[name] for name in S}
    fields = {"key": "k", "function": lambda key: S[key % 3]}
    topology = Topology.from_dsns(dsns, sharded={table_name: fields})
    with (
        LocalCluster(1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster),
    ):
        ddf = dss.read_sharded_table(table_name, topology)
        assert sorted(ddf.compute().k) == [*range(9)]
        table = dss.collect(f"SELECT sum(k) FROM {table_name}", topology, merge="global")
        assert table.to_pylist() == [{"sum": 36}]


def test_a_join_of_tables_that_are_sharded_otherwise_is_no_union(servers):
    servers.execute("CREATE TABLE sh_a (k int); CREATE TABLE sh_b (k int)")
    servers.load("sh_a", [(n,) for n in range(9)], shard_of=lambda row: row[0] % 3)
    servers.load("sh_b", [(n,) for n in range(9)], shard_of=lambda row: row[0] // 3)
    dsns = {name: servers.dsns[name] for name in S}
    sql = "SELECT sh_a.k FROM sh_a JOIN sh_b ON sh_a.k = sh_b.k"
    sharded = {
        "sh_a": {"key": "k", "function": "modulo"},
        "sh_b": {"key": "k", "function": "range", "bounds": [3, 6]},
    }
    topology = Topology.from_dsns(dsns, sharded=sharded)
    found = dss.collect(sql, topology, merge="global")
    assert sorted(found["k"].to_pylist()) == [*range(9)]
    assert dss.explain(sql, topology, merge="global").strategy == "gather"
    alike = Topology.from_dsns(dsns, sharded={"sh_a": sharded["sh_a"], "sh_b": sharded["sh_a"]})
    assert dss.explain(sql, alike, merge="global").strategy == "union"


# -- as a topology describes them ----------------------------------------------------------------

TOML = """
shards = [{name = "s1", host = "a"}, {name = "s2", host = "b"}, {name = "s3", host = "c"}]

[sharded]
plain = "k"
keyed = { key = "k" }
modulo = { key = "k", function = "modulo" }
buckets = { key = "k", function = "modulo", shards = ["s1", "s2", "s1", "s3"], null = "s1" }
hash = { key = "k", function = "hash", shards = ["s3", "s2"] }
range = { key = "k", function = "range", bounds = [10, 20] }
days = { key = "k", function = "range", bounds = [2024-05-01], shards = ["s1", "s2"] }
moments = { key = "k", function = "range", bounds = [2024-05-01T12:00:00], shards = ["s1", "s2"] }
prices = { key = "k", function = "range", bounds = ["9.99", 20], type = "numeric" }
own = { key = "k", function = "test_sharding:by_length" }

["sharded"."sales.list"]
key = "k"
function = "list"
values = { s1 = ["DE", "AT"], s2 = ["FR"] }
default = "s3"

[sharded.lookup]
key = "k"
function = "lookup"
type = "integer"
table = { 1 = "s1", 2 = "s2" }

[sharded.filed]
key = "k"
function = "lookup"
file = "tenants.csv"
type = "uuid"
null = "s2"
"""
DESCRIBED = {
    "plain": None,
    "keyed": None,
    "modulo": ShardByModulo(S),
    "buckets": ShardByModulo(["s1", "s2", "s1", "s3"], null="s1"),
    "hash": ShardByHash(["s3", "s2"]),
    "range": ShardByRange([10, 20], S),
    "days": ShardByRange([DAY], ["s1", "s2"]),
    "moments": ShardByRange([AT], ["s1", "s2"]),
    "prices": ShardByRange([Decimal("9.99"), Decimal(20)], S),
    "own": ShardByCallable("test_sharding:by_length"),
    "sales.list": ShardByList({"DE": "s1", "AT": "s1", "FR": "s2"}, default="s3"),
    "lookup": ShardByList({1: "s1", 2: "s2"}),
    "filed": ShardByList({ID: "s1"}, null="s2"),
}


def test_a_file_describes_every_kind(tmp_path):
    (tmp_path / "tenants.csv").write_text(f"value,shard\n{str(ID).upper()},s1\n\n")
    (tmp_path / "shards.toml").write_text(TOML)
    topology = Topology.from_toml(tmp_path / "shards.toml")
    assert {table.name: table.function for table in topology.sharded} == DESCRIBED
    assert {table.key for table in topology.sharded} == {"k"}


def test_python_describes_them_too():
    fields = {
        "a": {"key": "k", "function": by_length},
        "b": {"key": "k", "function": ShardByModulo(S)},
        "c": {"key": "k", "function": "list", "values": {"s1": [1], "s2": [2]}},
        "d": {"key": "k", "function": "lookup", "table": {1: "s1", 2: "s2"}},
        "e": {"key": "k", "function": None},
    }
    topology = Topology.from_dsns({name: f"host={name}" for name in S}, sharded=fields)
    assert [table.function for table in topology.sharded] == [
        *(ShardByCallable("test_sharding:by_length"), ShardByModulo(S)),
        *(ShardByList({1: "s1", 2: "s2"}), ShardByList({1: "s1", 2: "s2"}), None),
    ]
    assert "ShardByModulo(shards=('s1', 's2', 's3'), null=None)" in repr(topology)


MISTAKES = [
    ('function = "modolo"', "'modolo'; did you mean 'modulo'.*known: hash, list"),
    ("function = 3", "no sharding function is called 3"),
    ('function = ""', "known: hash"),
    ('shards = ["s1"]', "unknown key 'shards'"),
    ('function = "modulo"\nbounds = [1]', "unknown key 'bounds'"),
    ('function = "modulo"\nshards = "s1"', "list of shards' names"),
    ('function = "modulo"\nshards = []', "list of shards' names"),
    ('function = "modulo"\nshards = ["s1", "s9"]', "'s9'.*does not have.*'s1', 's2', 's3'"),
    ('function = "modulo"\nnull = 3', "name of a shard as its null"),
    ('function = "hash"\nnull = "s1"', "unknown key 'null'"),
    ('function = "range"', r"bounds = \[1000\]"),
    ('function = "range"\nbounds = []', "there are none"),
    ('function = "range"\nbounds = [1]', "needs 2 shards for 1 bounds"),
    ('function = "range"\nbounds = [2, 1]', "rise"),
    ('function = "range"\nbounds = [1, 1]', "rise"),
    ('function = "range"\nbounds = [1, 2.5]', 'type = "numeric"'),
    ('function = "range"\nbounds = [1, "2"]', "of one type"),
    ('function = "range"\nbounds = [true, 2]', "True"),
    ('function = "range"\nbounds = ["x", "y"]\ntype = "integer"', "'x' cannot be read as integer"),
    ('function = "range"\nbounds = [1, 2]\ntype = "text"', "1 cannot be read as text"),
    ('function = "range"\nbounds = ["1", "2"]\ntype = "number"', "type is 'number'.*numeric"),
    ('function = "range"\nbounds = [2024-01-01T00:00:00Z, 2024-01-01T00:00:01Z]', "time zone"),
    ('function = "list"', "must be a table"),
    ('function = "list"\nvalues = { s1 = 3 }', "'s1' must be a list"),
    ('function = "list"\nvalues = { s1 = [] }', "there are none"),
    ('function = "list"\nvalues = { s1 = [1], s2 = [1] }', "has 1 more than once"),
    ('function = "list"\nvalues = { s1 = [[1]] }', "needs a table of values|takes values"),
    ('function = "list"\nvalues = { s1 = [1], s8 = [2] }', "'s8'"),
    ('function = "list"\nvalues = { s1 = [1] }\ndefault = "s7"', "'s7'"),
    ('function = "lookup"', "either a table.*or the file"),
    ('function = "lookup"\ntable = { a = "s1" }\nfile = "x"', "either a table.*or the file"),
    ('function = "lookup"\ntable = { a = 1 }', "names, not"),
    ('function = "lookup"\nfile = 3', "path of a CSV file"),
    ('function = "lookup"\nfile = "none.csv"', r"none\.csv: No such file"),
    ('function = "lookup"\nfile = "headless.csv"', "first line must be value,shard"),
    ('function = "lookup"\nfile = "ragged.csv"', "each line needs a value and a shard"),
    ('function = "lookup"\nfile = "twice.csv"', "'a' more than once"),
    ('function = "lookup"\nfile = "latin.csv"', "no CSV file in UTF-8"),
    ('function = "mod:f"\nshards = ["s1"]', "'shards' cannot be given beside"),
    ('function = "mod:"', "module:function"),
    ('function = "a b:c"', "module:function"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_mistakes_name_the_table_and_the_remedy(tmp_path, text, message):
    (tmp_path / "headless.csv").write_text("a,s1\n")
    (tmp_path / "ragged.csv").write_text("value,shard\na,s1\nb\n")
    (tmp_path / "twice.csv").write_text("value,shard\na,s1\na,s2\n")
    (tmp_path / "latin.csv").write_bytes(b"value,shard\n\xe9,s1\n")
    shards, _, _ = TOML.partition("[sharded]")
    file = tmp_path / "shards.toml"
    file.write_text(f'{shards}[sharded.wrong]\nkey = "k"\n{text}')
    with pytest.raises(TopologyError, match="'wrong'") as caught:
        Topology.from_toml(file)
    with pytest.raises(TopologyError, match=message):
        raise caught.value


@pytest.mark.parametrize(
    "make",
    [
        *(lambda: ShardByModulo("s1"), lambda: ShardByModulo(None), lambda: ShardByHash([1])),
        *(lambda: ShardByRange("ab", S), lambda: ShardByRange([ID], ["s1", "s2"])),
        *(lambda: ShardByRange([Decimal("NaN")], ["s1", "s2"]), lambda: ShardByList(5)),
        *(lambda: ShardByList([1]), lambda: ShardByList({1: 2}), lambda: ShardByList("ab")),
        *(lambda: ShardByList([(1, "s1"), (1, "s2")]), lambda: ShardByList({1: "a", "b": "a"})),
        *(lambda: ShardByList({1: "a"}, default=2), lambda: ShardByCallable(5)),
        *(lambda: ShardByCallable("nocolon"), lambda: ShardedTable("t", "k", by_length)),
        *(lambda: ShardedTable("t", "k", "modulo"), lambda: over(ShardByModulo(["s9"]))),
        lambda: ShardByCallable((lambda handle: lambda key: handle.name)(sys.stdout)),
    ],
)
def test_values_of_the_wrong_kind_are_topology_errors(make):
    with pytest.raises(TopologyError):
        make()


# -- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        *(("integer", "-5", -5), ("integer", "+5", None), ("integer", "5 ", None)),
        *(("integer", "\u0665", None), ("integer", "1_000", None), ("integer", "5\n", None)),
        *(("numeric", "-5.50", Decimal("-5.5")), ("numeric", "NaN", None)),
        *(("numeric", "1e5", None), ("numeric", "Infinity", None), ("numeric", ".5", None)),
        *(("date", "2024-05-01", DAY), ("date", "2024-02-30", None)),
        ("date", "0044-03-15 BC", None),
        *(("date", "infinity", None), ("date", "01/05/2024", None), ("date", "20240501", None)),
        *(("timestamp", "2024-05-01 12:00:00", AT), ("timestamp", "2024-05-01 24:00:00", None)),
        *(("timestamp", "2024-05-01", datetime(2024, 5, 1)), ("timestamp", "12024-05-01", None)),
        ("timestamp", "2024-05-01 12:00:00.5", AT.replace(microsecond=500_000)),
        *(("timestamp", "2024-05-01 12:00:00+00", None), ("uuid", str(ID), ID)),
        *(("uuid", f"{{{ID}}}", None), ("text", " a ", " a ")),
    ],
)  # fmt: skip
def test_texts_are_read_as_postgresql_writes_them(kind, text, value):
    assert read_key(text, kind) == value
    assert value is None or type(read_key(text, kind)) is KEY_TYPES[kind]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("bigint", "integer"), ("pg_catalog.int2", "integer"), ("numeric(12,2)", "numeric")),
        *(("character varying(10)", "text"), ("text", "text"), ("uuid", "uuid")),
        *(("timestamp(3) without time zone", "timestamp"), ("date", "date")),
        *(("timestamp with time zone", None), ("character(5)", None), ("bpchar", None)),
        *(("citext", None), ("public.text", None), ("integer[]", None), ('"char"', None)),
        *(("double precision", None), ("boolean", None), ("", None), ("name", None)),
    ],
)
def test_columns_have_these_types(name, kind):
    assert type_of_column(name) == kind


def test_the_file_above_is_toml():
    assert len(tomllib.loads(TOML)["sharded"]) == len(DESCRIBED)
