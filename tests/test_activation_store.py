"""activation_store.py: which rows are served, in which order, and that rows of two hooks are of the same token.

Where the order matters, `reads` puts (window, position, token) in place of the activations, so every row is known.
"""

import gc
import json
import os
import random
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import IterableDataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

import activation_store
import text
from activation_store import ActivationsStore
from config import Config
from language_model import check_model, load_model, ordinary_positions, record
from runtime import documents as data
from runtime import machine
from runtime.disk import load_state, save_state
from text import held_out_windows

SPECIAL = (0, 1, 2, 3)
SEQ_LEN, WIDTH = 16, 32
CAPACITY = 8 * 4 * (SEQ_LEN - 1)  # 480 rows


def write_tokens(path: Path, documents: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in documents))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """60 documents of 1 to 60 tokens, a tenth of them special: some 100 windows of training text."""
    rng = random.Random(0)

    def token() -> int:
        return rng.choice(SPECIAL) if rng.random() < 0.1 else rng.randrange(4, 200)

    return write_tokens(tmp_path / "corpus.jsonl", [[token() for _ in range(rng.randint(1, 60))] for _ in range(60)])


@pytest.fixture
def lm(word_tokenizer: Callable) -> SimpleNamespace:
    return SimpleNamespace(tokenizer=word_tokenizer(bos_token="<bos>", eos_token="<eos>"))


FIRST, SECOND = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


