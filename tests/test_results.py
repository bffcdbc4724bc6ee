"""results.py against run folders made by hand; every number here was worked out on paper."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import wandb

import results
from checkpoint import load_checkpoint, save_checkpoint
from config import HINTS, TYPES, Config, SaeType
from results import format_table, load_history, load_results, report
from sae import build_sae

RESULTS = Path(results.__file__)
REAL_API = wandb.Api


def evaluation(l0: float, explained_variance: float = 0.8, ce_recovered: float = 0.9, step: int = 488) -> dict:
    metrics = dict(l0=l0, explained_variance=explained_variance, ce_recovered=ce_recovered, dead_share=0.0625, mse=0.2)
    return {"step": step, "tokens": 2048 * step} | {f"eval/{key}": value for key, value in metrics.items()}


def write_sae(sweep: Path, cfg: Config, *lines: dict) -> Path:
    folder = sweep / cfg.name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def twelve(sweep: Path) -> Path:
    """Write four types at three sparsity levels, in an order that is neither the table's nor the plot's."""
    for i, sae_type in enumerate(("jumprelu", "batchtopk", "vanilla", "topk")):
        for k in (32, 64, 16):
            cfg = Config(sae_type=sae_type, target_l0=k, l1_coeff=0.1 / k)
            write_sae(sweep, cfg, evaluation(l0=k + i, explained_variance=0.5 + k / 200, ce_recovered=0.6 + k / 200))
    return sweep


def frame(*saes: tuple[str, int, float, float, float]) -> pd.DataFrame:
    """Make a table as load_results gives it, of (sae_type, dict_size, l0, explained_variance, ce_recovered)."""
    df = pd.DataFrame(saes, columns=["sae_type", "dict_size", "l0", "explained_variance", "ce_recovered"])
    return df.assign(run="sweep", target_l0=32, l1_coeff=0.004, dead_share=0.0625)


# ---- load_results ----


def test_columns_of_one_sae(tmp_path: Path) -> None:
    cfg = Config(sae_type="topk", target_l0=16, lr=0.002)
    first = evaluation(l0=20.0, explained_variance=0.3, step=200)
    training = {"step": 300, "tokens": 614_400, "train/loss": 0.5, "train/l0": 99.0}
    last = evaluation(l0=15.5, explained_variance=0.75) | {"eval/new_metric": 7.0}
    folder = write_sae(tmp_path / "tiny-1", cfg, first, training, last)
    (sae,) = load_results(folder).itertuples()
    assert (sae.run, sae.name, sae.step, sae.tokens) == ("tiny-1", cfg.name, 488, 999_424)
    assert (sae.l0, sae.explained_variance, sae.ce_recovered, sae.dead_share, sae.mse) == (15.5, 0.75, 0.9, 0.0625, 0.2)
    assert sae.new_metric == 7.0
    fields = {field: value for field, value in vars(cfg).items() if field in HINTS and value is not None}
    assert {field: getattr(sae, field) for field in fields} == fields


def test_lists_become_tuples_which_pandas_can_compare(tmp_path: Path) -> None:
    for seed, prefixes in enumerate(([0.5, 1.0], [0.25, 1.0])):
        folder = write_sae(tmp_path / "s", Config(seed=seed), evaluation(30.0 + seed))
        (folder / "config.json").write_text(json.dumps(Config(seed=seed).to_dict() | {"prefixes": prefixes}))
    assert set(load_results(tmp_path)["prefixes"]) == {(0.5, 1.0), (0.25, 1.0)}


def test_relative_folder_keeps_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config()
    monkeypatch.chdir(write_sae(tmp_path / "tiny-1", cfg, evaluation(30.0)))
    (sae,) = load_results(".").itertuples()
    assert (sae.run, sae.name) == ("tiny-1", cfg.name)


def test_sorted_by_type_then_width_then_l0(tmp_path: Path) -> None:
    wanted = [
        ("vanilla", 2048, 40.0), ("topk", 512, 30.0), ("topk", 2048, 9.0), ("topk", 2048, 31.0), ("topk", 2048, 131.0),
        ("topk", 12288, 8.0), ("batchtopk", 2048, 5.0), ("jumprelu", 2048, 1.0),
    ]  # fmt: skip
    for seed, (sae_type, dict_size, l0) in enumerate(reversed(wanted)):
        write_sae(tmp_path / "s", Config(sae_type=sae_type, dict_size=dict_size, seed=seed), evaluation(l0))
    df = load_results(tmp_path)
    assert list(df[["sae_type", "dict_size", "l0"]].itertuples(index=False, name=None)) == wanted
    assert list(df.index) == list(range(8))


@pytest.mark.parametrize("rest", ['{"step": 489, "eval/l0": 9', '{"step": 489, "eval/l0": 9\n', "{"])
def test_incomplete_last_line_is_skipped(tmp_path: Path, rest: str) -> None:
    folder = write_sae(tmp_path / "s", Config(), evaluation(30.0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(rest)
    (sae,) = load_results(tmp_path).itertuples()
    assert (sae.l0, sae.step) == (30.0, 488)


def test_last_line_without_newline_counts(tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "s", Config(), evaluation(30.0))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation(31.0, step=489)))
    (sae,) = load_results(tmp_path).itertuples()
    assert (sae.l0, sae.step) == (31.0, 489)


def test_several_sweeps_and_one_of_them(tmp_path: Path) -> None:
    write_sae(tmp_path / "old", Config(sae_type="topk"), evaluation(31.0))
    write_sae(tmp_path / "new", Config(sae_type="topk"), evaluation(32.0))
    write_sae(tmp_path / "new", Config(sae_type="vanilla"), evaluation(33.0))
    assert list(load_results(tmp_path)["run"]) == ["new", "old", "new"]
    assert list(load_results(str(tmp_path / "old"))["l0"]) == [31.0]


def test_latest_checkpoint_is_the_largest_number(tmp_path: Path) -> None:
    first, second = Config(seed=1), Config(seed=2)
    folder = write_sae(tmp_path / "s", first, evaluation(30.0))
    for name in ("step-999", "step-1000", "step-000488", "step-002000.tmp"):
        (folder / name).mkdir()
    write_sae(tmp_path / "s", second, evaluation(31.0))
    with_one, without = load_results(tmp_path)["checkpoint"]
    assert with_one == str(folder / "step-1000")
    assert without is None


def test_folders_with_odd_names(tmp_path: Path) -> None:
    """Find an SAE below glob characters, a leading dash and a line break, beside what only looks like a checkpoint."""
    odd = tmp_path / "-a [b]*\n é" / "..c"
    folder = write_sae(odd, Config(), evaluation(30.0))
    for name in ("step-7", "step-²", "step-8\n", "step--9", ".step-9.writing"):
        (folder / name).mkdir()
    (folder / "step-10").write_text("no folder")
    for root in (tmp_path, odd, folder):
        (sae,) = load_results(root).itertuples()
        assert (sae.run, sae.name, sae.checkpoint) == ("..c", Config().name, str(folder / "step-7"))


@pytest.mark.parametrize(
    "file, text, said",
    [
        ("config.json", b"[1]", "holds list, not"),
        ("config.json", b"\xff", "not JSON"),
        ("config.json", b"[" * 100_000, "not JSON"),
        ("config.json", b'{"model_name": ', "not JSON"),
        ("config.json", b'{"sae_type": "topk"}', "no field 'dict_size'"),
        (
            "config.json",
            b'{"sae_type": ["a"], "dict_size": 1, "target_l0": 1, "l1_coeff": 1}',
            "sae_type ['a'] is none of",
        ),
        ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "ev\n{"step": 3}\n', "line 2: not JSON"),
        ("metrics.jsonl", b'{"step": 1}\n3\n{}', "line 2: holds int"),
        ("metrics.jsonl", b'{"step": 1, "eval/l0": {}}', "line 1: 'eval/l0' is not a number"),
        ("metrics.jsonl", b'{"step": 1, "\xff": 1}', "line 1: not JSON"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, file: str, text: bytes, said: str) -> None:
    folder = write_sae(tmp_path / "s", Config(), evaluation(30.0))
    (folder / file).write_bytes(text)
    with pytest.raises(ValueError) as error:
        load_results(tmp_path)
    assert str(error.value).startswith(str(folder / file)) and said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("lines", [(), ({"step": 20, "tokens": 40_960, "train/loss": 0.5, "train/l0": 9.0},)])
def test_no_evaluation_yet(tmp_path: Path, lines: tuple[dict, ...]) -> None:
    write_sae(tmp_path / "s", Config(), *lines)
    df = load_results(tmp_path)
    assert (df["step"][0], df["tokens"][0]) == ((20, 40_960) if lines else (0, 0))
    assert df[["l0", "explained_variance", "ce_recovered", "dead_share"]].isna().all(axis=None)
    assert format_table(df).splitlines()[1].split() == ["batchtopk", "2048", "L0=32", "-", "-", "-", "-"]


def test_layers_come_in_order(tmp_path: Path) -> None:
    for layer, l0 in ((1, 9.0), (0, 20.0), ((0, 1), 7.0), (1, 8.0), (0, 10.0)):
        cfg = Config(sae_type="topk", layer=layer, target_l0=int(l0))
        write_sae(tmp_path / "s", cfg, evaluation(l0))
    found = load_results(tmp_path)[["layer", "l0"]].values.tolist()
    assert found == [[0, 10.0], [0, 20.0], [(0, 1), 7.0], [1, 8.0], [1, 9.0]]


def test_missing_folder_and_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone: no such folder$"):
        load_results(tmp_path / "gone")
    with pytest.raises(ValueError, match=r": holds no runs$"):
        load_results(tmp_path)


class FakeApi:
    """Stand in for wandb.Api: the runs of one project, filtered by group as the server does it."""

    def runs(self, path: str, filters: dict, lazy: bool) -> list[SimpleNamespace]:
        assert path == "me/saes"
        inspect.signature(REAL_API.runs).bind(self, path, filters=filters, lazy=lazy)
        summary = evaluation(l0=31.5) | {"eval/kl": "NaN", "train/loss": 0.5, "_step": 12, "_wandb": {"runtime": 3}}
        runs = [
            SimpleNamespace(group=group, name=cfg.name, config=cfg.to_dict(), summary_metrics=summary)
            for group, cfg in (("a", Config(sae_type="jumprelu")), ("a", Config(sae_type="topk")), (None, Config()))
        ]
        return [run for run in runs if "group" not in filters or run.group == filters["group"]]


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", FakeApi)
    df = load_results("wandb:me/saes/a")
    assert list(df["run"]) == ["a", "a"]
    assert list(df["name"]) == [Config(sae_type="topk").name, Config(sae_type="jumprelu").name]
    sae = df.iloc[0]
    assert (sae["step"], sae["tokens"], sae["l0"], sae["target_l0"]) == (488, 999_424, 31.5, 32)
    assert math.isnan(sae["kl"]) and df["kl"].dtype == np.float64
    assert sae["checkpoint"] is None
    assert "train/loss" not in df and "_step" not in df
    everything = load_results("wandb:me/saes")
    assert list(everything["run"]) == ["a", "", "a"]
    assert len(format_table(everything).splitlines()) == 2 + 1 + 1 + 4  # two sweeps: names, headers, gap, SAEs


def test_wandb_s_latest_checkpoints_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def artifact(step: int) -> SimpleNamespace:
        def download(root: str) -> str:
            sae.cfg = replace(sae.cfg, seed=step)
            save_checkpoint(sae, root)
            return root

        inspect.signature(wandb.Artifact.download).bind(None, root="")
        return SimpleNamespace(type="model", metadata={"step": step}, download=download)

    sae = build_sae(Config(sae_type="topk", act_size=4, dict_size=8, target_l0=2, device="cpu"))
    other = SimpleNamespace(type="model", metadata={})
    saved = [artifact(20), other, artifact(140), artifact(7)]
    run = SimpleNamespace(group="a", name="one", config=sae.cfg.to_dict(), summary_metrics=evaluation(2.0))
    other = SimpleNamespace(**vars(run) | {"name": "other", "logged_artifacts": list})
    run.logged_artifacts = lambda: saved
    assert callable(wandb.apis.public.Run.logged_artifacts)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(runs=lambda *args, **options: [run, other]))
    df = load_results("wandb:me/saes", fetch_into=tmp_path)
    assert list(df["checkpoint"]) == [str(tmp_path / "a/one/step-000140"), None]
    assert load_checkpoint(df["checkpoint"][0]).cfg.seed == 140
    assert list(load_results("wandb:me/saes")["checkpoint"]) == [None, None]


def test_wandb_columns_are_the_folders_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", FakeApi)
    write_sae(tmp_path / "s", Config(), evaluation(31.5) | {"eval/kl": 0.5})
    assert list(load_results("wandb:me/saes")) == list(load_results(tmp_path))


@pytest.mark.parametrize("source", ["wandb:", "wandb:saes", "wandb:me/", "wandb:me/saes/a/b"])
def test_wandb_needs_entity_and_project(source: str) -> None:
    with pytest.raises(ValueError, match='give "wandb:entity/project"'):
        load_results(source)


# ---- format_table ----


def test_table_of_two(tmp_path: Path) -> None:
    write_sae(tmp_path / "s", Config(sae_type="batchtopk", target_l0=8), evaluation(7.96, 0.8126, 0.9004))
    write_sae(tmp_path / "s", Config(sae_type="jumprelu", l1_coeff=0.004), evaluation(123.4))
    assert format_table(load_results(tmp_path)).splitlines() == [
        "type       dict  setting      L0  expl. var.  CE recovered  dead %",
        "batchtopk  2048  L0=8        8.0       0.813         0.900     6.2",
        "jumprelu   2048  l0=0.004  123.4       0.800         0.900     6.2",
    ]


def test_table_of_fifteen_is_at_most_80_wide() -> None:
    wide = [(sae_type, 2**20, 131_071.9, -1.23456789e12, -98_765.4321) for sae_type in ("batchtopk", "jumprelu")]
    df = frame(*wide, *(("topk", 2048, 32.0, 0.8, math.nan) for _ in range(13)))
    df["l1_coeff"], df["target_l0"] = 0.000123456789, range(32, 32 + len(df))
    lines = format_table(df).splitlines()
    assert len(lines) == 16
    assert max(map(len, lines)) <= 80
    assert "1048576" in lines[1] and "L0=32" in lines[1] and "l0=0.000123457" in lines[2]


def test_rows_are_told_apart(tmp_path: Path) -> None:
    for l0, layer, lr in ((8.1, 1, 1e-4), (8.2, 1, 3e-4), (8.3, 2, 1e-4)):
        write_sae(tmp_path / "s", Config(sae_type="topk", target_l0=8, layer=layer, lr=lr), evaluation(l0))
    vanilla = Config(sae_type="vanilla", l1_coeff=0.004, layer=5, lr=1)
    write_sae(tmp_path / "s", vanilla, evaluation(123.4))
    write_sae(tmp_path / "s", replace(vanilla, dict_size=64, target_l0=9), evaluation(60))  # which it does not use
    assert format_table(load_results(tmp_path)).splitlines() == [
        "type     dict  setting            L0  expl. var.  CE recovered  dead %",
        "vanilla    64  l1=0.004         60.0       0.800         0.900     6.2",
        "vanilla  2048  l1=0.004        123.4       0.800         0.900     6.2",
        "topk     2048  L0=8, layer 1,    8.1       0.800         0.900     6.2",
        "               lr 0.0001",
        "topk     2048  L0=8, layer 1,    8.2       0.800         0.900     6.2",
        "               lr 0.0003",
        "topk     2048  L0=8, layer 2,    8.3       0.800         0.900     6.2",
        "               lr 0.0001",
    ]


def test_seeds_are_one_row_with_their_spread(tmp_path: Path) -> None:
    """Means of 7.9, 8.1 and 8.3 and so on, and their standard deviations, such as 0.2."""
    for seed, more in enumerate((-1, 0, 1)):
        cfg = Config(sae_type="matryoshka", dict_size=12288, target_l0=8, seed=seed)
        write_sae(tmp_path / "s", cfg, evaluation(8.1 + 0.2 * more, 0.8126 + 0.002 * more, 0.9 + 0.1 * more))
    write_sae(tmp_path / "s", replace(cfg, target_l0=16), evaluation(123.4))
    write_sae(tmp_path / "s", Config(sae_type="topk", target_l0=16), evaluation(16))
    df = load_results(tmp_path)
    lines = format_table(df).splitlines()
    assert lines == [
        "type         dict  setting             L0   expl. var.  CE recovered   dead %",
        "topk         2048  L0=16             16.0        0.800         0.900      6.2",
        "matryoshka  12288  L0=8, 3 seeds  8.1 ±.2  0.813 ±.002   0.900 ±.100  6.2 ±.0",
        "matryoshka  12288  L0=16            123.4        0.800         0.900      6.2",
    ]
    assert max(map(len, lines)) <= 80
    assert len(df) == 5


def test_table_of_several_sweeps_names_each() -> None:
    df = pd.concat([frame(("topk", 2048, 32.0, 0.8, 0.9)), frame(("vanilla", 2048, 40.0, 0.7, 0.8))])
    lines = format_table(df.assign(run=["tiny-2", "tiny-1"])).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["tiny-1", "type", "vanilla", "", "tiny-2", "type", "topk"]


def test_a_type_needs_only_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TYPES, "new", SaeType("New", "#000000", (), "topk"))
    monkeypatch.setitem(HINTS, "sae_type", str)  # which has the names of the types
    write_sae(tmp_path / "s", Config(sae_type="new", target_l0=8, l1_coeff=0.5), evaluation(8.0))
    write_sae(tmp_path / "s", Config(sae_type="jumprelu"), evaluation(9.0))
    df = load_results(tmp_path)
    assert list(df["sae_type"]) == ["jumprelu", "new"]
    assert format_table(df).splitlines()[2].split()[:3] == ["new", "2048", "L0=8"]


# ---- for the figures ----


def test_history_has_every_line(tmp_path: Path) -> None:
    lines = [{"step": 20, "tokens": 40_960, "train/loss": 0.5}, evaluation(30.0)]
    write_sae(tmp_path / "s", Config(), *lines)
    write_sae(tmp_path / "s", Config(seed=1))
    write_sae(tmp_path / "t", Config(), *lines)
    history = load_history(tmp_path / "s")
    assert list(history["run"]) == ["s", "s"] and list(history["name"]) == [Config().name] * 2
    assert list(history["tokens"]) == [40_960, 999_424]
    np.testing.assert_array_equal(history["train/loss"], [0.5, math.nan])
    np.testing.assert_array_equal(history["eval/l0"], [math.nan, 30.0])
    assert len(load_history(tmp_path)) == 4


def test_decoder_cosines_are_of_the_latest_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = Config(act_size=3, dict_size=4, target_l0=1, device="cpu")
    folder = write_sae(tmp_path / "s", cfg, evaluation(30.0))
    write_sae(tmp_path / "s", Config(sae_type="vanilla"), evaluation(30.0))
    for step, last in ((7, [0.0, 0, 1]), (12, [0.6, 0, 0.8])):
        sae = build_sae(cfg)
        sae.W_dec.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -1, 0], last])
        save_checkpoint(sae, folder / f"step-{step}")
    drawn = []
    monkeypatch.setattr(
        results, "save_figures", lambda df, folder, history, cosines, norms: drawn.extend([*cosines, *norms]) or []
    )
    report(str(tmp_path))
    none, cosines, *norms = drawn
    assert none is None and norms == [None, None]
    np.testing.assert_allclose(cosines, [0.6, 0, 0, 0.6], atol=1e-7)


def test_import_is_quick() -> None:
    code = "import sys, results; assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=RESULTS.parent, check=True)


# ---- the command line ----


def run_results(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, RESULTS, *args], cwd=cwd, capture_output=True, text=True)


def test_command_line(tmp_path: Path) -> None:
    sweep = twelve(tmp_path / "tiny-1")
    done = run_results(sweep, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert format_table(load_results(sweep)) in done.stdout
    assert done.stdout.splitlines()[-3:] == [
        f"table        {sweep}/results.csv",
        *(f"figure       {sweep}/{name}.png, .pdf" for name in ("pareto", "training")),
    ]
    for name in ("pareto", "training"):
        assert all((sweep / f"{name}.{kind}").stat().st_size > 0 for kind in ("png", "pdf"))
    assert list(pd.read_csv(sweep / "results.csv")["l0"]) == list(load_results(sweep)["l0"])


def test_before_there_is_an_evaluation_the_rest_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sae(tmp_path / "tiny-1", Config())
    results.main([str(tmp_path / "tiny-1")])
    assert capsys.readouterr().out.endswith("results.csv\n")
    assert (tmp_path / "tiny-1" / "results.csv").is_file()
    row = {"step": 9, "tokens": 18_432, "train/loss": 0.5, "eval/l0": 0.0, "eval/explained_variance": 0.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row | {"eval/ce_recovered": 0.0}) + "\n")
    results.main([str(tmp_path / "tiny-1")])
    assert capsys.readouterr().out.endswith("training.png, .pdf\n")


def test_command_line_user_error_is_one_line(tmp_path: Path) -> None:
    done = run_results("gone", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "results.py: gone: no such folder\n"


def test_ctrl_c_ends_the_command_quietly(tmp_path: Path) -> None:
    cfg = Config()
    folder = write_sae(tmp_path, cfg)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, RESULTS, tmp_path], **piped)
    with process, (folder / "metrics.jsonl").open("w"):  # once it is being read
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"") and process.returncode == -signal.SIGINT
