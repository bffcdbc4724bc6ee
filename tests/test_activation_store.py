"""activation_store.py: hooks against Hugging Face's own modules, and which rows are served, in which order.

Where the order matters, `reads` puts (window, position, token) in place of the activations, so every row is known.
"""

import gc
import json
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from datasets import IterableDataset
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

import activation_store
import text
from activation_store import ActivationsStore, check_model, load_model, ordinary_positions, record
from config import Config

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


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The windows that the store reads, batch by batch; their rows become (window, position, token, 0, 0, ...)."""
    batches: list[Tensor] = []

    def identify(model: object, tokens: Tensor, hook_name: str) -> Tensor:
        rows = torch.zeros(*tokens.shape, WIDTH)
        rows[..., 0] = torch.arange(len(tokens))[:, None] + windows_of(batches)
        rows[..., 1] = torch.arange(tokens.shape[1])
        rows[..., 2] = tokens
        batches.append(tokens)
        return rows

    monkeypatch.setattr(activation_store, "record", identify)
    return batches


def tokens_as_activations(model: object, tokens: Tensor, hook_name: str) -> Tensor:
    return tokens[..., None].float().expand(-1, -1, WIDTH)


def windows_of(batches: list[Tensor]) -> int:
    return sum(map(len, batches))


def config(dataset: Path, **changes: object) -> Config:
    small = dict(
        layer=0, seq_len=SEQ_LEN, model_batch_size=4, num_batches_in_buffer=8, act_size=WIDTH, batch_size=60,
        eval_windows=4, device="cpu", dataset_path=str(dataset),
    )  # fmt: skip
    return Config(**(small | changes))


def serve(store: ActivationsStore, batches: int) -> Tensor:
    """(window, position, token) of the rows of some batches."""
    return torch.cat([store.next_batch() for _ in range(batches)])[:, :3].int()


def places(rows: Tensor) -> Counter:
    return Counter(map(tuple, rows[:, :2].tolist()))


def expected_windows(cfg: Config, lm: SimpleNamespace | TransformerBridge, *, held_out: bool, epoch: int = 0) -> Tensor:
    documents = text.load_documents(cfg.dataset_path, held_out=held_out, seed=0 if held_out else cfg.seed)
    documents.set_epoch(epoch)
    return torch.stack(list(text.token_windows(documents, lm.tokenizer, cfg.seq_len)))


# ---- recording ----


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> TransformerBridge:
    return load_model(Config(model_name=str(tiny_gpt2), layer=1, device="cpu"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def seen_by_hugging_face(folder: Path, layer: int, tokens: Tensor) -> dict[str, Tensor]:
    """Each site's activations by forward hooks on the modules of transformers."""
    hf = GPT2LMHeadModel.from_pretrained(folder).eval()
    block = hf.transformer.h[layer]
    seen: dict[str, Tensor] = {}

    def entering(module: torch.nn.Module, site: str) -> None:
        module.register_forward_pre_hook(lambda m, args: seen.update({site: args[0]}))

    def leaving(module: torch.nn.Module, site: str) -> None:
        module.register_forward_hook(
            lambda m, args, out: seen.update({site: out[0] if isinstance(out, tuple) else out})
        )

    entering(block, "resid_pre")
    entering(block.attn.c_proj, "z")
    leaving(block.attn, "attn_out")
    entering(block.ln_2, "resid_mid")
    leaving(block.mlp, "mlp_out")
    leaving(block, "resid_post")
    with torch.no_grad():
        seen["logits"] = hf(tokens).logits
    return seen


SITES = ["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_record_gives_what_hugging_face_computes(
    model: TransformerBridge, tiny_gpt2: Path, tokens: Tensor, site: str, layer: int
) -> None:
    seen = seen_by_hugging_face(tiny_gpt2, layer, tokens)
    cfg = check_model(Config(model_name=str(tiny_gpt2), layer=layer, site=site, seq_len=16))
    acts = record(model, tokens, cfg.hook_point)
    assert acts.shape == (3, 20, cfg.act_size) and not acts.requires_grad
    assert_close(acts, seen[site], atol=1e-5, rtol=1e-4)
    assert all((seen[site] - seen[other]).abs().max() > 1e-3 for other in SITES if other != site)


