"""single_query, with PostgreSQL as the judge of where a statement ends."""
# ruff: noqa: RUF001 - a sign beyond ASCII that is no letter is what the texts are about

from __future__ import annotations

import pytest
import values
from conftest import first_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dask_shardsql as dss
from dask_shardsql.engine.drivers.duckdb import DuckDBDriver
from dask_shardsql.engine.drivers.sqlite import SQLiteDriver
from dask_shardsql.sql.statement import single_query

# SPI parses the whole text as the simple protocol does, and opens a cursor on one statement only.
_JUDGE = """
CREATE FUNCTION pg_temp.judge(sql text) RETURNS text LANGUAGE plpgsql AS $judge$
DECLARE c refcursor;
BEGIN
  OPEN c FOR EXECUTE sql;
  CLOSE c;
  RETURN 'one';
EXCEPTION WHEN OTHERS THEN
  RETURN CASE SQLERRM WHEN 'cannot open multi-query plan as cursor' THEN 'many'
                      ELSE 'refused: ' || SQLERRM END;
END $judge$
"""


@pytest.fixture(scope="module")
def judge(servers):
    """Return 'one', 'many' or 'refused: ...', as the server sees a text."""
    connection = values.open_reference(servers)
    cursor = connection.cursor()
    cursor.execute(_JUDGE)

    def ask(sql):
        cursor.execute("SELECT pg_temp.judge(%s)", (sql,))
        return cursor.fetchone()[0]

    yield ask
    connection.close()


def verdict(sql):
    """Return what single_query makes of a text, in the judge's words, and the query."""
    try:
        return "one", single_query(sql)
    except dss.StatementError as error:
        several = "only one statement" in error.message
        return "many" if several else f"refused: {error.message}", None


def check(sql, judge):
    said, (found, query) = judge(sql), verdict(sql)
    if found == "one":
        assert said != "many"
        assert judge(f"SELECT * FROM (\n{query}\n) AS q") != "many"
        assert said != "one" or judge(query) == "one"
    if said in ("one", "many"):
        assert found == said
    return said


def test_the_judge_can_tell(judge):
    assert judge("SELECT 1") == "one"
    assert judge("SELECT 1; SELECT 2") == "many"
    assert judge(";;SELECT 1;;") == "one"
    assert judge("SELECT 'a").startswith("refused: unterminated quoted string")
    assert judge("SELECT FROM FROM").startswith("refused: syntax error")


