"""`examples/notebook.ipynb` runs from top to bottom, in a kernel of its own."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples/notebook.ipynb"


def test_every_cell_runs_and_shows_what_it_should(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    executed = NotebookClient(
        notebook, timeout=100, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}, "no errors, no warnings"
    figures = [output for output in outputs if "image/png" in output.data]
    assert len(figures) == 3
    assert outputs[-1].data["text/plain"] == "True", "after the checkpoint was restored, the losses are the same"


def test_no_output_is_committed():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
