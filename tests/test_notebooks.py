"""Every notebook runs from top to bottom in a fresh kernel, and says again what it says.

What must be the same are the committed outputs' `match:` lines, text for text.
"""

import importlib
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NAMES = [
    "1_threat_model_and_pgd",
    "2_binary_masks",
    "3_lafa",
    "4_advlora",
    "5_trusting_robust_numbers",
    "6_rivals",
]
PATHS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
FOLDERS = "home|root|Users|tmp|work|usr|opt|mnt|var|private|content"


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    """The code cells with something in them."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def printed(cell):
    """What a cell prints; a stream may be cut into several outputs."""
    text = ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            text += output.text
    return text


def matches(notebook):
    """The lines that compare, cell by cell, in order."""
    found = []
    for cell in code(notebook):
        found += [line for line in printed(cell).split("\n") if "match:" in line]
    return found


def shown(output):
    """All that an output shows as text: a stream, an error, or a result's text forms."""
    values = [output.get("text", ""), *output.get("traceback", [])]
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/"):
            values.append(value)
    return "\n".join(map(str, values))


def test_all_are_there():
    assert [path.stem for path in PATHS] == NAMES


@each
def test_it_is_committed_as_executed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it from top to bottom, and save it"
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", "warnings do not help a reader"
    assert path.stat().st_size <= 400 * 1024
    lines = matches(notebook)
    assert len(lines) >= 5
    assert [line for line in lines if not line.endswith("match: True")] == []


@each
def test_it_names_no_folder_of_a_machine(path):
    for cell in code(read(path)):
        for output in cell.outputs:
            text = shown(output)
            assert not re.search(rf"(?<![\w.])/(?:{FOLDERS})/", text)
            assert not re.search(r"\b[A-Za-z]:\\", text)


def test_the_second_shows_the_tables_of_the_results_as_they_are_now(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER.parent / "results")
    scale = importlib.import_module("scale")
    text = "".join(printed(cell) for cell in code(read(FOLDER / "2_binary_masks.ipynb")))
    assert scale.differences() in text and scale.movements() in text


@each
def test_it_says_the_same_again(path, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's profile or start-up files
    notebook = read(path)
    committed = matches(notebook)
    for cell in code(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(FOLDER)}}
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources=resources
    )
    client.execute()
    again = matches(notebook)
    assert again == committed
    assert [line for line in again if not line.endswith("match: True")] == []
