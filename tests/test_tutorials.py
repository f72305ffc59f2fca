"""The tutorials run from the first cell to the last, and hold nothing of the machine that they were run on."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
FOLDERS = re.compile(r"(?<![\w.])(/(home|Users|root|work|tmp)/|[A-Za-z]:\\+Users)")

# These are run by the tests, and so by each check in CI; `make docs-all`, once a week and for each release, runs all.
FAST = {"quick_start", "own_program"}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def text(notebook):
    """Sources and outputs of all cells, without pictures, and the metadata."""
    parts = [json.dumps(notebook.metadata)]
    for cell in notebook.cells:
        parts.append(cell.source)
        for output in cell.get("outputs", []):
            parts.append(output.get("text", ""))
            parts += [str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(parts)


def test_there_are_tutorials_and_the_table_names_each():
    table = (TUTORIALS / "README.md").read_text()
    assert NOTEBOOKS
    assert set(re.findall(r"\]\((\w+\.ipynb)\)", table)) == {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("name", sorted(FAST))
@pytest.mark.slow
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # no profile of the user's
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    folder = tmp_path / "run"
    folder.mkdir()
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()  # raises at the first cell that does
    assert not list(folder.iterdir())


@each
def test_it_is_saved_with_its_outputs_and_without_paths(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")  # a title, by which the documentation lists it
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert not FOLDERS.search(text(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.stat().st_size < 1_000_000
