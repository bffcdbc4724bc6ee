"""What README.md and CLAUDE.md say: the Python runs, in a folder of runs like any, and the commands are some."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import results
from analysis.dashboard import dashboard_parser
from analysis.measure import evaluate_parser
from checkpoint import save_checkpoint
from config import Config
from language_model import check_model
from runtime import cli
from sae import build_sae

ROOT = Path(results.__file__).parent
PYTHON = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMAND = re.compile(r"\b(?:python|torchrun)\b[^`\n]*?\b(main|results)\.py\b([^`\n)]*)")
BENCHMARKS = ("step", "stream", "recorded", "sweep", "dashboard", "ground_truth", "findings", "quality")
COMMANDS = [
    (program, shlex.split(words, comments=True))
    for name in ("README.md", "CLAUDE.md")
    for program, words in COMMAND.findall((ROOT / name).read_text().replace("\\\n", " "))
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs/<sweep>, literally so, of one SAE."""
    sae = build_sae(check_model(Config(sae_type="topk", num_tokens=2048, dict_size=64, target_l0=8, device="cpu")))
    folder = tmp_path / "runs" / "<sweep>" / sae.cfg.name
    save_checkpoint(sae, folder / "step-000001")
    (folder / "config.json").write_text(json.dumps(sae.cfg.to_dict()))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 2048, "eval/l0": 8.0}) + "\n")
    save_checkpoint(sae, tmp_path / "runs" / "<sweep>" / "<name>" / "step-000146")
    (tmp_path / "my.yaml").write_text("target_l0: [16, 32]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python(here: Path) -> None:
    """The blocks one after the other, as in a notebook."""
    names: dict[str, Any] = {}
    for block in PYTHON:
        exec(block, names)
    assert names["latents"].shape == (*names["tokens"].shape, 64) and len(names["features"]) == 5
    assert not torch.equal(names["ablated"], names["logits"])
    assert names["density"].sum() == pytest.approx(8, abs=1e-4) and len(names["contexts"]) > 3
    assert (names["nearest"]["cosine"] > 0.999).all() and (names["without"]["kl"] >= 0).all()
    assert sorted(path.name for path in (here / "runs" / "<sweep>").glob("density.*")) == ["density.pdf", "density.png"]


def test_options_of_benchmarks_are_some() -> None:
    """argparse takes --no-x of an option --x that is yes or no."""
    found = re.findall(r"python (benchmarks/\w+\.py)([^`\n#]*)", (ROOT / "README.md").read_text())
    assert {name for name, _ in found} == {f"benchmarks/{name}.py" for name in BENCHMARKS}
    for name, words in found:
        known = re.findall(r'add_argument\("(--[a-z0-9-]+)"', (ROOT / name).read_text())
        options = [word.replace("--no-", "--") for word in words.split() if word.startswith("--")]
        assert set(options) <= set(known), name


def test_there_are_commands_and_python() -> None:
    assert len(COMMANDS) > 20 and len(PYTHON) > 3


@pytest.mark.parametrize("program, words", COMMANDS, ids=str)
def test_commands(here: Path, program: str, words: list[str]) -> None:
    """They are understood."""
    if program == "main":
        options = None if cli.answer(words) else cli.parse(words)
        assert options is None or options.resume or options.cfgs
    else:
        parsers = {"dashboard": dashboard_parser, "evaluate": evaluate_parser}
        parser = parsers.get(words[0], results.table_parser)()
        parser.parse_args(words[words[0] in parsers :])
