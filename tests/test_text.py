"""text.py: which files a path names, the held-out split, and packing, compared with plain concatenation."""

import hashlib
import itertools
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import text
from text import is_held_out, load_documents, local_files, token_windows

Value = str | list[int]
ROLES = dict(bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps 5 s at the end of every pass over parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def put_rows(path: Path, column: str, values: list) -> Path:
    rows = [{"id": 7, column: value} for value in values]
    if path.suffix == ".jsonl":
        return put(path, "".join(json.dumps(row) + "\n" for row in rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": [7] * len(rows), column: values}), path)
    return path


def write(folder: Path, kind: str) -> dict[str, Value]:
    """Files of a kind in three sub-folders; returns the documents by the key that decides whether they are held out."""
    suffix, _, column = kind.partition(" ")
    documents: dict[str, Value] = {}
    for f, name in enumerate("abc"):
        file = folder / name / "src" / f"part{suffix}"
        if suffix == ".py":
            for i in range(20):
                documents[f"{name}/src/m{i}.py"] = f"# {name}\nx = {i}\n"
                put(file.with_stem(f"m{i}"), documents[f"{name}/src/m{i}.py"])
        elif suffix == ".txt":
            # More files than `datasets` shuffles as streams of their own, of lengths that are no multiples of 128.
            for i in range(8):
                lines = [f"{name} {i} line {j}\n" for j in range((300, 500, 90)[f] + i)]
                put(file.with_stem(f"part{i}"), "".join(lines))
                documents |= {chunk: chunk for n in range(0, len(lines), 128) if (chunk := "".join(lines[n : n + 128]))}
        elif column in ("tokens", "input_ids"):
            rows = [np.arange(1 + i % 9, dtype=np.uint16) + 20 * f + i for i in range(20)]
            documents |= {str(row.tolist()): row.tolist() for row in rows}
            put_rows(file, column, rows if suffix == ".parquet" else [row.tolist() for row in rows])
        else:
            rows = [f"{name} says {i}\n\nand ends é" for i in range(20)]
            documents |= {row: row for row in rows}
            put_rows(file, column, rows)
    return documents


def read(dataset_path: object, *, held_out: bool, seed: int = 0, epoch: int = 0) -> list[Value]:
    dataset = load_documents(str(dataset_path), held_out=held_out, seed=seed)
    dataset.set_epoch(epoch)
    rows = list(dataset)
    assert all(list(row) in (["text"], ["tokens"]) for row in rows)
    return [value for row in rows for value in row.values()]


def read_all(dataset_path: object) -> list[Value]:
    return [value for held_out in (False, True) for value in read(dataset_path, held_out=held_out)]


# ---- documents and the split ----

KINDS = [".py", ".txt", ".jsonl text", ".jsonl content", ".jsonl tokens", ".parquet text", ".parquet input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["*/src/*", ""], ids=["glob", "folder"])
def test_training_and_held_out_part_are_disjoint_and_everything(tmp_path: Path, kind: str, form: str) -> None:
    documents = write(tmp_path, kind)
    path = tmp_path / form
    parts = [sorted(v for k, v in documents.items() if is_held_out(k) == held_out) for held_out in (False, True)]
    assert len(parts[0]) > len(parts[1]) > 0
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        assert sorted(read(path, held_out=False, seed=seed, epoch=epoch)) == parts[0]
        assert sorted(read(path, held_out=True, seed=seed, epoch=epoch)) == parts[1]


def test_is_held_out_never_changes() -> None:
    assert [key for key in "abcdefghijklmnopqrstuvwxyz" if is_held_out(key)] == ["g", "w"]
    assert [i for i in range(40) if is_held_out(str(i))] == [1, 2, 7, 30]
    assert not is_held_out("é\ud800")
    assert 850 < sum(is_held_out(f"document {i}") for i in range(10_000)) < 1150


@pytest.mark.parametrize("kind", [".py", ".txt"])
def test_order_is_decided_by_seed_and_epoch(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind)
    orders = [read(tmp_path, held_out=False, seed=s, epoch=e) for s, e in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert read(tmp_path, held_out=False, seed=1, epoch=1) == orders[-1]


def test_source_files_keep_their_part_wherever_their_folder_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", ".py")
    write(tmp_path / "two/deeper", ".py")
    monkeypatch.chdir(tmp_path)
    parts = [sorted(read(path, held_out=True)) for path in ("one", tmp_path / "two", "./two/deeper/**/*.py")]
    assert parts[0] == parts[1] == parts[2]


def test_the_standard_library_is_a_data_set_of_files() -> None:
    files = local_files(text.STDLIB)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert root / "json/decoder.py" in files and not any("site-packages" in file.parts for file in files)
    held_out = read(text.STDLIB, held_out=True)
    paths = [file for file in files if is_held_out(file.relative_to(root).as_posix())]
    expected = [file.read_bytes().decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n") for file in paths]
    assert sorted(map(digest, held_out)) == sorted(map(digest, expected))
    assert 0.07 < len(held_out) / len(files) < 0.13


def digest(document: str) -> str:
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()


# ---- paths as people write them ----


@pytest.mark.parametrize("path, file", [
    ("data.jsonl", "data.jsonl"),
    ("./data.jsonl", "data.jsonl"),
    ("sub/../data.jsonl", "data.jsonl"),
    ("~/data.jsonl", "home/data.jsonl"),
    ("~/corpus", "home/corpus/deep/er/data.jsonl"),
    ("~/*.jsonl", "home/data.jsonl"),
    ("corpus/", "corpus/data.jsonl"),
    ("**/data.jsonl", "a/b/data.jsonl"),
    (".hidden/data.jsonl", ".hidden/data.jsonl"),
    ("with space, é#%20/[1] d?ta.jsonl", "with space, é#%20/[1] d?ta.jsonl"),
    ("with [1]", "with [1]/data.jsonl"),
    ("with*/data.jsonl", "with [1]/data.jsonl"),
])  # fmt: skip
def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "sub").mkdir()
    put_rows(tmp_path / file, "text", ["one", "two", "three"])
    put(tmp_path / file.replace(".jsonl", ".md"), "beside it")
    assert sorted(read_all(path)) == ["one", "three", "two"]


def test_a_hub_name_is_not_a_local_path() -> None:
    assert local_files("Skylion007/openwebtext") == [] == local_files("wikitext")


def test_what_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(text, "_load", unreachable)
    said = (
        r"^dataset_path 'some/texts': cannot be reached \(ConnectionError: no network\); give other data, or try again$"
    )
    with pytest.raises(OSError, match=said):
        text.documents("some/texts", held_out=True)


@pytest.mark.parametrize("path, files, said", [
    ("none.txt", {}, "no such file"),
    ("none/*.txt", {}, "no such file"),
    ("/none", {}, "no such file"),
    ("./none", {}, "no such file"),
    ("~/none", {}, "no such file"),
    ("folder", {"folder/a.csv": "a,b\n"}, "no file of .py, .txt, .jsonl, .parquet in that folder"),
    ("a.csv", {"a.csv": "a,b\n"}, "found .csv; give files of one of .py, .txt"),
    ("A.TXT", {"A.TXT": "a\n"}, "found .TXT; give files of one of .py, .txt"),
    ("*", {"a.txt": "a\n", "b.jsonl": "{}\n"}, "found .jsonl, .txt; give files of one of"),
    ("mixed", {"mixed/a.txt": "a\n", "mixed/b.py": "b\n"}, "found .py, .txt; give files of one of"),
    ("e.txt", {"e.txt": ""}, "every file is empty"),
    ("e", {"e/a.jsonl": "", "e/b.jsonl": ""}, "every file is empty"),
    ("one.py", {"one.py": "x = 1\n"}, "1 files leave none for the"),
    ("c.jsonl", {"c.jsonl": '{"body": "x", "id": 3}\n'}, "among body, id; name one of them text, content, tokens"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, files: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        put(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read_all(path)
    message = str(error.value)
    assert message.startswith(f"dataset_path {path!r}: ") and said in message and "\n" not in message


def test_a_parquet_file_without_text_is_refused_with_its_columns(tmp_path: Path) -> None:
    path = put_rows(tmp_path / "a.parquet", "body", ["x"])
    with pytest.raises(ValueError, match="no column of text or tokens among id, body; name one of them text"):
        read_all(path)


def test_empty_files_beside_others_and_bytes_that_are_no_utf8_do_no_harm(tmp_path: Path) -> None:
    for suffix in (".txt", ".py"):
        folder = tmp_path / suffix[1:]
        put(folder / f"empty{suffix}", "")
        for i in range(30):
            put(folder / f"latin{i}{suffix}", f"caf\xe9 {i}\r\n".encode("latin1"))
        assert sorted(filter(None, read_all(folder))) == sorted(f"caf\ufffd {i}\n" for i in range(30))
    put_rows(tmp_path / "rows/a.jsonl", "text", ["one"])
    put(tmp_path / "rows/0.jsonl", "")
    assert read_all(tmp_path / "rows") == ["one"]


@pytest.mark.parametrize("content", [b'{"text": "caf\xe9"}\n' * 9, b"plain words\n"], ids=["latin-1", "not JSON"])
def test_jsonl_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError):
        read_all(put(tmp_path / "a.jsonl", content))


def test_rows_without_a_value_are_left_out(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(30)]
    assert sorted(read_all(put_rows(tmp_path / "a.jsonl", "text", [None, *rows, None]))) == sorted(rows)


# ---- packing ----


def numbers(count: int = 150) -> list[list[int]]:
    """Documents of 0 to 40 ordinary tokens; more of them than are tokenised at once."""
    rng = random.Random(0)
    return [[rng.randrange(4, 200) for _ in range(rng.randrange(41))] for _ in range(count)]


@pytest.mark.parametrize("column", ["tokens", "numpy tokens", "text"])
@pytest.mark.parametrize("seq_len", [2, 3, 16, 2000, 10_000])
@pytest.mark.parametrize("roles, bos, separator", [
    (ROLES, 0, [1]),
    (dict(bos_token="<bos>"), 0, []),
    (dict(eos_token="<eos>"), 1, [1]),
    (dict(bos_token="<eos>", eos_token="<eos>"), 1, [1]),
], ids=["both", "no EOS", "no BOS", "the same"])  # fmt: skip
def test_windows_are_the_documents_one_after_the_other(
    word_tokenizer: Callable, column: str, seq_len: int, roles: dict[str, str], bos: int, separator: list[int]
) -> None:
    if column == "text":
        documents = [{"text": " ".join(f"w{i}" for i in tokens)} for tokens in numbers()]
    else:
        documents = [{"tokens": np.array(tokens) if column == "numpy tokens" else tokens} for tokens in numbers()]
    windows = list(token_windows(documents, word_tokenizer(**roles), seq_len))
    stream = [token for tokens in numbers() for token in tokens + separator]
    full = len(stream) // (seq_len - 1)
    assert len(windows) == full and all(w.shape == (seq_len,) and w.dtype == torch.int64 for w in windows)
    assert all(w[0] == bos for w in windows)
    assert [token for w in windows for token in w[1:].tolist()] == stream[: full * (seq_len - 1)]


def test_windows_are_made_as_documents_come(word_tokenizer: Callable) -> None:
    taken = 0

    def stream() -> Iterator[dict[str, str]]:
        nonlocal taken
        while taken < 10_000:
            taken += 1
            yield {"text": "w5 w6 w7"}

    assert len(list(itertools.islice(token_windows(stream(), word_tokenizer(**ROLES), 5), 3))) == 3
    assert taken <= 100


def test_one_long_row_is_many_windows(word_tokenizer: Callable, tmp_path: Path) -> None:
    path = put_rows(tmp_path / "long.jsonl", "text", ["w9 " * 100_000])
    documents = itertools.chain(*(load_documents(str(path), held_out=held_out) for held_out in (False, True)))
    windows = list(token_windows(documents, word_tokenizer(**ROLES), 101))
    assert len(windows) == 1000 and all(w.tolist() == [0] + [9] * 100 for w in windows)


@pytest.mark.parametrize("document, said", [
    ({"tokens": [4, 200, 5]}, "token 200 is outside the vocabulary of 200"),
    ({"tokens": [4, -1, 5]}, "token -1 is outside the vocabulary of 200"),
    ({"tokens": ["the", "cat"]}, "tokens are \\['the', 'cat'\\]; the column must hold lists of ids"),
    ({"text": 3}, "a text is 3; the column must hold strings"),
])  # fmt: skip
def test_rows_that_are_no_text_and_no_tokens_are_refused(word_tokenizer: Callable, document: dict, said: str) -> None:
    assert len(list(token_windows([{"tokens": [4, 199, 5]}], word_tokenizer(**ROLES), 5))) == 1
    with pytest.raises(ValueError, match=said):
        list(token_windows([document], word_tokenizer(**ROLES), 2))


def test_a_tokenizer_without_bos_and_eos_is_refused(word_tokenizer: Callable) -> None:
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token; choose another model_name"):
        next(token_windows([{"text": "w5 w6"}], word_tokenizer(), 2))
