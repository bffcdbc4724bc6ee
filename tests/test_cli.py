"""The command line: help, list, completion, files of overrides, --dry-run, and what a run prints into a file."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import COMMIT, standing_in
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import activation_store
import cli
import dry_run
import main
from config import SWEEPS, Config, field_docs, field_groups, tiny_sweep
from sae import build_sae

PROGRAM = [sys.executable, main.__file__]
SMALL = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=3840", "--dict-size=64", "--top-k=4",
    "--eval-windows=8", "--log-freq=20", "--perf-log-freq=40", "--device=cpu", "--wandb-mode=disabled",
]  # fmt: skip


def said(*args: str, **how: object) -> str:
    done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, timeout=120, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def in_a_terminal(*args: str, cwd: Path) -> str:
    """What the program writes into a terminal of 80 columns."""
    controller, terminal = pty.openpty()
    how = dict(stdin=terminal, stdout=terminal, stderr=terminal, cwd=cwd, env=os.environ | {"COLUMNS": "80"})
    with subprocess.Popen([*PROGRAM, *args], **how) as process:
        os.close(terminal)
        written = b""
        while chunk := read(controller):
            written += chunk
    os.close(controller)
    assert process.returncode == 0, written
    return written.decode()


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # Linux, where the program has ended
        return b""


# ---- help ----


@pytest.mark.parametrize("sweep", SWEEPS)
def test_help_has_every_field_in_its_group_with_the_default_of_the_sweep(tmp_path: Path, sweep: str) -> None:
    out = said(sweep, "--help", env=os.environ | {"COLUMNS": "80"}, cwd=tmp_path)
    assert cli.answer(["--help", sweep]) == cli.answer([sweep, "--help"])
    assert cli.answer(["--model-name", sweep, "--help"]) == cli.answer(["--help"])
    assert out == said(sweep, "--top-k", "3", "-h", env=os.environ | {"COLUMNS": "80"}, cwd=tmp_path)
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    sections = dict(re.findall(r"^([a-z ]+):\n((?:  .*\n|\n)+)", out + "\n", flags=re.M))
    assert list(sections) == ["the run", "the activations", "the autoencoder", "training", "output"]
    names = []
    for title, text in list(sections.items())[1:]:
        entries = re.split(r"^  (?=--)", text, flags=re.M)[1:]
        for entry in entries:
            name = entry.split()[0][2:].replace("-", "_")
            names.append(name)
            assert name in field_groups()[title]
            entry = re.sub(r"\s+", "", entry)
            assert re.sub(r"\s+", "", field_docs()[name]) in entry
            used = {"top_k": ("topk", "batchtopk"), "l1_coeff": ("vanilla", "jumprelu"), "bandwidth": ("jumprelu",)}
            cfgs = [c for c in SWEEPS[sweep]() if c.sae_type in used.get(name, [c.sae_type])]
            if name not in ("threshold_init", "top_k_aux", "aux_penalty", "sparsity_warmup"):
                values = dict.fromkeys(str(getattr(cfg, name)) for cfg in cfgs)
                assert entry.endswith(f"(default:{','.join(values)})"), entry
    assert names == list(Config.__dataclass_fields__)


def test_texts_are_told_without_the_slow_imports() -> None:
    code = (
        "import sys, cli; sys.argv = ['main.py', 'tiny', '--top-k', '4']\n"
        "assert all(cli.answer(words) for words in (['--help'], ['list'], ['completion']))\n"
        "assert cli.answer(sys.argv[1:]) is None and cli.answer([]) is None and cli.parse(sys.argv[1:]).configs()\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'wandb', 'tyro'} & set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(Path(main.__file__).parent)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == "[]\n"


# ---- list ----


def test_list_names_the_sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    head, *lines = said("list", cwd=tmp_path).splitlines()
    assert head == "sweep  SAEs    activations"
    starts = [line for line in lines if not line.startswith(" ")]
    for start, (name, make) in zip(starts, SWEEPS.items(), strict=True):
        cfgs = make()
        assert start.split()[:3] == [name, str(len(cfgs)), f"{cfgs[0].num_tokens:,}"]
        assert " ".join(make.__doc__.split("\n")[0].split()) in re.sub(r"\s+", " ", " ".join(lines))
    assert max(map(len, lines)) <= 80

    def both() -> list[Config]:
        return [Config(num_tokens=n) for n in (5000, 9000, 7000)]

    monkeypatch.setitem(SWEEPS, "both", both)
    assert cli.sweeps().splitlines()[-1].split() == ["both", "3", "5,000", "to", "9,000"]


# ---- completion ----


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What bash offers after a line, split into words as bash does it."""
    script = tmp_path_factory.mktemp("bash") / "completion"
    script.write_text(said("completion"))

    def run(line: str) -> list[str]:
        words = re.findall(r"=|[^\s=]+", line) + ([""] if line.endswith(" ") else [])
        shell = (
            'source "$0"; set -- "$@"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
            'complete -p "$1" >&2 && _main_py && printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "--norc", "-uc", shell, script, *words], capture_output=True, text=True)
        assert done.stderr == f"complete -o default -F _main_py {words[0]}\n"
        return done.stdout.split()

    return run


@pytest.mark.parametrize(
    "line, offered",
    [
        ("python main.py ", [*SWEEPS, "list", "completion"]),
        ("python3 lib/main.py g", ["gpt2"]),
        ("main.py t", ["tiny"]),
        ("torchrun --nproc-per-node 8 main.py gpt2 --share ", ["batches", "saes"]),
        ("python main.py --top-k-", ["--top-k-aux"]),
        ("python main.py gpt2 --re", ["--resume", "--resume-freq"]),
        ("python main.py gpt2 ", []),
        ("python main.py --sae-type ", ["vanilla", "topk", "batchtopk", "jumprelu"]),
        ("python main.py --sae_type topk b", ["batchtopk"]),
        ("python main.py --sae-type=", ["vanilla", "topk", "batchtopk", "jumprelu"]),
        ("python main.py --sae-type=j", ["jumprelu"]),
        ("python main.py --site m", ["mlp_out"]),
        ("python main.py --input-unit-norm ", ["True", "False"]),
        ("python main.py --overrides ", []),  # files, by bash itself
        ("python main.py --top-k 4 --lr ", []),
        ("python other.py --sae-type ", []),
        ("python ", []),
    ],
)
def test_bash_completes(complete: Callable[[str], list[str]], line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_every_option_is_completed(complete: Callable[[str], list[str]]) -> None:
    usage = set(re.findall("^  (?:-h, )?(--[a-z0-9-]+)", cli.answer(["--help"]), flags=re.M))
    assert set(complete("python main.py --")) == usage and len(usage) == len(Config.__dataclass_fields__) + 4


# ---- files of overrides ----

FILES = {
    "a.yaml": "top_k: [4, 8]\nlr: 1e-3\nsae_type: topk\nact_size: null\ninput_unit_norm: no\nmodel_name: '7'\n"
    "num_tokens: 2e6",
    "a.json": '{\t"top_k": [4, 8], "lr": 1e-3, "sae_type": "topk", "act_size": null, "input_unit_norm": false,'
    ' "model_name": "7", "num_tokens": 2e6}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_as_its_options(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text(FILES[name])
    words = ["--top-k", "4", "8", "--lr=0.001", "--sae-type=topk", "--act-size=None", "--input-unit-norm=False"]
    words += ["--model-name=7", "--num-tokens=2e6"]
    options = cli.parse(["gpt2", f"--overrides={file}"])
    assert options.configs() == cli.parse(["gpt2", *words]).configs() and len(options.configs()) == 8
    assert options.given["top_k"] == (4, 8) and options.given["lr"] == (0.001,)
    assert {type(value) for name in ("top_k", "num_tokens") for value in options.given[name]} == {int}


@pytest.mark.parametrize(
    "word, name, value",
    [
        ("2e6", "num_tokens", 2_000_000), ("9007199254740993", "seed", 2**53 + 1), (".5", "lr", 0.5), ("3", "lr", 3),
        ("4.5", "top_k", 4.5), (True, "top_k", True), ("false", "input_unit_norm", False), ("None", "act_size", None),
        ("none", "model_name", "none"), ("1e6", "model_name", "1e6"),
    ],
)  # fmt: skip
def test_words_as_values(word: object, name: str, value: object) -> None:
    found = cli._value(word, name)
    assert (found, type(found)) == (value, type(value))


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("top_k: [4, 8]\nlr: [1e-3, .1]\nsae_type: topk\n")
    cfgs = cli.parse(["--overrides", str(file), "--lr", "0.5", "--top-k", "2", "--top_k=3"]).configs()
    assert [(cfg.sae_type, cfg.top_k, cfg.lr) for cfg in cfgs] == [("topk", 3, 0.5)]
    assert cli.parse([]).configs() == tiny_sweep()


# ---- --dry-run ----


@pytest.fixture
def here(place: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = place()
    monkeypatch.chdir(folder)
    return folder


def dry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    before = set(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", ["main.py", *SMALL, "--dry-run", *args])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which it changes
    main.main()
    out, err = capsys.readouterr()
    assert err == "" and max(map(len, out.splitlines())) <= 80 and set(Path().rglob("*")) == before
    return out


def test_a_dry_run_tells_configs_sizes_and_time(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = dry(capsys, monkeypatch, "--lr", "0.001", "0.01", "--sae-type", "topk", "jumprelu", "--seed", "0", "1")
    cfgs = cli.parse([*SMALL, "--lr", "0.001", "0.01", "--sae-type", "topk", "jumprelu", "--seed", "0", "1"]).configs()
    cfgs = [activation_store.check_model(cfg) for cfg in cfgs]  # the width is part of the name
    configs, *groups, time = out.split("\n\n")[:1] + out.split("\n\n")[2:]
    lines = [" ".join(line.split()) for line in re.split(r"\n(?! )", configs)]
    jumprelu = "l1_coeff {0.l1_coeff}, bandwidth 0.03, threshold_init 0.05, "
    for cfg, line in zip(cfgs, lines, strict=True):
        own = jumprelu.format(cfg) if cfg.sae_type == "jumprelu" else ""
        assert line == f"{cfg.name} sae_type {cfg.sae_type}, {own}seed {cfg.seed}, lr {cfg.lr}"
    common = " ".join(out.split("\n\n")[1].split())
    assert common.startswith("in each of them model_name tiny-gpt2, layer 1, ") and ", dict_size 64, " in common

    assert len(groups) == 2  # a stream for each seed
    model = GPT2LMHeadModel.from_pretrained("tiny-gpt2").num_parameters()
    for seed, group in enumerate(groups):
        own = [cfg for cfg in cfgs if cfg.seed == seed]
        each = [sum(p.numel() for p in build_sae(cfg).parameters()) for cfg in own]
        assert group.startswith(f"{len(own)} SAEs on tiny-gpt2 blocks.1.hook_resid_pre, 3,840 activations\n")
        assert f"{sum(each):,} in the SAEs, {min(each):,} to {max(each):,} in each\n" in group
        assert f" {model:,} in the language model\n" in group and "MB  Adam's two means\n" in group
    assert (
        re.search(r"^time +about \d", time)
        and len(re.findall(r"\d (?:s|min|h)  (steps|the lang|evalu|the start)", time)) == 4
    )


def test_a_dry_run_of_an_unknown_model_tells_what_is_known(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "load_model", lambda cfg: pytest.fail("a model was loaded"))
    unknown = ["--model-name=some/model", "--sae-type=topk", "--dataset-path=some/text"]
    out = dry(capsys, monkeypatch, *unknown)
    assert "\nparameters   unknown: some/model is not on this disk; --act-size gives" in out and "MB" not in out
    (cfg,) = cli.parse([*SMALL, *unknown]).configs()
    assert out.startswith(f"{cfg.name}\n\nin it\n    model_name some/model, ")
    out = dry(capsys, monkeypatch, *unknown, "--act-size=16")
    assert f"parameters   {2 * 16 * 64 + 64 + 16:,} in the SAEs" in out and "and the language model\n" in out
    assert " s  steps of the SAEs\n" in out and "evaluations" not in out and "(not on this disk)" in out


def test_a_dry_run_asks_nothing_of_the_hub(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose weights are in the cache in part, and of one that is there whole."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "cache"))
    with standing_in(monkeypatch, here / "cache") as hub:
        cached = here / "cache" / "models--some--model"
        folder = cached / "snapshots" / COMMIT
        shutil.copytree(here / "tiny-gpt2", folder)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(COMMIT)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        first = dict(list(weights.items())[:9])
        index = {name: f"model-{1 if name in first else 2}.safetensors" for name in weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        save_file(first, folder / "model-1.safetensors", {"format": "pt"})
        out = dry(capsys, monkeypatch, "--model-name=some/model")
        assert "in the language model\n" in out and "evaluations" not in out and "(not on this disk)" in out
        rest = {name: tensor for name, tensor in weights.items() if name not in first}
        save_file(rest, folder / "model-2.safetensors", {"format": "pt"})
        out = dry(capsys, monkeypatch, "--model-name=some/model")
        assert "evaluations\n" in out and "not on this disk" not in out
        assert hub.requests == []


def test_memory_and_time_are_the_sums_of_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of numbers that can be checked by hand: 2 s a step, 3 s a window of the model, 5 s one of an evaluation."""
    monkeypatch.setattr(dry_run, "_step_seconds", lambda trainers: dict.fromkeys(trainers, 2.0))
    monkeypatch.setattr(dry_run, "_seconds_per_latent", lambda *alike: 0.5)
    monkeypatch.setattr(dry_run, "_model_seconds", lambda cfg, sae: (3.0, 5.0))
    monkeypatch.setattr(dry_run, "_start_seconds", lambda: 60.0)
    monkeypatch.setattr(dry_run, "TIMED_PARAMETERS", 256 * 128)
    common = dict(
        num_tokens=25_400, batch_size=127, perf_log_freq=100, top_k=32, eval_windows=10, sae_type="topk", device="cpu"
    )
    lines = list(dry_run.describe([Config(dict_size=F, **common) for F in (128, 138)]))
    sums = {line.split("  ")[-1]: line.split("  ")[-2].strip() for line in lines if line.startswith("      ")}
    # 200 steps of 2 s and of 2 + 10 * 0.5 s; 200 windows; 2 evaluations of 10 windows, 4/3 of what one takes
    steps, model, evaluations = 200 * (2 + 7), 200 * 3, 2 * 10 * 5 * 4 / 3
    assert sums["steps of the SAEs"] == f"{steps / 60:.1f} min"
    assert sums["the language model"] == f"{model / 60:.1f} min"
    assert sums["evaluations"] == f"{evaluations / 60:.1f} min"
    (time,) = (line for line in lines if line.startswith("time"))
    assert time.split()[2:4] == [f"{(steps + model + evaluations + 60) / 60:.1f}", "min"]

    (memory,) = (line for line in lines if line.startswith("memory"))
    parts = [float(value.split()[0]) for value in sums.values() if value.endswith(" MB")]
    assert len(parts) == 6 and sum(parts) == pytest.approx(float(memory.split()[1]), abs=3)
    parameters = sum(2 * 256 * F + F + 256 for F in (128, 138))
    assert sums["weights"] == sums["gradients"] == f"{4 * parameters / 1e6:.1f} MB"
    assert sums["activation buffer, and a copy while the state is saved"] == f"{2 * 16 * 32 * 127 * 1024 / 1e6:.1f} MB"


# ---- what a run prints ----


def test_a_log_file_has_no_bar_and_a_terminal_has_one(place: Callable[[], Path], fork: Callable[..., dict]) -> None:
    args = [*SMALL, "--sae-type", "topk", "batchtopk", "--perf-log-freq", "20"]
    done = fork(*args, cwd=place())
    assert (done["rc"], done["err"]) == (0, "") and done["out"].isascii() and not set(done["out"]) & set("\r\x1b\t\b")
    lines = done["out"].splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("2 SAEs on tiny-gpt2")
    line = re.compile(r"step (\d+), \d\d:\d\d left: L0 \d.*, expl. var. \S+ to \S+")
    evaluations = [line.fullmatch(text) for text in lines[1:3]]
    assert [found and found[1] for found in evaluations] == ["20", "40"] and " tokens/s; " in lines[3]

    seen = in_a_terminal(*args, cwd=place())
    shown = [line.split("\r")[-1] for line in seen.replace("\r\n", "\n").split("\n")]
    assert "\r" in seen and max(len(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)) for line in shown) <= 80
    table = lines.index(next(line for line in lines if line.startswith("type ")))
    assert lines[table : table + 3] == [line for line in shown if line in lines[table : table + 3]]


@pytest.mark.parametrize("text, value", [("sae_type: [[topk]]", "['topk']"), ("sae_type: {a: 1}", "{'a': 1}")])
def test_a_type_that_is_no_word_is_refused(tmp_path: Path, text: str, value: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"sae_type = {value}: ") + ".*give one of vanilla"):
        cli.parse([f"--overrides={tmp_path / 'a.yaml'}"]).configs()
