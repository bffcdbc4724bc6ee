"""Bad input of every kind: one line with the field, the value and the remedy, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import jaxtyping
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import evaluation
import main
import sweep
from config import Config
from evaluation import HeldOut, evaluate
from language_model import load_model
from sae import BaseAutoencoder, build_sae

SMALL = [
    "--model-name=tiny-gpt2", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=640", "--dict-size=64", "--target-l0=4",
    "--device=cpu",
    "--sae-type=topk", "--wandb-mode=disabled",
]  # fmt: skip
Said = tuple[str, ...]


@pytest.fixture
def here(place: Callable[[], Path], tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a text and what tests may break: a copy of the model, an empty folder."""
    folder = place()
    shutil.copytree(tiny_gpt2, folder / "broken")
    (folder / "folder").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str], Said], None]:
    """Run the command line, which must be refused in one line that holds each of the fragments."""

    def run(args: list[str], said: Said) -> None:
        before = set(here.rglob("*"))
        code = main.main([*SMALL, *args])
        out, err = capfd.readouterr()
        assert code == 2 and err.startswith("main.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert all(fragment in err for fragment in said), err
        assert set(here.rglob("*")) == before and out == ""

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "load_model", lambda cfg: pytest.fail("a model was loaded"))


# ---- command lines ----

COMMAND_LINES: list[tuple[list[str], Said]] = [
    (["--colour=red"], ("--colour=red: no such option", "--help lists them")),
    (["--top_kk=3"], ("--top-kk=3: no such option", "did you mean --top-k-aux?")),
    (["tiny", "huge"], ("huge: no such option", "--help lists them")),
    (["--lr", "--seed=1"], ("--lr: no value", "give one or several")),
    (["--target-l0="], ("target_l0 = '': ", "give int")),
    (["--target-l0", "4", "tiny"], ("target_l0 = 'tiny': ", "give int")),
    (["--lr=nan"], ("lr = nan: ", "give a finite number")),
    (["--prefixes=0.5,one"], ("prefixes = (0.5, 'one'): ", "give a list of float")),
    (["--input-unit-norm=maybe"], ("input_unit_norm = 'maybe': ", "give bool")),
    (["--seed=None"], ("seed = 'None': ", "give int")),
    (["--device=cuda:99"], ("device = 'cuda:99': ", "GPUs; give cpu or another")),
    (["--wandb-project=a/b"], ("wandb_project = 'a/b': ", "none of /\\#?%:")),
    (["--wandb-project=" + 129 * "x"], ("wandb_project = 'xxx", "give at most 128 characters")),
    (["--num-batches-in-buffer=2", "--batch-size=500", "--num-tokens=500"],
     ("num_batches_in_buffer = 2: 496 rows are less than two of batch_size 500; give at least 5",)),
    (["--output-dir=animals.txt/deeper"], ("output_dir = 'animals.txt/deeper': ", "Not a directory", "give another")),
    (["--output-dir=/proc/runs"], ("output_dir = '/proc/runs': /proc cannot be written to", "give another")),
    (["--layer", "0", "7"], ("layer = 7: tiny-gpt2 has 2 blocks", "give 0 to 1")),
    (["--site=z", "--act-size=8"], ("act_size = 8: z of tiny-gpt2 is 16 wide", "leave it out")),
    (["list"], ("list: give it no other word",)),
    (["--dry-run", "--layer=2"], ("layer = 2: tiny-gpt2 has 2 blocks", "give 0 to 1")),
    (["--dry-run", "--model-name=a/b/c"], ("model_name = 'a/b/c': found neither in a folder ", "give another")),
    (["--dry-run", "--dataset-path=no.txt"], ("dataset_path = 'no.txt': no such file", "check the path")),
    (["--dry-run", "--output-dir=animals.txt"], ("output_dir = 'animals.txt': ", "Not a directory", "give another")),
    (["--dry-run", "--resume", "folder"], ("--resume: give it one folder and no other option",)),
    (["--overrides"], ("--overrides: expected one argument",)),
    (["--overrides", "a.yaml", "b.yaml"], ("'b.yaml': give one of tiny, gpt2",)),
    (["--overrides=folder"], ("--overrides: folder: no such file", "give a YAML or JSON file of Config's fields")),
]  # fmt: skip


@pytest.mark.parametrize("args, said", COMMAND_LINES, ids=lambda value: value[0][:40])
def test_command_lines(refused: Callable, no_model: None, args: list[str], said: Said) -> None:
    refused(args, said)


