"""Bad input of every kind: one line with the field, the value and the remedy, exit code 2, nothing written."""

import json
import os
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
from activation_store import ActivationsStore
from config import Config
from evaluation import evaluate
from language_model import check_model, load_model
from sae import build_sae

SMALL = [
    "--model-name=model", "--dataset-path=animals.txt", "--layer=1", "--seq-len=32", "--model-batch-size=8",
    "--num-batches-in-buffer=4", "--batch-size=64", "--num-tokens=640", "--dict-size=64", "--top-k=4", "--device=cpu",
    "--sae-type=topk", "--wandb-mode=disabled",
]  # fmt: skip
Said = tuple[str, ...]


@pytest.fixture
def here(tmp_path: Path, tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a text and what tests may break: a copy of the model, an empty folder."""
    (tmp_path / "model").symlink_to(tiny_gpt2)
    (tmp_path / "animals.txt").symlink_to(tiny_text)
    (tmp_path / "broken").mkdir()
    for file in tiny_gpt2.iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture
def refused(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[list[str], Said], None]:
    """Run the command line, which must be refused in one line that holds each of the fragments."""

    def run(args: list[str], said: Said) -> None:
        before = tree(here)
        code = main.main([*SMALL, *args])
        out, err = capfd.readouterr()
        assert code == 2 and err.startswith("main.py: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert all(fragment in err for fragment in said), err
        assert tree(here) == before
        assert out == ""

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "load_model", lambda cfg: pytest.fail("a model was loaded"))


# ---- command lines ----

COMMAND_LINES: list[tuple[list[str], Said]] = [
    (["--colour=red"], ("--colour=red: no such option", "--help lists them")),
    (["--sae-typ", "topk"], ("--sae-typ: no such option", "did you mean --sae-type?")),
    (["--top_kk=3"], ("--top_kk=3: no such option", "did you mean --top-k?")),
    (["-v"], ("-v: no such option", "--help lists them")),
    (["--top-k"], ("--top-k: no value", "give one or several")),
    (["--lr", "--seed=1"], ("--lr: no value",)),
    (["--top-k=many"], ("top_k = 'many': ", "give int")),
    (["--top-k="], ("top_k = '': ", "give int")),
    (["--layer=1.5"], ("layer = 1.5: ", "give int")),
    (["--num-tokens=1e-6"], ("num_tokens = 1e-06: ", "give int")),
    (["--top-k", "4", "tiny"], ("top_k = 'tiny': ", "give int")),
    (["--lr=fast"], ("lr = 'fast': ", "give float")),
    (["--lr=nan"], ("lr = nan: ", "give a finite number")),
    (["--l1-coeff=-inf"], ("l1_coeff = -inf: ", "give a finite number")),
    (["--input-unit-norm=maybe"], ("input_unit_norm = 'maybe': ", "give bool")),
    (["--checkpoint-freq=never"], ("checkpoint_freq = 'never': ", "give int or None")),
    (["--seed=None"], ("seed = 'None': ", "give int")),
    (["--dict-size", "-3"], ("dict_size = -3: ", "give a number above 0")),
    (["--dtype=fp32"], ("dtype = 'fp32': ", "give one of float32, bfloat16, float16")),
    (["--device=cuda:99"], ("device = 'cuda:99': ", "GPUs; give cpu or another")),
    (["--device=tpu"], ("device = 'tpu': ", 'give "auto", "cpu"')),
    (["--wandb-project=a/b"], ("wandb_project = 'a/b': ", "none of /\\#?%:")),
    (["--wandb-project=" + 129 * "x"], ("wandb_project = 'xxx", "give at most 128 characters")),
    (["--num-batches-in-buffer=2", "--batch-size=500", "--num-tokens=500"],
     ("num_batches_in_buffer = 2: 496 rows are less than two of batch_size 500; give at least 5",)),
    (["--output-dir=animals.txt"], ("output_dir = 'animals.txt': ", "Not a directory", "give another")),
    (["--output-dir=animals.txt/deeper"], ("output_dir = 'animals.txt/deeper': ", "Not a directory", "give another")),
    (["--output-dir=/proc/runs"], ("output_dir = '/proc/runs': /proc cannot be written to", "give another")),
    (["--layer=2"], ("layer = 2: model has 2 blocks", "give 0 to 1")),
    (["--layer", "0", "7"], ("layer = 7: model has 2 blocks", "give 0 to 1")),
    (["--seq-len=65"], ("seq_len = 65: model reads at most 64 tokens", "give no more")),
    (["--act-size=17"], ("act_size = 17: resid_pre of model is 16 wide", "leave it out")),
    (["--site=z", "--act-size=8"], ("act_size = 8: z of model is 16 wide", "leave it out")),
    (["--site=mlp_post"], ("site = 'mlp_post': ", "give one of resid_pre, resid_mid")),
    (["tinny"], ("sweep = 'tinny': did you mean tiny? give one of tiny, gpt2",)),
    (["tiny", "huge"], ("huge: no such option", "--help lists them")),
    (["list"], ("list: give it no other word",)),
    (["--dry-run=yes"], ("argument --dry-run: ignored explicit argument 'yes'",)),
    (["--dry-run", "--top-k=65"], ("top_k = 65: give at most dict_size, 64",)),
    (["--dry-run", "--layer=2"], ("layer = 2: model has 2 blocks", "give 0 to 1")),
    (["--dry-run", "--dataset-path=no.txt"], ("dataset_path = 'no.txt': no such file", "check the path")),
    (["--dry-run", "--output-dir=animals.txt"], ("output_dir = 'animals.txt': ", "Not a directory", "give another")),
    (["--dry-run", "--resume", "folder"], ("--resume: give it one folder and no other option",)),
    (["--overrides"], ("--overrides: expected one argument",)),
    (["--overrides", "a.yaml", "b.yaml"], ("'b.yaml': give one of tiny, gpt2",)),
    (["--overrides=no.yaml"], ("--overrides: no.yaml: no such file", "give a YAML or JSON file of Config's fields")),
    (["--overrides=folder"], ("--overrides: folder: no such file", "give a YAML or JSON file")),
    (["--overrides=folder", "--resume=folder"], ("--resume: give it one folder and no other option",)),
]  # fmt: skip


@pytest.mark.parametrize("args, said", COMMAND_LINES, ids=lambda value: value[0][:40])
def test_command_lines(refused: Callable, no_model: None, args: list[str], said: Said) -> None:
    refused(args, said)


OVERRIDES: list[tuple[str, bytes, Said]] = [
    ("a.yaml", b"", ("no fields and values", "give lines such as top_k: [16, 32]")),
    ("a.yaml", b"- top_k", ("no fields and values", "give lines")),
    ("a.yaml", b"top_k", ("no fields and values", "give lines")),
    ("a.yaml", b"top_k: [16", ("not YAML (", "line 1", "give lines such as")),
    ("a.yaml", b"top_k: 16\n\tlr: 1", ("not YAML (", "give lines")),
    ("a.yaml", b"top_k: 1\n---\ntop_k: 2", ("not YAML (", "give lines")),
    ("a.yaml", b"\xff\xfe\xfd", ("not YAML (", "give lines")),
    ("a.yaml", b"lr: 2024-13-45", ("not YAML (ValueError: month must be in 1..12)", "give lines")),
    ("a.yaml", b"lr: !!python/name:os.system", ("not YAML (ConstructorError: could not determine", "give lines")),
    ("a.yaml", b"[" * 5000, ("not YAML (", "give lines")),
    ("a.yaml", b"topk: 4", ("'topk' is no field of Config; did you mean top_k?", "--help lists them")),
    ("a.yaml", b"top-k: 4", ("'top-k' is no field of Config; did you mean top_k?",)),
    ("a.yaml", b"sweep: gpt2", ("'sweep' is no field of Config", "--help lists them")),
    ("a.yaml", b"[1]: 4", ("[1] is no field of Config", "--help lists them")),
    ("a.yaml", b"lr: 1\ntop_k: 4\nlr: 2", ("lr stands there twice", "give one list of its values")),
    ("a.yaml", b"top_k: []", ("top_k = []: no value", "give one or several")),
    ("a.json", b'{"seed": []}', ("seed = []: no value", "give one or several")),
    ("a.json", b"{'seed': 1}", ("not JSON (", "give lines")),
    ("a.json", b'{"seed": 1, "seed": 2}', ("seed stands there twice", "give one list")),
    ("a.json", b'[["seed", 1]]', ("no fields and values", "give lines")),
    ("a.json", b"\xff", ("not JSON (", "give lines")),
    ("a.json", b"[" * 100_000, ("not JSON (", "give lines")),
]  # fmt: skip


@pytest.mark.parametrize("name, content, said", OVERRIDES, ids=[f"{c[0]} {c[1][:30]!r}" for c in OVERRIDES])
def test_files_of_overrides(refused: Callable, no_model: None, name: str, content: bytes, said: Said) -> None:
    Path(name).write_bytes(content)
    refused([f"--overrides={name}"], (f"--overrides: {name}: ", *said))


@pytest.mark.parametrize("content, said", [
    ("seed: many", "seed = 'many': give int"),
    ("seed: [0, 1.5]", "seed = 1.5: give int"),
    ("seed: [[0, 1]]", "seed = [0, 1]: give int"),
    ("seed: {a: 1}", "seed = {'a': 1}: give int"),
    ("seed:", "seed = None: give int"),
    ("seed: 2024-01-01", "seed = datetime.date(2024, 1, 1): give int"),
    ("beta2: 1e0", "beta2 = 1.0: give a number in [0, 1)"),
    ("dtype: fp32", "dtype = 'fp32': give one of float32,"),
    ("site: no", "site = False: give one of resid_pre,"),
    ("dataset_name: 3", "dataset_name = 3: give str or None"),
])  # fmt: skip
def test_values_in_files_of_overrides(refused: Callable, no_model: None, content: str, said: str) -> None:
    Path("a.yaml").write_text(content)
    refused(["--overrides=a.yaml"], (said,))


@pytest.mark.parametrize("args, said", [
    (["tinny"], "sweep = 'tinny': did you mean tiny? give one of tiny, gpt2"),
    (["--dataset-path=floats.parquet"], "dataset_path = 'floats.parquet': cannot be used ("),
], ids=["word", "data"])  # fmt: skip
def test_the_program_itself_says_one_line_and_ends_with_2(tmp_path: Path, args: list[str], said: str) -> None:
    """Threads of other libraries read ahead when it ends, and must neither keep it nor add to the line."""
    (tmp_path / "floats.parquet").write_bytes(parquet("tokens", [[0.5]] * 1000))
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, main.__file__, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"main.py: {said}") and done.stderr.count("\n") == 1, done.stderr


# ---- data ----


def lines(*rows: object, times: int = 40) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows) * times


def parquet(column: str, values: list, kind: pa.DataType | None = None) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({column: pa.array(values, kind)}), buffer)
    return buffer.getvalue().to_pybytes()


def ids(*tokens: object) -> bytes:
    """40 rows, so that the training part has some."""
    return lines(*({"tokens": [4, *tokens, i]} for i in range(1, 41)), times=1)


DATA: list[tuple[str, dict[str, bytes], Said]] = [
    ("no.txt", {}, ("no such file", "check the path")),
    ("/none", {}, ("no such file", "check the path")),
    ("./none", {}, ("no such file", "check the path")),
    ("~/none", {}, ("no such file", "check the path")),
    ("folder/*.txt", {}, ("no such file", "check the path or the glob")),
    ("folder", {}, ("no file of .py, .txt, .jsonl, .parquet in that folder", "check the path")),
    ("folder", {"folder/a.csv": b"a"}, ("no file of .py, .txt", "check the path")),
    ("folder", {"folder/a.py": b"a", "folder/a.txt": b"b"}, ("found .py, .txt", "give files of one of")),
    ("a.csv", {"a.csv": b"a"}, ("found .csv", "give files of one of .py, .txt")),
    ("A.TXT", {"A.TXT": b"a"}, ("found .TXT", "give files of one of .py, .txt")),
    ("a*", {"a.py": b"a"}, ("found .py, .txt", "give files of one of .py, .txt")),  # animals.txt is there too
    ("a", {"a": b"a"}, ("found a name without a suffix", "give files of one of")),
    ("a.txt", {"a.txt": b""}, ("every file is empty", "give files with text")),
    ("folder", {"folder/a.jsonl": b"", "folder/b.jsonl": b""}, ("every file is empty", "give files with text")),
    ("a.txt", {"a.txt": b"\x7fELF\0\0\1" * 99}, ("a.txt is binary, it has NUL bytes", "give text in UTF-8")),
    ("a.txt", {"a.txt": "some text".encode("utf-16")}, ("a.txt is binary", "give text in UTF-8")),
    ("folder", {"folder/a.py": b"x = 1", "folder/b.py": b"\0"}, ("folder/b.py is binary", "give text in UTF-8")),
    ("a.jsonl", {"a.jsonl": b"\1\0\2" * 99}, ("a.jsonl is binary", "give text in UTF-8")),
    ("a.txt", {"a.txt": b"a few words\n"}, ("training text does not fill a window of seq_len 32", "give more text")),
    ("a.txt", {"a.txt": b"a few words " * 300}, ("does not fill a window of seq_len 32", "give more text")),
    ("a.py", {"a.py": b"x = 1\n" * 300}, ("1 files leave none for the held-out part", "add files")),
    ("a.jsonl", {"a.jsonl": b"plain words\n" * 9}, ("cannot be read (ArrowInvalid: JSON parse error", "give other")),
    ("a.jsonl", {"a.jsonl": lines({"text": "a"}) + b'{"text": "b'}, ("in row 40", "give other data")),
    ("a.jsonl", {"a.jsonl": b'{"text": "caf\xe9"}\n' * 9}, ("'utf-8' codec can't decode byte 0xe9", "give other data")),
    ("a.jsonl", {"a.jsonl": b"[1, 2]\n" * 9}, ("cannot be read (", "give other data")),
    ("a.jsonl", {"a.jsonl": b"\n" * 9}, ("no column of text or tokens among none", "name one of them text")),
    ("a.jsonl", {"a.jsonl": lines({"body": "a", "id": 3})}, ("among body, id", "name one of them text, content")),
    ("a.jsonl", {"a.jsonl": lines({"text": 3}, {"text": 4})}, ("a text is ", "the column must hold strings")),
    ("a.jsonl", {"a.jsonl": lines({"text": ["a"]}, {"text": ["b"]})}, ("a text is [", "must hold strings")),
    ("a.jsonl", {"a.jsonl": lines({"text": None})}, ("does not fill a window", "give more text")),
    ("a.jsonl", {"a.jsonl": lines({"text": ""}, times=999)}, ("its training text does not fill", "give more text")),
    ("a.jsonl", {"a.jsonl": ids(320)}, ("token 320 is outside the vocabulary of 320 of '", "give other data")),
    ("a.jsonl", {"a.jsonl": ids(-1)}, ("token -1 is outside the vocabulary of 320", "give other data")),
    ("a.jsonl", {"a.jsonl": ids(1.5)}, ("tokens are [4.0, 1.5,", "the column must hold lists of ids")),
    ("a.jsonl", {"a.jsonl": ids(None)}, ("tokens are [4, None,", "the column must hold lists of ids")),
    ("a.jsonl", {"a.jsonl": lines({"tokens": [True, False]}, {"tokens": [True]})}, ("tokens are [True", "of ids")),
    ("a.jsonl", {"a.jsonl": lines({"tokens": "5 6"}, {"tokens": "7"})}, ("tokens are '", "must hold lists of ids")),
    ("a.jsonl", {"a.jsonl": lines({"tokens": 5}, {"tokens": 6})}, ("tokens are ", "must hold lists of ids")),
    ("a.parquet", {"a.parquet": b"PK\3\4" * 99}, ("a.parquet is not parquet", "give the file whole")),
    ("a.parquet", {"a.parquet": b"PAR1" + bytes(99)}, ("magic bytes not found in footer", "give other data")),
    ("a.parquet", {"a.parquet": parquet("body", ["a"])}, ("no column of text or tokens among body", "name one")),
    ("a.parquet", {"a.parquet": parquet("text", [], pa.string())}, ("dataset_path = 'a.parquet': ", "give other data")),
    ("a.parquet", {"a.parquet": parquet("text", [None] * 9, pa.string())}, ("does not fill", "give more text")),
    ("a.parquet", {"a.parquet": parquet("tokens", [[4, i, 999] for i in range(40)])}, ("token 999", "give other")),
    ("a.parquet", {"a.parquet": parquet("tokens", [[0.5, i] for i in range(40)])}, ("tokens are [0.5,", "of ids")),
]  # fmt: skip


@pytest.mark.parametrize("path, files, said", DATA, ids=[f"{path} {said[0][:40]}" for path, _, said in DATA])
def test_data(refused: Callable, no_model: None, path: str, files: dict[str, bytes], said: Said) -> None:
    for name, content in files.items():
        Path(name).write_bytes(content)
    refused([f"--dataset-path={path}"], (f"dataset_path = {path!r}: ", *said))


def test_a_link_to_nothing(refused: Callable, no_model: None) -> None:
    Path("a.txt").symlink_to("gone.txt")
    refused(["--dataset-path=a.txt"], ("dataset_path = 'a.txt': no such file", "check the path"))


def test_a_file_that_may_not_be_read(refused: Callable, no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.jsonl").write_bytes(lines({"text": "a"}))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.jsonl")  # root may read all
    refused(
        ["--dataset-path=a.jsonl"], ("dataset_path = 'a.jsonl': you may not read a.jsonl", "change its permissions")
    )


# ---- models ----


def set_fields(**changes: object) -> Callable[[], None]:
    file = Path("broken/config.json")
    return lambda: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def put(name: str, content: str) -> Callable[[], None]:
    return lambda: Path("broken", name).write_text(content)


def remove(pattern: str) -> Callable[[], None]:
    return lambda: [file.unlink() for file in Path("broken").glob(pattern)]


BEFORE_THE_WEIGHTS: list[tuple[str, Callable[[], object], Said]] = [
    ("no config", remove("config.json"), ("has no good config.json (ValueError: Unrecognized model", "give another")),
    ("cut config", put("config.json", '{"model_type":'), ("has no good config.json (", "not a valid JSON file")),
    ("config a list", put("config.json", "[]"), ("has no good config.json", "give another")),
    ("no model_type", put("config.json", "{}"), ("has no good config.json", "model_type", "give another")),
    ("unknown type", set_fields(model_type="gpt9"), ("has no good config.json", "`gpt9`", "give another")),
    ("field of a wrong type", set_fields(n_layer="two"), ("has no good config.json", "'n_layer' expected int")),
    ("images", put("config.json", '{"model_type": "resnet"}'), ("resnet is no decoder-only language", "give one")),
    ("encoder", put("config.json", '{"model_type": "t5"}'), ("t5 is no decoder-only language model", "give one")),
    ("another's tokenizer", set_fields(vocab_size=300), ("has 320 tokens, the model 300", "put the model's own")),
    ("no tokenizer", remove("token*"), ("no tokenizer in that folder", "give another")),
    ("no BOS and no EOS", put("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}'),
     ("its tokenizer has neither a BOS nor an EOS", "give another")),
    ("cut tokenizer", put("tokenizer.json", '{"version":'), ("no tokenizer that can be read", "give another")),
]  # fmt: skip
WEIGHTS: list[tuple[str, Callable[[], object]]] = [
    ("no weights", remove("*.safetensors")),
    ("empty weights", put("model.safetensors", "")),
    ("cut weights", lambda: os.truncate("broken/model.safetensors", 5000)),
    ("other width", set_fields(n_embd=32)),
]


@pytest.mark.parametrize(
    "breaks, said", [case[1:] for case in BEFORE_THE_WEIGHTS], ids=[c[0] for c in BEFORE_THE_WEIGHTS]
)
def test_models(refused: Callable, no_model: None, breaks: Callable[[], object], said: Said) -> None:
    breaks()
    refused(["--model-name=broken"], ("model_name = 'broken': ", *said))


@pytest.mark.parametrize("breaks", [case[1] for case in WEIGHTS], ids=[case[0] for case in WEIGHTS])
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
    for file in Path("model").glob("token*"):
        Path("parallel", file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(sweep, "train", lambda *args: pytest.fail("a stream was trained"))
    sites = ["--layer", "0", "1", "--site", "resid_pre", "mlp_out", "resid_mid"]
    refused(
        ["--model-name=parallel", *sites], ("site = 'resid_mid': ", "give one of resid_pre, resid_post, attn_out, mlp_")
    )


@pytest.mark.parametrize("name", ["animals.txt", "./gone", "no such model", "a/b/c"])
def test_names_of_no_model(refused: Callable, no_model: None, name: str) -> None:
    refused([f"--model-name={name}"], (f"model_name = {name!r}: ", "give another"))


# ---- Configs ----


@pytest.mark.parametrize("fields, said", [
    (dict(model_batch_size=1, seq_len=2), "num_batches_in_buffer = 16: 16 rows are less than two of batch_size 2048"),
    (dict(wandb_project="a:b"), "wandb_project = 'a:b': give at most 128 characters, none of"),
    (dict(wandb_project=""), "wandb_project = '': give a name"),
    (dict(layer=torch.tensor(2)), "layer = tensor(2): give int"),
    (dict(dict_size=2e3), "dict_size = 2000.0: give int"),
    (dict(output_dir=Path("runs")), "give str"),
    (dict(site=["resid_pre"]), "site = ['resid_pre']: did you mean resid_pre? give one of"),
    (dict(sae_type=["topk"]), "sae_type = ['topk']: did you mean topk? give one of vanilla"),
    (dict(device="cuda:-1"), "device = 'cuda:-1': give \"auto\""),
], ids=str)  # fmt: skip
def test_configs(fields: dict, said: str) -> None:
    with pytest.raises(ValueError) as error:
        Config(**fields)
    assert said in str(error.value) and "\n" not in str(error.value)


# ---- tensors ----


@pytest.fixture(autouse=True)
def no_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as outside the tests


D = 16
ROWS: list[tuple[str, Tensor]] = [
    ("float32 [3, 17]", torch.zeros(3, D + 1)),
    ("float32 [15]", torch.zeros(D - 1)),
    ("float32 [16, 3]", torch.zeros(D, 3)),
    ("float32 []", torch.zeros(())),
    ("float32 [0, 16]", torch.zeros(0, D)),
    ("float32 [2, 0, 16]", torch.zeros(2, 0, D)),
    ("int64 [3, 16]", torch.zeros(3, D, dtype=torch.int64)),
    ("bool [3, 16]", torch.zeros(3, D, dtype=torch.bool)),
    ("complex64 [3, 16]", torch.zeros(3, D, dtype=torch.complex64)),
]


@pytest.mark.parametrize("named, x", ROWS, ids=[named for named, _ in ROWS])
def test_activations(named: str, x: Tensor) -> None:
    sae = build_sae(Config(act_size=D, dict_size=64, top_k=4, device="cpu"))
    for method in (sae.forward, sae.encode, sae.initialise_from):
        with pytest.raises(ValueError) as error:
            method(x)
        assert str(error.value) == f"x = torch.{named}: give floating-point activations [..., 16], at least one row"


def test_an_sae_is_initialised_from_one_row_or_many_dimensions() -> None:
    x = torch.randn(2, 3, D)
    for part in (x, x[0, 0]):
        sae = build_sae(Config(act_size=D, dict_size=64, top_k=4, device="cpu", input_unit_norm=False))
        sae.initialise_from(part)
        assert torch.allclose(sae.b_dec, part.reshape(-1, D).mean(dim=0))


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> TransformerBridge:
    return load_model(Config(model_name=str(tiny_gpt2), layer=1, device="cpu"))


GOOD, MEAN = torch.arange(1, 31).view(2, 15), torch.zeros(D)
TOKENS: list[tuple[str, Tensor, Tensor, str]] = [
    ("floats", GOOD.float(), MEAN, "tokens = torch.float32 [2, 15]: give int64 [window, pos]"),
    ("int32", GOOD.int(), MEAN, "tokens = torch.int32 [2, 15]: give int64"),
    ("one dimension", GOOD[0], MEAN, "tokens = torch.int64 [15]: give int64 [window, pos]"),
    ("no window", GOOD[:0], MEAN, "tokens = torch.int64 [0, 15]: give int64 [window, pos], at least one window"),
    ("one token", GOOD[:, :1], MEAN, "tokens = torch.int64 [2, 1]: "),
    ("above the context", GOOD.repeat(1, 5), MEAN, "at least one window of 2 to 64 tokens"),
    ("above the vocabulary", GOOD + 300, MEAN, "tokens = 301 to 330: the model knows 0 to 319; use its own tokenizer"),
    ("below 0", GOOD - 2, MEAN, "tokens = -1 to 28: the model knows 0 to 319"),
    ("special ones", GOOD * 0, MEAN, "tokens = [2, 15]: special ones only; give held-out text"),
    ("mean of another width", GOOD, torch.zeros(D + 1), "mean = torch.float32 [17]: give 16 finite numbers"),
    ("mean of NaN", GOOD, torch.full((D,), torch.nan), "mean = torch.float32 [16]: give 16 finite numbers"),
]


@pytest.mark.parametrize("tokens, mean, said", [case[1:] for case in TOKENS], ids=[case[0] for case in TOKENS])
def test_tokens(model: TransformerBridge, tokens: Tensor, mean: Tensor, said: str) -> None:
    sae = build_sae(Config(layer=1, act_size=D, dict_size=64, top_k=4, device="cpu"))
    with pytest.raises(ValueError) as error:
        evaluate(model, [sae], tokens, mean)
    assert str(error.value).startswith(said) or said in str(error.value)
    assert "\n" not in str(error.value) and sae.training


def test_windows_of_special_tokens_alone_change_no_metric(
    model: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "MAX_LOGITS", 2 * 15 * 320)  # two windows a batch
    sae = build_sae(Config(layer=1, act_size=D, dict_size=64, top_k=4, device="cpu"))
    padded = torch.cat([GOOD, GOOD * 0, GOOD])
    assert evaluate(model, [sae], padded, MEAN)[0] == pytest.approx(evaluate(model, [sae], GOOD.repeat(2, 1), MEAN)[0])


def test_a_store_needs_the_width(model: TransformerBridge) -> None:
    with pytest.raises(AssertionError, match="widths that check_model found"):
        ActivationsStore(model, [Config(layer=1)])


def test_a_model_s_site_decides_the_width(tiny_gpt2: Path) -> None:
    cfg = Config(model_name=str(tiny_gpt2), layer=1, seq_len=32, site="mlp_out", act_size=64)
    with pytest.raises(ValueError, match=r"^act_size = 64: mlp_out of .* is 16 wide; leave it out$"):
        check_model(cfg)