@pytest.mark.parametrize("site, later", [
    ("resid_pre", ["blocks.0.attn", "blocks.0.mlp", "blocks.1", "unembed"]),
    ("z", ["blocks.0.mlp", "blocks.1", "unembed"]),
    ("attn_out", ["blocks.0.mlp", "blocks.1", "unembed"]),
    ("resid_mid", ["blocks.0.mlp", "blocks.1", "unembed"]),
    ("mlp_out", ["blocks.1", "unembed"]),
    ("resid_post", ["blocks.1", "unembed"]),
])  # fmt: skip
def test_record_runs_nothing_behind_the_hook_and_leaves_no_hook(
    model: TransformerBridge, tiny_gpt2: Path, tokens: Tensor, site: str, later: list[str]
) -> None:
    calls: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name in later
    ]
    record(model, tokens, Config(layer=0, site=site).hook_point)
    assert calls == []
    with torch.no_grad():
        logits = model(tokens)
    assert set(calls) == set(later)
    for handle in handles:
        handle.remove()
    assert_close(logits, seen_by_hugging_face(tiny_gpt2, 0, tokens)["logits"], atol=1e-4, rtol=1e-4)


def test_load_model_freezes_the_raw_weights_in_the_dtype(tiny_gpt2: Path) -> None:
    model = load_model(Config(model_name=str(tiny_gpt2), layer=1, dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_ordinary_positions_are_neither_the_first_nor_special(lm: SimpleNamespace) -> None:
    tokens = torch.tensor([[0, 4, 1, 5, 2, 3], [9, 0, 199, 3, 8, 1]])
    assert ordinary_positions(tokens, lm.tokenizer).int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]


# ---- rows served ----


@pytest.mark.parametrize("mixed_windows", [10, 10_000])
def test_every_ordinary_position_is_served_once_and_no_other(
    corpus: Path, lm: SimpleNamespace, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch, mixed_windows: int
) -> None:
    monkeypatch.setattr(text, "MIXED_TOKENS", mixed_windows * SEQ_LEN)
    cfg = config(corpus)
    rows = serve(ActivationsStore(lm, cfg), 150)
    windows = torch.cat(reads)
    for epoch in range(3):
        expected = expected_windows(cfg, lm, held_out=False, epoch=epoch)
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
    corpus: Path, lm: SimpleNamespace, reads: list[Tensor], batch_size: int, shape: tuple[int, int]
) -> None:
    model_batch_size, fills = shape
    cfg = config(corpus, batch_size=batch_size, model_batch_size=model_batch_size, num_batches_in_buffer=fills)
    store = ActivationsStore(lm, cfg)
    capacity = model_batch_size * fills * (SEQ_LEN - 1)
    batches, read = [], []
    for _ in range(3 * capacity // batch_size):
        batches.append(store.next_batch())
        read.append(windows_of(reads))
    assert all(batch.shape == (batch_size, WIDTH) for batch in batches)
    assert max(places(torch.cat(batches).int()).values()) == 1
    refills = [i for i in range(len(read)) if i == 0 or read[i] > read[i - 1]]
    gaps = {b - a for a, b in pairwise(refills)}
    half = capacity // 2 // batch_size
    assert min(gaps) == half and all(gap % half == 0 for gap in gaps)  # rows left over from a fill may do for the next


def test_consecutive_fills_mix(corpus: Path, lm: SimpleNamespace, reads: list[Tensor]) -> None:
    """After a refill half the rows are new, half older; every batch is a sample of both, in no order."""
    store = ActivationsStore(lm, config(corpus))
    shares = []
    for _ in range(40):
        before = windows_of(reads)
        window = store.next_batch()[:, 0]
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
        documents = [[4 + 10 * file + i] * (SEQ_LEN - 2) for i in range(10)]
        write_tokens(tmp_path / f"{file}.jsonl", documents)
    corpus = tmp_path
    streams = []
    for seed in (0, 0, 1):
        reads.clear()
        rows = serve(ActivationsStore(lm, config(corpus, seed=seed)), 20)
        streams.append((rows, torch.cat(reads)[:100]))
    (rows, windows), (same_rows, same_windows), (other_rows, other_windows) = streams
    assert torch.equal(rows, same_rows) and torch.equal(windows, same_windows)
    assert not torch.equal(rows[:, :2], other_rows[:, :2]) and not torch.equal(windows, other_windows)


def test_a_batch_is_the_caller_s_to_keep(corpus: Path, lm: SimpleNamespace, reads: list[Tensor]) -> None:
    store = ActivationsStore(lm, config(corpus))
    batch = store.next_batch()
    kept = batch.clone()
    for _ in range(10):
        store.next_batch()
    assert torch.equal(batch, kept)


def test_starting_over_reshuffles_and_says_so_once(
    corpus: Path, lm: SimpleNamespace, reads: list[Tensor], capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(activation_store, "PREFETCHED", 1)
    cfg = config(corpus)
    store = ActivationsStore(lm, cfg)
    count = len(expected_windows(cfg, lm, held_out=False))
    said = ""
    while windows_of(reads) < 4 * count:
        if windows_of(reads) < count - 2 * cfg.model_batch_size:
            said += capsys.readouterr().out
            assert said == ""
        store.next_batch()
    line = f"all {count * SEQ_LEN:,} training tokens of {corpus} read: starting over, reshuffled\n"
    assert capsys.readouterr().out == line
    first, second, third = torch.cat(reads)[: 3 * count].split(count)
    assert not torch.equal(first, second) and not torch.equal(second, third) and not torch.equal(first, third)


def test_mean_is_of_all_rows_read(corpus: Path, lm: SimpleNamespace, reads: list[Tensor]) -> None:
    store = ActivationsStore(lm, config(corpus))
    for batches in (1, 30):
        serve(store, batches)
        windows = torch.cat(reads)
        ordinary = ~torch.isin(windows, torch.tensor(SPECIAL))
        window, position = ordinary.nonzero().t()
        rows = torch.stack([window, position, windows[ordinary]], dim=1).double()
        assert store.mean.shape == (WIDTH,) and store.mean.dtype == torch.float32
        assert_close(store.mean[:3].double(), rows.mean(dim=0), rtol=1e-6, atol=0)
        assert store.tokens_seen == windows.numel()


def test_no_second_buffer_is_ever_made(corpus: Path, lm: SimpleNamespace, reads: list[Tensor]) -> None:
    store = ActivationsStore(lm, config(corpus, num_batches_in_buffer=32, batch_size=100))
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
    buffers = [v for v in vars(store).values() if isinstance(v, Tensor) and v.untyped_storage().nbytes() > max(sizes)]
    assert [b.untyped_storage().nbytes() for b in buffers] == [buffer_bytes]


def test_a_store_that_is_dropped_leaves_memory_at_once(corpus: Path, lm: SimpleNamespace, reads: list[Tensor]) -> None:
    store = ActivationsStore(lm, config(corpus))
    store.next_batch()
    buffer = weakref.ref(store._buffer)
    gc.disable()
    try:
        del store
        assert buffer() is None
    finally:
        gc.enable()


# ---- held-out text ----


def test_held_out_text_is_never_trained_on_and_always_the_same(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor]
) -> None:
    documents = {i: [i] * 40 for i in range(4, 200)}
    corpus = write_tokens(tmp_path / "corpus.jsonl", list(documents.values()))
    held_out = {i for i, tokens in documents.items() if text.is_held_out(str(tokens))}
    store, untouched = (ActivationsStore(lm, config(corpus, eval_windows=1000)) for _ in range(2))
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


def test_held_out_windows_are_a_sample_of_the_first_whatever_the_seed(
    corpus: Path, lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "HELD_OUT_CHOICE", 2)
    samples = [
        ActivationsStore(lm, config(corpus, seed=seed, eval_windows=3)).held_out_tokens().tolist() for seed in (0, 1)
    ]
    first = expected_windows(config(corpus), lm, held_out=True)[:6].tolist()
    assert samples[0] == samples[1] and len(samples[0]) == 3
    places = [first.index(window) for window in samples[0]]
    assert len(set(places)) == 3 and places != [0, 1, 2]


# ---- a real model ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_are_activations_of_the_model(
    tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    read = []

    def remember(model: object, tokens: Tensor, hook_name: str) -> Tensor:
        read.append(tokens)
        return record(model, tokens, hook_name)

    monkeypatch.setattr(activation_store, "record", remember)
    cfg = check_model(
        config(tiny_text, model_name=str(tiny_gpt2), layer=1, act_size=None, dtype=dtype, site="resid_post")
    )
    store = ActivationsStore(load_model(cfg), cfg)
    rows = torch.cat([store.next_batch() for _ in range(8)])
    assert rows.shape == (480, 16) and rows.dtype == cfg.torch_dtype and rows.device.type == "cpu"
    windows = torch.cat(read)
    assert {tuple(w) for w in windows.tolist()} <= {
        tuple(w) for w in expected_windows(cfg, store.model, held_out=False).tolist()
    }
    acts = torch.cat([record(store.model, batch, cfg.hook_point) for batch in read])
    known = {tuple(row) for row in acts[ordinary_positions(windows, store.model.tokenizer)].tolist()}
    assert {tuple(row) for row in rows.tolist()} <= known
    assert store.mean.dtype == torch.float32


# ---- refusals ----


@pytest.mark.parametrize("changes, message", [
    (dict(layer=2), "layer = 2: {} has 2 blocks; give 0 to 1"),
    (dict(seq_len=65), "seq_len = 65: {} reads at most 64 tokens; give no more"),
    (dict(act_size=32), "act_size = 32: resid_pre of {} is 16 wide; leave it out"),
])  # fmt: skip
def test_check_model_refuses_what_does_not_fit(tiny_gpt2: Path, changes: dict, message: str) -> None:
    fits = check_model(Config(model_name=str(tiny_gpt2), layer=1, seq_len=64, site="z"))
    assert fits.act_size == 16 and check_model(fits) == fits
    with pytest.raises(ValueError) as error:
        check_model(Config(**(dict(model_name=str(tiny_gpt2), layer=1, seq_len=64) | changes)))
    assert str(error.value) == message.format(tiny_gpt2)


@pytest.mark.parametrize("model_name", ["no-such/model", "./no-such-folder", "/no/such/folder", "no such model"])
def test_a_model_that_is_not_there_is_named_in_one_line(model_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError) as error:
        check_model(Config(model_name=model_name))
    message = str(error.value)
    assert message.startswith(f"model_name = {model_name!r}: found neither in a folder nor on the Hub (")
    assert "\n" not in message and error.value.__suppress_context__


def test_a_model_folder_is_found_from_home(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_gpt2.parent))
    assert check_model(Config(model_name=f"~/{tiny_gpt2.name}", layer=1, seq_len=64)).act_size == 16


