"""What a query reads, asked of PostgreSQL's catalog: what a view that is made of it depends on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dask_shardsql.engine.drivers.rows import double_quoted
from dask_shardsql.errors import MergeRefusedError
from dask_shardsql.topology import ShardedTable

__all__ = [
    "ATTRIBUTES",
    "BEHIND",
    "FUNCTIONS",
    "GUARDED",
    "JIT",
    "KEYS",
    "KEY_FACTS",
    "NAMESAKES",
    "NO_JIT",
    "PARENTS",
    "POLICIES",
    "READ_BY",
    "RELATIONS",
    "ROW_COLUMNS",
    "RULES",
    "WIDTH",
    "Relation",
    "sharded_tables",
]

# compiling one of these takes longer than to run it, which the planner does not foresee
NO_JIT, JIT = "SET LOCAL jit = off", "SET LOCAL jit TO DEFAULT"

# what a view reads, through the views in it: relations, their columns, constraints, functions
_USED = """
WITH RECURSIVE used(kind, oid, part) AS (
    SELECT d.refclassid, d.refobjid, d.refobjsubid
    FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_depend d
        ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
    WHERE r.ev_class = %(view)s::pg_catalog.regclass AND d.refobjid <> r.ev_class
    UNION
    SELECT d.refclassid, d.refobjid, d.refobjsubid
    FROM used JOIN pg_catalog.pg_rewrite r
        ON used.kind = 'pg_catalog.pg_class'::pg_catalog.regclass
        AND r.ev_class = used.oid AND r.rulename = '_RETURN'
    JOIN pg_catalog.pg_class v ON v.oid = r.ev_class AND v.relkind = 'v'
    JOIN pg_catalog.pg_depend d
        ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
        AND d.refobjid <> r.ev_class
)"""
RELATIONS = (
    _USED
    + """
SELECT c.oid::int8, n.nspname, c.relname, c.relkind::text, c.relhassubclass,
    pg_catalog.array_remove(pg_catalog.array_agg(DISTINCT used.part), 0)
FROM used JOIN pg_catalog.pg_class c
    ON used.kind = 'pg_catalog.pg_class'::pg_catalog.regclass AND c.oid = used.oid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
GROUP BY 1, 2, 3, 4, 5 ORDER BY 2, 3"""
)
KEYS = (
    _USED
    + """
SELECT k.conrelid::int8, k.conkey FROM used JOIN pg_catalog.pg_constraint k
    ON used.kind = 'pg_catalog.pg_constraint'::pg_catalog.regclass AND k.oid = used.oid"""
)
# functions and relations behind it: of functions themselves, aggregates, operators, domains, types
BEHIND = (
    _USED
    + """, behind(kind, oid) AS (
    SELECT kind, oid FROM used WHERE kind IN (
        'pg_catalog.pg_proc'::pg_catalog.regclass, 'pg_catalog.pg_operator'::pg_catalog.regclass,
        'pg_catalog.pg_type'::pg_catalog.regclass, 'pg_catalog.pg_cast'::pg_catalog.regclass)
    UNION
    SELECT next.kind, next.oid FROM behind, LATERAL (
        SELECT d.refclassid, d.refobjid FROM pg_catalog.pg_depend d
        WHERE d.classid = behind.kind AND d.objid = behind.oid
            AND behind.kind NOT IN ('pg_catalog.pg_class'::pg_catalog.regclass,
                'pg_catalog.pg_language'::pg_catalog.regclass)
        UNION ALL
        SELECT 'pg_catalog.pg_constraint'::pg_catalog.regclass, k.oid
        FROM pg_catalog.pg_constraint k WHERE k.contypid = behind.oid
            AND behind.kind = 'pg_catalog.pg_type'::pg_catalog.regclass
    ) AS next(kind, oid)
)
SELECT NULL::text, NULL::text, true, behind.oid::int8 FROM behind
WHERE behind.kind = 'pg_catalog.pg_class'::pg_catalog.regclass
UNION ALL
SELECT p.proname, p.prosrc,
    p.provolatile = 'i' OR l.lanname = 'internal' OR p.prokind = 'a' OR l.lanname = 'c'
        AND NOT p.proargtypes::pg_catalog.oid[] && '{text,regclass,name,varchar,cstring,oid}'
            ::pg_catalog.regtype[]::pg_catalog.oid[], NULL
FROM behind JOIN pg_catalog.pg_proc p
    ON behind.kind = 'pg_catalog.pg_proc'::pg_catalog.regclass AND p.oid = behind.oid
JOIN pg_catalog.pg_language l ON l.oid = p.prolang"""
)
RULES = (
    _USED
    + """
SELECT bool_or(r.ev_action::text LIKE '%%:varattno 0 %%'),
    bool_or(r.ev_action::text LIKE '%%:varattno -%%'), pg_catalog.array_agg(DISTINCT named.oid)
        FILTER (WHERE named.oid IS NOT NULL), min(of_server.name)