TEXTS = [
    *("SELECT 1", "select 1;", "SELECT 1 ; ; ", ";SELECT 1", "; ; /* a */ SELECT 1", "SELECT 1--"),
    *("SELECT 1 -- ;", "SELECT 1; -- ;", "SELECT 1 --;\n;", "-- a\nSELECT 1", "--\rSELECT 1"),
    *("SELECT 1;SELECT 2", "SELECT 1; x", "SELECT 1 -- a\n; SELECT 2", "SELECT 1 --\r; SELECT 2"),
    *("/* ; */ SELECT 1", "/* /* */ ; */ SELECT 1", "SELECT 1 /* */ */", "SELECT 1 /*/ ; */"),
    *("SELECT 1 /**/; SELECT 2", "SELECT 1 /***/; SELECT 2", "SELECT 1 /*/**/*/; SELECT 2"),
    *("SELECT 2 */* ; */ 3", "SELECT 2 -/* ; */- 3", "SELECT 1 +-- ;\n 2", "SELECT 1 //* ; */ 2"),
    *("SELECT ';'", "SELECT ''';'", "SELECT '\\'; SELECT 2", "SELECT '\\'';'", "SELECT 'a\n;'"),
    *("SELECT E'\\';'", "SELECT e'\\\\'; SELECT 2", "SELECT E''';'", "SELECT E'\\'''; SELECT 2"),
    *("SELECT E'a'\n'\\';'", "SELECT E'a' -- '\n'\\';'", "SELECT E'a'\n\n --\n '\\'''; SELECT 2"),
    *("SELECT E'a'\n'\\'' ; SELECT 2 --'", "SELECT 'a'\n'\\'; SELECT 2 --'", "SELECT E'a' 'b;'"),
    *("SELECT E'a' /* */\n'\\'; SELECT 2 --'", "SELECT E'a'\r'\\';'", "SELECT E'a'\f\n\t'\\';'"),
    *(
        "SELECT N';'",
        "SELECT B'1;'",
        "SELECT x';'",
        "SELECT U&';\\0061'",
        "SELECT U&'\\'; SELECT 1",
    ),
    *('SELECT 1 AS ";"', 'SELECT 1 AS """;"', 'SELECT 1 AS "\\"; SELECT 2', 'SELECT 1 AS U&";"'),
    *("SELECT 1 AS \"'\"; SELECT 2 --'", "SELECT '\"'; SELECT 2 --\"", "SELECT U&';' UESCAPE ';'"),
    *("SELECT $$;$$", "SELECT $a$;$$;$a$", "SELECT $a$;$b$;$a$", "SELECT $A$;$a$;$A$"),
    *("SELECT $$$$; SELECT $$;$$", "SELECT $a$$a$; SELECT 2", "SELECT $_1$;$_1$", "SELECT $é$;$é$"),
    *("SELECT $×$;$×$", "SELECT $\xa0$;$\xa0$", "SELECT $a$;'$a$; SELECT 2", "SELECT $1$;$1$"),
    *("SELECT 1 AS a$b$; SELECT 2 AS a$b$", "SELECT 1 AS ×$a$; SELECT 2 AS ×$a$", "SELECT $1;"),
    *("SELECT 1 AS ×e; SELECT 2", "SELECT 1 AS é$$; SELECT 2 AS é$$", "SELECT 1 AS _$$;SELECT 2"),
    *("SELECT 1 AS a\xa0b; SELECT 2", "SELECT 1 AS \u2028;SELECT 2", "SELECT $a b$;$a b$"),
    *("(SELECT 1)", "((SELECT 1))", "( /* ; */ -- ;\n(SELECT 1));", "(SELECT 1;)", "(;SELECT 1)"),
    *(
        "VALUES (1)",
        "values(1);",
        "TABLE pg_class",
        "table\npg_class",
        "WITH a AS (SELECT 1) TABLE a",
    ),
    *(
        "wItH a(b) as (vAlUeS (1)) SeLeCt * FrOm a",
        "WITH RECURSIVE a AS (SELECT 1) SELECT * FROM a",
    ),
    *(
        "SELECT'a'",
        "SELECT(1)",
        "SELECT*FROM pg_class",
        "SELECT/**/1",
        "SELECT--\n1",
        "SELECT$$a$$",
    ),
    *("SELECT 1\v;", "SELECT\f1", "SELECT 1;\f\t\r\n", "SELECT 1;\xa0", "SELECT 1;\ufeff"),
    *(
        "SELECT 'a",
        "SELECT E'a\\",
        "SELECT E'a\\'; x \\",
        'SELECT "a',
        "SELECT $a$ ;",
        "SELECT /* ;",
    ),
    *("SELECT 1 /* /* */ ;", "SELECT $$ $a$ ;", "SELECT 'a' 'b", "SELECT E'\\';", "SELECT 1 -- \\"),
    *("SELECT 1::int4; SELECT 2", "SELECT 5 % 2", "SELECT '%s;'", "SELECT '{1}'::int[] @> '{1}'"),
    *('SELECT 1 AS "a""b;"""; SELECT 2', "SELECT '' ''; SELECT 2", "SELECT '';'';SELECT 2"),
]


@pytest.mark.parametrize("sql", TEXTS)
def test_one_statement_or_several_is_what_the_server_says(sql, judge):
    check(sql, judge)


def test_the_texts_above_cover_every_verdict(judge):
    said = [judge(sql).split(":")[0] for sql in TEXTS]
    assert min(said.count(word) for word in ("one", "many", "refused")) >= 15


TOKENS = [
    *("'", "'", "''", '"', '""', "\\", "\\'", "\\\\", "E'", "e'", "U&'", 'U&"', "N'", "x'", "b'"),
    *(
        "$$",
        "$$",
        "$a$",
        "$a$",
        "$b$",
        "$1$",
        "$é$",
        "$×$",
        "a$b$",
        "×$a$",
        "×e'",
        "$",
        "1",
        "a",
        "e",
    ),
    *("--", "-- ", "/*", "*/", "/*/", "*", "/", "-", "+", ";", ";", "; SELECT 2", "(", ")", ","),
    *("\n", "\n", "\r", " ", " ", "\t", "\f", "\xa0", "\u2028", " AS x", " AS ×", "||", "::text"),
    *("%s", "%%", "%(a)s", "SELECT 1", "'a'", "'a'\n'b'", "E'a'\n'", "UESCAPE '!'", "@", "×", "é"),
]
settled = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=values.EXAMPLES * 20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(tokens=st.lists(st.sampled_from(TOKENS), max_size=9), start=st.sampled_from(["", " ", "("]))
@settled
def test_any_tokens(tokens, start, judge):
    check(f"{start}SELECT 'a'{''.join(tokens)}", judge)


