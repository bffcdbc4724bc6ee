"""main.py: a miniature sweep from the command line to the plot, the options, and bad input refused in one line."""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from wandb import wandb_agent

import main
import sweep
from checkpoint import load_checkpoint
from config import SWEEPS, Config, tiny_sweep
from evaluation import HeldOut, evaluate
from language_model import load_model
from results import format_table, load_results
from runtime import cli
from runtime.preflight import check_machine
from sae import SAE_TYPES
from text import held_out_windows

SMALL = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=3840", "--dict-size=64", "--target_l0=4",
    "--l1-coeff=0.01", "--lr=0.01", "--eval-windows=8", "--log-freq=20", "--perf-log-freq=40", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder that holds a model and a text, nothing else."""
    (tmp_path / "tiny-gpt2").symlink_to(tiny_gpt2)
    (tmp_path / "animals.txt").symlink_to(tiny_text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def parse(*args: str) -> list[Config]:
    return cli.parse(list(args)).cfgs


def test_a_folder_is_named_after_the_sweep_or_else_the_model() -> None:
    named = [["gpt2"], ["--model-name=EleutherAI/pythia-160m"], ["--model-name=/data/llama 1b/"], []]
    assert [cli.parse(words).name for words in named] == ["gpt2", "pythia-160m", "llama-1b", "tiny-lm"]


def test_a_model_that_is_not_there_is_answered_before_the_imports_that_take_seconds() -> None:
    said = "import main, sys; print(main.main(['--model-name', 'a/b/c']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], cwd=Path(main.__file__).parent, capture_output=True, text=True)
    assert done.stdout == "2 False\n" and "model_name = 'a/b/c': found neither in a folder nor" in done.stderr


# ---- from the command line to the plot ----


def test_a_miniature_sweep_end_to_end(here: Path) -> None:
    done = subprocess.run([sys.executable, main.__file__, *SMALL], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(os.listdir(here)) == {"tiny-gpt2", "animals.txt", "runs"}
    (folder,) = Path("runs").iterdir()

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "4 SAEs on tiny-gpt2 blocks.1.hook_resid_pre, 3,840 activations"
    df = load_results(folder)
    types = list(dict.fromkeys(cfg.sae_type for cfg in tiny_sweep()))
    assert list(df["sae_type"]) == types and list(df["step"]) == [60] * 4
    assert (df["explained_variance"] > 0.5).all() and (df["ce_recovered"] > 0.8).all()
    assert f"\n\n{format_table(df)}\n\n" in done.stdout
    for file in ("results.csv", "pareto.png", "training.png", "cosines.png"):
        assert str(folder / file) in done.stdout and (folder / file).stat().st_size > 1000
    assert all((folder / f"{name}.pdf").stat().st_size > 1000 for name in ("pareto", "training", "cosines"))
    assert f"{folder}/**/step-*  (4)" in done.stdout and f"wandb sync {folder}/wandb/offline-*" in done.stdout
    assert len(list(folder.glob("wandb/offline-run-*"))) == 4
    with (folder / "results.csv").open() as file:
        assert [float(row["l0"]) for row in csv.DictReader(file)] == pytest.approx(list(df["l0"]))

    saes = [load_checkpoint(checkpoint) for checkpoint in df["checkpoint"]]
    assert [type(sae) for sae in saes] == [SAE_TYPES[sae_type] for sae_type in types]
    cfg, model = saes[0].cfg, load_model(saes[0].cfg)
    tokens = held_out_windows(cfg, model.tokenizer, cfg.eval_windows)
    metrics = evaluate(HeldOut(model, tokens), saes)
    for sae, row, found in zip(saes, df.itertuples(), metrics):
        assert sae.cfg.name == row.name and sae.cfg.act_size == 16
        for metric in ("l0", "mse", "explained_variance", "ce", "ce_clean", "kl", "dead_share"):
            assert found[metric] == pytest.approx(getattr(row, metric), rel=1e-4), metric
        logged = [json.loads(l) for l in (folder / row.name / "metrics.jsonl").read_text().splitlines()]
        assert [l["step"] for l in logged if "train/loss" in l] == [20, 40, 60]
        assert [l["step"] for l in logged if "eval/ce" in l] == [40, 60]


def test_saes_of_different_streams_share_a_table_but_no_pass(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--num-tokens=640", "--text-seed", "0", "1", "--sae-type", "topk", "batchtopk", "--wandb-mode=disabled"]
    assert main.main([*SMALL, *more, "--output-dir=elsewhere"]) == 0
    out, err = capsys.readouterr()
    assert out.count("2 SAEs on tiny-gpt2 blocks.1.hook_resid_pre, 640 activations\n") == 2 and err == ""
    assert "W&B" not in out
    (folder,) = Path("elsewhere").iterdir()
    df = load_results(folder)
    assert sorted(zip(df["sae_type"], df["text_seed"])) == [(t, s) for t in ("batchtopk", "topk") for s in (0, 1)]
    assert not (folder / "wandb").exists()


# ---- options ----


def test_without_options_a_sweep_is_as_it_is_written() -> None:
    assert parse() == parse("tiny") == tiny_sweep()
    assert parse("gpt2") == SWEEPS["gpt2"]()


def test_values_are_swept_and_what_they_do_not_change_is_trained_once() -> None:
    cfgs = parse("--target-l0", "2", "4")
    assert [(cfg.sae_type, cfg.target_l0) for cfg in cfgs] == [
        (sae_type, k) for sae_type in ("vanilla", "topk", "batchtopk", "jumprelu") for k in (2, 4)
    ]
    assert len({cfg.name for cfg in cfgs}) == len(cfgs)


def test_two_swept_fields_are_combined() -> None:
    cfgs = parse("--sae-type", "topk", "--target-l0", "2", "4", "--seed", "0", "1", "--lr", "0.001")
    found = [(cfg.sae_type, cfg.target_l0, cfg.seed, cfg.lr) for cfg in cfgs]
    assert found == [("topk", k, seed, 0.001) for k in (2, 4) for seed in (0, 1)]


@pytest.mark.parametrize("spelling", [["--target-l0", "4"], ["--target_l0", "4"], ["--target-l0=4"], ["--target_l0=4"]])
def test_every_spelling_means_the_same(spelling: list[str]) -> None:
    assert parse(*spelling) == parse("--target-l0", "4") != parse()


def test_options_of_every_kind_reach_the_configs() -> None:
    given = dict(
        model_name="m", site="z", act_size=5, dtype="bfloat16", l1_coeff=0.0, input_unit_norm=True, seed=0,
        checkpoint_freq=None, wandb_mode="online", dataset_name="en",
    )  # fmt: skip
    cfgs = parse("gpt2", *(f"--{field}={value}" for field, value in given.items()))
    expected = [replace(cfg, **given) for cfg in SWEEPS["gpt2"]()]
    assert cfgs == list({cfg.name: cfg for cfg in expected}.values())


# ---- bad input ----


@pytest.mark.parametrize(
    "args, message",
    [
        (["tinny"], "sweep = 'tinny': did you mean tiny? give one of tiny, gpt2"),
        ([""], "sweep = '': give one of tiny, gpt2"),
        (["--sae-type=top-k"], "sae_type = 'top-k': did you mean topk? give one of vanilla, topk,"),
        (["--site=resid_pro"], "site = 'resid_pro': did you mean resid_pre? give one of resid_pre,"),
        (["--wandb-mode=of"], "wandb_mode = 'of': "),
        (["--target-l0", "4", "65"], "target_l0 = 65: give at most dict_size, 64"),
        (["--batch-size=0"], "batch_size = 0: give a number above 0"),
        (["--dict-size=-3"], "dict_size = -3: give a number above 0"),
        (["--num-tokens=63"], "num_tokens = 63: give at least a batch of 64"),
        (["--layer=2"], "layer = 2: tiny-gpt2 has 2 blocks; give 0 to 1"),
        (["--seq-len=65"], "seq_len = 65: tiny-gpt2 reads at most 64 tokens"),
        (["--act-size=17"], "act_size = 17: "),
        (["--model-name=no-such-model"], "model_name = 'no-such-model': "),
        (["--dataset-path", "animals.txt", "no.txt"], "dataset_path = 'no.txt': no such file"),
        (["--dataset-path=no-text.jsonl"], "dataset_path = 'no-text.jsonl': no column of text or tokens among colour"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_before_a_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    (here / "no-text.jsonl").write_text('{"colour": "red"}\n{"colour": "blue"}\n')
    before = set(os.listdir(here))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sweep, "load_model", lambda cfg: pytest.fail("a model was loaded"))
    assert main.main(args if args in (["tinny"], [""]) else [*SMALL, *args]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"main.py: {message}") and err.count("\n") == 1 and err.endswith("\n"), err
    assert set(os.listdir(here)) == before


def test_a_mistake_is_answered_without_a_traceback_and_before_the_slow_imports(here: Path) -> None:
    code = (
        "import sys, main\n"
        "code = main.main(['--target-l0=5000'])\n"
        "print(sorted({'torch', 'transformers', 'transformer_lens', 'datasets', 'wandb'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert (done.returncode, done.stdout) == (2, "[]\n")
    assert done.stderr == "main.py: target_l0 = 5000: give at most dict_size, 2048\n"


def test_sae_type_chooses_among_the_sweep_and_adds_what_it_lacks() -> None:
    tiny = SWEEPS["tiny"]()
    chosen = cli.override(tiny, {"sae_type": ("topk", "vanilla")})
    assert {cfg.name for cfg in chosen} == {cfg.name for cfg in tiny if cfg.sae_type in ("topk", "vanilla")}
    added = cli.override(SWEEPS["gpt2"](), {"sae_type": ("vanilla",), "l1_coeff": (0.01,)})
    assert {(cfg.sae_type, cfg.l1_coeff) for cfg in added} == {("vanilla", 0.01)}


# ---- wandb agent ----


def test_the_command_that_an_agent_of_the_sweep_file_builds_trains_one_sae(
    here: Path, monkeypatch: pytest.MonkeyPatch, fork: Callable[..., dict]
) -> None:
    """Let wandb's own agent build a command from each of the grid's combinations; run one, without a network."""
    file = Path(main.__file__).parent / "sweeps" / "topk.yaml"
    grid_of = yaml.safe_load(file.read_text())
    built: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **how: object) -> None:
            built.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    agent.__dict__ |= dict(_sweep_command=grid_of["command"], _run_processes={}, _function=None, _in_jupyter=False)
    agent._forward_signals = False
    monkeypatch.setenv("WANDB_SWEEP_ID", "sw33p")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets; afterwards they are gone again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    grid = [dict(zip(grid_of["parameters"], values)) for values in itertools.product(
        *(parameter["values"] for parameter in grid_of["parameters"].values())
    )]  # fmt: skip
    for number, point in enumerate(grid):
        args = {name: {"value": value} for name, value in point.items()}
        agent._command_run({"run_id": f"run{number}", "program": grid_of["program"], "args": args})
    assert len(built) == 12
    for point, command in zip(grid, built):
        (cfg,) = parse(*command[3:])
        assert {name: getattr(cfg, name) for name in point} == point and cfg.wandb_mode == "online"

    words = [word.replace("=online", "=offline") for word in (*SMALL, *built[-1][3:])]
    words = [word for word in words if word not in ("--target_l0=4", "--lr=0.01")]
    done = fork(*words, cwd=here, environment={"WANDB_SWEEP_ID": "sw33p", "WANDB_RUN_ID": "run11"})
    assert done["rc"] == 0, done["err"]
    (checkpoint,) = Path("runs").glob("*/*/step-000060")
    assert load_checkpoint(checkpoint).cfg.sae_type == "batchtopk"
    assert (checkpoint.parent / "wandb_id").read_text() == "run11"  # the agent's, so that the sweep has this run
    assert len(list(Path("runs").glob("*/wandb/offline-run-*/run-run11.wandb"))) == 1


def test_an_agent_that_asks_for_one_run_gets_one_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "run11")
    cfgs = [Config(target_l0=k, device="cpu") for k in (4, 8)]
    with pytest.raises(ValueError, match=r"^WANDB_RUN_ID = 'run11': one run, and 2 SAEs; give each field one value"):
        check_machine(cfgs, tmp_path)
    check_machine(cfgs[:1], tmp_path)
    check_machine([replace(cfg, wandb_mode="disabled") for cfg in cfgs], tmp_path)