def test_a_site_that_the_model_lacks_is_refused_with_those_it_has(tmp_path: Path, word_tokenizer: Callable) -> None:
    neox = GPTNeoXConfig(
        vocab_size=200, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, use_parallel_residual=True,
    )  # fmt: skip
    GPTNeoXForCausalLM(neox).save_pretrained(tmp_path)
    word_tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^site = 'resid_mid': .* give one of resid_pre, resid_post, attn_out, mlp_o"):
        load_model(Config(model_name=str(tmp_path), layer=1, site="resid_mid", device="cpu"))


def test_a_buffer_of_less_than_two_batches_is_refused_with_the_size_that_does(
    corpus: Path, lm: SimpleNamespace, reads: list[Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"^num_batches_in_buffer = 8: 480 rows .* batch_size 241; give at least 9"):
        config(corpus, batch_size=241)
    assert len(ActivationsStore(lm, config(corpus, batch_size=241, num_batches_in_buffer=9)).next_batch()) == 241


@pytest.mark.parametrize("held_out", [True, False], ids=["held out", "training"])
def test_a_part_without_a_window_of_text_is_refused(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor], held_out: bool
) -> None:
    documents = [[i] * 40 for i in range(4, 100)]
    corpus = write_tokens(tmp_path / "a.jsonl", [d for d in documents if text.is_held_out(str(d)) != held_out])
    store = ActivationsStore(lm, config(corpus))
    ask, part = (store.held_out_tokens, "held-out tenth") if held_out else (store.next_batch, "training text")
    with pytest.raises(ValueError, match=f"dataset_path = '{corpus}': .*{part}"):
        ask()


