"""Several processes: what they compute together is what one computes alone, and where one dies the others end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import SWEEP, left_behind, sweep_folder
from torch.testing import assert_close

from runtime import ranks
from runtime.disk import load_state
from sae import SAE_TYPES

ForkAll = Callable[..., list[dict]]
Place = Callable[[], Path]
SMALL = [*SWEEP, "--sae-type", "batchtopk", "jumprelu", "--text-seed=0", "--num-tokens=7680"]
GONE = "another process of this run is gone ("


def together(fork_all: ForkAll, *args: str, processes: int, **how: object) -> list[dict]:
    answers = fork_all(*args, processes=processes, **how)
    for answer in answers:
        assert answer["rc"] == 0, answer["err"]
    return answers


# ---- sharing batches: the arithmetic ----


@pytest.fixture(scope="module")
def one_step(fork_all: ForkAll, place: Place) -> dict[int, list[dict[str, dict[str, torch.Tensor]]]]:
    """What one process, and each of three, finds in a step, by type."""
    found = {}
    for processes in (1, 3):
        folder = place()
        together(fork_all, job="one_step", processes=processes, cwd=folder)
        found[processes] = [
            {sae_type: load_file(folder / f"one-step-{sae_type}-{rank}.safetensors") for sae_type in SAE_TYPES}
            for rank in range(processes)
        ]
    return found


@pytest.mark.parametrize("sae_type", ["vanilla", "topk", "jumprelu"])
def test_a_step_is_that_of_one_process_on_the_whole_batch(one_step: dict, sae_type: str) -> None:
    (alone,), (first, *others) = ([found[sae_type] for found in one_step[processes]] for processes in (1, 3))
    assert first.keys() == alone.keys() and ("auxk" in first) == (sae_type != "vanilla")
    for name, expected in alone.items():
        if name == "smallest of the share":
            continue
        if not expected.is_floating_point():
            assert torch.equal(first[name], expected), name
            continue
        # Adam's first step is lr * sign(gradient): where a gradient is all but 0 its sign is that of rounding.
        atol = 1e-6 * float(expected.abs().max()) if "gradient" in name or expected.ndim == 0 else 2e-4
        assert_close(first[name], expected, rtol=1e-5, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert expected.abs().max() > 0 or "gradient" not in name
    for name in ("train/loss", "train/l0", "train/l1"):  # means over the batch, so of the whole
        assert_close(first[name], alone[name], rtol=1e-5, atol=0)
        assert all(torch.equal(first[name], other[name]) for other in others)


def test_batchtopk_chooses_among_each_share_and_averages(one_step: dict) -> None:
    """The latents kept, on average, and the thresholds: the mean of what each process would find alone."""
    (alone,), found = ([found["batchtopk"] for found in one_step[processes]] for processes in (1, 3))
    assert all(torch.equal(found[0]["threshold"], other["threshold"]) for other in found)
    assert int(found[0]["threshold_updates"]) == 1
    smallest = torch.stack([of_share["smallest of the share"] for of_share in found])
    assert smallest.unique().numel() == 3
    assert_close(found[0]["threshold"], smallest.mean(), rtol=1e-6, atol=0)
    assert float(found[0]["mse"]) == pytest.approx(float(alone["mse"]), rel=0.05)


def test_after_50_steps_all_hold_the_same_numbers_from_rows_of_their_own(fork_all: ForkAll, place: Place) -> None:
    folder, alone = place(), place()
    together(fork_all, job="fifty_steps", processes=2, cwd=folder)
    first, second = (load_state(folder / f"fifty-steps-{rank}.safetensors") for rank in range(2))
    for sae_type in SAE_TYPES:
        for name, tensor in first[sae_type].items():
            assert torch.equal(tensor, second[sae_type][name]), (sae_type, name)
    metrics, others = ((folder / f"metrics-{rank}.json").read_text() for rank in range(2))
    assert metrics == others and all(found["explained_variance"] > 0.2 for found in json.loads(metrics))

    together(fork_all, job="fifty_steps", processes=1, cwd=alone)
    first, second = (load_file(folder / f"rows-{rank}.safetensors") for rank in range(2))
    assert len(first["x"]) == len(load_file(alone / "rows-0.safetensors")["x"]) // 2
    # A row tells its window, as no two are alike.
    read, also_read = ({tuple(row.tolist()) for row in found["x"]} for found in (first, second))
    assert len(read & also_read) < len(read) / 10


def test_windows_of_an_evaluation_are_shared_out_and_the_metrics_are_of_all(fork_all: ForkAll, place: Place) -> None:
    found = {}
    for processes in (1, 3):
        folder = place()
        together(fork_all, job="evaluated", processes=processes, cwd=folder)
        metrics = [json.loads((folder / f"metrics-{rank}.json").read_text()) for rank in range(processes)]
        assert all(other == metrics[0] for other in metrics)
        found[processes] = metrics[0]
    for mine, alone in zip(found[3], found[1], strict=True):
        assert mine == pytest.approx(alone, rel=1e-4)


# ---- sharing batches: whole runs ----


@pytest.fixture(scope="module")
def untroubled(fork_all: ForkAll, place: Place) -> dict:
    cwd = place()
    first, second = together(fork_all, *SMALL, processes=2, cwd=cwd)
    assert first["out"].startswith("2 SAEs on tiny-gpt2") and "results.csv" in first["out"]
    assert (second["out"], first["err"], second["err"]) == ("", "", "")
    folder = sweep_folder(cwd)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["resume.safetensors"]
    return left_behind(folder)


def test_a_state_counts_only_when_all_have_written_their_part(
    fork_all: ForkAll, place: Place, untroubled: dict
) -> None:
    cwd = place()
    first, second = fork_all(*SMALL, processes=2, cwd=cwd, before="dies_once_saved")
    folder = sweep_folder(cwd)
    assert (first["rc"], second["rc"]) == (-signal.SIGKILL, 2)
    (line,) = second["err"].splitlines()
    assert line.startswith(f"main.py: rank 1: {GONE}")
    assert line.endswith(f"says why; to go on: torchrun ... main.py --resume {folder.relative_to(cwd)}")
    assert load_state(folder / "resume.safetensors")["step"] == 7
    together(fork_all, "--resume", str(folder), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled


def test_asked_to_stop_all_stop_after_the_same_step(fork_all: ForkAll, place: Place, untroubled: dict) -> None:
    cwd = place()
    first, second = together(
        fork_all, *SMALL, processes=2, cwd=cwd, signals=[["runs/*/*/step-000020", signal.SIGTERM, 1]]
    )
    folder = sweep_folder(cwd)
    relative = folder.relative_to(cwd)
    assert first["out"].splitlines()[-1].endswith(f"of 120; to go on: torchrun ... main.py --resume {relative}")
    assert (second["out"], second["err"]) == ("", "")

    for processes in (1, 3):
        for rank, answer in enumerate(fork_all("--resume", str(relative), processes=processes, cwd=cwd)):
            who = "" if processes == 1 else f"rank {rank}: "
            says = f"main.py: {who}{relative}: begun by 2 processes, not {processes}; resume it with as many: torchrun"
            assert answer["rc"] == 2 and answer["err"] == f"{says} --nproc-per-node 2\n"
    together(fork_all, "--resume", str(relative), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["resume.safetensors"]


def test_where_one_cannot_read_both_say_why_they_end(fork_all: ForkAll, place: Place, untroubled: dict) -> None:
    cwd = place()
    first, second = fork_all(*SMALL, processes=2, cwd=cwd, before="cannot_read")
    folder = sweep_folder(cwd)
    assert (first["rc"], second["rc"]) == (2, 2)
    assert f"main.py: rank 0: {GONE}" in first["err"]
    assert "main.py: rank 1: the cable is out; to go on: torchrun ... main.py --resume runs/" in second["err"]
    together(fork_all, "--resume", str(folder), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled


def test_where_one_meets_nan_all_stop_before_the_step(fork_all: ForkAll, place: Place) -> None:
    for answer in fork_all(*SMALL, processes=2, cwd=place(), before="reads_nan"):
        assert answer["rc"] == 2 and "step 34, activations: not finite" in answer["err"], answer["err"]


# ---- what is refused ----


@pytest.mark.parametrize(
    "args, how, expected",
    [
        (["--batch-size=65"], {}, "batch_size = 65: 2 processes share it; give a multiple of that"),
        (["--device=cpu:0"], {}, "device = 'cpu:0': each process of torchrun has its own; give cpu"),
        (
            [], {"before": "sees_another_disk"},
            "output_dir = 'runs': not the same on all machines; give one that all share",
        ),
    ],
)  # fmt: skip
def test_what_processes_cannot_share_is_refused(
    fork_all: ForkAll, place: Place, args: list[str], how: dict, expected: str
) -> None:
    cwd = place()
    for rank, answer in enumerate(fork_all(*SMALL, *args, processes=2, cwd=cwd, **how)):
        assert (answer["rc"], answer["err"]) == (2, f"main.py: rank {rank}: {expected}\n")
    assert not (cwd / "runs").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device = 'cuda': 2 GPUs for more processes; give torchrun --nproc"):
        ranks.start("batches", torch.device("cuda"))


def test_one_that_never_comes_is_not_waited_for_forever(fork_all: ForkAll, place: Place) -> None:
    first, second = fork_all(job="never_comes", processes=2, cwd=place())
    assert (first["rc"], second["rc"]) == (70, 0)
    assert "ConnectionError: not all processes of this run have joined (" in first["err"]


# ---- sharing SAEs ----


def test_saes_shared_out_end_as_those_of_one_process(fork_all: ForkAll, place: Place) -> None:
    """Eight SAEs, two streams, three processes, stopped and resumed in between."""
    args = [*SWEEP, "--sae-type", "topk", "vanilla", "batchtopk", "jumprelu"]
    alone, cwd = place(), place()
    (answer,) = together(fork_all, *args, processes=1, cwd=alone)
    expected = answer["out"].partition("\n\n")[2].replace(str(sweep_folder(alone).relative_to(alone)), "X")
    stop = [["runs/*/*/step-000020", signal.SIGTERM, None]]
    first, *others = together(fork_all, *args, "--share=saes", processes=3, cwd=cwd, signals=stop)
    relative = sweep_folder(cwd).relative_to(cwd)
    assert f"to go on: torchrun ... main.py --resume {relative}" in first["out"]
    first, *others = together(fork_all, "--resume", str(relative), processes=3, cwd=cwd)
    assert [other["out"] for other in others] == ["", ""]
    assert left_behind(cwd / relative) == left_behind(sweep_folder(alone))
    assert first["out"].partition("\n\n")[2].replace(str(relative), "X") == expected


def test_saes_of_many_streams_are_shared_out_too(fork_all: ForkAll, place: Place) -> None:
    cwd = place()
    args = [*SWEEP, "--sae-type=topk", "--share=saes", "--num-tokens=640"]  # text seeds 0 and 1: two streams
    together(fork_all, *args, processes=2, cwd=cwd)
    assert {path.name for path in sweep_folder(cwd).glob("resume*")} == {
        "resume-team-1.safetensors",
        "resume.safetensors",
    }
    assert len(list(sweep_folder(cwd).glob("*/step-000010"))) == 2


@pytest.mark.parametrize("second", ["trains on", "stops"])
def test_the_first_knows_without_waiting_whether_all_are_done(fork_all: ForkAll, place: Place, second: str) -> None:
    together(fork_all, second, job="ends_last", processes=2, cwd=place())


# ---- torchrun itself ----

WAITS = """
import sys, time, torch
from pathlib import Path
from runtime import ranks

