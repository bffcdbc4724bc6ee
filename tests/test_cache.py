"""python main.py cache: the rows of a run in a folder, whatever stops it; and training from them, as from the model."""

import json
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import left_behind, sweep_folder
from torch import Tensor
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from activation_store import ActivationsStore, TensorStore
from cache import MANIFEST, SUMS
from config import Config
from language_model import check_hooks, load_model
from sae import build_sae
from training import train

Run = Callable[..., dict]
ON_TEXT = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=9600", "--device=cpu",
]  # fmt: skip
TRANSCODER = ["--site=mlp_in", "--target-site=mlp_out", "--sae-type=topk"]
CACHE = ["cache", *ON_TEXT, *TRANSCODER, "--output-dir=acts"]
TRAIN = [
    *ON_TEXT, *TRANSCODER, "--activations=acts", "--dict-size=64", "--target-l0=4", "--eval-windows=8", "--lr=0.01",
    "--wandb-mode=disabled",
]  # fmt: skip
X, Y = "blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"


def config(place: Path, **changes: object) -> Config:
    return Config(
        **dict(
            model_name=str(place / "tiny-gpt2"), dataset_path=str(place / "animals.txt"), layer=1, seq_len=32,
            model_batch_size=8, num_batches_in_buffer=4, batch_size=64, num_tokens=9600, device="cpu", dict_size=64,
            target_l0=4, eval_windows=8, lr=0.01, sae_type="topk", site="mlp_in", target_site="mlp_out",
        )
        | changes
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def recorded(folder: Path) -> dict[str, Tensor]:
    parts = [load_file(file) for file in sorted(folder.glob("rows-*"))]
    return {hook: torch.cat([part[hook] for part in parts]) for hook in parts[0]}


@pytest.fixture(scope="module")
def whole(fork: Run, place: Callable[[], Path]) -> Path:
    """A working folder with a recording in `acts`, in four files."""
    cwd = place()
    done = fork(*CACHE, cwd=cwd, before="records_small_files")
    assert (done["rc"], done["err"]) == (0, "")
    assert done["out"].splitlines() == [
        "recording 9,600 activations at 2 hooks of tiny-gpt2 into acts", "to train on them: --activations acts"
    ]  # fmt: skip
    return cwd


def test_it_holds_the_rows_of_the_stream_in_the_order_in_which_a_run_would_train_on_them(whole: Path) -> None:
    cfg = config(whole)
    model = load_model(cfg)
    store = ActivationsStore(model, [check_hooks(model, cfg)])
    batches = [store.next_batch() for _ in range(150)]
    assert sorted(contents(whole / "acts")) == [SUMS, MANIFEST, *(f"rows-000-0000{n}.safetensors" for n in range(4))]
    for hook, rows in recorded(whole / "acts").items():
        assert torch.equal(rows, torch.cat([batch[hook] for batch in batches])), hook
    assert_rows_are_of_the_same_tokens(recorded(whole / "acts"), whole)


def assert_rows_are_of_the_same_tokens(rows: dict[str, Tensor], place: Path) -> None:
    """What the model's own MLP makes of those at its input are those at its output."""
    mlp = GPT2LMHeadModel.from_pretrained(place / "tiny-gpt2").eval().transformer.h[1].mlp
    with torch.no_grad():
        assert_close(mlp(rows[X]), rows[Y], rtol=1e-4, atol=1e-4)


def test_manifest_and_checksums_tell_what_there_is(whole: Path) -> None:
    manifest = json.loads((whole / "acts" / MANIFEST).read_text())
    assert manifest["hooks"] == {X: 16, Y: 16} and sum(manifest["files"].values()) == 9600
    assert manifest["config"]["seq_len"] == 32 and manifest["config"]["dtype"] == "float32"
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=whole / "acts", capture_output=True, text=True, check=True)
    assert checked.stdout.splitlines() == [f"{file}: OK" for file in (*manifest["files"], MANIFEST)]


def test_killed_at_nine_moments_and_begun_again_the_files_are_the_same(
    fork: Run, place: Callable[[], Path], whole: Path
) -> None:
    cwd, rng, kills = place(), random.Random(0), [3, 5, 8, 10, 13, 16, 18, 19, 20]
    rng.shuffle(kills)
    while kills:
        killed = fork(*CACHE, cwd=cwd, before="records_small_files", kill_at_flush=kills.pop())
        assert killed["rc"] in (-signal.SIGKILL, 0)
        if killed["rc"] == 0:
            assert contents(cwd / "acts") == contents(whole / "acts")
            cwd = place()
    done = fork(*CACHE, cwd=cwd, before="records_small_files")
    assert done["rc"] == 0, done["err"]
    assert contents(cwd / "acts") == contents(whole / "acts")


