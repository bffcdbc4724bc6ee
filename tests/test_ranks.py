"""Several processes: what they compute together is what one computes alone, and none outlives another unnoticed."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import SWEEP, left_behind, sweep_folder
from torch.testing import assert_close

from disk import load_state
from sae import SAE_TYPES

ForkAll = Callable[..., list[dict]]
Place = Callable[[], Path]
SMALL = [*SWEEP, "--sae-type", "topk", "batchtopk", "jumprelu", "--seed=0"]
GONE = "another process of this run is gone; its own output, or its machine, says why"


def together(fork_all: ForkAll, *args: str, processes: int, **how: object) -> list[dict]:
    answers = fork_all(*args, processes=processes, **how)
    for answer in answers:
        assert answer["rc"] == 0, answer["err"]
    return answers


# ---- sharing batches: the arithmetic ----


@pytest.fixture(scope="module")
def one_step(fork_all: ForkAll, place: Place) -> dict[int, Path]:
    folders = {processes: place() for processes in (1, 2, 3)}
    for processes, folder in folders.items():
        together(fork_all, job="one_step", processes=processes, cwd=folder)
    return folders


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("sae_type", ["vanilla", "topk", "jumprelu"])
def test_a_step_is_that_of_one_process_on_the_whole_batch(
    one_step: dict[int, Path], sae_type: str, processes: int
) -> None:
    alone = load_file(one_step[1] / f"one-step-{sae_type}-0.safetensors")
    first = load_file(one_step[processes] / f"one-step-{sae_type}-0.safetensors")
    assert first.keys() == alone.keys() and ("auxk" in first) == (sae_type == "topk")
    for name, expected in alone.items():
        if name == "smallest of the share":
            continue
        if not expected.is_floating_point():
            assert torch.equal(first[name], expected), name
            continue
        # Adam's first step is lr * sign(gradient): where a gradient is all but 0 its sign is that of rounding.
        atol = 1e-6 * float(expected.abs().max()) if "gradient" in name or expected.ndim == 0 else 2e-4
        assert_close(first[name], expected, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert all(expected.abs().max() > 0 for name, expected in alone.items() if "gradient" in name)
    others = [
        load_file(one_step[processes] / f"one-step-{sae_type}-{rank}.safetensors") for rank in range(1, processes)
    ]
    for name in ("train/loss", "train/l0", "train/l1"):  # means over the batch, so of the whole
        assert_close(first[name], alone[name], rtol=1e-5, atol=0)
        assert all(torch.equal(first[name], other[name]) for other in others)


def test_batchtopk_chooses_among_each_share_and_averages(one_step: dict[int, Path]) -> None:
    """The latents kept, on average, and the thresholds: the mean of what each process would find alone."""
    alone = load_file(one_step[1] / "one-step-batchtopk-0.safetensors")
    for processes in (2, 3):
        found = [load_file(one_step[processes] / f"one-step-batchtopk-{rank}.safetensors") for rank in range(processes)]
        assert all(torch.equal(found[0]["threshold"], other["threshold"]) for other in found)
        assert int(found[0]["threshold_updates"]) == 1
        smallest = torch.stack([of_share["smallest of the share"] for of_share in found])
        assert smallest.unique().numel() == processes
        assert_close(found[0]["threshold"], smallest.mean(), rtol=1e-6, atol=0)
        assert float(found[0]["mse"]) == pytest.approx(float(alone["mse"]), rel=0.05)


@pytest.mark.parametrize("processes", [2, 3])
def test_after_50_steps_all_hold_the_same_numbers(fork_all: ForkAll, place: Place, processes: int) -> None:
    folder = place()
    together(fork_all, job="fifty_steps", processes=processes, cwd=folder)
    states = [load_state(folder / f"fifty-steps-{rank}.safetensors") for rank in range(processes)]
    for sae_type in SAE_TYPES:
        for name, tensor in states[0][sae_type].items():
            for other in states[1:]:
                assert torch.equal(tensor, other[sae_type][name]), (sae_type, name)
    metrics = [(folder / f"metrics-{rank}.json").read_text() for rank in range(processes)]
    assert len(set(metrics)) == 1
    assert all(found["explained_variance"] > 0.2 for found in json.loads(metrics[0]))

    alone = place()
    together(fork_all, job="fifty_steps", processes=1, cwd=alone)
    stores = [load_file(folder / f"rows-{rank}.safetensors") for rank in range(processes)]
    assert all(torch.equal(store["mean"], stores[0]["mean"]) for store in stores)
    rows = [store["x"] for store in stores]
    assert len(rows[0]) == len(load_file(alone / "rows-0.safetensors")["x"]) // processes
    read = [{tuple(row.tolist()) for row in mine} for mine in rows]  # a row tells its window, as no two are alike
    assert all(len(mine & other) < len(mine) / 10 for i, mine in enumerate(read) for other in read[:i])


def test_windows_of_an_evaluation_are_shared_out_and_the_metrics_are_of_all(fork_all: ForkAll, place: Place) -> None:
    found = {}
    for processes in (1, 2, 3):
        folder = place()
        together(fork_all, job="evaluated", processes=processes, cwd=folder)
        metrics = [json.loads((folder / f"metrics-{rank}.json").read_text()) for rank in range(processes)]
        assert all(other == metrics[0] for other in metrics)
        found[processes] = metrics[0]
    for processes in (2, 3):
        for mine, alone in zip(found[processes], found[1]):
            assert mine == pytest.approx(alone, rel=1e-4)


# ---- sharing batches: whole runs ----


@pytest.fixture(scope="module")
def untroubled(fork_all: ForkAll, place: Place) -> tuple[dict, float]:
    cwd = place()
    first, second = together(fork_all, *SMALL, processes=2, cwd=cwd)
    assert first["out"].startswith("3 SAEs on tiny-gpt2") and "results.csv" in first["out"]
    assert (second["out"], first["err"], second["err"]) == ("", "", "")
    folder = sweep_folder(cwd)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["resume.safetensors"]
    return left_behind(folder), first["seconds"]


def test_killed_at_random_moments_and_resumed_the_result_is_the_same_bit_for_bit(
    fork_all: ForkAll, place: Place, untroubled: tuple[dict, float]
) -> None:
    expected, seconds = untroubled
    rng = random.Random(1)
    left = ["kill_after", "kill_at_flush"] * 4
    cwd, compared = place(), 0
    while left or compared == 0:
        begun = list(cwd.glob("runs/*/sweep.json"))
        args = ["--resume", str(begun[0].parent)] if begun else SMALL
        kill = {}
        if left:
            moment = {"kill_after": rng.uniform(0.3, 0.9) * seconds, "kill_at_flush": rng.randint(4, 40)}
            kill = {left[-1]: moment[left[-1]]}
        answers = fork_all(*args, processes=2, cwd=cwd, **kill)
        if any(answer["rc"] == -signal.SIGKILL for answer in answers):
            left.pop()
            for answer in answers:
                # The second may have ended: the first alone makes the table.
                assert answer["rc"] in (-signal.SIGKILL, 0) or (answer["rc"] == 2 and GONE in answer["err"]), answer
        else:
            assert [answer["rc"] for answer in answers] == [0, 0], answers
            assert left_behind(sweep_folder(cwd)) == expected
            cwd, compared = place(), compared + 1


@pytest.mark.parametrize("processes, killed", [(2, 1), (2, 0), (3, 0), (3, 2)])
def test_where_one_is_killed_the_others_end_and_say_so(
    fork_all: ForkAll, place: Place, processes: int, killed: int
) -> None:
    cwd = place()
    how = dict(processes=processes, cwd=cwd, signals=[["runs/*/*/step-000020", signal.SIGKILL, killed]])
    answers = fork_all(*SMALL, "--batch-size=48", "--num-tokens=48000", **how)
    folder = sweep_folder(cwd).relative_to(cwd)
    for rank, answer in enumerate(answers):
        if rank == killed:
            assert answer["rc"] == -signal.SIGKILL
            continue
        assert answer["rc"] == 2 and "Traceback" not in answer["err"]
        (line,) = answer["err"].splitlines()
        assert line == f"main.py: rank {rank}: {GONE}; to go on: torchrun ... main.py --resume {folder}"
        assert answer["seconds"] - answers[killed]["seconds"] < 30


def test_one_that_waits_for_its_device_is_ended_too(fork_all: ForkAll, place: Place) -> None:
    """As a process does whose GPU waits for what a dead one would have sent: its collectives never fail."""
    first, second = fork_all(job="waits", processes=2, cwd=place())
    assert (first["rc"], first["err"]) == (2, f"rank 0: {GONE}\n") and second["rc"] == -signal.SIGKILL
    assert first["seconds"] < 30


def test_a_state_counts_only_when_all_have_written_their_part(
    fork_all: ForkAll, place: Place, untroubled: tuple[dict, float]
) -> None:
    """The second is slow to write, and the first dies right after its own file is there."""
    cwd = place()
    first, second = fork_all(*SMALL, processes=2, cwd=cwd, before="dies_once_saved")
    assert (first["rc"], second["rc"]) == (-signal.SIGKILL, 2)
    folder = sweep_folder(cwd)
    assert load_state(folder / "resume.safetensors")["step"] == 7
    together(fork_all, "--resume", str(folder), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled[0]


def test_one_that_never_comes_is_not_waited_for_forever(fork_all: ForkAll, place: Place) -> None:
    first, second = fork_all(job="never_comes", processes=2, cwd=place())
    assert second["rc"] == 0 and first["rc"] == 70 and first["seconds"] < 20
    assert "ConnectionError: not all processes of this run have come" in first["err"]


def test_who_waits_for_the_others_at_the_end_notices_a_dead_one(fork_all: ForkAll, place: Place) -> None:
    """Four that share SAEs: the first is at the end, and the third dies. The others save what they have and end."""
    answers = fork_all(job="dies_before_the_end", processes=4, cwd=place())
    assert [answer["rc"] for answer in answers] == [2, -signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]
    assert all(answer["seconds"] < 25 for answer in answers)
    assert f"rank 0: {GONE}\n" in answers[0]["err"]


def test_who_ended_as_it_should_is_not_missed(fork_all: ForkAll, place: Place) -> None:
    together(fork_all, job="one_has_more_to_do", processes=3, cwd=place())


def test_asked_to_stop_all_stop_after_the_same_step(
    fork_all: ForkAll, place: Place, untroubled: tuple[dict, float]
) -> None:
    cwd = place()
    first, second = together(
        fork_all, *SMALL, processes=2, cwd=cwd, signals=[["runs/*/*/step-000020", signal.SIGTERM, 1]]
    )
    folder = sweep_folder(cwd)
    relative = folder.relative_to(cwd)
    assert first["out"].splitlines()[-1].endswith(f"of 60; to go on: torchrun ... main.py --resume {relative}")
    assert (second["out"], second["err"]) == ("", "")

    for processes in (1, 3):
        for rank, answer in enumerate(fork_all("--resume", str(relative), processes=processes, cwd=cwd)):
            who = "" if processes == 1 else f"rank {rank}: "
            says = f"main.py: {who}{relative}: begun by 2 processes, not {processes}; resume it with as many: torchrun"
            assert answer["rc"] == 2 and answer["err"] == f"{says} --nproc-per-node 2\n"
    together(fork_all, "--resume", str(relative), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled[0]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["resume.safetensors"]


def test_where_one_cannot_read_all_save_and_stop(
    fork_all: ForkAll, place: Place, untroubled: tuple[dict, float]
) -> None:
    cwd = place()
    first, second = fork_all(*SMALL, processes=2, cwd=cwd, before="cannot_read")
    folder = sweep_folder(cwd)
    assert (first["rc"], second["rc"]) == (2, 2)
    assert "rank 0: another process could not read its share of the text" in first["err"]
    assert "rank 1: the cable is out; to go on: torchrun ... main.py --resume runs/" in second["err"]
    assert load_state(folder / "resume.safetensors")["step"] == 33
    together(fork_all, "--resume", str(folder), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled[0]


def test_where_one_meets_nan_all_stop_before_the_step(fork_all: ForkAll, place: Place) -> None:
    cwd = place()
    answers = fork_all(*SMALL, processes=2, cwd=cwd, before="reads_nan")
    for answer in answers:
        assert answer["rc"] == 2 and "step 34, activations: not finite" in answer["err"], answer["err"]


@pytest.mark.parametrize(
    "args, expected",
    [
        (["--batch-size=65"], "batch_size = 65: 2 processes share it; give a multiple of that"),
        (["--device=cpu:0"], "device = 'cpu:0': each process of torchrun has its own; give cpu"),
    ],
)
def test_what_processes_cannot_share_is_refused(
    fork_all: ForkAll, place: Place, args: list[str], expected: str
) -> None:
    cwd = place()
    for rank, answer in enumerate(fork_all(*SMALL, *args, processes=2, cwd=cwd)):
        assert (answer["rc"], answer["err"]) == (2, f"main.py: rank {rank}: {expected}\n")
    assert not (cwd / "runs").exists()


# ---- sharing SAEs ----


def test_saes_shared_out_end_as_those_of_one_process(fork_all: ForkAll, place: Place) -> None:
    """Seven SAEs, two streams, three processes, stopped and resumed in between."""
    args = [*SWEEP, "--sae-type", "topk", "vanilla", "batchtopk", "jumprelu"]
    alone = place()
    (answer,) = fork_all(*args, cwd=alone)
    expected = left_behind(sweep_folder(alone))
    cwd = place()
    stop = [["runs/*/*/step-000020", signal.SIGTERM, None]]
    first, *others = together(fork_all, *args, "--share=saes", processes=3, cwd=cwd, signals=stop)
    relative = sweep_folder(cwd).relative_to(cwd)
    assert f"to go on: torchrun ... main.py --resume {relative}" in first["out"]
    first, *others = together(fork_all, "--resume", str(relative), processes=3, cwd=cwd)
    assert [other["out"] for other in others] == ["", ""]
    assert left_behind(cwd / relative) == expected
    assert first["out"].partition("\n\n")[2].replace(str(relative), "X") == answer["out"].partition("\n\n")[2].replace(
        str(sweep_folder(alone).relative_to(alone)), "X"
    )


def test_saes_of_many_streams_are_shared_out_too(fork_all: ForkAll, place: Place) -> None:
    cwd = place()
    args = [*SWEEP, "--sae-type=topk", "--share=saes", "--num-tokens=640"]  # seeds 0 and 1: two streams
    together(fork_all, *args, processes=2, cwd=cwd)
    assert sorted(path.name for path in sweep_folder(cwd).glob("resume*")) == [
        "resume-team-1.safetensors",
        "resume.safetensors",
    ]
    assert len(list(sweep_folder(cwd).glob("*/step-000010"))) == 2


def test_a_disk_that_not_all_see_is_refused(fork_all: ForkAll, place: Place) -> None:
    cwd = place()
    for answer in fork_all(*SMALL, processes=2, cwd=cwd, before="sees_another_disk"):
        assert answer["rc"] == 2 and "output_dir = 'runs': not the same on all machines; give one" in answer["err"]
    assert not (cwd / "runs").exists()


def test_where_one_is_killed_the_others_save_their_saes(fork_all: ForkAll, place: Place) -> None:
    cwd = place()
    kill = [["runs/*/*/step-000020", signal.SIGKILL, 1]]
    args = [*SMALL, "--share=saes", "--num-tokens=48000", "--resume-freq=100000"]
    answers = fork_all(*args, processes=3, cwd=cwd, signals=kill)
    folder = sweep_folder(cwd)
    for rank, name in ((0, "resume.safetensors"), (2, "resume-team-2.safetensors")):
        assert answers[rank]["rc"] == 2 and f"rank {rank}: {GONE}\n" in answers[rank]["err"]
        assert 0 < load_state(folder / name)["step"] < 750


# ---- torchrun itself ----


def test_torchrun_starts_stops_and_resumes_a_run(place: Place, untroubled: tuple[dict, float]) -> None:
    cwd = place()
    program = str(Path(__file__).parent.parent / "main.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    how = dict(cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, *SMALL], **how) as run:
        while not list(cwd.glob("runs/*/*/step-000020")):
            assert run.poll() is None, run.communicate()
        run.terminate()
        out, err = run.communicate()
    folder = sweep_folder(cwd)
    assert f"to go on: torchrun ... main.py --resume {folder.relative_to(cwd)}" in out, err
    done = subprocess.run([*command, "--resume", str(folder)], **how)
    assert done.returncode == 0, done.stderr
    assert left_behind(folder) == untroubled[0]
