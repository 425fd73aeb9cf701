"""One instant for all shards: what asks PostgreSQL for the time of its transaction, or statement.

In a text that the server has written these are replaced by a setting of the session, which holds
the instant of the query: so the planner knows it, as it knows the time itself.
"""

from __future__ import annotations

from dask_shardsql.sql.statement import tokens_of

__all__ = ["FUNCTIONS", "SETTING", "with_one_instant"]

SETTING = "dask_shardsql.now"
"""Holds the instant, as a timestamp with its time zone."""
FUNCTIONS = frozenset({"now", "transaction_timestamp", "statement_timestamp"})
"""Those that give it; the others are words of the language."""
_INSTANT = f"(current_setting('{SETTING}'::text))::timestamp with time zone"
_WORDS = {
    "CURRENT_TIMESTAMP": ("timestamp", " with time zone"),
    "LOCALTIMESTAMP": ("timestamp", " without time zone"),
    "CURRENT_TIME": ("time", " with time zone"),
    "LOCALTIME": ("time", " without time zone"),
    "CURRENT_DATE": ("date", ""),
}


def with_one_instant(text: str) -> str:
    """Return a query, as the server has written it, with one instant wherever it asks for the time.

    A name with its schema stays as it is: it may be another function.
    """
    tokens = [(kind, text[start:end]) for kind, start, end in tokens_of(text)]
    found: list[str] = []
    at = 0
    while at < len(tokens):
        (kind, word), behind = tokens[at], [one for _, one in tokens[at + 1 : at + 4]]
        at += 1
        if (
            kind == "word"
            and word in FUNCTIONS
            and behind[:2] == ["(", ")"]
            and found[-1:] != ["."]
        ):
            found.append(_INSTANT)
            at += 2
        elif kind == "word" and word in _WORDS:
            name, zone = _WORDS[word]
            has_digits = len(behind) == 3 and behind[0] == "(" and behind[2] == ")"
            digits = "".join(behind) if has_digits else ""
            at += 3 if has_digits else 0
            found.append(f"(({_INSTANT})::{name}{digits}{zone})")
        else:
            found.append(word)
    return "".join(found)
