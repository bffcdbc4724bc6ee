"""Check text.py: which files a path names, the held-out split, packing (against plain concatenation), the stream.

What it refuses stands in test_bad_input.py.
"""

import itertools
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import text
from config import Config
from runtime.documents import STDLIB, is_held_out, load_documents, local_files
from text import TextPosition, TextStream, token_windows

Value = str | list[int]
ROLES = dict(bos_token="<bos>", eos_token="<eos>")


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
    """Write files in three sub-folders; return the documents by the key that decides whether they are held out."""
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
        else:
            rows: list[Value] = [f"{name} says {i}\n\nand ends é" for i in range(20)]
            if column in ("tokens", "input_ids"):
                rows = [list(range(20 * f + i, 20 * f + i + 1 + i % 9)) for i in range(20)]
            documents |= {str(row): row for row in rows}
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


def test_source_files_keep_their_part_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "one", ".py")
    write(tmp_path / "two/deeper", ".py")
    monkeypatch.chdir(tmp_path)
    parts = [sorted(read(path, held_out=True)) for path in ("one", tmp_path / "two", "./two/deeper/**/*.py")]
    assert parts[0] == parts[1] == parts[2]


def test_the_standard_library_is_a_data_set_of_files() -> None:
    files = local_files(STDLIB)
    root = Path(sysconfig.get_paths()["stdlib"])
    assert root / "json/decoder.py" in files and not any("site-packages" in file.parts for file in files)
    held_out = read(STDLIB, held_out=True)
    paths = [file for file in files if is_held_out(file.relative_to(root).as_posix())]
    assert sorted(held_out) == sorted(file.read_text(encoding="utf-8", errors="replace") for file in paths)
    assert 0.07 < len(held_out) / len(files) < 0.13


# ---- paths as people write them ----