def test_asked_to_stop_it_says_how_to_go_on_and_the_rows_are_the_same(
    fork: Run, place: Callable[[], Path], whole: Path
) -> None:
    cwd = place()
    stop = [["acts/rows-000-00001.safetensors", signal.SIGINT, 0]]
    stopped = fork(*CACHE, cwd=cwd, before="records_small_files", signals=stop)
    assert stopped["rc"] == 0 and stopped["out"].endswith(" of 9,600 activations; the same command goes on\n")
    refused = fork(*TRAIN, cwd=cwd)
    (line,) = refused["err"].splitlines()
    assert refused["rc"] == 2 and "activations = 'acts': no manifest.json there; give (or put back) a folder" in line
    assert fork(*CACHE, cwd=cwd, before="records_small_files")["rc"] == 0
    for hook, rows in recorded(cwd / "acts").items():
        assert torch.equal(rows, recorded(whole / "acts")[hook]), hook


def test_what_is_whole_is_not_recorded_again(fork: Run, whole: Path) -> None:
    before = contents(whole / "acts")
    done = fork(*CACHE, cwd=whole)
    assert (done["rc"], done["err"]) == (0, "") and done["out"].endswith("\nto train on them: --activations acts\n")
    assert contents(whole / "acts") == before


@pytest.mark.parametrize("change", ["--layer=0", "--num-batches-in-buffer=8", "--num-tokens=6400", "--site=resid_mid"])
def test_a_part_of_other_activations_is_not_gone_on_with(fork: Run, place: Callable[[], Path], change: str) -> None:
    cwd = place()
    fork(*CACHE, cwd=cwd, before="records_small_files", kill_at_flush=10)
    part = contents(cwd / "acts")
    assert "resume-000.state" in part
    done = fork(*CACHE, change, cwd=cwd)
    assert done["rc"] == 2 and "output_dir = 'acts': holds other activations; give a new folder" in done["err"]
    assert contents(cwd / "acts") == part


def test_two_processes_are_killed_and_begun_again_the_files_are_the_same(
    fork_all: Callable[..., list[dict]], place: Callable[[], Path]
) -> None:
    expected, cwd = place(), place()
    how = dict(before="records_small_files", processes=2)
    fork_all(*CACHE, cwd=expected, **how)
    kills = [[f"acts/rows-00{rank}-0000{file}.safetensors", signal.SIGKILL, rank] for rank, file in ((1, 0), (0, 1))]
    fork_all(*CACHE, cwd=cwd, signals=kills, **how)
    alone = fork_all(*CACHE, cwd=cwd, before="records_small_files")
    assert alone[0]["rc"] == 2 and "holds r" in alone[0]["err"], alone
    assert [answer["rc"] for answer in fork_all(*CACHE, cwd=cwd, **how)] == [0, 0]
    assert contents(cwd / "acts") == contents(expected / "acts")


def test_in_half_precision_the_rows_are_the_models_own(fork: Run, place: Callable[[], Path]) -> None:
    cwd = place()
    for command in (CACHE, TRAIN):
        done = fork(*command, "--dtype=bfloat16", cwd=cwd)
        assert done["rc"] == 0, done["err"]
    rows = recorded(cwd / "acts")
    assert rows[X].dtype == rows[Y].dtype == torch.bfloat16
    refused = fork(*TRAIN, cwd=cwd)
    assert "was recorded with other values; give --dtype bfloat16" in refused["err"]


def test_two_processes_write_their_shares_and_train_from_them(
    fork_all: Callable[..., list[dict]], place: Callable[[], Path], whole: Path
) -> None:
    cwd = place()
    for command in (CACHE, TRAIN):
        answers = fork_all(*command, cwd=cwd, before="records_small_files", processes=2)
        assert [answer["rc"] for answer in answers] == [0, 0], answers
    files = json.loads((cwd / "acts" / MANIFEST).read_text())["files"]
    shares = [sum(rows for name, rows in files.items() if name.startswith(f"rows-00{rank}")) for rank in (0, 1)]
    assert shares == [4800, 4800]
    together, alone = (len(recorded(folder / "acts")[X].unique(dim=0)) for folder in (cwd, whole))
    assert together > 0.95 * alone, "of different text"
    assert_rows_are_of_the_same_tokens(recorded(cwd / "acts"), cwd)


