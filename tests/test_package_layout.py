"""The layout of the package: imports run in one direction, files and functions stay short."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import se_retrofit

PACKAGE = Path(se_retrofit.__file__).parent
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def _imported(file: Path) -> set[Path]:
    """The files that a file imports from, at its top or in a function; a package's names are those of its files."""
    found = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inside = [folder / f"{alias.name}.py" for alias in node.names]
            found.update(
                [path for path in inside if path in TREES]
                or {folder.with_suffix(".py"), folder / "__init__.py"} & TREES.keys()
            )
    return found


def test_imports_have_no_circle_even_within_functions() -> None:
    own = TREES.keys() - {PACKAGE / "__init__.py"}  # which imports its names on first use
    assert len(list(TopologicalSorter({file: _imported(file) for file in own}).static_order())) == len(TREES)


def test_files_have_at_most_400_lines_and_functions_60() -> None:
    functions = [
        (file.name, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [entry for entry in functions if entry[-1] > 60] == []
    assert [file.name for file in TREES if len(file.read_text().splitlines()) > 400] == []