OVERRIDES: list[tuple[bytes, str]] = [
    (b"", "no fields and values; give lines such as target_l0: [16, 32]"),
    (b'[["seed", 1]]', "no fields and values; give lines"),
    (b"target_l0: [16", "not YAML or JSON ("),
    (b"target_l0: 16\n\tlr: 1", "not YAML or JSON ("),
    (b"target_l0: 1\n---\ntarget_l0: 2", "not YAML or JSON ("),
    (b"\xff\xfe\xfd", "not YAML or JSON ("),
    (b"lr: 2024-13-45", "not YAML or JSON (ValueError: month must be in 1..12); give lines such as"),
    (b"lr: !!python/name:os.system", "not YAML or JSON (ConstructorError: could not determine"),
    (b"[" * 100_000, "not YAML or JSON ("),
    (b"target-l0: 4", "'target-l0' is no field of Config; did you mean target_l0? --help lists them"),
    (b"[1]: 4", "[1] is no field of Config; --help lists them"),
    (b"lr: 1\ntarget_l0: 4\nlr: 2", "lr is given twice; give one list of its values"),
    (b'{"seed": 1, "seed": 2}', "seed is given twice; give one list"),
    (b"prefixes: []", "prefixes = []: no value; give one or several"),
]  # fmt: skip
VALUES: list[tuple[bytes, str]] = [
    (b"seed: [0, 1.5]", "seed = 1.5: give int"),
    (b"seed: [[0, 1]]", "seed = [0, 1]: give int"),
    (b"seed:", "seed = None: give int"),
    (b"seed: 2024-01-01", "seed = datetime.date(2024, 1, 1): give int"),
    (b"site: no", "site = False: give str"),
    (b"dataset_name: 3", "dataset_name = 3: give str or None"),
    (b"prefixes: {a: 1}", "give a list of float"),
    (b"prefixes: [1, 0.5]", "prefixes = (1, 0.5): give shares that rise from 0 to 1"),
]


@pytest.mark.parametrize("content, said", [*((c, f"--overrides: a.yaml: {said}") for c, said in OVERRIDES), *VALUES])
def test_files_of_overrides(refused: Callable, no_model: None, content: bytes, said: str) -> None:
    Path("a.yaml").write_bytes(content)
    refused(["--overrides=a.yaml"], (said,))


@pytest.mark.parametrize("args, said", [
    (["tinny"], "sweep = 'tinny': did you mean tiny? give one of tiny, gpt2"),
    (["--dataset-path=floats.parquet"], "dataset_path = 'floats.parquet': cannot be used ("),
], ids=["word", "data"])  # fmt: skip
def test_the_program_itself_says_one_line_and_ends_with_2(tmp_path: Path, args: list[str], said: str) -> None:
    """Threads of other libraries read ahead when it ends, and must neither keep it nor add to the line."""
    pq.write_table(pa.table({"tokens": [[0.5]] * 1000}), tmp_path / "floats.parquet")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, main.__file__, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"main.py: {said}") and done.stderr.count("\n") == 1, done.stderr


# ---- data ----


def lines(*rows: object, times: int = 40) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows) * times


def ids(*tokens: object) -> bytes:
    """40 rows, so that the training part has some."""
    return lines(*({"tokens": [4, *tokens, i]} for i in range(1, 41)), times=1)


