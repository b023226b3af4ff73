"""The examples in the docstrings of the package."""

import doctest
import importlib

import pytest
from conftest import ROOT

FILES = (path for path in sorted((ROOT / "probabilistic_sam").rglob("*.py")) if ">>>" in path.read_text())
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_docstrings(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


def test_examples_are_found():
    assert {"probabilistic_sam.metrics.functional", "probabilistic_sam.training.optimization"} < set(MODULES)
