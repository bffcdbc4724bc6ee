"""The notebooks run from top to bottom, in a copy of the repository without runs, and are committed as executed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the modules, the embedded model and the notebooks."""
    folder = tmp_path_factory.mktemp("repository")
    packages = [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in [*ROOT.glob("*.py"), *packages, ROOT / "assets"]:
        (folder / path.name).symlink_to(path)
    (folder / "notebooks").mkdir()
    for path in NOTEBOOKS:
        (folder / "notebooks" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_where_there_are_no_runs(copy: Path, notebook: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--nbmake", "-q", "-p", "no:cacheprovider", f"notebooks/{notebook.name}"]
    done = subprocess.run(command, cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len(list(copy.glob("runs/brief/tiny-*/results.csv"))) == 1


TRAINING = """
import torch
from activation_store import TensorStore
from config import Config
from sae import build_sae
from training import train

cfg = Config(act_size=8, dict_size=32, target_l0=4, num_tokens=8192, device="cpu")
train([build_sae(cfg)], TensorStore(torch.randn(9999, 8), cfgs=[cfg]))
"""


def test_training_shows_a_bar_in_jupyter(copy: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TRAINING)])
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": copy}}).execute()
    outputs = notebook.cells[0].outputs
    shown = [output for output in outputs if "application/vnd.jupyter.widget-view+json" in output.get("data", {})]
    assert len(shown) == 1 and not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_as_executed(notebook: Path) -> None:
    text = notebook.read_text()
    assert len(text) < 300_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    said = json.dumps(
        [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} | {"text": o.get("text")} for o in outputs]
    )
    assert not any(place in said for place in ("/home/", "/root/", "/tmp/", "/Users/", "site-packages", "C:\\"))