# ---- continuing where another store stood ----


@pytest.mark.parametrize("mixed_windows", [10, 10_000])
@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".py"])
def test_a_store_made_with_a_state_serves_what_the_other_would_have(
    tmp_path: Path, lm: SimpleNamespace, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch, kind: str,
    mixed_windows: int,
) -> None:  # fmt: skip
    """Over three epochs, from states taken anywhere, and after they went through JSON and safetensors."""
    monkeypatch.setattr(text, "MIXED_TOKENS", mixed_windows * SEQ_LEN)
    monkeypatch.setattr(text, "TOKENISED_DOCUMENTS", 3)
    monkeypatch.setattr(activation_store, "record", tokens_as_activations)
    rng = random.Random(1)
    for file in range(6):
        documents = [[rng.randrange(4, 200) for _ in range(rng.randint(1, 60))] for _ in range(10)]
        if kind == ".jsonl":
            write_tokens(tmp_path / f"{file}.jsonl", documents)
        else:
            lines = (" ".join(f"w{token}" for token in tokens) for tokens in documents)
            (tmp_path / f"{file}{kind}").write_text("\n".join(lines))
    cfg = config(tmp_path)
    store, states, served = ActivationsStore(lm, cfg), [], []
    for _ in range(60):
        served.append(store.next_batch())
        states.append(store.state)
    assert states[0]["text"]["epoch"] == 0 and states[-1]["text"]["epoch"] >= 1
    for at in (0, 1, 2, 7, 23, 40):
        again = ActivationsStore(lm, cfg, states[at])
        for expected in served[at + 1 : at + 16]:
            assert torch.equal(again.next_batch(), expected)
        assert torch.equal(again.mean, ActivationsStore(lm, cfg, states[at + 15]).mean)
        assert again.tokens_seen == states[at + 15]["tokens_seen"]


