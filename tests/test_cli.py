"""The command line: help, list, completion, files of overrides, --dry-run, and what a run prints into a file."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import docstring_parser
import huggingface_hub.constants
import pytest
from hub_server import COMMIT, standing_in
from transformers import GPT2LMHeadModel

import language_model
import main
from config import GROUPS, HINTS, SWEEPS, TYPES, Config, unused_by
from runtime import cli, dry_run, preflight
from sae import build_sae

PROGRAM = [sys.executable, main.__file__]
SMALL = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=3840", "--dict-size=64", "--target-l0=4",
    "--eval-windows=8", "--log-freq=20", "--perf-log-freq=40", "--device=cpu", "--wandb-mode=disabled",
]  # fmt: skip


def said(*args: str, **how: object) -> str:
    done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, timeout=120, **how)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# ---- help ----


@pytest.mark.parametrize("sweep", SWEEPS)
def test_help_has_every_field_in_its_group_with_the_default_of_the_sweep(tmp_path: Path, sweep: str) -> None:
    out = said(sweep, "--help", env=os.environ | {"COLUMNS": "80"}, cwd=tmp_path)
    assert (
        cli.answer(["--help", sweep]) == cli.answer([sweep, "--help"]) == cli.answer([sweep, "--target-l0", "3", "-h"])
    )
    assert cli.answer(["--model-name", sweep, "--help"]) == cli.answer(["--help"])
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    sections = dict(re.findall(r"^([a-z ,]+):\n((?:  .*\n|\n)+)", out + "\n", flags=re.M))
    assert list(sections) == ["the sweep", *(group.__doc__ for group in GROUPS)]
    for group in GROUPS:
        docs = {p.arg_name: p.description for p in docstring_parser.parse_from_object(group).params}
        entries = re.split(r"^  (?=--)", sections[group.__doc__], flags=re.M)[1:]
        names = [entry.split()[0][2:].replace("-", "_") for entry in entries]
        assert names == list(docs) == list(group.__dataclass_fields__)
        for name, entry in zip(names, entries):
            assert docs[name].endswith((".", ")")) and "".join(docs[name].split()) in "".join(entry.split())
            used = [cfg for cfg in SWEEPS[sweep]() if name not in unused_by(cfg.sae_type)]
            values = dict.fromkeys(cli.written(getattr(cfg, name)) for cfg in used or SWEEPS[sweep]())
            assert "".join(entry.split()).endswith(f"(default:{','.join(values)})"), entry


def test_texts_and_mistakes_are_told_without_the_slow_imports() -> None:
    code = (
        "import sys, main\n"
        "codes = [main.main([word]) for word in ('--help', 'list', 'completion', '--top-kk', '--target-l0=5000')]\n"
        "slow = {'torch', 'numpy', 'transformers', 'transformer_lens', 'datasets', 'wandb', 'huggingface_hub'}\n"
        "print(codes, slow & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(main.__file__).parent
    )
    assert done.stderr.splitlines() == [
        "main.py: --top-kk: no such option; did you mean --top-k-aux? python main.py --help lists them",
        "main.py: target_l0 = 5000: give at most dict_size, 2048",
        "[0, 0, 0, 2, 2] set()",
    ]


# ---- list ----


def test_list_names_the_sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = said("list", cwd=tmp_path).splitlines()
    assert max(map(len, lines)) <= 80
    shown = " ".join(" ".join(lines).split())
    for name, make in SWEEPS.items():
        first = make()[0]
        assert f"{name}: {len(make())} {first.kind}s on {first.num_tokens:,} activations {make.__doc__}" in shown
    monkeypatch.setitem(SWEEPS, "both", lambda: [Config(num_tokens=n) for n in (5000, 9000, 7000)])
    assert "both: 3 SAEs on 5,000 to 9,000 activations" in cli.sweeps().splitlines()
    monkeypatch.setitem(SWEEPS, "both", lambda: [Config(), Config(layer=(0, 1)), Config(target_site="mlp_out")])
    assert "both: 3 dictionaries on 1,000,000 activations" in cli.sweeps().splitlines()
    monkeypatch.setitem(SWEEPS, "both", lambda: [Config(target_site="mlp_out", skip=True)])
    assert "both: 1 transcoder on 1,000,000 activations" in cli.sweeps().splitlines()


# ---- completion ----


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """What bash offers after a line."""
    script = tmp_path_factory.mktemp("bash") / "completion"
    script.write_text(said("completion"))
    shell = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        "said=$(complete -p nn-decompositions); function=${said##*-F }; ${function% *}\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def run(line: str) -> list[str]:
        command = ["bash", "--norc", "-c", shell, script, *re.split(" +", line)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    return run


@pytest.mark.parametrize("line, offered", [
    ("nn-decompositions ", [*SWEEPS, "list", "completion", "cache"]),
    ("nn-decompositions t", ["tiny", "transcoders"]),
    ("nn-decompositions gpt2 --re", ["--resume", "--resume-freq"]),
    ("nn-decompositions --sae-type ", [*TYPES]),
    ("nn-decompositions --lr 1 2 --sae-type topk b", ["batchtopk"]),
    ("nn-decompositions --input-unit-norm ", ["True", "False"]),
    ("nn-decompositions --sae-type topk --lr ", []),
])  # fmt: skip
def test_bash_completes(complete: Callable[[str], list[str]], line: str, offered: list[str]) -> None:
    assert complete(line) == offered


def test_every_option_is_completed(complete: Callable[[str], list[str]]) -> None:
    usage = set(re.findall("^  (?:-h, )?(--[a-z0-9-]+)", cli.answer(["--help"]), flags=re.M))
    assert set(complete("nn-decompositions --")) == usage and len(usage) == len(HINTS) + 4


# ---- files of overrides ----

YAML = """target_l0: [4, 8]\nlr: 1e-3\nsae_type: topk\nact_size: null\ninput_unit_norm: no\nmodel_name: '7'
num_tokens: 2e6"""
JSON = """{\t"target_l0": [4, 8], "lr": 1e-3, "sae_type": "topk", "act_size": null, "input_unit_norm": false,
"model_name": "7", "num_tokens": 2e6}"""


@pytest.fixture
def parsed(tmp_path: Path) -> Callable[..., cli.Options]:
    """What a file of overrides and further words ask for."""

    def parse(text: str, *words: str) -> cli.Options:
        (tmp_path / "a.yaml").write_text(text)
        return cli.parse([*words, f"--overrides={tmp_path / 'a.yaml'}"])

    return parse


@pytest.mark.parametrize("text", [YAML, JSON], ids=["YAML", "JSON"])
def test_a_file_is_as_its_options(parsed: Callable, text: str) -> None:
    words = ["--target-l0", "4", "8", "--lr=0.001", "--sae-type=topk", "--act-size=None", "--input-unit-norm=False"]
    words += ["--model-name=7", "--num-tokens=2e6"]
    options = parsed(text, "gpt2")
    assert options.cfgs == cli.parse(["gpt2", *words]).cfgs and len(options.cfgs) == 8
    assert {cfg.target_l0 for cfg in options.cfgs} == {4, 8} and {cfg.lr for cfg in options.cfgs} == {0.001}
    assert {type(number) for cfg in options.cfgs for number in (cfg.target_l0, cfg.num_tokens)} == {int}


@pytest.mark.parametrize("word, name, value", [
    ("2e6", "num_tokens", 2_000_000), ("9007199254740993", "seed", 2**53 + 1), ("08", "seed", 8), (".5", "lr", 0.5),
    ("3", "lr", 3), ("4.5", "target_l0", 4.5), (True, "target_l0", True), ("false", "input_unit_norm", False),
    ("None", "act_size", None), ("none", "model_name", "none"), ("1e6", "model_name", "1e6"),
    ("inf", "target_l0", float("inf")), ("0.25,5e-1,1", "prefixes", (0.25, 0.5, 1)), ("1", "prefixes", (1,)),
    ("1,x", "prefixes", (1, "x")),
])  # fmt: skip
def test_words_as_values(word: object, name: str, value: object) -> None:
    found = cli._value(word, HINTS[name])
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text, swept", [
    ("[0.25, 5e-1, 1]", [(0.25, 0.5, 1)]),
    ("[[0.25, 1], [0.5, 1]]", [(0.25, 1), (0.5, 1)]),
    ("1", [(1,)]),
])  # fmt: skip
def test_a_list_is_one_value_of_a_field_of_several_numbers(parsed: Callable, text: str, swept: list[tuple]) -> None:
    found = [cfg.prefixes for cfg in parsed(f"prefixes: {text}\nsae_type: matryoshka").cfgs]
    words = ["--sae-type=matryoshka", "--prefixes", *map(cli.written, swept)]
    assert found == swept == [cfg.prefixes for cfg in cli.parse(words).cfgs]


def test_options_win_over_the_file(parsed: Callable) -> None:
    words = ["--lr", "0.5", "--target-l0", "2", "--target_l0=3"]
    cfgs = parsed("target_l0: [4, 8]\nlr: [1e-3, .1]\nsae_type: topk\n", *words).cfgs
    assert [(cfg.sae_type, cfg.target_l0, cfg.lr) for cfg in cfgs] == [("topk", 3, 0.5)]


@pytest.mark.parametrize("text, value", [("sae_type: [[topk]]", "['topk']"), ("sae_type: {a: 1}", "{'a': 1}")])
def test_a_type_that_is_no_word_is_refused(parsed: Callable, text: str, value: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"sae_type = {value}: ") + ".*give one of vanilla"):
        parsed(text)


@pytest.mark.parametrize("words", [["--resume="], ["--resume=runs/a", "tiny"]], ids=str)
def test_resume_takes_one_folder_alone(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^--resume: give it one folder and no other option"):
        cli.parse(words)


# ---- --dry-run ----


@pytest.fixture
def dry(
    place: Callable[[], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """What a dry run prints, in a folder in which only a model and a text lie."""
    monkeypatch.chdir(place())

    def run(*args: str) -> str:
        before = set(Path().rglob("*"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which it changes
        assert main.main([*SMALL, "--dry-run", *args]) == 0
        out, err = capsys.readouterr()
        assert err == "" and max(map(len, out.splitlines())) <= 80 and set(Path().rglob("*")) == before
        return out

    return run


def test_a_dry_run_tells_configs_and_sizes(dry: Callable[..., str]) -> None:
    args = ["--lr", "0.001", "0.01", "--sae-type", "topk", "jumprelu", "--text-seed", "0", "1"]
    configs, common, *groups = dry(*args).split("\n\n")
    cfgs = [language_model.check_model(cfg) for cfg in cli.parse([*SMALL, *args]).cfgs]  # the name has the width
    lines = [" ".join(line.split()) for line in re.split(r"\n(?! )", configs)]
    for cfg, line in zip(cfgs, lines, strict=True):
        assert line == f"{cfg.name} text_seed {cfg.text_seed}, sae_type {cfg.sae_type}, lr {cfg.lr}"
    common = " ".join(common.split())
    assert common.startswith("in each of them model_name tiny-gpt2, ") and ", layer 1, site " in common
    assert ", dict_size 64, " in common

    assert len(groups) == 2  # a stream for each text_seed
    model = GPT2LMHeadModel.from_pretrained("tiny-gpt2").num_parameters()
    for seed, group in enumerate(groups):
        own = [cfg for cfg in cfgs if cfg.text_seed == seed]
        each = [sum(p.numel() for p in build_sae(cfg).parameters()) for cfg in own]
        assert group.startswith(f"{len(own)} SAEs on tiny-gpt2 blocks.1.hook_resid_pre, 3,840 activations\n")
        assert f"{sum(each):,} in the SAEs, {min(each):,} to {max(each):,} in each\n" in group
        assert f" {model:,} in the language model\n" in group


def test_a_dry_run_of_an_unknown_model_tells_what_is_known(dry: Callable[..., str]) -> None:
    unknown = ["--model-name=some/model", "--sae-type=topk", "--dataset-path=some/text"]
    out = dry(*unknown)
    assert "\nparameters   unknown: some/model is not on this disk; give --act-size" in out and "MB" not in out
    (cfg,) = cli.parse([*SMALL, *unknown]).cfgs
    assert out.startswith(f"{cfg.name}\n\nin it\n    model_name some/model, ")
    out = dry(*unknown, "--act-size=16")
    assert f"parameters   {2 * 16 * 64 + 64 + 16:,} in the SAEs" in out
    assert "beside the libraries and the language model\n" in out and "in the language model" not in out


def test_a_dry_run_reads_the_text_once_for_each_window_size(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("The grey owl hoots in the attic.\n" * 8000)
    cfgs = [
        Config(layer=1, dataset_path=str(tmp_path / "few.txt"), seq_len=seq_len, batch_size=64, device="cpu")
        for seq_len in (16, 64)
    ]
    checked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check_text", lambda cfg: checked.append(cfg.seq_len))
        list(dry_run.describe([*cfgs, cfgs[0]]))
    assert checked == [16, 64]


def test_a_dry_run_asks_nothing_of_the_hub(
    dry: Callable[..., str], tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of a model in the cache is enough, without its weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    shutil.copytree(tiny_gpt2, cached / "snapshots" / COMMIT, ignore=shutil.ignore_patterns("*.safetensors"))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    with standing_in(monkeypatch, tmp_path) as hub:
        out = dry("--model-name=some/model")
        assert "in the language model\n" in out and "not on this disk" not in out and hub.requests == []


@pytest.mark.parametrize("sae_type, dense_rows", [("topk", 0), ("vanilla", dry_run.DENSE_ROWS)])
def test_memory_is_the_sum_of_its_parts(sae_type: str, dense_rows: int) -> None:
    cfgs = [Config(dict_size=F, batch_size=8192, sae_type=sae_type, device="cpu", eval_windows=1) for F in (2048, 4096)]
    line = r"^(?:memory)? +([0-9.]+) (MB|GB)(?: on cpu)?,?  ?(.*)$"
    found = re.findall(line, "\n".join(dry_run.describe(cfgs)), re.M)
    total, *parts = [(float(size) * {"MB": 1, "GB": 1000}[unit], name) for size, unit, name in found]
    assert {name: size for size, name in parts} == pytest.approx({
        "weights, gradients and Adam's two means": 16e-6 * sum(2 * 256 * F + F + 256 for F in (2048, 4096)),
        "activation buffer (on a CPU, and a copy to save it)": 2e-6 * 16 * 32 * 127 * 256 * 4,
        "language model": 17.1,
        "peak of a step or an evaluation": 4e-6 * 8192 * (dry_run.STEP_ROWS * 256 + dense_rows * 4096),
    }, abs=0.06)  # fmt: skip
    assert total[0] == pytest.approx(sum(size for size, _ in parts), abs=50 if total[0] >= 1000 else 0.4)


# ---- what a run prints ----


def test_a_log_file_has_no_bar_and_a_terminal_has_one(place: Callable[[], Path], fork: Callable[..., dict]) -> None:
    args = [*SMALL, "--sae-type", "topk", "batchtopk", "--perf-log-freq", "20"]
    done = fork(*args, cwd=place())
    assert (done["rc"], done["err"]) == (0, "") and done["out"].isascii() and not set(done["out"]) & set("\r\x1b\t\b")
    lines = done["out"].splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].startswith("2 SAEs on tiny-gpt2")
    line = re.compile(r"step (\d+), \d\d:\d\d left: L0 \d.*, expl. var. \S+ to \S+")
    evaluations = [line.fullmatch(text) for text in (lines[2], lines[4])]
    assert [found and found[1] for found in evaluations] == ["20", "40"] and " tokens/s; time: " in lines[6]
    assert [lines[i] for i in (1, 3, 5)] == ["evaluating 2 SAEs"] * 3 and "drawing figures" in lines

    terminal = fork(*args, cwd=place(), terminal=True)
    seen = terminal["out"]
    assert terminal["rc"] == 0, seen
    shown = [line.split("\r")[-1] for line in seen.replace("\r\n", "\n").split("\n")]
    assert "\r" in seen and max(len(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line)) for line in shown) <= 80
    table = lines.index(next(line for line in lines if line.startswith("type ")))
    assert lines[table : table + 3] == [line for line in shown if line in lines[table : table + 3]]
