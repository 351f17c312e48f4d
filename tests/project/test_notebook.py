"""The notebook runs from an empty folder; so do its assertions, which are the reader's."""

import nbclient
import nbformat
import pytest

from tests.support.program import HANGS, ROOT


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, compilation_cache):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(compilation_cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook,
        timeout=HANGS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert (tmp_path / "digits_w2a4/manifest.json").is_file()