JUNK = st.text(st.sampled_from("'\"\\;$a-/*\n\r ×e%1"), max_size=8)
GAPS = st.sampled_from(
    ["", " ", "\n", "--;'\n", "/*;'*/", "/*/*;*/'*/", "\t--$$\r", " /**/ ", "/*--*/\n", "/* E'\\*/"]
)


def _dollar(text, tag):
    return f"${tag}${text}${tag}$" if f"${tag}$" not in f"{text}${tag}" else f"'{len(text)}'"


LITERALS = st.one_of(
    JUNK.map(lambda t: "'" + t.replace("'", "''") + "'"),
    JUNK.map(lambda t: "E'" + t.replace("\\", "\\\\").replace("'", "\\'") + "'"),
    JUNK.map(lambda t: "e'" + t.replace("\\", "\\\\").replace("'", "''") + "'"),
    JUNK.map(lambda t: "U&'" + t.replace("\\", "\\\\").replace("'", "''") + "'"),
    st.tuples(JUNK, st.sampled_from(["", "a", "_a1", "é", "×", "\xa0"])).map(lambda v: _dollar(*v)),
    st.tuples(JUNK, JUNK, st.sampled_from(["\n", " --'\n", "\n--\\\n\t"])).map(
        lambda v: (
            "E'"
            + v[0].replace("\\", "\\\\").replace("'", "''")
            + f"'{v[2]}'"
            + v[1].replace("\\", "\\\\").replace("'", "\\'")
            + "'"
        )
    ),
    st.integers(0, 9).map(str),
)
NAMES = st.one_of(
    JUNK.filter(bool).map(lambda t: '"' + t.replace('"', '""') + '"'),
    JUNK.filter(bool).map(
        lambda t: 'U&"' + t.replace("\\", "\\\\").replace('"', '""') + '"',
    ),
    st.sampled_from(["a", "a$b$", "×$a$", "é$$", "_e", "×e", "a1$"]),
)


@st.composite
def selects(draw):
    items = []
    for _ in range(draw(st.integers(1, 3))):
        item = draw(GAPS) + draw(LITERALS) + draw(GAPS)
        if draw(st.booleans()):
            item += f" AS {draw(GAPS)}{draw(NAMES)}"
        items.append(item)
    return (
        f"{draw(st.sampled_from(['SELECT ', 'select ', 'VALUES (1); SELECT ']))}{','.join(items)}"
    )


@given(
    statements=st.lists(selects(), min_size=1, max_size=2), end=GAPS, semicolons=st.integers(0, 2)
)
@settled
def test_valid_statements_are_counted(statements, end, semicolons, judge):
    """Every text is valid by construction, so the server always gives a verdict."""
    sql = "\n;".join(statements) + "\n" + end + ";" * semicolons
    several = len(statements) > 1 or any(s.startswith("VALUES") for s in statements)
    assert check(sql, judge) == ("many" if several else "one")


@pytest.mark.parametrize(
    "sql", ["", " ", ";", "--", "/* a */", "(", "-- SELECT 1", "/* SELECT 1 */;", "\n;\n;"]
)
def test_a_text_without_a_statement_is_refused(sql):
    with pytest.raises(dss.StatementError, match="empty"):
        single_query(sql)


@pytest.mark.parametrize(
    "sql",
    [
        *("DROP TABLE a", "insert into a values (1)", "EXPLAIN SELECT 1", "COPY a TO STDOUT"),
        *("(DELETE FROM a)", "/* SELECT */ UPDATE a SET b = 1", '"select" 1', "'SELECT 1'"),
        *("SELECTED", "select$1", "éSELECT 1", "\xa0SELECT 1", "SHOW ALL", "CALL a()", "1"),
    ],
)
def test_what_is_no_query_is_refused(sql):
    with pytest.raises(dss.StatementError, match="only a query"):
        single_query(sql)


@pytest.mark.parametrize("sql", [None, b"SELECT 1", 1, ["SELECT 1"]])
def test_what_is_no_text_is_refused(sql):
    with pytest.raises(dss.StatementError, match="must be a text"):
        single_query(sql)


def test_a_nul_character_is_refused():
    with pytest.raises(dss.StatementError, match="NUL"):
        single_query("SELECT '\0'")