def test_training_from_it_is_training_on_the_stream_in_another_order(whole: Path) -> None:
    cfg = config(whole)
    model = load_model(cfg)
    cfg = check_hooks(model, cfg)
    stream, files = ActivationsStore(model, [cfg]), TensorStore(whole / "acts", cfgs=[cfg], model=model)
    expected, found = (train([build_sae(cfg)], store)[0] for store in (stream, files))
    assert found["ce_clean"] == expected["ce_clean"]
    for metric, within in (("explained_variance", 0.01), ("ce_recovered", 0.03), ("l0", 0.1)):
        assert abs(found[metric] - expected[metric]) < within, metric
    served = TensorStore(whole / "acts", cfgs=[cfg], model=model)
    rows, all_rows = torch.cat([served.next_batch()[X] for _ in range(150)]), recorded(whole / "acts")[X]
    for column in range(16):
        assert torch.equal(rows[:, column].sort().values, all_rows[:, column].sort().values), "each row once"


def test_a_sweep_that_trains_from_it_ends_as_if_it_had_not_been_stopped(fork: Run, whole: Path) -> None:
    often = [*TRAIN, "--checkpoint-freq=20", "--resume-freq=7"]
    assert fork(*often, "--output-dir=untroubled", cwd=whole)["rc"] == 0
    stopped = fork(*often, cwd=whole, signals=[["runs/*/*/step-000020", signal.SIGTERM, 0]])
    assert stopped["rc"] == 0 and "stopped after step" in stopped["out"]
    resumed = fork("--resume", str(sweep_folder(whole).relative_to(whole)), cwd=whole)
    assert resumed["rc"] == 0, resumed["err"]
    (untroubled,) = (whole / "untroubled").iterdir()
    assert left_behind(sweep_folder(whole)) == left_behind(untroubled)


@pytest.mark.parametrize(
    "args, expected",
    [
        ([*CACHE, "--layer=0"], "output_dir = 'acts': holds other activations; give a new folder"),
        ([*CACHE, "--output-dir=."], "output_dir = '.': holds "),
        ([*CACHE, "--output-dir=runs"], "output_dir = 'runs': give a folder for the activations"),
        ([*CACHE, "cache"], "cache: give it first, and once"),
        ([*CACHE, "--activations=acts"], "activations = 'acts': they are recorded already; leave it out"),
        ([*CACHE, "--seq-len", "16", "32"], "cache: several streams of activations; give one value"),
        ([*CACHE, "--output-dir=new", "--num-tokens=1e14"], "num_tokens = 100000000000000: they take"),
        ([*CACHE, "--dry-run"], "cache: takes neither --resume nor --dry-run"),
        ([*TRAIN, "--layer=0"], "holds no blocks.0.hook_mlp_out and blocks.0.ln2.hook_out; it holds"),
        ([*TRAIN, "--seq-len=16"], "activations = 'acts': was recorded with other values; give --seq-len 32"),
        ([*TRAIN, "--activations=nowhere"], "activations = 'nowhere': no manifest.json there"),
        ([*TRAIN, "--dry-run", "--layer=0"], "holds no blocks.0.hook_mlp_out"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(fork: Run, whole: Path, args: list[str], expected: str) -> None:
    before = contents(whole / "acts")
    done = fork(*args, cwd=whole)
    assert done["rc"] == 2 and len(done["err"].splitlines()) == 1 and expected in done["err"], done["err"]
    assert contents(whole / "acts") == before


@pytest.mark.parametrize("manifest", ["{}", '{"config": {}, "hooks": {}, "files": {}}', "[]", '{"config": 3}'])
def test_another_manifest_is_refused(fork: Run, place: Callable[[], Path], manifest: str) -> None:
    cwd = place()
    (cwd / "acts").mkdir()
    (cwd / "acts" / MANIFEST).write_text(manifest)
    done = fork(*TRAIN, cwd=cwd)
    assert done["rc"] == 2 and len(done["err"].splitlines()) == 1 and "acts/manifest.json: " in done["err"]


def test_rows_that_the_manifest_does_not_name_are_not_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "acts", tmp_path / "acts")
    save_file({X: torch.ones(5000, 16), Y: torch.ones(5000, 16)}, tmp_path / "acts" / "rows-001-00000.safetensors")
    cfg = replace(config(whole), act_size=16, target_size=16)
    stores = [TensorStore(folder / "acts", cfgs=[cfg]) for folder in (whole, tmp_path)]
    for _ in range(150):
        batches = [store.next_batch() for store in stores]
        assert torch.equal(batches[0][X], batches[1][X])


def test_a_folder_without_one_of_its_files_is_refused(fork: Run, whole: Path) -> None:
    file = whole / "acts" / "rows-000-00001.safetensors"
    kept = file.rename(whole / "kept")
    done = fork(*TRAIN, cwd=whole)
    kept.rename(file)
    assert done["rc"] == 2 and f"{file.name} is gone; copy the whole folder" in done["err"]
