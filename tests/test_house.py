"""The promises of the house: sizes, and who may know of whom."""
import ast
import pathlib

import pytest

HERE = pathlib.Path(__file__).resolve().parent.parent
METHODS = [p for p in sorted(HERE.glob("*.py")) if p.name not in ("common.py", "robustness.py")]


@pytest.mark.parametrize("name, lines", [("common.py", 600), ("robustness.py", 300), ("results/sweep.py", 80)])
def test_what_is_shared_is_small(name, lines):
    assert len((HERE / name).read_text().splitlines()) <= lines


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_is_at_most_350_lines(path):
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize("name", ["common.py", "robustness.py"])
def test_what_is_shared_mentions_no_method(name):
    text = (HERE / name).read_text().lower()
    assert [name for name in {"advmask", "advlora", *(p.stem for p in METHODS)} if name.lower() in text] == []


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
    return names


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_a_method_imports_no_method(path):
    assert imports(path) & {p.stem for p in METHODS} == set()


def test_robustness_can_be_copied():
    assert imports(HERE / "robustness.py") <= {"functools", "io", "math", "torch", "torchattacks", "matplotlib", "Figure"}