def test_the_position_of_the_second_statement_is_told():
    sql = "SELECT ';' -- ;\n; /* ; */ DROP TABLE a"
    with pytest.raises(dss.StatementError) as caught:
        single_query(sql)
    assert sql[caught.value.position - 1 :] == "DROP TABLE a"


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT 1", "SELECT 1"),
        ("/* a */ SELECT 1 -- b\n; -- c", "/* a */ SELECT 1 -- b\n"),
        ("; SELECT 1;;", " SELECT 1"),
        ("\ufeff".join(["SELECT '", "'"]), "SELECT '\ufeff'"),
    ],
)
def test_the_query_keeps_its_text(sql, expected):
    assert single_query(sql) == expected


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT '" + "a''\\" * 2_000_000,
        "SELECT E'" + "a\\'''" * 2_000_000,
        "SELECT E'a'" + "\n-- '\n" * 500_000,
        "SELECT " + "E'a' -- '" * 500_000,
        "SELECT " + "/*" * 2_000_000,
        "SELECT " + "$a$" * 1_000_001,
        "SELECT " + "(" * 300_000,
        'SELECT "' + '""' * 2_000_000,
    ],
    ids=lambda sql: sql[7:17],
)
@pytest.mark.timeout(20)
def test_long_texts_take_linear_time(sql):
    assert single_query(sql) == sql


ATTACK = ") AS q; COMMIT; DROP TABLE {}; SELECT * FROM (SELECT 1 --"


@pytest.fixture
def victim(servers, table_name):
    """A table on s1, and whether it is still there."""
    connection = values.open_reference(servers, "s1")
    cursor = connection.cursor()
    cursor.execute(f"CREATE TABLE {table_name} (a int4)")

    def is_there():
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (table_name,))
        return cursor.fetchone()[0]

    yield table_name, is_there
    connection.close()


@pytest.mark.parametrize(
    "before",
    [
        *(
            "SELECT 1 AS ×$a${}; SELECT 1 AS ×$a$",
            "SELECT E'a'\n'\\''{} '",
            "SELECT 1 AS ×e'\\'{} '",
        ),
        *("SELECT '\\'{}", "SELECT 1{}", "SELECT U&'\\'{} '"),
    ],
)
def test_a_statement_cannot_be_hidden(before, servers, victim):
    table, is_there = victim
    with pytest.raises(dss.QueryError):
        dss.collect(before.format(ATTACK.format(table)), first_shards(servers, 1))
    assert is_there()


def test_the_attack_works_without_single_query(servers, victim):
    """Else the test above could not fail."""
    table, is_there = victim
    inside = "SELECT 1" + ATTACK.format(table)
    with servers.session("s1", autocommit=True) as cursor:
        cursor.execute(f"BEGIN READ ONLY; SELECT * FROM (\n{inside}\n) AS q LIMIT 0")
    assert not is_there()


@pytest.mark.parametrize(
    ("sql", "value"),
    [("'%s'", "{}"), ("1 /* %s */", "*/{}"), ("$$%s$$", "$${}"), ("E'\\'%s'", "{}")],
)
def test_a_parameter_inside_quotes_cannot_end_the_statement(sql, value, servers, victim):
    table, is_there = victim
    with pytest.raises(dss.QueryError):
        dss.collect(
            f"SELECT {sql} AS v", first_shards(servers, 1), [value.format(ATTACK.format(table))]
        )
    assert is_there()


def test_a_server_with_standard_conforming_strings_off(servers, victim):
    table, is_there = victim
    topology = first_shards(servers, 1)
    with servers.session("s1", autocommit=True) as cursor:
        cursor.execute("ALTER ROLE CURRENT_USER SET standard_conforming_strings = off")
    try:
        dsn = servers.dsns["s1"] + " application_name=another_pool"
        topology = dss.Topology.from_dsns({"s1": dsn})
        text = "\\'', 2" + ATTACK.format(table)
        # one text, as the standard reads it; with backslash escapes it would end at its second '
        found = dss.collect(f"SELECT '{text}' AS v", topology).to_pylist()
        assert found == [{"v": text.replace("''", "'")}]
        assert is_there()
        assert dss.collect("SELECT 'a\\b' AS v", topology).to_pylist() == [{"v": "a\\b"}]
    finally:
        with servers.session("s1", autocommit=True) as cursor:
            cursor.execute("ALTER ROLE CURRENT_USER RESET standard_conforming_strings")


@pytest.mark.parametrize("check", [single_query, SQLiteDriver().check, DuckDBDriver().check])
@pytest.mark.parametrize("bad", ["\ud800", "\0"])
def test_what_no_text_may_hold_is_refused(check, bad):
    with pytest.raises(dss.StatementError) as caught:
        check(f"SELECT 'a{bad}'")
    str(caught.value).encode()  # it can be printed
