"""Runs that are killed, stopped or starved, and then resumed: each ends as the run that nothing happened to."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

SWEEP = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=3840", "--dict-size=64", "--target_l0=4",
    "--lr=0.01", "--eval-windows=8", "--log-freq=10", "--perf-log-freq=30", "--checkpoint-freq=20",
    "--resume-freq=7", "--device=cpu", "--wandb-mode=disabled", "--dead-after-tokens=640", "--text-seed", "0",
    "1",
    "--sae-type", "topk", "jumprelu",
]  # fmt: skip
Run = Callable[..., dict]


@pytest.fixture(scope="module")
def untroubled(fork: Run, place: Callable[[], Path]) -> tuple[dict, float]:
    """What the sweep leaves behind, and how long it takes."""
    cwd = place()
    done = fork(*SWEEP, cwd=cwd)
    assert done["rc"] == 0, done["err"]
    found = left_behind(sweep_folder(cwd))
    assert len(found) == 4 * (2 * 3 + 1)  # SAEs times the files of 3 checkpoints, and a metrics.jsonl
    metrics = next(rows for file, rows in found.items() if "metrics" in file)
    assert [row["step"] for row in metrics] == [10, 20, 30, 30, 40, 50, 60, 60]
    return found, done["seconds"]


def sweep_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def left_behind(folder: Path) -> dict:
    """Every tensor of every checkpoint, bit for bit, and every logged value but the speed, by path."""
    found: dict = {}
    for file in sorted(folder.glob("*/step-*/*.safetensors")):
        tensors = load_file(file)
        found[str(file.relative_to(folder))] = {n: t.contiguous().numpy().tobytes() for n, t in tensors.items()}
    for file in sorted(folder.glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row.pop("train/tokens_per_second", None)
        found[str(file.relative_to(folder))] = rows
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    return found


def test_killed_at_ten_moments_and_resumed_the_result_is_the_same_bit_for_bit(
    fork: Run, place: Callable[[], Path], untroubled: tuple[dict, float]
) -> None:
    """Four of the kills fall into the writing of a checkpoint, of the state or of another file."""
    expected, seconds = untroubled
    rng = random.Random(0)
    how = {"kill_after": [0.1, 0.6 * seconds], "kill_at_flush": [1, 60]}
    left = ["kill_after"] * 6 + ["kill_at_flush"] * 4
    rng.shuffle(left)
    cwd, compared = place(), 0
    while left or compared == 0:
        begun = list(cwd.glob("runs/*/sweep.json"))
        args = ["--resume", str(begun[0].parent)] if begun else SWEEP
        if not begun:
            shutil.rmtree(cwd / "runs", ignore_errors=True)  # killed before there was anything to resume
        kill = {}
        if left:
            low, high = how[left[-1]]
            kill = {left[-1]: rng.uniform(low, high) if left[-1] == "kill_after" else rng.randint(low, high)}
        done = fork(*args, cwd=cwd, **kill)
        if done["rc"] == -signal.SIGKILL:
            left.pop()
        else:
            assert done["rc"] == 0, done["err"]
            assert left_behind(sweep_folder(cwd)) == expected
            cwd, compared = place(), compared + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_says_how_to_go_on_and_goes_on(
    fork: Run, place: Callable[[], Path], untroubled: tuple[dict, float], number: int
) -> None:
    cwd = place()
    stopped = fork(*SWEEP, cwd=cwd, signals=[["runs/*/*/step-000020", number, 0]])
    folder = sweep_folder(cwd)
    assert stopped["rc"] == 0 and "Traceback" not in stopped["err"]
    assert stopped["err"] == "\nstopping after this step; Ctrl-C again stops at once\n"
    *_, line = stopped["out"].splitlines()
    step = int(line.split()[3])
    assert 20 <= step < 60
    relative = folder.relative_to(cwd)
    assert line == f"stopped after step {step} of 60; to go on: python main.py --resume {relative}"
    resumed = fork("--resume", str(relative), cwd=cwd)
    assert (resumed["rc"], resumed["err"]) == (0, "")
    assert resumed["out"].splitlines()[0].endswith(f" activations, on from step {step}")
    assert left_behind(folder) == untroubled[0]
    again = fork("--resume", str(relative), cwd=cwd)
    table = resumed["out"].partition("\n\n")[2]
    assert (again["rc"], again["out"]) == (0, f"this sweep has been trained to its end\n\n{table}")


def test_ctrl_c_before_the_first_step_stops_at_once(
    fork: Run, place: Callable[[], Path], untroubled: tuple[dict, float]
) -> None:
    cwd = place()
    done = fork(*SWEEP, cwd=cwd, signals=[["runs/*/*/metrics.jsonl", signal.SIGINT, 0]], before="fills_slowly")
    assert (done["rc"], done["err"]) == (130, "main.py: stopped at once; no state was saved\n")
    resumed = fork("--resume", str(sweep_folder(cwd)), cwd=cwd)
    assert resumed["rc"] == 0 and resumed["out"].startswith("no state was saved; starting from the beginning\n2 SAEs")
    assert left_behind(sweep_folder(cwd)) == untroubled[0]


def test_ctrl_c_twice_stops_at_once(fork: Run, place: Callable[[], Path]) -> None:
    cwd = place()
    twice = [["runs/*/*/step-000020", signal.SIGINT, 0], ["runs", signal.SIGINT, 0]]
    done = fork(*SWEEP, cwd=cwd, signals=twice, before="slows_down_after_step_20")
    folder = sweep_folder(cwd).relative_to(cwd)
    first = "\nstopping after this step; Ctrl-C again stops at once\n"
    assert done["rc"] == 130 and "stopped" not in done["out"]
    assert done["err"] == f"{first}main.py: stopped at once; to go on: python main.py --resume {folder}\n"


def test_without_room_on_the_disk_it_says_what_is_needed_and_can_go_on_later(
    fork: Run, place: Callable[[], Path], untroubled: tuple[dict, float]
) -> None:
    cwd = place()
    full = fork(*SWEEP, cwd=cwd, file_limit=40_000)
    folder = sweep_folder(cwd).relative_to(cwd)
    (line,) = full["err"].splitlines()
    assert full["rc"] == 2 and f"{folder}/resume.safetensors" in line
    assert "File too large" in line and " bytes are free there; make room" in line
    done = fork("--resume", str(folder), cwd=cwd)
    assert done["rc"] == 0 and left_behind(cwd / folder) == untroubled[0]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--resume", "nowhere"], "nowhere/sweep.json: no such file; give the folder of a sweep"),
        (["--resume", "nowhere", "--lr", "0.1"], "--resume: give it one folder and no other option; the Configs are"),
        (["--resume"], "argument --resume: expected one argument"),
        (["gpt2", "--resume", "nowhere"], "--resume: give it one folder and no other option"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(
    fork: Run, place: Callable[[], Path], args: list[str], expected: str
) -> None:
    done = fork(*args, cwd=place())
    assert (done["rc"], done["out"]) == (2, "") and len(done["err"].splitlines()) == 1 and expected in done["err"]