@pytest.mark.parametrize("path, file", [
    ("data.jsonl", "data.jsonl"),
    ("sub/../data.jsonl", "data.jsonl"),
    ("~/corpus", "home/corpus/deep/er/data.jsonl"),
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


@pytest.mark.parametrize("name", ["Skylion007/openwebtext", "wikitext", "HuggingFaceFW/fineweb-edu_2.0"])
def test_a_hub_name_is_not_a_local_path(name: str) -> None:
    assert local_files(name) == []


def test_what_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = r"^dataset_path = 'some/texts': cannot be reached \(ConnectionError: no network\); give other data, or try"
    with pytest.raises(OSError, match=said):
        load_documents("some/texts", held_out=True)


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


@pytest.mark.parametrize("named, kind, value", [
    (None, "text", "1"), ("input_ids", "tokens", [1]), ("story", "text", "one"), ("ids", "tokens", [11]),
])  # fmt: skip
def test_one_column_is_read_text_unless_told_otherwise(
    tmp_path: Path, named: str | None, kind: str, value: Value
) -> None:
    row = {"input_ids": [1], "story": "one", "ids": [11], "text": "1"}
    put(tmp_path / "a.jsonl", "\n".join(json.dumps(row | {"story": None} if i == 0 else row) for i in range(9)))
    documents = [d for part in (False, True) for d in load_documents(str(tmp_path), None, named, held_out=part)]
    assert documents == [{kind: value}] * (8 if named == "story" else 9)


def test_rows_without_a_value_are_left_out(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(30)]
    assert sorted(read_all(put_rows(tmp_path / "a.jsonl", "text", [None, *rows, None]))) == sorted(rows)


# ---- packing ----


def numbers(count: int = 150) -> list[list[int]]:
    """Documents of 0 to 40 ordinary tokens; more of them than are tokenised at once."""
    rng = random.Random(0)
    return [[rng.randrange(4, 200) for _ in range(rng.randrange(41))] for _ in range(count)]


@pytest.mark.parametrize("roles, bos, separator", [
    (ROLES, 0, [1]), (dict(bos_token="<bos>"), 0, []), (dict(eos_token="<eos>"), 1, [1])
], ids=["both", "no EOS", "no BOS"])  # fmt: skip
@pytest.mark.parametrize("seq_len", [2, 3, 16, 2000, 10_000])
def test_windows_are_the_documents_one_after_the_other(
    word_tokenizer: Callable, roles: dict[str, str], bos: int, separator: list[int], seq_len: int
) -> None:
    stream = [token for tokens in numbers() for token in tokens + separator]
    full = len(stream) // (seq_len - 1)
    for documents in (
        [{"tokens": tokens} for tokens in numbers()],
        [{"tokens": np.array(tokens)} for tokens in numbers()],
        [{"text": " ".join(f"w{i}" for i in tokens)} for tokens in numbers()],
    ):
        windows = list(token_windows(documents, word_tokenizer(**roles), seq_len))
        assert len(windows) == full and all(w.shape == (seq_len,) and w.dtype == torch.int64 for w in windows)
        assert all(w[0] == bos for w in windows)
        assert [token for w in windows for token in w[1:].tolist()] == stream[: full * (seq_len - 1)]


def test_windows_are_made_as_documents_come(word_tokenizer: Callable) -> None:
    stream = ({"text": "w5 w6 w7"} for _ in range(10_000))
    assert len(list(itertools.islice(token_windows(stream, word_tokenizer(**ROLES), 5), 3))) == 3
    assert len(list(stream)) >= 9900


def test_one_long_row_is_many_windows(word_tokenizer: Callable, tmp_path: Path) -> None:
    path = put_rows(tmp_path / "long.jsonl", "text", ["w9 " * 100_000])
    documents = itertools.chain(*(load_documents(str(path), held_out=held_out) for held_out in (False, True)))
    windows = list(token_windows(documents, word_tokenizer(**ROLES), 101))
    assert len(windows) == 1000 and all(w.tolist() == [0] + [9] * 100 for w in windows)


def test_a_token_outside_the_vocabulary_is_refused(word_tokenizer: Callable) -> None:
    assert len(list(token_windows([{"tokens": [0, 4, 199]}], word_tokenizer(**ROLES), 5))) == 1
    for token in (-1, 200):
        with pytest.raises(ValueError, match=f"^token {token} is outside the vocabulary of 200"):
            list(token_windows([{"tokens": [4, token, 5]}], word_tokenizer(**ROLES), 2))


# ---- the stream ----


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pool and what is read at once smaller than the test's text."""
    monkeypatch.setattr(text, "MIXED_TOKENS", 80)
    monkeypatch.setattr(text, "TOKENISED_DOCUMENTS", 3)


def test_every_epoch_serves_each_window_once_in_its_own_order(
    word_tokenizer: Callable, tmp_path: Path, small: None
) -> None:
    path, tokenizer = str(put_rows(tmp_path / "a.jsonl", "tokens", numbers())), word_tokenizer(**ROLES)
    documents = load_documents(path, held_out=False)
    count = len(list(token_windows(documents, tokenizer, 8)))
    epochs = TextStream(Config(dataset_path=path, seq_len=8, batch_size=64), tokenizer).next_windows(3 * count).tolist()
    epochs = [epochs[i * count : (i + 1) * count] for i in range(3)]
    for epoch, served in enumerate(epochs):
        documents.set_epoch(epoch)
        packed = [window.tolist() for window in token_windows(documents, tokenizer, 8)]
        assert sorted(served) == sorted(packed) and served != packed
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_position_continues_the_stream_and_stays_what_it_was(
    word_tokenizer: Callable, tmp_path: Path, small: None
) -> None:
    path = put_rows(tmp_path / "a.jsonl", "tokens", numbers(40))
    options = Config(dataset_path=str(path), seq_len=8, batch_size=64), word_tokenizer(**ROLES)
    stream, served, positions = TextStream(*options), [], []
    for _ in range(40):
        positions.append(stream.position)
        served.append(stream.next_windows(7))
    assert {position.epoch for position in positions} == {0, 1, 2}
    for at in (0, 1, 12, 25):
        state = positions[at].to_state()
        json.dumps({name: value for name, value in state.items() if not isinstance(value, torch.Tensor)})
        for position in (positions[at], TextPosition.from_state(state)):
            again = TextStream(*options, position)
            assert all(torch.equal(again.next_windows(7), windows) for windows in served[at : at + 15])


def test_a_bad_row_is_named_with_its_data_set(word_tokenizer: Callable, tmp_path: Path, small: None) -> None:
    path = put_rows(tmp_path / "a.jsonl", "tokens", [*numbers(), *([[200, i] for i in range(40)])])
    stream = TextStream(Config(dataset_path=str(path), seq_len=8, batch_size=64), word_tokenizer(**ROLES))
    said = rf"^dataset_path = '{path}': cannot be used \(.*token 200 is outside.*other data$"
    with pytest.raises(ValueError, match=said):
        stream.next_windows(10_000)