DATA: list[tuple[str, bytes | None, Said]] = [
    *((path, None, ("no such file", "check the path")) for path in ("no.txt", "./none", "~/none", "a/b/c")),
    ("folder/*.txt", None, ("no such file", "check the path or the glob")),
    ("folder", None, ("no file of .py, .txt, .jsonl, .parquet in that folder", "check the path")),
    ("A.TXT", b"a", ("found .TXT", "give files of one of .py, .txt")),
    ("a", b"a", ("found a name without a suffix", "give files of one of")),
    ("a.txt", b"", ("every file is empty", "give files with text")),
    ("a.txt", "some text".encode("utf-16"), ("a.txt is binary, it has NUL bytes", "give text in UTF-8")),
    ("a.jsonl", b"\1\0\2" * 99, ("a.jsonl is binary", "give text in UTF-8")),
    ("a.txt", b"a few words\n", ("training text does not fill a window of seq_len 32", "give more text")),
    ("a.txt", b"a few words " * 300, ("does not fill a window of seq_len 32", "give more text")),
    ("a.py", b"x = 1\n" * 300, ("1 files leave none for the held-out part", "add files")),
    ("a.jsonl", b"plain words\n" * 9, ("cannot be read (ArrowInvalid: JSON parse error", "give other")),
    ("a.jsonl", lines({"text": "a"}) + b'{"text": "b', ("in row 40", "give other data")),
    ("a.jsonl", b'{"text": "caf\xe9"}\n' * 9, ("'utf-8' codec can't decode byte 0xe9", "give other data")),
    ("a.jsonl", b"[1, 2]\n" * 9, ("cannot be read (", "give other data")),
    ("a.jsonl", b"\n" * 9, ("no column of text or tokens among none", "name it as text_column")),
    ("a.jsonl", lines({"body": "a", "id": 3}), ("among body, id", "name it as text_column")),
    ("a.jsonl", lines({"text": 3}, {"text": 4}), ("a text is ", "the column must hold strings")),
    ("a.jsonl", lines({"text": None}), ("does not fill a window", "give more text")),
    ("a.jsonl", lines({"text": ""}, times=999), ("its training text does not fill", "give more text")),
    ("a.jsonl", ids(320), ("token 320 is outside the vocabulary of 320 of '", "give other data")),
    ("a.jsonl", ids(-1), ("token -1 is outside the vocabulary of 320", "give other data")),
    ("a.jsonl", ids(1.5), ("tokens are [4.0, 1.5,", "the column must hold lists of ids")),
    ("a.jsonl", ids(None), ("tokens are [4, None,", "the column must hold lists of ids")),
    ("a.jsonl", lines({"tokens": [True, False]}, {"tokens": [True]}), ("tokens are [True", "of ids")),
    ("a.jsonl", lines({"tokens": "5 6"}, {"tokens": "7"}), ("tokens are '", "must hold lists of ids")),
    ("a.jsonl", lines({"tokens": 5}, {"tokens": 6}), ("tokens are ", "must hold lists of ids")),
    ("a.parquet", b"PK\3\4" * 99, ("a.parquet is not parquet", "give the file whole")),
    ("a.parquet", b"PAR1" + bytes(99), ("magic bytes not found in footer", "give other data")),
]  # fmt: skip


@pytest.mark.parametrize("path, content, said", DATA, ids=[f"{path} {said[0][:40]}" for path, _, said in DATA])
def test_data(refused: Callable, no_model: None, path: str, content: bytes | None, said: Said) -> None:
    if content is not None:
        Path(path).write_bytes(content)
    refused([f"--dataset-path={path}"], (f"dataset_path = {path!r}: ", *said))


@pytest.mark.parametrize(
    "path, said", [("a.jsonl", "one of body, id"), ("a.txt", "files have no columns; leave it out")]
)
def test_a_column_that_is_not_there(refused: Callable, no_model: None, path: str, said: str) -> None:
    Path(path).write_bytes(lines({"body": "a", "id": 3}))
    refused([f"--dataset-path={path}", "--text-column=story"], ("text_column = 'story': ", said))


@pytest.mark.parametrize("names, content, said", [
    (["a.csv"], b"a", ("no file of .py, .txt", "check the path")),
    (["a.py", "a.txt"], b"a", ("found .py, .txt", "give files of one of")),
    (["a.jsonl", "b.jsonl"], b"", ("every file is empty", "give files with text")),
    (["a.py", "b.py"], b"\0", ("folder/a.py is binary", "give text in UTF-8")),
])  # fmt: skip
def test_folders(refused: Callable, no_model: None, names: list[str], content: bytes, said: Said) -> None:
    for name in names:
        Path("folder", name).write_bytes(content)
    refused(["--dataset-path=folder"], ("dataset_path = 'folder': ", *said))