ranks.start(sys.argv[1], torch.device("cpu"))
Path(f"here {ranks.world_rank()}").touch()
while sys.argv[1] == "batches":
    ranks.mean(torch.ones(1))
if ranks.world_rank() == 1:
    time.sleep(600)
ranks.meet(False, lambda: False)
"""


def torchrun(program: str | Path, *args: str, cwd: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, *args]
    library = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": library}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def once_there(run: subprocess.Popen, cwd: Path, file: str) -> None:
    while not list(cwd.glob(file)):
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)


def processes_in(cwd: Path) -> dict[int, str]:
    """The processes that work in a folder, with torchrun's number of each."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")) == cwd:
                variables = dict(v.partition("=")[::2] for v in (process / "environ").read_text().split("\0"))
                found[int(process.name)] = variables.get("RANK", "")
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize("share", ["batches", "saes"])
def test_torchrun_ends_the_others_when_one_dies(tmp_path: Path, share: str) -> None:
    """Whether they are in a collective, or the first waits for the second, which has more to train."""
    program, cwd = tmp_path / "waits.py", tmp_path / "cwd"
    program.write_text(WAITS)
    cwd.mkdir()
    with torchrun(program, share, cwd=cwd) as run:
        for rank in (0, 1):
            once_there(run, cwd, f"here {rank}")
        (killed,) = (process for process, rank in processes_in(cwd).items() if rank == "1")
        os.kill(killed, signal.SIGKILL)
        run.communicate(timeout=240)
    assert run.returncode == 1 and processes_in(cwd) == {}


def test_torchrun_stops_when_asked(fork_all: ForkAll, place: Place, untroubled: dict) -> None:
    cwd = place()
    with torchrun(Path(__file__).parent.parent / "main.py", *SMALL, cwd=cwd) as run:
        once_there(run, cwd, "runs/*/*/step-000020")
        run.terminate()
        out, err = run.communicate(timeout=240)
    folder = sweep_folder(cwd)
    assert f"to go on: torchrun ... main.py --resume {folder.relative_to(cwd)}" in out, err
    assert processes_in(cwd) == {}
    together(fork_all, "--resume", str(folder), processes=2, cwd=cwd)
    assert left_behind(folder) == untroubled
