"""Which shards a condition leaves: never one too few, and for simple conditions no other."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import NamedTuple

import psycopg2
import pytest
import sqlglot
import values
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sqlglot import exp
from sqlglot.errors import SqlglotError

from dask_shardsql import (
    ShardByCallable,
    ShardByHash,
    ShardByList,
    ShardByModulo,
    ShardByRange,
    TopologyError,
)
from dask_shardsql.sql.route import possible_shards

ALL = ("s1", "s2", "s3", "s4", "s5")
EVERY = frozenset(ALL)


def spread(value):
    """Deterministic, and unlike any of ours."""
    return ALL[sum(str(value).encode()) * 7 % 5]


class Kind(NamedTuple):
    """A type of shard keys, some of its values as SQL writes them, and functions that take it."""

    column: str
    rows: Sequence[str]
    literals: Sequence[str]
    functions: Sequence[object]


_INTS = [str(n) for n in (-300, -7, -6, -5, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 300)]
_INT_LITERALS = [
    *_INTS,
    *("5::smallint", "'7'::bigint", "6::bigint", "NULL", "NULL::bigint", "-(3)", "- 5::smallint"),
    *("'8'", "3000000000", "5.0", "5.5", "6::numeric", "7::float8", "2 + 3", "abs(-3)"),
    *("'9'::text::int", "x", "k", "(SELECT 5)", "'4'::oid::int8", "8::text::int4"),
    "-9223372036854775808",
]  # fmt: skip
_INT_FUNCTIONS = [
    ShardByModulo(ALL),
    ShardByModulo(ALL[:3], null="s4"),
    ShardByHash(ALL),
    ShardByRange([-5, 0, 5, 10], ALL, null="s2"),
    ShardByList({n: ALL[n % 5] for n in range(-10, 20)}),
    ShardByList({5: "s1", 6: "s2"}, default="s3", null="s3"),
    ShardByCallable(spread),
    ShardByRange([Decimal(-5), Decimal(5)], ["s1", "s2", "s3"]),  # of another type: says nothing
]
_WORDS = [
    "",
    "a",
    "b",
    "ab",
    "B",
    "\u00e4",
    "a ",
    "it's",
    "c\\d",
    "\n",
    "\U0001f600",
    "zz",
    "5",
    "NULL",
]


def _quoted(texts: Sequence[str]) -> list[str]:
    return ["'" + text.replace("'", "''") + "'" for text in texts]


_TEXT_LITERALS = [
    *_quoted(_WORDS),
    *("'a'::varchar", "'abc'::varchar(1)", "'a'::char(3)", "'a'::bpchar", "'b'::name", "NULL"),
    *("'a'::text", "'a' || 'b'", "lower('AB')", "E'\\n'", "U&'\\0061'", "'a' COLLATE \"C\"", "k"),
    *("'b'::\"char\"", "5::text", "$$it's$$", "current_user"),
]
_TEXT_FUNCTIONS = [
    ShardByHash(ALL),
    ShardByRange(["a", "b", "c"], ALL[:4], null="s5"),
    ShardByList({word: ALL[len(word) % 5] for word in _WORDS}),
    ShardByList({"a": "s1", "b": "s2"}, default="s3"),
    ShardByCallable(spread),
    ShardByModulo(ALL),
]
_IDS = [str(uuid.UUID(int=n)) for n in (0, 1, 2, 3, 1 << 127, (1 << 128) - 1)]
_DAYS = ["2023-12-31", "2024-01-01", "2024-01-02", "2024-02-28", "2024-02-29", "2024-03-01"]
_DAYS += ["0001-01-01", "9999-12-31", "infinity", "-infinity", "0044-03-15 BC", "12024-01-01"]
_DAY_LITERALS = [f"{cast}{text}" for text in _quoted(_DAYS) for cast in ("", "date ")]
_DAY_LITERALS += ["NULL", "'2024-01-01 10:00'::timestamp", "'2024-01-01'::timestamp", "'now'::date"]
_DAY_LITERALS += [
    "date '2024-01-01' + 1",
    "'2024-01-01'::timestamptz",
    "'20240101'",
    "current_date",
]
_AT = [f"{day} {time}" for day in _DAYS[:4] for time in ("00:00:00", "12:00:00", "23:59:59.999999")]
_AT += _DAYS[6:]
_AT_LITERALS = [*_quoted(_AT), *_quoted(_DAYS[:4]), "date '2024-01-01'", "NULL::timestamp"]
_AT_LITERALS += ["'2024-01-01 12:00:00+02'", "'2024-01-01 12:00:00+02'::timestamptz", "now()"]
_AT_LITERALS += [
    "'2024-01-01 12:00:00.5'::timestamp(0)",
    "'2024-01-01 24:00:00'",
    "date '2024-01-02'",
]
_NUMBERS = ["-5.5", "-1", "0", "0.00", "1", "1.0", "1.50", "2", "2.5", "99999999999999999999.5"]
_NUMBERS += ["'NaN'", "'Infinity'", "'-Infinity'"]
_NUMBER_LITERALS = [*_NUMBERS, "1::int8", "2.5::numeric(3,0)", "1e0", "-(1.5)", "NULL", "1::float8"]
_NUMBER_LITERALS += ["'1.50'::numeric", "2.49::numeric(2,1)", "1.5::text::numeric", "5 / 2.0"]
KINDS = {
    "int2": Kind("smallint", _INTS, _INT_LITERALS, _INT_FUNCTIONS),
    "int4": Kind("integer", _INTS, _INT_LITERALS, _INT_FUNCTIONS),
    "int8": Kind("bigint", [*_INTS, "3000000000"], _INT_LITERALS, _INT_FUNCTIONS),
    "text": Kind("text", _quoted(_WORDS), _TEXT_LITERALS, _TEXT_FUNCTIONS),
    "varchar": Kind("varchar(9)", _quoted(_WORDS), _TEXT_LITERALS, _TEXT_FUNCTIONS),
    "bpchar": Kind("char(3)", _quoted(["a", "b", "ab", ""]), _TEXT_LITERALS, _TEXT_FUNCTIONS),
    "uuid": Kind(
        "uuid",
        _quoted(_IDS),
        [*_quoted(_IDS), *_quoted([i.upper() for i in _IDS]), "NULL", "gen_random_uuid()"],
        [
            ShardByHash(ALL),
            ShardByList({uuid.UUID(one): ALL[n % 5] for n, one in enumerate(_IDS)}),
            ShardByCallable(spread),
        ],
    ),
    "date": Kind(
        "date",
        _quoted(_DAYS),
        _DAY_LITERALS,
        [
            ShardByRange([date(2024, 1, 1), date(2024, 2, 29)], ALL[:3], null="s5"),
            ShardByList({date(2024, 1, 1): "s1", date(2024, 1, 2): "s2"}, default="s3"),
            ShardByRange([datetime(2024, 1, 1)], ["s1", "s2"]),
            ShardByCallable(spread),
        ],
    ),
    "timestamp": Kind(
        "timestamp(6)",
        _quoted(_AT),
        _AT_LITERALS,
        [
            ShardByRange([datetime(2024, 1, 1), datetime(2024, 1, 1, 12)], ALL[:3], null="s5"),
            ShardByList({datetime(2024, 1, 1): "s1"}, default="s3"),
            ShardByRange([date(2024, 1, 1)], ["s1", "s2"]),
            ShardByCallable(spread),
        ],
    ),
    "timestamptz": Kind(
        "timestamptz",
        _quoted(_AT),
        _AT_LITERALS,
        [ShardByRange([datetime(2024, 1, 1)], ["s1", "s2"])],
    ),
    "numeric": Kind(
        "numeric",
        _NUMBERS,
        _NUMBER_LITERALS,
        [
            ShardByRange([Decimal(0), Decimal("1.5"), Decimal(2)], ALL[:4], null="s5"),
            ShardByList({Decimal("1"): "s1", Decimal("2.5"): "s2"}, default="s3"),
            ShardByRange([0, 1], ALL[:3]),
            ShardByHash(ALL),
        ],
    ),
    "float8": Kind(
        "float8", _NUMBERS, _NUMBER_LITERALS, [ShardByModulo(ALL), ShardByCallable(spread)]
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cursor(servers):
    connection = values.open_reference(servers)
    with connection.cursor() as found:
        for name, kind in KINDS.items():
            found.execute(f"CREATE TABLE rt_{name} (k {kind.column}, x int4)")
            for number, row in enumerate([*kind.rows, "NULL"]):
                found.execute(f"INSERT INTO rt_{name} VALUES ({row}, {number % 10})")
        yield found
    connection.close()


class Written(NamedTuple):
    """A condition as the server writes it, and the keys of the rows for which it is true."""

    condition: exp.Expr
    keys: set[object]
    text: str


def write_down(cursor, name, condition) -> Written:
    """Let the server read a condition, write it down, and say for which rows it is true."""
    cursor.execute(
        f"CREATE OR REPLACE TEMPORARY VIEW rv_{name} AS SELECT k FROM rt_{name} WHERE {condition}"
    )
    cursor.execute("SELECT pg_get_viewdef(%s::regclass)", (f"pg_temp.rv_{name}",))
    ((text,),) = cursor.fetchall()
    parsed = sqlglot.parse_one(text.rstrip().removesuffix(";"), dialect="postgres")
    # as texts: neither infinity nor years before 1 are Python's
    cursor.execute(f"SELECT DISTINCT k::text FROM pg_temp.rv_{name}")
    return Written(parsed.args["where"].this, {key for (key,) in cursor.fetchall()}, text)


def is_key(node):
    return isinstance(node, exp.Column) and node.name == "k"


_PYTHON = {
    **dict.fromkeys(("int2", "int4", "int8"), int),
    **dict.fromkeys(("text", "varchar"), str),
    "uuid": uuid.UUID,
    "date": date.fromisoformat,
    "timestamp": datetime.fromisoformat,
    "numeric": Decimal,
}


def home_of(function, name, key):
    """Where the row with that key is; None where nobody can know."""
    if key is None:
        value = None
    elif name not in _PYTHON:
        return None
    elif isinstance(function, ShardByRange) and key.lstrip("-").lower() in ("infinity", "nan"):
        return function.shards[0 if key[0] == "-" else -1] if type_matches(function, name) else None
    elif isinstance(function, ShardByRange) and key.endswith(" BC"):
        return function.shards[0] if type_matches(function, name) else None
    elif isinstance(function, ShardByRange) and key.startswith("12024"):
        return function.shards[-1] if type_matches(function, name) else None
    else:
        try:
            value = _PYTHON[name](key)
        except ValueError:  # for Python there is no such date
            return getattr(function, "default", None)
    try:
        return function.shard_of(value)
    except TopologyError:
        # a list's default has whatever Python cannot hold as well
        return getattr(function, "default", None) if name == "numeric" else None


def type_matches(function, name):
    return (
        type(function.bounds[0]) is {"date": date, "timestamp": datetime, "numeric": Decimal}[name]
    )


@st.composite
def conditions(draw, kind: Kind, depth: int = 0) -> str:
    """Draw a condition on a key of that kind."""
    literal = st.sampled_from(kind.literals)
    if depth < 3 and draw(st.integers(0, 9)) < 5:
        one, other = draw(conditions(kind, depth + 1)), draw(conditions(kind, depth + 1))
        form = draw(st.sampled_from([
            *("({0} AND {1})",) * 4, *("({0} OR {1})",) * 3, "(NOT {0})", "({0} AND NOT {1})",
            *("({0} IS TRUE)", "({0} IS NOT TRUE)", "({0} IS FALSE)", "({0} IS NULL)"),
            *("({0} = {1})", "CASE WHEN {0} THEN {1} END", "coalesce({0}, {1})"),
        ]))  # fmt: skip
        return form.format(one, other)
    sign = draw(st.sampled_from(["=", "=", "=", "<", "<=", ">", ">=", "<>"]))
    a, b, c = draw(literal), draw(literal), draw(literal)
    return draw(st.sampled_from([
        *(f"(k {sign} {a})",) * 6, *(f"({a} {sign} k)",) * 2, f"(k IN ({a}, {b}, {c}))",
        *(f"(k IN ({a}, {b}))", f"(k NOT IN ({a}, {b}))", f"(k BETWEEN {a} AND {b})"),
        *(f"(k BETWEEN SYMMETRIC {a} AND {b})", f"(k NOT BETWEEN {a} AND {b})"),
        *(f"(k = ANY (ARRAY[{a}, {b}]))", f"(k = ALL (ARRAY[{a}]))"),
        *(f"(k <> ALL (ARRAY[{a}, {b}]))", f"(k < ANY (ARRAY[{a}, {b}]))"),
        f"(k = ANY (ARRAY[{a}]::{kind.column.split('(')[0]}[]))",
        *(f"(k IS NOT DISTINCT FROM {a})", f"(k IS DISTINCT FROM {a})", "(k IS NULL)"),
        *("(k IS NOT NULL)", f"((k, x) = ({a}, 3))", f"((k, x) IN (({a}, 3), ({b}, 4)))"),
        *(f"((k, x) < ({a}, 5))", f"(k::text {sign} {a}::text)", f"(coalesce(k, {a}) {sign} {b})"),
        *(f"(x {sign} 4)", "(x IN (1, 2))", "true", "false", "NULL", "(k = k)", f"({a} = {b})"),
        *(f"(k IN (SELECT {a} UNION SELECT {b}))", f"(nullif(k, {a}) = {b})", "(k = '{}')"),
        f"EXISTS (SELECT WHERE k = {a})",
    ]))  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_no_row_that_satisfies_a_condition_is_left_out(cursor, name):
    kind = KINDS[name]
    pruned = []

    @settings(
        max_examples=300,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )
    @given(conditions(kind))
    def check(condition):
        try:
            written = write_down(cursor, name, condition)
        except (psycopg2.Error, SqlglotError):
            assume(False)
        for function in kind.functions:
            found = possible_shards(written.condition, is_key, function, ALL, kind.column)
            assert found <= EVERY
            for key in written.keys:
                home = home_of(function, name, key)
                if home is None:
                    assert found == EVERY, (function, key, written.text)
                else:
                    assert home in found, (function, key, written.text)
            pruned.append(found != EVERY)

    check()
    assert len(pruned) > 150 * len(kind.functions)
    if name in ("bpchar", "timestamptz", "float8"):  # only what is true for no row at all
        assert sum(pruned) < len(pruned) / 2
    else:
        assert sum(pruned) > len(pruned) / 10


PRUNED = [
    ("int8", "k = 7", ShardByModulo(ALL), {"s3"}),
    ("int8", "7 = k", ShardByModulo(ALL), {"s3"}),
    ("int8", "k = -1", ShardByModulo(ALL), {"s5"}),
    ("int8", "k = '7'::int2", ShardByModulo(ALL), {"s3"}),
    ("int8", "k IN (5, 10, NULL, 3000000000)", ShardByModulo(ALL), {"s1"}),
    ("int8", "k = ANY ('{5,10}')", ShardByModulo(ALL), {"s1"}),
    ("int8", "k = ANY ('{}'::int[])", ShardByModulo(ALL), set()),
    ("int8", "k > 5 AND k < 8", ShardByModulo(ALL), {"s2", "s3"}),
    ("int8", "k BETWEEN 6 AND 7 AND x = 3", ShardByModulo(ALL), {"s2", "s3"}),
    ("int8", "k IN (1, 2, 3) AND k >= 3", ShardByModulo(ALL), {"s4"}),
    ("int8", "k IN (1, 2) AND k IN (2, 3)", ShardByModulo(ALL), {"s3"}),
    ("int8", "(k = 1 AND x > 3) OR k = 2", ShardByModulo(ALL), {"s2", "s3"}),
    ("int8", "(k, x) IN ((1, 2), (3, 4))", ShardByModulo(ALL), {"s2", "s4"}),
    ("int8", "k = 1 AND k = 2", ShardByModulo(ALL), set()),
    ("int8", "k = 1 AND k IS NULL", ShardByModulo(ALL), set()),
    ("int8", "k > 5 AND k < 3", ShardByHash(ALL), set()),
    ("int8", "k = NULL", ShardByModulo(ALL), set()),
    ("int8", "false", ShardByModulo(ALL), set()),
    ("int8", "x = 3 AND NULL", ShardByModulo(ALL), set()),
    ("int8", "(k = 1) IS TRUE", ShardByModulo(ALL), {"s2"}),
    ("int8", "k IS NOT DISTINCT FROM 1", ShardByModulo(ALL), {"s2"}),
    ("int8", "k IS NULL", ShardByModulo(ALL, null="s5"), {"s5"}),
    ("int8", "k IS NOT DISTINCT FROM NULL", ShardByModulo(ALL, null="s5"), {"s5"}),
    ("int8", "k IS NULL OR k = 1", ShardByModulo(ALL, null="s5"), {"s5", "s2"}),
    ("int8", "k IS NULL", ShardByHash(ALL), {"s1"}),
    ("int4", "k = 7", ShardByHash(ALL), {ShardByHash(ALL).shard_of(7)}),
    ("int2", "k = 7", ShardByHash(ALL), {ShardByHash(ALL).shard_of(7)}),
    ("int4", "k >= 100", ShardByRange([10, 20], ALL[:3]), {"s3"}),
    ("int4", "k < 10", ShardByRange([10, 20], ALL[:3]), {"s1"}),
    ("int4", "k <= 10", ShardByRange([10, 20], ALL[:3]), {"s1", "s2"}),
    ("int4", "k BETWEEN SYMMETRIC 19 AND 10", ShardByRange([10, 20], ALL[:3]), {"s2"}),
    ("int4", "k = 2", ShardByList({1: "s1", 2: "s2"}), {"s2"}),
    ("int4", "k > 1", ShardByList({1: "s1", 2: "s2"}, default="s3"), {"s2", "s3"}),
    ("int4", "k IN (3, 4)", ShardByCallable(spread), {spread(3), spread(4)}),
    ("text", "k = 'it''s'", ShardByHash(ALL), {ShardByHash(ALL).shard_of("it's")}),
    ("text", "k IN ('a', 'c')", ShardByRange(["b"], ALL[:2]), {"s1", "s2"}),
    ("text", "k = 'a'", ShardByRange(["b"], ALL[:2]), {"s1"}),
    ("varchar", "k = 'a'", ShardByList({"a": "s4"}), {"s4"}),
    ("varchar", "k IN ('a', 'b')", ShardByList({"a": "s4", "b": "s4"}), {"s4"}),
    ("uuid", f"k = '{_IDS[3]}'", ShardByHash(ALL), {ShardByHash(ALL).shard_of(uuid.UUID(_IDS[3]))}),
    ("date", "k >= '2024-03-01'", ShardByRange([date(2024, 1, 1)], ALL[:2]), {"s2"}),
    ("date", "k = '2024-01-02'", ShardByCallable(spread), {spread(date(2024, 1, 2))}),
    ("timestamp", "k < '2024-01-01'", ShardByRange([datetime(2024, 1, 1)], ALL[:2]), {"s1"}),
    ("timestamp", "k >= date '2024-01-01'", ShardByRange([datetime(2024, 1, 1)], ALL[:2]), {"s2"}),
    ("numeric", "k > 2", ShardByRange([Decimal("1.5")], ALL[:2]), {"s2"}),
    ("numeric", "k = 1.50", ShardByList({Decimal("1.5"): "s3"}), {"s3"}),
    ("numeric", "k IN (1, 1.5)", ShardByRange([Decimal("1.6")], ALL[:2]), {"s1"}),
]


@pytest.mark.parametrize(("name", "condition", "function", "shards"), PRUNED)
def test_simple_conditions_leave_no_other_shard(cursor, name, condition, function, shards):
    written = write_down(cursor, name, condition)
    assert possible_shards(written.condition, is_key, function, ALL, KINDS[name].column) == shards


UNKNOWN = [
    *(("int8", "NOT k = 7"), ("int8", "k <> 7"), ("int8", "k = 7 OR x = 1"), ("int8", "k + 0 = 7")),
    ("int8", "k = x"),
    *(("int8", "k = 7.0"), ("int8", "k = (SELECT 7)"), ("int8", "k::numeric = 7")),
    *(("int8", "k IN (7, x)"), ("int8", "k = 2 + 5"), ("int8", "(k = 7) IS NOT FALSE")),
    *(("int8", "k IS NOT NULL"), ("int8", "x = 7"), ("int8", "coalesce(k, 7) = 7")),
    ("int8", "true"),
    *(("int8", "k IS NULL"), ("int8", "k IS DISTINCT FROM 7"), ("int8", "k = '7'::oid::int8")),
    *(("text", "k > 'a'"), ("text", "k LIKE 'a'"), ("text", "k = 'a' COLLATE \"C\"")),
    *(("text", "k = 'a'::char(3)"), ("text", "k = 'c\\d'"), ("text", "lower(k) = 'a'")),
    *(("bpchar", "k = 'a'"), ("float8", "k = 1"), ("timestamptz", "k = '2024-01-01'")),
    *(("date", "k = '2024-01-01'::timestamp"), ("date", "k = 'infinity'")),
    ("date", "k = current_date"),
    *(("numeric", "k = 'NaN'"), ("numeric", "k = 2.5::numeric(3,0)"), ("numeric", "k = 1::float8")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "condition"), UNKNOWN)
def test_what_is_not_understood_leaves_every_shard(cursor, name, condition):
    written = write_down(cursor, name, condition)
    for function in (*KINDS[name].functions, ShardByModulo(ALL), ShardByCallable(spread)):
        if getattr(function, "null", None) or (condition == "k IS NULL" and home(function)):
            continue
        found = possible_shards(written.condition, is_key, function, ALL, KINDS[name].column)
        assert found == EVERY


def home(function):
    """Where the row whose key is NULL is, if that is known."""
    try:
        return function.shard_of(None)
    except TopologyError:
        return None


def parse(condition):
    return sqlglot.parse_one(f"SELECT 1 WHERE {condition}", dialect="postgres").args["where"].this


def shards_of(condition, function=None, key_type="bigint", shards=ALL, **options):
    function = function or ShardByModulo(ALL)
    condition = parse(condition) if isinstance(condition, str) else condition
    return possible_shards(condition, is_key, function, shards, key_type, **options)


def test_without_a_condition_a_function_or_a_known_type_every_shard_stays():
    one = parse("(k = 7)")
    assert possible_shards(None, is_key, ShardByModulo(ALL), ALL, "bigint") == EVERY
    assert possible_shards(one, is_key, None, ALL, "bigint") == EVERY
    assert shards_of("(k = 7)", key_type="pg_catalog.int8") == {"s3"}
    for unknown in ("", "citext", "character(3)", "bigint[]", "double precision", "my_domain"):
        assert shards_of("(k = 7)", key_type=unknown) == EVERY
    assert shards_of("(k = 7)", key_type="numeric") == EVERY  # of which a modulo knows nothing


def test_a_shard_that_is_not_there_means_every_shard():
    assert shards_of("(k = 7)", ShardByCallable(lambda key: "s9")) == EVERY
    assert shards_of("(k = 7)", shards=("s1", "s2")) == {"s1", "s2"}


def test_rows_that_an_outer_join_makes_up_are_no_rows_of_the_table():
    function = ShardByModulo(ALL, null="s5")
    assert shards_of("(k IS NULL)", function) == {"s5"}
    assert shards_of("(k IS NULL)", function, may_be_missing=True) == EVERY
    assert shards_of("((k = 1) OR (k IS NULL))", function, may_be_missing=True) == EVERY
    assert shards_of("((k = 1) OR (x = 3))", function, may_be_missing=True) == EVERY
    assert shards_of("((k = 1) AND (x IS NULL))", function, may_be_missing=True) == {"s2"}
    assert shards_of("(k > 5) AND (k < 7)", function, may_be_missing=True) == {"s2"}


@pytest.mark.parametrize(
    "condition",
    [
        "(k = '7'::public.\"integer\")",
        "(k OPERATOR(public.=) 7)",
        "(k = 'x'::bigint)",
        "(k = '7'::integer[])",
        "(k = ANY ('7'::integer))",
        "(k = ANY ('{1,{2}}'::integer[]))",
        "(k = ANY ('{1,NULL}'::integer[]))",
        "(k = ANY (ARRAY[ARRAY[1], ARRAY[2]]))",
        "(k = ALL (ARRAY[7]))",
        "(k = SOME (SELECT 7))",
        "(k = ANY (ARRAY[7]::text[]))",
        "(NOT (k = ANY (ARRAY[7])))",
        "(NOT ((k = 7) IS TRUE))",
        "(k = TRY_CAST('7' AS bigint))",
        "(k[1] = 7)",
        "(k = 7) = false",
        '(k = 300::smallint::"char")',
        "(k = (70000)::smallint)",
    ],
)
def test_odd_forms_leave_every_shard(condition):
    assert shards_of(condition) == EVERY


def test_the_order_of_texts_is_the_collations():
    for condition in ("(k = 'B'::text) AND (k > 'a'::text)", "(k > 'a'::text) AND (k < 'B'::text)"):
        listed = ShardByList({"a": "s1", "B": "s2"}, default="s3")
        assert "s2" in shards_of(condition, listed, "text")


def test_null_stays_possible_behind_a_wide_or():
    function = ShardByModulo(ALL, null="s5")
    for wide in ("(k > 5)", "(x = 3)", "(k <> 5)"):
        assert shards_of(f"((k IS NULL) OR {wide}) AND (k IS NULL)", function) == {"s5"}


def test_older_trees_of_is_not_null_are_read_as_well():
    key = exp.column("k")
    negated = exp.Not(this=exp.Is(this=key, expression=exp.Null()))
    function = ShardByModulo(ALL[:2], null="s5")
    assert shards_of(exp.Not(this=negated), function) == EVERY
    both = exp.And(this=negated, expression=parse("(k IS NULL)"))
    assert shards_of(both, function) == frozenset()


def test_long_conditions_are_read_and_too_deep_ones_leave_every_shard():
    many = " OR ".join(f"(k = {5 * n})" for n in range(300))
    assert shards_of(f"({many})") == {"s1"}
    listed = ", ".join(str(5 * n) for n in range(5000))
    assert shards_of(f"(k = ANY (ARRAY[{listed}]))") == {"s1"}
    deep = parse("(k = 5)")
    for _ in range(2000):
        deep = exp.And(this=exp.Or(this=deep, expression=exp.false()), expression=exp.true())
    assert shards_of(deep) in ({"s1"}, EVERY)