def test_a_file_that_may_not_be_read(refused: Callable, no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_bytes(lines({"text": "a"}))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.jsonl")  # root may read all
    refused(["--dataset-path=a.jsonl"], ("dataset_path = 'a.jsonl': you may not read a.jsonl", "change its permiss"))


# ---- models ----


def set_fields(**changes: object) -> Callable[[], None]:
    file = Path("broken/config.json")
    return lambda: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put(name: str, content: str) -> Callable[[], None]:
    return lambda: Path("broken", name).write_text(content)


def remove(pattern: str) -> Callable[[], None]:
    return lambda: [file.unlink() for file in Path("broken").glob(pattern)]


MODELS: dict[str, tuple[Callable[[], object], Said]] = {
    "no config": (remove("config.json"), ("no good config.json (ValueError: Unrecognized model", "give another")),
    "cut config": (put("config.json", '{"model_type":'), ("has no good config.json (", "not a valid JSON file")),
    "unknown type": (set_fields(model_type="gpt9"), ("has no good config.json", "`gpt9`", "give another")),
    "wrong field": (set_fields(n_layer="two"), ("has no good config.json", "'n_layer' expected int")),
    "encoder": (put("config.json", '{"model_type": "t5"}'), ("t5 is no decoder-only language model", "give one")),
    "other tokenizer": (set_fields(vocab_size=300), ("has 320 tokens, the model 300", "put the model's own")),
    "no tokenizer": (remove("token*"), ("no tokenizer in that folder", "give another")),
    "no BOS, no EOS": (put("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
     ("its tokenizer has neither a BOS nor an EOS", "give another")),
    "cut tokenizer": (put("tokenizer.json", '{"version":'), ("no tokenizer that can be read", "give another")),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models(refused: Callable, no_model: None, case: str) -> None:
    breaks, said = MODELS[case]
    breaks()
    refused(["--model-name=broken"], ("model_name = 'broken': ", *said))


@pytest.mark.parametrize("breaks", [
    remove("*.safetensors"), lambda: os.truncate("broken/model.safetensors", 5000), set_fields(n_embd=32)
], ids=["no weights", "cut weights", "other width"])  # fmt: skip
def test_weights(refused: Callable, breaks: Callable[[], object]) -> None:
    breaks()
    refused(["--model-name=broken"], ("model_name = 'broken': cannot be loaded (", "give a whole model that fits"))


def test_a_site_that_the_model_lacks_is_found_before_the_first_stream(
    refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = GPTNeoXConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, use_parallel_residual=True,
    )  # fmt: skip
    GPTNeoXForCausalLM(cfg).save_pretrained("parallel")
    for file in Path("tiny-gpt2").glob("token*"):
        Path("parallel", file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(sweep, "train", lambda *args: pytest.fail("a stream was trained"))
    said = "site = 'resid_mid': ", "give one of resid_pre, resid_post, attn_in, attn_out, mlp_"
    refused(["--model-name=parallel", "--layer", "0", "1", "--site", "resid_pre", "mlp_out", "resid_mid"], said)


@pytest.mark.parametrize("name", ["animals.txt", "./gone", "no such model", "a/b/c"])
def test_names_of_no_model(refused: Callable, no_model: None, name: str) -> None:
    refused([f"--model-name={name}"], (f"model_name = {name!r}: ", "give another"))


# ---- tensors ----


@pytest.fixture(autouse=True)
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests


D = 16


def small_sae() -> BaseAutoencoder:
    return build_sae(Config(layer=1, act_size=D, dict_size=64, target_l0=4, device="cpu", input_unit_norm=False))


def test_an_sae_is_initialised_from_one_row() -> None:
    sae, row = small_sae(), torch.randn(D)
    sae.initialise_from(row)
    assert torch.allclose(sae.b_dec, row)


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> TransformerBridge:
    return load_model(Config(model_name=str(tiny_gpt2), layer=1, device="cpu"))


GOOD = torch.arange(1, 31).view(2, 15)


@pytest.mark.parametrize("tokens, said", [
    (GOOD.float(), "tokens = torch.float32 [2, 15]: give int64 [window, pos]"),
    (GOOD[:0], "tokens = torch.int64 [0, 15]: give int64 [window, pos], at least one window"),
    (GOOD[:, :1], "tokens = torch.int64 [2, 1]: "),
    (GOOD.repeat(1, 5), "at least one window of 2 to 64 tokens"),
    (GOOD + 290, "tokens = 291 to 320: the model knows 0 to 319; use its own tokenizer"),
    (GOOD - 2, "tokens = -1 to 28: the model knows 0 to 319"),
    (GOOD * 0, "tokens = [2, 15]: special ones only; give held-out text"),
], ids=["float", "no window", "one token", "too long", "too high", "too low", "special"])  # fmt: skip
def test_tokens(model: TransformerBridge, tokens: Tensor, said: str) -> None:
    with pytest.raises(ValueError) as error:
        HeldOut(model, tokens)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_windows_of_special_tokens_alone_change_no_metric(
    model: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 2 * 15 * 320)  # two windows a batch
    sae, padded = small_sae(), torch.cat([GOOD, GOOD * 0, GOOD])
    found, expected = (evaluate(HeldOut(model, tokens), [sae]) for tokens in (padded, GOOD.repeat(2, 1)))
    assert found[0] == pytest.approx(expected[0])
