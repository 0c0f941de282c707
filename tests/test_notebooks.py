"""Every notebook runs from top to bottom in a fresh kernel, and says again what its committed outputs say: every `match:` line, text for text."""
import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
NAMES = ["1_threat_model_and_pgd", "2_binary_masks", "3_lafa", "4_advlora", "5_trusting_robust_numbers"]
PATHS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    """The code cells with something in them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def matches(notebook):
    """The lines that compare, cell by cell, in order; a stream may be cut into several outputs."""
    found = []
    for cell in code(notebook):
        text = "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")
        found += [line for line in text.split("\n") if "match:" in line]
    return found


def shown(output):
    """All that an output shows as text: a stream, an error, or the text forms of a result."""
    values = [output.get("text", ""), *output.get("traceback", []), *(v for k, v in output.get("data", {}).items() if not k.startswith("image/"))]
    return "\n".join(map(str, values))


def test_the_five_are_there():
    assert [path.stem for path in PATHS] == NAMES


@each
def test_it_is_committed_as_executed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1)), "run it from top to bottom, and save it"
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert [o.ename for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.get("name") == "stderr"] == [], "warnings do not help a reader"
    assert path.stat().st_size <= 400 * 1024
    lines = matches(notebook)
    assert len(lines) >= 5 and [line for line in lines if not line.endswith("match: True")] == []


@each
def test_it_names_no_folder_of_a_machine(path):
    text = "\n".join(shown(output) for cell in code(read(path)) for output in cell.outputs)
    assert re.findall(r"(?:(?<![\w.])/(?:home|root|Users|tmp|work|usr|opt|mnt|var|private|content)/|\b[A-Za-z]:\\)\S*", text) == []


@each
def test_it_says_the_same_again(path, monkeypatch, tmp_path):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))    # nobody's profile or start-up files
    notebook = read(path)
    committed = matches(notebook)
    for cell in code(notebook):
        cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    again = matches(notebook)
    assert again == committed
    assert [line for line in again if not line.endswith("match: True")] == []
