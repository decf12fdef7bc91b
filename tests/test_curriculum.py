"""The table in experiments/README.md: every row of the lectures names a function, a test and an experiment that exist."""

import ast
import re
from functools import reduce
from pathlib import Path

import pytest

import fnn
from experiments.__main__ import discover

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "experiments" / "README.md").read_text().splitlines()
ROWS = [
    line.strip("| ").split(" | ") if not line.endswith("| |") else [*line.strip("| ").split(" | "), ""]
    for line in LINES
    if line.startswith("|")
]
ROWS = [[cell.strip() for cell in row] for row in ROWS if row[0] not in ("concept", "---") and not row[0].startswith("---")]


def named(cell):
    return re.findall(r"`([^`]+)`", cell)


def functions_in(file):
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_row_names_exists(row):
    _, functions, tests, experiments = row
    assert named(functions)
    assert named(tests)
    for name in named(functions):
        reduce(getattr, name.split(".")[1:], fnn)
    for name in named(tests):
        file, _, test = name.rpartition("::") if "::" in name else ("tests/test_lectures.py", "", name)
        if name.endswith(".py"):
            assert functions_in(name)
        else:
            assert test in functions_in(file)
    assert set(named(experiments)) <= set(discover())


def test_the_table_has_every_row_and_every_lecture_experiment():
    assert len(ROWS) >= 46
    shown = {name for row in ROWS for name in named(row[3])}
    others = {"benchmark", "gallery", "influence", "private-training", "privacy-audit"}
    assert set(discover()) - others <= shown
