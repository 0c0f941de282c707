"""The promises of the house: sizes, and who may know of whom."""
import ast
import pathlib

import pytest

HERE = pathlib.Path(__file__).resolve().parent.parent
METHODS = [p for p in sorted([*HERE.glob("*.py"), *HERE.glob("baselines/*.py")]) if p.name != "common.py"]


def test_common_is_at_most_600_lines():
    assert len((HERE / "common.py").read_text().splitlines()) <= 600


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_is_at_most_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


def test_common_mentions_no_method():
    text = (HERE / "common.py").read_text().lower()
    assert [name for name in {"advmask", "advlora", *(p.stem for p in METHODS)} if name.lower() in text] == []


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_imports_no_method(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
    assert imported & {"baselines", *(p.stem for p in METHODS)} == set()
