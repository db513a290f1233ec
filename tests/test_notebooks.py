"""The notebooks run from their first cell to their last, at a small size, one after the other as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {
    "STEPS": {"1_tokens_and_masks": {"tokenizer": 2, "pretrain": 2}, "2_fine_tuning": 5},
    "IMAGES": {"1_tokens_and_masks": 110},
    "PER_CLASS": {"2_fine_tuning": 4},
}


def small(name: str) -> str:
    """The cell that follows the parameters: fewer steps, and no more threads than a test may take."""
    lines = [f"{key} = {values[name]!r}" for key, values in SMALL.items() if name in values]
    return "\n".join(["import torch", "torch.set_num_threads(1)", *lines])


@pytest.mark.long
@pytest.mark.timeout(600)
def test_notebooks_run(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    assert len(NOTEBOOKS) == 3
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, as_version=4)
        place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(small(file.stem)))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        assert len(pictures) >= 3, file.name
    assert (tmp_path / "runs/notebooks/my_model/model.safetensors").is_file()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_says_what_it_needs(file):
    """The first cell says what is needed, the second what may be changed; outputs hold no path of the machine."""
    import nbformat

    notebook = nbformat.read(file, as_version=4)
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert "**What it needs**" in first.source
    assert second.metadata["tags"] == ["parameters"]
    text = file.read_text()
    assert not re.search(r"/(home|root|tmp|Users)/", text)
    assert len(text) < 2_000_000
