"""logs.py: metrics, settings and checkpoints on disk, the state to resume from, W&B without a network."""

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from checkpoint import load_checkpoint
from config import Config
from logs import RunLog, load_progress
from sae import build_sae


def two_configs(**changes: object) -> list[Config]:
    small = dict(
        act_size=6, dict_size=20, target_l0=3, batch_size=32, num_tokens=320, layer=1, seq_len=16, device="cpu"
    )
    return [Config(sae_type=sae_type, **(small | changes)) for sae_type in ("topk", "jumprelu")]


def log_something(log: RunLog) -> None:
    log.log(0, 2, 64, {"train/loss": 0.5, "train/l0": 3.0})
    log.log(1, 2, 64, {"train/loss": 0.25})
    log.log(0, 4, 128, {"train/loss": 0.125})
    log.log(0, 4, 128, {"eval/ce": 1.5})


def test_metrics_config_and_checkpoints_lie_in_the_folder_of_their_sae(tmp_path: Path) -> None:
    cfgs = two_configs(wandb_mode="disabled")
    log = RunLog(tmp_path / "sweep", cfgs)
    log_something(log)
    sae = build_sae(cfgs[1])
    log.checkpoint(sae, 4)
    log.close()
    loaded = load_checkpoint(tmp_path / "sweep" / cfgs[1].name / "step-000004")
    assert loaded.cfg == sae.cfg and torch.equal(loaded.W_enc, sae.W_enc)
    first, second = (tmp_path / "sweep" / cfg.name for cfg in cfgs)
    assert [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 2, "tokens": 64, "train/loss": 0.5, "train/l0": 3.0},
        {"step": 4, "tokens": 128, "train/loss": 0.125},
        {"step": 4, "tokens": 128, "eval/ce": 1.5},
    ]
    assert (second / "metrics.jsonl").read_text() == '{"step": 2, "tokens": 64, "train/loss": 0.25}\n'
    assert [Config(**json.loads((f / "config.json").read_text())) for f in (first, second)] == cfgs
    assert set(os.listdir(tmp_path / "sweep")) == {cfg.name for cfg in cfgs}, "disabled writes nothing for W&B"


@pytest.fixture
def visitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A server that W&B takes for its own and for its proxy, on a machine without a key. It accepts later, if ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        wandb.teardown()  # its service reads the environment when it starts
        yield server
        wandb.teardown()