def test_where_the_model_or_the_text_fails_the_state_is_that_of_the_batch_before(
    corpus: Path, lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fail_at_the_30th(model: object, tokens: Tensor, hook_name: str) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise torch.OutOfMemoryError("30")
        return tokens_as_activations(model, tokens, hook_name)

    monkeypatch.setattr(activation_store, "record", tokens_as_activations)
    untroubled = ActivationsStore(lm, config(corpus))
    expected = [untroubled.next_batch() for _ in range(60)]
    monkeypatch.setattr(activation_store, "record", fail_at_the_30th)
    store, served = ActivationsStore(lm, config(corpus)), []
    with pytest.raises(ValueError, match="model_batch_size = 4: out of memory on cpu; give 2, or lower seq_len = 16"):
        while True:
            served.append(store.next_batch())
    again = ActivationsStore(lm, config(corpus), store.state)
    served += [again.next_batch() for _ in range(60 - len(served))]
    assert all(map(torch.equal, served, expected))


def test_reading_is_tried_again_from_the_same_place_and_given_up_in_one_line(
    corpus: Path, lm: SimpleNamespace, reads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "TOKENISED_DOCUMENTS", 3)
    monkeypatch.setattr(text.TextStream._read_documents.retry, "sleep", (waits := []).append)
    untroubled = serve(ActivationsStore(lm, config(corpus)), 30)
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
    assert torch.equal(serve(ActivationsStore(lm, config(corpus)), 30), untroubled)
    assert len(failures) == 4 and waits == [0.5, 1, 2, 4]
    fail = 10**6
    with pytest.raises(
        OSError, match=r"dataset_path = .*corpus.*: reading failed 5 times \(ConnectionResetError: peer\)"
    ):
        serve(ActivationsStore(lm, config(corpus)), 30)


def test_a_buffer_that_does_not_fit_is_refused_with_what_would(
    corpus: Path, lm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_store, "_free_memory", lambda device: 2 * 5 * 4 * 15 * WIDTH * 4)  # five, twice
    with pytest.raises(ValueError, match=r"num_batches_in_buffer = 8: the buffer .* takes .* GB.*; give at most 5, or"):
        ActivationsStore(lm, config(corpus))
    monkeypatch.undo()
    assert 1e8 < activation_store._free_memory(torch.device("cpu")) < 1e14
