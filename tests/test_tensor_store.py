"""TensorStore: recorded rows are served once an epoch, in no order, aligned, and never those that are held out."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from activation_store import BLOCK, TensorStore
from config import Config
from evaluation import evaluate
from runtime import ranks
from runtime.disk import load_state, save_state
from sae import build_sae
from training import train

ROWS, D, O = 4000, 6, 4
TRAINED = 14 * BLOCK  # of 16 blocks, the last of 160 rows, two are held out


def config(**changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=16, target_l0=2, num_tokens=6000, batch_size=60, seq_len=16, model_batch_size=4,
        num_batches_in_buffer=8, eval_windows=100, device="cpu",
    )  # fmt: skip
    return Config(**(small | changes))


TRANSCODER = dict(site="mlp_in", target_site="mlp_out", target_size=O)
X, Y = "blocks.2.ln2.hook_out", "blocks.2.hook_mlp_out"


def numbered(width: int) -> Tensor:
    """Rows whose first number is which they are."""
    return torch.arange(ROWS, dtype=torch.float32)[:, None] + 0.25 * torch.arange(width)


def as_memmap(width: int, file: Path) -> np.ndarray:
    np.save(file, numbered(width).numpy())
    return np.load(file, mmap_mode="r")


def as_folder(named: dict[str, Tensor], folder: Path, edges: tuple[int, ...] = (0, 700, 701, ROWS)) -> Path:
    folder.mkdir()
    for start, stop in pairwise(edges):
        save_file(
            {name: rows[start:stop].contiguous() for name, rows in named.items()}, folder / f"{start:04}.safetensors"
        )
    return folder


def serve(store: TensorStore, batches: int, hook: str = X) -> list[int]:
    """Which rows some batches are of."""
    return [int(row) for _ in range(batches) for row in store.next_batch()[hook][:, 0]]


SOURCES: dict[str, Callable[[Path], dict]] = {
    "tensors": lambda _: dict(x=numbered(D), y=numbered(O)),
    "float64 arrays": lambda _: dict(x=numbered(D).double().numpy(), y=numbered(O).double().numpy()),
    "memmaps": lambda folder: dict(x=as_memmap(D, folder / "x.npy"), y=as_memmap(O, folder / "y.npy")),
    "by hook": lambda _: dict(x={X: numbered(D), Y: numbered(O)}),
    "files by hook": lambda folder: dict(x=as_folder({X: numbered(D), Y: numbered(O)}, folder / "acts")),
    "files of x and y": lambda folder: dict(x=str(as_folder({"x": numbered(D), "y": numbered(O)}, folder / "acts"))),
}


@pytest.mark.parametrize("source", SOURCES)
def test_rows_are_served_once_an_epoch_in_no_order_with_those_of_the_other_hook(source: str, tmp_path: Path) -> None:
    store, seen = TensorStore(**SOURCES[source](tmp_path), cfgs=[config(**TRANSCODER)]), []
    held_out = int(store.held_out().rows[X][0, 0])
    for _ in range(3 * held_out // 60):
        batch = store.next_batch()
        assert batch[X].dtype == batch[Y].dtype == torch.float32
        assert torch.equal(batch[X][:, 0], batch[Y][:, 0]) and torch.equal(batch[Y][:, 3], batch[Y][:, 0] + 0.75)
        seen += batch[X][:, 0].int().tolist()
    times = torch.bincount(torch.tensor(seen), minlength=held_out)
    assert len(times) == held_out and {*times.tolist()} <= {2, 3, 4}, "three epochs, but for what is in the buffer"
    first = torch.tensor(seen[:held_out]).float()
    assert torch.corrcoef(torch.stack([first, torch.arange(len(first)).float()]))[0, 1].abs() < 0.5
    assert (first.diff() == 1).float().mean() < 0.02


def test_the_last_tenth_of_the_blocks_is_held_out_and_evaluated_on_evenly() -> None:
    store = TensorStore(numbered(D), cfgs=[config(eval_windows=10**6)])
    (rows,) = store.held_out().rows.values()
    assert rows[:, 0].tolist() == list(range(TRAINED, ROWS))
    (few,) = (
        TensorStore(numbered(D).repeat(10, 1), cfgs=[config(eval_windows=BLOCK // 15 * 5)]).held_out().rows.values()
    )
    starts = few[::BLOCK, 0].tolist()
    assert len(few) == 4 * BLOCK and len({*starts}) == 4


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_held_out_rows_must_be_finite(number: float) -> None:
    x = numbered(D)
    x[TRAINED + 3, 1] = number
    with pytest.raises(ValueError, match=f"held-out rows at {re.escape(X)} have numbers that are not finite"):
        TensorStore(x, cfgs=[config(site="mlp_in")]).held_out()


@pytest.mark.parametrize("batch_size", [60, 70])
def test_an_epoch_ends_before_the_next_begins(batch_size: int) -> None:
    """Every row is served once before any is served again, but for the rest that fills no batch."""
    store, hook = TensorStore(numbered(D), cfgs=[config(batch_size=batch_size)]), config().hook_name
    batches = TRAINED // batch_size
    for epoch in (1, 2):
        seen = serve(store, batches, hook)
        assert len({*seen}) > len(seen) - epoch * batch_size and (epoch > 1 or len({*seen}) == len(seen))


def test_rows_of_tensors_in_training_are_served_without_their_graph() -> None:
    assert not TensorStore(numbered(D).requires_grad_(), cfgs=[config()]).next_batch()[config().hook_name].requires_grad


def test_a_state_of_other_rows_is_refused() -> None:
    store = TensorStore(numbered(D), cfgs=[config()])
    store.next_batch()
    with pytest.raises(ValueError, match=r"activations: 3000 rows, and 4000 when training began; give those of then"):
        TensorStore(numbered(D)[:3000], cfgs=[config()], state=store.state)


def test_seed_decides_the_order() -> None:
    orders = [serve(TensorStore(numbered(D), cfgs=[config(text_seed=s)]), 9, config().hook_name) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_store_made_with_a_state_serves_what_the_other_would_have(tmp_path: Path) -> None:
    cfgs = [config()]
    store = TensorStore(numbered(D), cfgs=cfgs)
    for _ in range(9):
        serve(store, 20, cfgs[0].hook_name)
        save_state(store.state, tmp_path / "state.safetensors")
        again = TensorStore(numbered(D), cfgs=cfgs, state=load_state(tmp_path / "state.safetensors"))
        assert serve(again, 150, cfgs[0].hook_name) == serve(store, 150, cfgs[0].hook_name)


def test_processes_that_share_batches_read_all_rows_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "count", lambda: 3)
    served = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        store = TensorStore(numbered(D), cfgs=[config(num_batches_in_buffer=2)])
        own = {*serve(store, 2 * TRAINED // 60, config().hook_name)}  # more than an epoch of 20 rows at a time
        served.append(own)
    assert sum(map(len, served)) > TRAINED and len(set.union(*served)) == TRAINED


def test_dictionaries_of_another_model_train_and_are_evaluated_without_a_language_model() -> None:
    """Rows made of 16 directions; metrics against formulas over the held-out rows."""
    rng = torch.Generator().manual_seed(0)
    true = torch.randn(16, D, generator=rng)
    fires = torch.rand(20_000, 16, generator=rng) < 0.1
    x = fires.float() @ true
    cfgs = [config(num_tokens=60_000, model_batch_size=64, sae_type=t) for t in ("topk", "vanilla")]
    saes, store = [build_sae(cfg) for cfg in cfgs], TensorStore(x, cfgs=cfgs)
    results = train(saes, store)
    (rows,) = store.held_out().rows.values()
    assert any(torch.equal(rows[0], row) for row in x[-2000:])
    for sae, found in zip(saes, results):
        assert found["explained_variance"] > 0.8, sae
        latents = sae.encode(rows).detach()
        y_hat = sae.decode(latents).detach()
        error = (rows - y_hat).double().square().sum()
        assert_close(found["explained_variance"], float(1 - error / (rows - rows.mean(dim=0)).double().square().sum()))
        assert_close(found["l0"], float((latents > 0).sum() / len(rows)))
        assert found["silent_share"] == float((latents == 0).all(dim=0).double().mean())
        assert not {"ce", "ce_recovered", "kl", "_rows"} & found.keys()


def test_evaluation_on_rows_is_that_of_a_crosscoder_too() -> None:
    cfg = config(layer=(0, 1), site="resid_post")
    store = TensorStore({cfg.reads[0]: numbered(D), cfg.reads[1]: -numbered(D)}, cfgs=[cfg])
    sae = build_sae(cfg)
    x = torch.cat(list(store.held_out().rows.values()), dim=1)
    sae.initialise_from(x)
    (found,) = evaluate(store.held_out(), [sae])
    error = (x - sae.eval()(x).sae_out).double() / sae.hook_scales.double().repeat_interleave(D)
    assert_close(found["mse"], float(error.square().mean()), rtol=1e-5, atol=0)


BAD = {
    "no files": (lambda folder: dict(x=folder), ["holds no .safetensors files", "give a folder"]),
    "width": (lambda _: dict(x=torch.zeros(900, 5)), ["activations: x = torch.float32 [900, 5]", "[row, 6]"]),
    "dimensions": (lambda _: dict(x=torch.zeros(9, 9, 6)), ["x = torch.float32 [9, 9, 6]", "[row, 6]"]),
    "integers": (lambda _: dict(x=np.zeros((900, 6), int)), ["x = int64 [900, 6]", "float16, bfloat16"]),
    "no rows": (lambda _: dict(x=torch.zeros(0, 6)), ["x = torch.float32 [0, 6]"]),
    "few rows": (lambda _: dict(x=torch.zeros(BLOCK, 6)), ["256 rows are too few", "give 256 for each process"]),
    "another hook": (lambda _: dict(x={"blocks.3.hook_resid_pre": torch.zeros(900, 6)}), ["no blocks.2."]),
    "no y": (lambda _: dict(x=torch.zeros(900, 6), cfgs=[config(**TRANSCODER)]), [f"no {Y} in x", "by its name"]),
    "a list": (lambda _: dict(x=[[1.0] * 6] * 900), ["x = list", "[row, 6]"]),
    "long doubles": (lambda _: dict(x=np.zeros((900, 6), np.longdouble)), ["x = float128", "float64"]),
    "y beside names": (
        lambda _: dict(x={"x": torch.zeros(900, 6)}, y=torch.zeros(900, 4)),
        ["y: x holds the rows of each hook", "leave y out"],
    ),
    "y of an SAE": (
        lambda _: dict(x=torch.zeros(900, 6), y=torch.zeros(900, 4)),
        ["y: these Configs write what they read", "target_size"],
    ),
    "x of two layers": (
        lambda _: dict(x=torch.zeros(900, 6), cfgs=[config(layer=0), config(layer=1)]),
        ["no blocks.0.hook_resid_pre in x"],
    ),
    "x of a crosscoder": (lambda _: dict(x=torch.zeros(900, 6), cfgs=[config(layer=(0, 1))]), ["no blocks.0."]),
    "no Config": (lambda _: dict(x=torch.zeros(900, 6), cfgs=[]), ["cfgs: give one or several"]),
    "two streams": (
        lambda _: dict(x=torch.zeros(900, 6), cfgs=[config(), config(batch_size=30)]),
        ["cfgs: give one or several, alike in"],
    ),
    "no width": (lambda _: dict(x=torch.zeros(900, 6), cfgs=[config(act_size=None)]), ["act_size = None: give"]),
    "lengths": (
        lambda _: dict(x=torch.zeros(900, 6), y=torch.zeros(901, 4), cfgs=[config(**TRANSCODER)]),
        ["900 and 901 rows", "as many"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_in_a_line(case: str, tmp_path: Path) -> None:
    make, parts = BAD[case]
    with pytest.raises(ValueError) as error:
        TensorStore(**({"cfgs": [config()]} | make(tmp_path)))
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), error.value


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = as_folder({"x": numbered(D)}, tmp_path / "acts")
    file = folder / "0701.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file}: cannot be read .*; give whole safetensors files"):
        TensorStore(folder, cfgs=[config()])
