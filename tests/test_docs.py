"""Every doctest and every Python block of the README and of docs/ runs."""

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import jax
import pytest

import experiments
import fnn

ROOT = Path(__file__).parents[1]
PACKAGES = (fnn, experiments)
MODULES = [
    m.name
    for p in PACKAGES
    for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")
    if "__main__" not in m.name
]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def as_a_newcomer_has_it():
    """JAX's own defaults: what a reader pastes runs in them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert (
        doctest.testmod(
            importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
        ).failed
        == 0
    )


def test_the_blocks_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "readme.py"
    file.write_text("\n".join(BLOCKS))  # a block uses what those before it made
    runpy.run_path(str(file))


def test_the_blocks_of_the_page_on_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks_of("rules.md"):
        exec(block, {})


@pytest.mark.parametrize("page", ["training.md", "scaling.md"])
def test_the_blocks_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(blocks_of(page)), {})  # a block uses what those before it made


def blocks_of(page):
    found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert found
    return found


def test_the_readme_has_python_blocks():
    assert len(BLOCKS) >= 3