def as_recorded(rows: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    """The rows at the first hook; at the second, in the same places, others that tell them."""
    return {hook: rows + 0.5 * (hook == SECOND) for hook in hooks}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The windows that the store reads, batch by batch; their rows become (window, position, token, 0, 0, ...)."""
    batches: list[Tensor] = []

    def identify(model: object, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        rows = torch.zeros(*tokens.shape, WIDTH)
        rows[..., 0] = torch.arange(len(tokens))[:, None] + windows_of(batches)
        rows[..., 1] = torch.arange(tokens.shape[1])
        rows[..., 2] = tokens
        batches.append(tokens)
        return as_recorded(rows, hooks)

    monkeypatch.setattr(activation_store, "record", identify)
    return batches


def tokens_as_activations(model: object, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
    return as_recorded(tokens[..., None].float().expand(-1, -1, WIDTH), hooks)


def windows_of(batches: list[Tensor]) -> int:
    return sum(map(len, batches))


def config(dataset: Path, **changes: object) -> Config:
    small = dict(
        layer=(0, 1), site="resid_post", seq_len=SEQ_LEN, model_batch_size=4, num_batches_in_buffer=8, act_size=WIDTH,
        batch_size=60, eval_windows=4, device="cpu", dataset_path=str(dataset),
    )  # fmt: skip
    return Config(**(small | changes))


def next_rows(store: ActivationsStore) -> Tensor:
    """A batch at the first hook, once at the second it is of the same tokens."""
    batch = store.next_batch()
    assert batch.keys() == {FIRST, SECOND}
    assert torch.equal(batch[FIRST] + 0.5, batch[SECOND])
    return batch[FIRST]


def serve(store: ActivationsStore, batches: int) -> Tensor:
    """(window, position, token) of the rows of some batches."""
    return torch.cat([next_rows(store) for _ in range(batches)])[:, :3].int()


def places(rows: Tensor) -> Counter:
    return Counter(map(tuple, rows[:, :2].tolist()))


def expected_windows(cfg: Config, lm: SimpleNamespace | TransformerBridge, *, held_out: bool, epoch: int = 0) -> Tensor:
    documents = text.load_documents(cfg.dataset_path, held_out=held_out, seed=0 if held_out else cfg.text_seed)
    documents.set_epoch(epoch)
    return torch.stack(list(text.token_windows(documents, lm.tokenizer, cfg.seq_len)))


@pytest.fixture
def make(corpus: Path, lm: SimpleNamespace) -> Callable[..., ActivationsStore]:
    """Makes stores of the corpus."""
    return lambda state=None, **changes: ActivationsStore(lm, [config(corpus, **changes)], state)


# ---- rows served ----


@pytest.mark.parametrize("mixed_windows", [10, 10_000])
def test_every_ordinary_position_is_served_once_and_no_other(
    make: Callable, lm: SimpleNamespace, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch, mixed_windows: int
) -> None:
    monkeypatch.setattr(text, "MIXED_TOKENS", mixed_windows * SEQ_LEN)
    store = make()
    rows = serve(store, 150)
    windows = torch.cat(reads)
    for epoch in range(3):
        expected = expected_windows(store.cfg, lm, held_out=False, epoch=epoch)
        read = windows[epoch * len(expected) : (epoch + 1) * len(expected)]
        assert sorted(read.tolist()) == sorted(expected.tolist()) and not torch.equal(read, expected)
    ordinary = ~torch.isin(windows, torch.tensor(SPECIAL))
    assert not ordinary[:, 0].any() and not ordinary.all(dim=1).any()
    served, readable = places(rows), places(ordinary.nonzero())
    assert max(served.values()) == 1 and served.keys() <= readable.keys()
    first_three_epochs = {place for place in readable if place[0] < 3 * len(expected)}
    assert len(first_three_epochs) > 2 * CAPACITY and first_three_epochs <= served.keys()
    assert torch.equal(rows[:, 2], windows[rows[:, 0], rows[:, 1]])


@pytest.mark.parametrize("batch_size", [1, 97, 239, 240])
@pytest.mark.parametrize("shape", [(4, 8), (16, 2), (1, 33)], ids=str)
def test_half_the_buffer_is_refilled_and_no_row_served_twice_whatever_the_sizes(
    make: Callable, reads: list[Tensor], batch_size: int, shape: tuple[int, int]
) -> None:
    model_batch_size, fills = shape
    store = make(batch_size=batch_size, model_batch_size=model_batch_size, num_batches_in_buffer=fills)
    capacity = model_batch_size * fills * (SEQ_LEN - 1)
    batches, read = [], []
    for _ in range(3 * capacity // batch_size):
        batches.append(next_rows(store))
        read.append(windows_of(reads))
    assert all(batch.shape == (batch_size, WIDTH) for batch in batches)
    assert max(places(torch.cat(batches).int()).values()) == 1
    refills = [i for i in range(len(read)) if i == 0 or read[i] > read[i - 1]]
    gaps = {b - a for a, b in pairwise(refills)}
    half = capacity // 2 // batch_size
    assert min(gaps) == half and all(gap % half == 0 for gap in gaps)  # rows left over from a fill may do for the next


def test_consecutive_fills_mix(make: Callable, reads: list[Tensor]) -> None:
    """After a refill half the rows are new, half older; every batch is a sample of both, in no order."""
    store, shares = make(), []
    for _ in range(40):
        before = windows_of(reads)
        window = next_rows(store)[:, 0]
        if windows_of(reads) > before:
            newest = before
        assert torch.corrcoef(torch.stack([torch.arange(60), window]))[0, 1].abs() < 0.5
        shares.append((window >= newest).float().mean())
    assert all(share == 1 for share in shares[:4]) and all(0.15 < share < 0.75 for share in shares[4:])
    assert 0.35 < sum(shares[4:]) / 36 < 0.55


@pytest.mark.parametrize("order_of", ["documents", "windows"])
def test_seed_decides_the_text_and_the_shuffling(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch, order_of: str
) -> None:
    """Documents as long as a window: (window, position) shows the shuffling alone, the windows the text alone."""
    if order_of == "documents":
        monkeypatch.setattr(text, "MIXED_TOKENS", SEQ_LEN)
    else:
        load = text.load_documents
        monkeypatch.setattr(text, "load_documents", lambda *args, **options: load(*args, **(options | {"seed": 0})))
    for file in range(15):
        write_tokens(tmp_path / f"{file}.jsonl", [[4 + 10 * file + i] * (SEQ_LEN - 2) for i in range(10)])
    streams = []
    for seed in (0, 0, 1):
        reads.clear()
        rows = serve(ActivationsStore(lm, [config(tmp_path, text_seed=seed)]), 20)
        streams.append((rows, torch.cat(reads)[:100]))
    (rows, windows), (same_rows, same_windows), (other_rows, other_windows) = streams
    assert torch.equal(rows, same_rows) and torch.equal(windows, same_windows)
    assert not torch.equal(rows[:, :2], other_rows[:, :2]) and not torch.equal(windows, other_windows)


def test_a_batch_is_the_caller_s_to_keep(make: Callable, reads: list[Tensor]) -> None:
    store = make()
    batch = store.next_batch()
    kept = {hook: rows.clone() for hook, rows in batch.items()}
    serve(store, 10)
    assert all(torch.equal(rows, kept[hook]) for hook, rows in batch.items())


def test_starting_over_reshuffles_and_says_so_once(
    make: Callable, lm: SimpleNamespace, reads: list[Tensor], capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(activation_store, "PREFETCHED", 1)
    store, said = make(), ""
    count = len(expected_windows(store.cfg, lm, held_out=False))
    while windows_of(reads) < 4 * count:
        if windows_of(reads) < count - 2 * store.cfg.model_batch_size:
            said += capsys.readouterr().out
            assert said == ""
        store.next_batch()
    line = f"all {count * SEQ_LEN:,} training tokens of {store.cfg.dataset_path} read: starting over, reshuffled\n"
    assert capsys.readouterr().out == line
    first, second, third = torch.cat(reads)[: 3 * count].split(count)
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)


def test_no_second_buffer_is_ever_made(make: Callable, reads: list[Tensor]) -> None:
    store = make(num_batches_in_buffer=32, batch_size=100)
    buffer_bytes = 32 * 4 * (SEQ_LEN - 1) * WIDTH * 4
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in storages:
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Sizes():
        for _ in range(60):
            store.next_batch()
    assert 100 * WIDTH * 4 <= max(sizes) <= buffer_bytes // 8
    held = [v for value in vars(store).values() for v in (value.values() if isinstance(value, dict) else [value])]
    large = [v.untyped_storage().nbytes() for v in held if isinstance(v, Tensor)]
    assert [size for size in large if size > max(sizes)] == [buffer_bytes] * 2


def test_a_store_that_is_dropped_leaves_memory_at_once(make: Callable, reads: list[Tensor]) -> None:
    store = make()
    store.next_batch()
    buffers = [weakref.ref(buffer) for buffer in store._buffers.values()]
    gc.disable()
    try:
        del store
        assert [buffer() for buffer in buffers] == [None, None]
    finally:
        gc.enable()


SCRIPT = """
import logging, sys, types, activation_store, config, text, torch, transformers
text.MIXED_TOKENS, text.TOKENISED_DOCUMENTS = 3200, 1
activation_store.record = lambda model, tokens, hooks: {hook: tokens[..., None].float() for hook in hooks}
model = types.SimpleNamespace(tokenizer=transformers.AutoTokenizer.from_pretrained(sys.argv[1]))
shape = dict(seq_len=16, model_batch_size=64, batch_size=60, num_batches_in_buffer=2, act_size=1, device="cpu")
store = activation_store.ActivationsStore(model, [config.Config(dataset_path=sys.argv[2], **shape)])
store.next_batch()
logging.held = torch.held = store  # whatever holds it last
"""


def test_a_script_that_holds_a_store_ends_cleanly(tmp_path: Path, tiny_gpt2: Path, tiny_text: Path) -> None:
    """In the middle of the text, which a thread reads ahead."""
    lines = tiny_text.read_text().splitlines()
    pq.write_table(pa.table({"text": lines}), tmp_path / "a.parquet", row_group_size=100)
    environment = os.environ | {"PYTHONPATH": str(Path(activation_store.__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tiny_gpt2, tmp_path / "a.parquet"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# ---- held-out text ----


def test_held_out_text_is_never_trained_on_and_always_the_same(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor]
) -> None:
    documents = {i: [i] * 40 for i in range(4, 200)}
    corpus = write_tokens(tmp_path / "corpus.jsonl", list(documents.values()))
    held_out = {i for i, tokens in documents.items() if data.is_held_out(str(tokens))}
    store, untouched = (ActivationsStore(lm, [config(corpus, eval_windows=1000)]) for _ in range(2))
    windows = store.held_out_tokens()
    assert set(windows.unique().tolist()) == held_out | {0, 1} and len(held_out) > 5
    rows = []
    for _ in range(5):
        rows.append(serve(store, 50))
        assert torch.equal(store.held_out_tokens(), windows)
    two_epochs = torch.cat(reads)
    assert len(two_epochs) > 2 * 41 * (len(documents) - len(held_out)) / (SEQ_LEN - 1)
    assert set(torch.cat(rows)[:, 2].tolist()) == documents.keys() - held_out
    assert not held_out & set(two_epochs.unique().tolist())
    reads.clear()
    assert torch.equal(torch.cat(rows), serve(untouched, 250))


def test_held_out_windows_are_a_sample_of_the_first_whatever_the_seed(make: Callable, lm: SimpleNamespace) -> None:
    stores = [make(text_seed=seed) for seed in (0, 1)]
    samples = [held_out_windows(store.cfg, lm.tokenizer, 3, choice=2).tolist() for store in stores]
    first = expected_windows(stores[0].cfg, lm, held_out=True)[:6].tolist()
    assert samples[0] == samples[1] and len(samples[0]) == 3
    found = [first.index(window) for window in samples[0]]
    assert len(set(found)) == 3 and found != [0, 1, 2]


# ---- a real model ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_two_layers_are_the_model_s_and_of_the_same_token(
    tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """After refills, and after a resume: among the activations of every token read, both layers side by side."""
    read = []

    def remember(model: object, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        read.append(tokens)
        return record(model, tokens, hooks)

    monkeypatch.setattr(activation_store, "record", remember)
    cfg = check_model(config(tiny_text, model_name=str(tiny_gpt2), act_size=None, dtype=dtype))
    model = load_model(cfg)
    store = ActivationsStore(model, [cfg])
    batches = [store.next_batch() for _ in range(12)]
    store = ActivationsStore(model, [cfg], store.state)
    batches += [store.next_batch() for _ in range(12)]
    assert all(batch.keys() == set(cfg.reads) for batch in batches)
    assert {(b.shape, b.dtype) for batch in batches for b in batch.values()} == {((60, 16), getattr(torch, dtype))}

    windows = torch.cat(read)
    known = {tuple(window) for window in expected_windows(cfg, model, held_out=False).tolist()}
    assert {tuple(window) for window in windows.tolist()} <= known
    computed = [torch.cat([record(model, some, [hook])[hook] for hook in cfg.reads], dim=-1) for some in read]
    ordinary = torch.cat(computed)[ordinary_positions(windows, model.tokenizer)]
    served = torch.cat([torch.cat([batch[hook] for hook in cfg.reads], dim=1) for batch in batches])
    assert {tuple(row) for row in served.tolist()} <= {tuple(row) for row in ordinary.tolist()}


# ---- refusals ----


def test_a_buffer_of_less_than_two_batches_is_refused_with_the_size_that_does(
    make: Callable, reads: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"^num_batches_in_buffer = 8: 480 rows .* batch_size 241; give at least 9"):
        make(batch_size=241)
    assert len(next_rows(make(batch_size=241, num_batches_in_buffer=9))) == 241


@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "training"])
def test_a_part_without_a_window_of_text_is_refused(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor], held_out: bool
) -> None:
    documents = [[i] * 40 for i in range(4, 100)]
    corpus = write_tokens(tmp_path / "a.jsonl", [d for d in documents if data.is_held_out(str(d)) != held_out])
    store = ActivationsStore(lm, [config(corpus)])
    ask, part = (store.held_out_tokens, "held-out tenth") if held_out else (store.next_batch, "training text")
    with pytest.raises(ValueError, match=f"dataset_path = '{corpus}': .*{part}"):
        ask()


def test_a_buffer_that_does_not_fit_is_refused_with_what_would(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 2 * 2 * 5 * 4 * (SEQ_LEN - 1) * WIDTH * 4  # two hooks, each buffer twice, of five batches
    monkeypatch.setattr(machine, "_free_memory", lambda device: free)
    with pytest.raises(ValueError, match=r"num_batches_in_buffer = 8: the buffer .* needs .* GB.*; give at most 5, or"):
        make()
    monkeypatch.undo()
    assert 1e8 < machine._free_memory(torch.device("cpu")) < 1e14


# ---- continuing where another store stood ----


@pytest.mark.parametrize("mixed_windows", [10, 10_000])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".py"])
def test_a_store_made_with_a_state_serves_what_the_other_would_have(
    tmp_path: Path, lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str, mixed_windows: int
) -> None:
    """Over three epochs, from states taken anywhere, after they were on the disk."""
    monkeypatch.setattr(text, "MIXED_TOKENS", mixed_windows * SEQ_LEN)
    monkeypatch.setattr(text, "TOKENISED_DOCUMENTS", 3)
    monkeypatch.setattr(activation_store, "record", tokens_as_activations)
    rng, folder = random.Random(1), tmp_path / "text"
    folder.mkdir()
    for file in range(6):
        documents = [[rng.randrange(4, 200) for _ in range(rng.randint(1, 60))] for _ in range(10)]
        if kind == ".jsonl":
            write_tokens(folder / f"{file}.jsonl", documents)
        else:
            lines = (" ".join(f"w{token}" for token in tokens) for tokens in documents)
            (folder / f"{file}{kind}").write_text("\n".join(lines))
    cfg = config(folder)
    store, states, served = ActivationsStore(lm, [cfg]), [], []
    for _ in range(60):
        served.append(next_rows(store))
        states.append(store.state)
    assert states[0]["position"]["epoch"] == 0 and states[-1]["position"]["epoch"] >= 1
    for at in (0, 1, 2, 7, 23, 40):
        save_state(states[at], tmp_path / "state.safetensors")
        again = ActivationsStore(lm, [cfg], load_state(tmp_path / "state.safetensors"))
        for expected in served[at + 1 : at + 16]:
            assert torch.equal(next_rows(again), expected)


def test_where_the_model_or_the_text_fails_the_state_is_that_of_the_batch_before(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail_at_the_30th(model: object, tokens: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise torch.OutOfMemoryError("30")
        return tokens_as_activations(model, tokens, hooks)

    monkeypatch.setattr(activation_store, "record", tokens_as_activations)
    untroubled = make()
    expected = [next_rows(untroubled) for _ in range(60)]
    monkeypatch.setattr(activation_store, "record", fail_at_the_30th)
    store, served = make(), []
    with pytest.raises(ValueError, match=r"model_batch_size = 4: out of memory on cpu .*give 2, or lower seq_len = 16"):
        while True:
            served.append(next_rows(store))
    again = make(store.state)
    served += [next_rows(again) for _ in range(60 - len(served))]
    assert all(map(torch.equal, served, expected))


def test_a_batch_put_back_is_served_again(make: Callable, reads: list[Tensor]) -> None:
    store, untouched = make(), make()
    for _ in range(12):
        batch = next_rows(store)
        store.put_back()
        assert torch.equal(next_rows(store), batch)
    reads.clear()
    assert torch.equal(serve(untouched, 12)[-60:], batch[:, :3].int())


def test_reading_is_tried_again_from_the_same_place_and_given_up_in_one_line(
    make: Callable, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "TOKENISED_DOCUMENTS", 3)
    monkeypatch.setattr(text.TextStream._read_documents.retry, "sleep", (waits := []).append)
    untroubled = serve(make(), 30)
    reads.clear()
    failures, iterate = [], IterableDataset.__iter__

    def troubled(dataset: IterableDataset) -> Iterator[dict]:
        for count, document in enumerate(iterate(dataset)):
            if (count == 7 or failures) and len(failures) < fail:
                failures.append(count)
                raise ConnectionResetError("peer")
            yield document

    monkeypatch.setattr(IterableDataset, "__iter__", troubled)
    fail = 4
    assert torch.equal(serve(make(), 30), untroubled)
    assert len(failures) == 4 and waits == [0.5, 1, 2, 4]
    fail = 10**6
    problem = r"dataset_path = .*corpus.*: reading failed 5 times \(ConnectionResetError: peer\)"
    with pytest.raises(OSError, match=problem):
        serve(make(), 30)