FROM pg_catalog.pg_rewrite r LEFT JOIN LATERAL (
    SELECT m[1]::pg_catalog.oid::pg_catalog.regclass::text FROM pg_catalog.regexp_matches(
        r.ev_action::text, ':rtekind 0 :relid (\\d+) ', 'g') m WHERE m[1]::int8 < 16384
) of_server(name) ON true LEFT JOIN LATERAL (
    SELECT c.oid::int8 FROM pg_catalog.regexp_matches(r.ev_action::text, ':consttype 2205 [^{}]*'
        ':constvalue 4 \\[ (-?\\d+) (-?\\d+) (-?\\d+) (-?\\d+) ', 'g') b
    JOIN pg_catalog.pg_class c ON c.oid::int8 IN (
        (b[1]::int8 & 255) + (b[2]::int8 & 255) * 256 + (b[3]::int8 & 255) * 65536
            + (b[4]::int8 & 255) * 16777216,
        (b[4]::int8 & 255) + (b[3]::int8 & 255) * 256 + (b[2]::int8 & 255) * 65536
            + (b[1]::int8 & 255) * 16777216)
) named ON true
WHERE r.ev_class = %(view)s::pg_catalog.regclass OR r.ev_class IN (
    SELECT used.oid FROM used JOIN pg_catalog.pg_class v ON v.oid = used.oid AND v.relkind = 'v'
    WHERE used.kind = 'pg_catalog.pg_class'::pg_catalog.regclass)"""
)
# all functions, aggregates and operators that a view calls, through the views in it; of what the
# parser has an own node for, CURRENT_DATE and its like ask for the time, and all else is volatile
FUNCTIONS = (
    _USED
    + r""", rules(action) AS (
    SELECT r.ev_action::text FROM pg_catalog.pg_rewrite r
    WHERE r.ev_class = %(view)s::pg_catalog.regclass OR r.ev_class IN (
        SELECT used.oid FROM used JOIN pg_catalog.pg_class v
            ON v.oid = used.oid AND v.relkind = 'v'
        WHERE used.kind = 'pg_catalog.pg_class'::pg_catalog.regclass)
)
SELECT DISTINCT p.proname::text, p.prokind::text, p.provolatile::text, p.pronargs::int4,
    p.oid >= 16384 OR called.is_own, 'pg_catalog.regclass'::pg_catalog.regtype IN (
        SELECT pg_catalog.unnest(p.proargtypes::pg_catalog.oid[] || p.prorettype))
FROM (
    SELECT m[1]::pg_catalog.oid, false FROM rules, pg_catalog.regexp_matches(
        action, ':(?:funcid|opfuncid|aggfnoid|winfnoid|hashfuncid) (\d+)', 'g') m
    UNION
    SELECT o.oprcode::pg_catalog.oid, o.oid >= 16384 FROM rules, pg_catalog.regexp_matches(
        action, ':opno (\d+)', 'g') m
    JOIN pg_catalog.pg_operator o ON o.oid = m[1]::pg_catalog.oid
) AS called(oid, is_own) JOIN pg_catalog.pg_proc p ON p.oid = called.oid
UNION ALL
SELECT 'node', 'f', 'v', 0, false, false FROM rules
WHERE action ~ '\{(NEXTVALUEEXPR|CURRENTOFEXPR|XMLEXPR|RANGETBLFUNCTION) '
    OR action ~ '\{SQLVALUEFUNCTION :op (9|\d\d) '
UNION ALL
SELECT 'now', 'f', 's', 0, false, false FROM rules WHERE action ~ '\{SQLVALUEFUNCTION :op \d '"""
)
# by name, of one column of a table; one collation that takes different texts for equal may be that
# of whatever a key is compared with, too
KEY_FACTS = """
SELECT n.nspname::text, t.typname::text, a.attnotnull AND NOT EXISTS (
    SELECT FROM pg_catalog.pg_constraint k WHERE k.conrelid = a.attrelid AND k.contype = 'n'
        AND NOT k.convalidated AND a.attnum = ANY(k.conkey)), a.attcollation = 0 OR NOT EXISTS (
    SELECT FROM pg_catalog.pg_collation c WHERE NOT c.collisdeterministic), (
    SELECT pg_catalog.array_agg(o.attname::text) FROM pg_catalog.pg_attribute o
    WHERE o.attrelid = a.attrelid AND o.attnum > 0 AND NOT o.attisdropped)
FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
WHERE a.attrelid = %(table)s::pg_catalog.oid AND a.attname = %(key)s AND a.attnum > 0"""
# of all columns of a relation, in their order
ATTRIBUTES = """
SELECT a.attname::text, pg_catalog.format_type(a.atttypid, NULL), a.atttypid::int8, a.atttypmod,
    a.attcollation::int8
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = %(table)s::pg_catalog.regclass AND a.attnum > 0 ORDER BY a.attnum"""
# about the least that its rows take, if no value is missing
WIDTH = """
SELECT pg_catalog.sum(CASE WHEN a.attlen > 0 THEN a.attlen ELSE 8 END)
FROM pg_catalog.pg_attribute a
WHERE a.attrelid = %(table)s::pg_catalog.regclass AND a.attnum > 0"""
# of a view, those whose values are rows of some tables, or arrays of such
ROW_COLUMNS = """
SELECT a.attname::text FROM pg_catalog.pg_attribute a
JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
JOIN pg_catalog.pg_class c ON c.reltype IN (t.oid, t.typelem)
WHERE a.attrelid = %(view)s::pg_catalog.regclass
    AND c.oid = ANY(%(tables)s::int8[]::pg_catalog.oid[])"""
READ_BY = """
SELECT d.refobjid::int8 FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_depend d
    ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
WHERE r.ev_class = %(view)s::pg_catalog.oid
    AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid <> r.ev_class"""
# a table, and whatever is a part of it: partitions, and tables that inherit
_FAMILY = """
WITH RECURSIVE family(oid) AS (
    SELECT pg_catalog.to_regclass(%(name)s)::pg_catalog.oid
    UNION
    SELECT i.inhrelid FROM pg_catalog.pg_inherits i JOIN family ON i.inhparent = family.oid
)
SELECT oid::int8 FROM family WHERE oid IS NOT NULL"""
PARENTS = """
WITH RECURSIVE parent(oid) AS (
    SELECT unnest(%(tables)s::int8[])::pg_catalog.oid
    UNION
    SELECT i.inhparent FROM pg_catalog.pg_inherits i JOIN parent ON i.inhrelid = parent.oid
)
SELECT oid::int8 FROM parent"""
# of some tables, read through some views: those whose policies apply to the login, or to an owner
# of a view
GUARDED = """
SELECT c.oid::int8 FROM pg_catalog.pg_class c
WHERE c.oid = ANY(%(tables)s::int8[]::pg_catalog.oid[]) AND c.relrowsecurity AND (
    pg_catalog.row_security_active(c.oid) OR EXISTS (
        SELECT FROM pg_catalog.pg_class v JOIN pg_catalog.pg_roles o ON o.oid = v.relowner
        WHERE v.oid = ANY(%(tables)s::int8[]::pg_catalog.oid[]) AND v.relkind = 'v'
            AND NOT (o.rolsuper OR o.rolbypassrls)
            AND (v.relowner <> c.relowner OR c.relforcerowsecurity)))"""
# what policies depend on: relations, whether they have policies, and functions of users
POLICIES = """
SELECT CASE d.refclassid WHEN 'pg_catalog.pg_class'::pg_catalog.regclass THEN d.refobjid::int8 END,
    coalesce(c.relrowsecurity, true)
FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_depend d
    ON d.classid = 'pg_catalog.pg_policy'::pg_catalog.regclass AND d.objid = p.oid
LEFT JOIN pg_catalog.pg_class c
    ON d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND c.oid = d.refobjid
WHERE p.polrelid = ANY(%(tables)s::int8[]::pg_catalog.oid[]) AND d.refobjid <> p.polrelid
    AND d.refobjid >= 16384 AND d.refclassid IN (
        'pg_catalog.pg_class'::pg_catalog.regclass, 'pg_catalog.pg_proc'::pg_catalog.regclass)"""
NAMESAKES = """
SELECT n.nspname FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relname = %(name)s AND c.relkind IN ('r', 'p', 'f', 'v', 'm')
    AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema' ORDER BY 1"""


class Relation(NamedTuple):
    """A table or view that a query reads, and which of its columns."""

    oid: int
    schema: str
    name: str
    kind: str  # as in pg_class.relkind
    is_inherited: bool
    columns: Sequence[int]  # by number

    @property
    def full_name(self) -> str:
        """The name, quoted, with its schema."""
        return f"{double_quoted(self.schema)}.{double_quoted(self.name)}"


def sharded_tables(
    rows: Callable[..., list[tuple[Any, ...]]], sharded: Sequence[ShardedTable]
) -> dict[int, ShardedTable]:
    """Return every sharded table by oid, also for all that is a part of one.

    Raises
    ------
    MergeRefusedError
        One is not there.
    """
    found: dict[int, ShardedTable] = {}
    for table in sharded:
        name = ".".join(map(double_quoted, table.name.split(".", 1)))
        family = rows(_FAMILY, name=name)
        if not family:
            raise MergeRefusedError(
                "unknown-table",
                f"the topology's sharded table {table.name!r} is not to be found: write it as the "
                "database has it, upper and lower case too, and with its schema if that is not in "
                "the search_path",
            )
        found |= {oid: table for (oid,) in family}
    return found