def records(file: Path) -> Iterator[Record]:
    """A .wandb file is a LevelDB log: blocks of 32768 bytes of fragments, each checksum [4], length [2], type [1]."""
    data, position, whole = file.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a record in one fragment, or its last one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_is_one_run_per_sae_grouped_by_sweep_without_a_network(
    tmp_path: Path, visitors: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    cfgs = two_configs(wandb_project="features")
    log = RunLog(tmp_path / "sweep-7", cfgs)
    log_something(log)
    log.close()
    wandb.teardown()  # the service writes its last records after a run's end
    with pytest.raises(BlockingIOError):
        visitors.accept()
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""

    history: dict[str, list[dict]] = {}
    for file in sorted((tmp_path / "sweep-7" / "wandb").glob("offline-run-*/*.wandb")):
        found = list(records(file))
        (run,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
        assert (run.project, run.run_group) == ("features", "sweep-7")
        (cfg,) = (cfg for cfg in cfgs if cfg.name == run.display_name)
        saved = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert saved.items() >= cfg.to_dict().items()
        rows = [r.history.item for r in found if r.WhichOneof("record_type") == "history"]
        history[cfg.sae_type] = [{i.nested_key[0]: json.loads(i.value_json) for i in items} for items in rows]
    first = [{"_step": 2, "tokens": 64, "train/loss": 0.5, "train/l0": 3.0},
             {"_step": 4, "tokens": 128, "train/loss": 0.125, "eval/ce": 1.5}]  # fmt: skip
    second = [{"_step": 2, "tokens": 64, "train/loss": 0.25}]
    assert history.keys() == {"topk", "jumprelu"}
    for sae_type, expected in (("topk", first), ("jumprelu", second)):
        assert len(history[sae_type]) == len(expected)
        assert all(row.items() >= wanted.items() for row, wanted in zip(history[sae_type], expected))


@pytest.mark.parametrize("asked", [True, False])
def test_checkpoints_are_artifacts_of_their_runs_where_asked_for(
    tmp_path: Path, visitors: socket.socket, capfd: pytest.CaptureFixture[str], asked: bool
) -> None:
    cfgs = two_configs(wandb_artifacts=asked)
    log = RunLog(tmp_path / "sweep-7", cfgs)
    log.checkpoint(build_sae(cfgs[1]), 4)
    log.close()
    wandb.teardown()
    assert capfd.readouterr().out == ""
    found = {}
    for file in (tmp_path / "sweep-7" / "wandb").glob("offline-run-*/*.wandb"):
        said = list(records(file))
        (run,) = (r.run for r in said if r.WhichOneof("record_type") == "run")
        requests = (r.request.log_artifact for r in said if r.WhichOneof("record_type") == "request")
        uploads = [r.artifact for r in said if r.WhichOneof("record_type") == "artifact"]
        found[run.display_name] = uploads + [request.artifact for request in requests if request.artifact.name]
    assert not found[cfgs[0].name]
    if asked:
        (artifact,) = found[cfgs[1].name]
        folder = tmp_path / "sweep-7" / cfgs[1].name / "step-000004"
        assert (artifact.type, json.loads(artifact.metadata)) == ("model", {"step": 4})
        files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
        assert files == {path.name: str(path) for path in folder.iterdir()} and len(files) == 3
    else:
        assert not found[cfgs[1].name]


def test_an_artifact_that_cannot_be_made_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise OSError("no room")

    cfgs = two_configs(wandb_artifacts=True)
    log = RunLog(tmp_path / "sweep", cfgs)
    monkeypatch.setattr(wandb, "Artifact", fails)
    log.checkpoint(build_sae(cfgs[0]), 4)
    log.close()
    assert "W&B failed at step 4 (OSError: no room)" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "sweep" / cfgs[0].name / "step-000004").cfg == cfgs[0]


# ---- going on after an interruption ----


def test_a_resumed_log_repeats_and_loses_nothing(tmp_path: Path, visitors: socket.socket) -> None:
    """Killed at step 6, in the middle of a line, and resumed from the state of step 4, twice."""
    cfgs, folder = two_configs(wandb_project="features"), tmp_path / "sweep-7"
    log = RunLog(folder, cfgs)
    log_something(log)
    log.save_state({"step": 4, "store": {"order": torch.arange(3)}})
    for index in (0, 1):
        log.log(index, 6, 192, {"train/loss": 0.0625})
    log.close()
    file = folder / cfgs[1].name / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 8, "tok')
    progress = load_progress(folder)
    assert (progress["group"], progress["step"]) == (0, 4) and progress["store"]["order"].tolist() == [0, 1, 2]

    RunLog(folder, cfgs, 0, progress["step"]).close()
    log = RunLog(folder, cfgs, 0, progress["step"])
    for step in (6, 8):
        for index in (0, 1):
            log.log(index, step, 32 * step, {"train/loss": 0.0625 if step == 6 else 0.03})
    log.finish()
    log.close()
    wandb.teardown()
    assert load_progress(folder) == {"group": 1}
    steps = {"topk": [2, 4, 4, 6, 8], "jumprelu": [2, 6, 8]}
    for cfg in cfgs:
        lines = (folder / cfg.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps[cfg.sae_type]
        found = [r for run in sorted(folder.glob("wandb/*/*.wandb")) for r in records(run)]
        runs = [r.run for r in found if r.WhichOneof("record_type") == "run" and r.run.display_name == cfg.name]
        (run_id,) = {run.run_id for run in runs}
        files = sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
        assert len(files) == 3
        rows = [r.history.item for f in files for r in records(f) if r.WhichOneof("record_type") == "history"]
        sent = [int(i.value_json) for items in rows for i in items if i.nested_key[0] == "_step"]
        assert sent == sorted(set(steps[cfg.sae_type]))


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    log = RunLog(tmp_path, two_configs(wandb_mode="disabled"))
    log.save_state({"step": 4, "store": {"order": torch.arange(1000)}})
    file = tmp_path / "resume.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"what is this")
    with pytest.raises(ValueError, match=r"resume\.safetensors: damaged .*; remove it to train from the beginning$"):
        load_progress(tmp_path)


# ---- W&B in trouble ----


@pytest.fixture
def key(visitors: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone logged in, to a service that never answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()


def test_an_unreachable_wandb_leaves_the_runs_offline(
    tmp_path: Path, key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "sweep", two_configs(wandb_mode="online"))
    log_something(log)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("W&B cannot be used as online (") and line.endswith("; metrics are also in metrics.jsonl")
    assert len(list((tmp_path / "sweep").glob("*/metrics.jsonl"))) == 2
    assert len(list((tmp_path / "sweep").glob("wandb/offline-run-*"))) == 2


def test_a_failing_wandb_run_is_let_go_and_metrics_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfgs = two_configs(wandb_mode="disabled")
    log = RunLog(tmp_path, cfgs)

    def fail(row: dict, step: int) -> None:
        raise BrokenPipeError("the service\nis gone")

    monkeypatch.setattr(log._runs[0], "log", fail)
    log_something(log)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    file = tmp_path / cfgs[0].name / "metrics.jsonl"
    assert line == f"W&B failed at step 2 (BrokenPipeError: the service is gone); metrics go on in {file}"
    assert len(file.read_text().splitlines()) == 3


def test_a_wandb_that_cannot_begin_any_run_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**how: object) -> None:
        raise wandb.errors.UsageError("no service")

    monkeypatch.setattr(wandb, "init", fail)
    log = RunLog(tmp_path, two_configs(wandb_mode="offline"))
    log_something(log)
    log.close()
    assert (
        capsys.readouterr().out.count("W&B cannot be used as offline (UsageError: no service); metrics are also") == 2
    )
    assert len(list(tmp_path.glob("*/metrics.jsonl"))) == 2


def test_a_wandb_that_fails_at_the_end_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def time_out() -> None:
        raise TimeoutError("Timed out finishing run.")

    log = RunLog(tmp_path, two_configs(wandb_mode="offline"))
    first, second = log._runs
    assert first.settings.finish_timeout == 30 and first.settings.finish_timeout_raises
    monkeypatch.setattr(first, "finish", time_out)
    log.close()
    assert f"lies in {tmp_path}/wandb; use `wandb sync`" in capsys.readouterr().out
    with pytest.raises(wandb.errors.UsageError, match="finished"):
        second.log({})
    monkeypatch.undo()
    first.finish()
