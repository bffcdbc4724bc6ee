"""kernels/ against plain dense torch, on shapes where chunks, rows and latents do not come out even."""

from itertools import pairwise

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from kernels import choose, sparse
from kernels.sparse import GradientMemory, Selection, SparseLatents, Support

D, F = 4, 13


@pytest.fixture(params=[(2048, 1536), (2, 5), (100, 3), (1, 1)], ids=str)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "CPU_CHUNK_ROWS", request.param[0])
    monkeypatch.setattr(choose, "CPU_CHUNK_LATENTS", request.param[1])


def problem(batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make x, W_enc stored latent by latent, b_enc, and the dense pre-activations."""
    rng = torch.Generator().manual_seed(seed)
    x, W, b_enc = (torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((batch, D), (F, D), (F,)))
    return x, W.t(), b_enc, x @ W.t() + b_enc


def masked(dense: Tensor, mask: Tensor) -> SparseLatents:
    """Keep the entries of dense latents under a mask."""
    rows, indices = mask.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)])
    entries = dense[rows, indices]
    return SparseLatents(entries, entries, Support(indices, offsets, mask.shape[1]))


def assert_selects(selection: Selection, pre: Tensor, mask: Tensor) -> None:
    """Check that a selection has exactly the mask's entries, each once, with their pre-activations."""
    pre_at, support = selection
    assert support.dict_size == pre.shape[1] and len(support.offsets) == len(pre) + 1
    assert support.offsets[0] == 0 and support.offsets[-1] == len(support.indices) == len(pre_at)
    ones = torch.ones_like(pre_at)
    assert_close(SparseLatents(ones, ones, support).to_dense(), mask.to(pre.dtype))
    assert_close(SparseLatents(pre_at, pre_at, support).to_dense(), pre * mask)


def largest(pre: Tensor, count: int) -> Tensor:
    """Mark the `count` largest of all entries, by sorting."""
    return pre >= pre.flatten().sort(descending=True).values[count - 1]


def random_mask() -> Tensor:
    """Leave some of seven rows and some latents without an entry, row 3 nearly full, the rest uneven."""
    mask = torch.rand(7, F, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[3] = True
    mask[[0, 4, -1]] = False
    mask[:, [0, 6, -1]] = False
    return mask


# ---- choosing ----


@pytest.mark.parametrize("k", [1, 4, F])
@pytest.mark.parametrize("repeat", [[0], [0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 2, 0]], ids=["one", "many", "equal"])
def test_topk_is_the_k_largest_of_each_row(chunks: None, repeat: list[int], k: int) -> None:
    x, W_enc, b_enc, pre = problem(7)
    x, pre = x[repeat], pre[repeat]
    mask = torch.stack([largest(row, k) for row in pre])
    assert_selects(choose.topk(x, W_enc, b_enc, k), pre, mask)
    assert torch.equal(choose.topk_mask(pre, k), mask)


@pytest.mark.parametrize("skew", [1.0, 30.0], ids=["even", "all in the first block"])
@pytest.mark.parametrize("dict_size, k", [(5000, 8), (1000, 8), (1024, 48), (1024, 49), (3000, 1)])
def test_topk_through_group_maxima_is_the_topk(
    monkeypatch: pytest.MonkeyPatch, dict_size: int, k: int, skew: float
) -> None:
    """With `skew`, too few entries reach what the first block's maxima promise, and rows are chosen again."""
    monkeypatch.setattr(choose, "CPU_CHUNK_ROWS", 16)
    monkeypatch.setattr(choose, "CPU_CHUNK_LATENTS", 1024)
    rng = torch.Generator().manual_seed(0)
    x, W_enc = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((40, 32), (32, dict_size)))
    W_enc[:, :1024] *= skew
    b_enc = torch.randn(dict_size, generator=rng, dtype=torch.float64)
    selection = choose.topk(x, W_enc, b_enc, k)
    expected = (x @ W_enc + b_enc).topk(k)
    order = selection.pre.view(40, k).sort(dim=1, descending=True)
    assert_close(order.values, expected.values)
    assert torch.equal(selection.support.indices.view(40, k).gather(1, order.indices), expected.indices)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("low", [-torch.inf, 0.0, 1.5])
def test_above_is_what_exceeds_each_latents_floor(chunks: None, batch: int, low: float) -> None:
    x, W_enc, b_enc, pre = problem(batch)
    floor = low + torch.linspace(0, 1, F, dtype=torch.float64)
    assert_selects(choose.above(x, W_enc, b_enc, floor, max_density=1.0), pre, pre > floor)


@pytest.mark.parametrize("k", [1, 5, 9, F])
def test_at_most_keeps_the_largest_of_rows_that_have_more(k: int) -> None:
    pre, mask = problem(7)[3], random_mask()
    among = pre.masked_fill(~mask, -torch.inf)
    kept = mask & (among >= among.sort(dim=1, descending=True).values[:, k - 1 : k])
    entries = masked(pre, mask)
    assert_selects(choose.at_most(Selection(entries.pre, entries.support), k), pre, kept)


def test_above_gives_up_where_the_first_chunk_is_denser_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W_enc, b_enc, pre = problem(7)
    monkeypatch.setattr(choose, "CPU_CHUNK_LATENTS", 5)
    floor = torch.zeros_like(b_enc)
    density = (pre[:, :5] > 0).double().mean().item()
    assert choose.above(x, W_enc, b_enc, floor, max_density=density - 1e-6) is None
    assert choose.above(x, W_enc, b_enc, floor, max_density=density + 1e-6) is not None


@pytest.mark.parametrize("guess", [-5.0, 0.0, 1e-9, 0.7, 50.0, torch.inf])
@pytest.mark.parametrize("batch, k, shift", [(1, 2, 0), (7, 3, 0), (5, 1, 0), (5, 6, -2), (5, F, -2)])
def test_batchtopk_is_the_largest_positive_of_the_batch_whatever_the_guess(
    chunks: None, batch: int, k: int, shift: float, guess: float
) -> None:
    """With `shift`, too few are positive."""
    x, W_enc, b_enc, pre = problem(batch)
    b_enc, pre = b_enc + shift, pre + shift
    assert 0 < (pre > 0).sum() < k * batch if shift else (pre > 0).sum() > k * batch
    selection = choose.batchtopk(x, W_enc, b_enc, k, torch.tensor(guess, dtype=torch.float64))
    assert_selects(selection, pre, largest(pre, k * batch) & (pre > 0))


@pytest.mark.parametrize("guess", [0.0, 0.5, 9.0])
def test_batchtopk_keeps_as_many_and_as_large_where_rows_tie(chunks: None, guess: float) -> None:
    x, W_enc, b_enc, pre = problem(2)
    repeat = [0, 1, 0, 0, 1]
    kept, support = choose.batchtopk(x[repeat], W_enc, b_enc, 2, torch.tensor(guess, dtype=torch.float64))
    assert_close(kept.sort(descending=True).values, pre[repeat].flatten().sort(descending=True).values[:10])
    assert_close(kept, pre[repeat][support.rows, support.indices])


@pytest.mark.parametrize("shift", [0.0, -2.0])
@pytest.mark.parametrize("batch, k", [(1, 2), (7, 3), (5, 1500)])
def test_the_way_for_gpus_picks_the_same_latents(
    monkeypatch: pytest.MonkeyPatch, batch: int, k: int, shift: float
) -> None:
    """Of three blocks, the last one narrower. What does not fire may be among them."""
    monkeypatch.setattr(sparse, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(choose, "GPU_CHUNK_ELEMENTS", 1)
    x, W_enc, b_enc = (torch.randn(shape, dtype=torch.float64) for shape in ((batch, D), (D, 2500), (2500,)))
    b_enc += shift
    pre = x @ W_enc + b_enc
    assert_selects(choose.batchtopk(x, W_enc, b_enc, k, torch.tensor(0.5)), pre, largest(pre, k * batch))
    assert_selects(choose.topk(x, W_enc, b_enc, k), pre, torch.stack([largest(row, k) for row in pre]))
    assert choose.above(x, W_enc, b_enc, torch.zeros_like(b_enc), max_density=1.0) is None


# ---- the format ----


KEPT = {"uneven": random_mask(), "nothing": torch.zeros(3, F) > 0, "one row": random_mask()[3:4]}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_support_by_latent_is_the_transpose_with_rows_in_order(kept: Tensor) -> None:
    support = masked(kept.double(), kept).support
    order, rows, starts = support.by_latent
    assert torch.equal(support.rows, kept.nonzero()[:, 0])
    assert torch.equal(support.indices[order], kept.t().nonzero()[:, 0])
    assert torch.equal(rows, kept.t().nonzero()[:, 1])
    assert torch.equal(starts, torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(dim=0).cumsum(0)]))


@pytest.mark.parametrize("has_support", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_latents_are_the_same_in_either_form_with_gradients(kept: Tensor, has_support: bool) -> None:
    leaf = (torch.rand(kept.shape, dtype=torch.float64) + 1).requires_grad_()
    dense = leaf * kept
    latents = masked(dense, kept) if has_support else SparseLatents(dense, dense, None)
    assert len(latents) == len(kept) and torch.equal(latents.offsets.diff(), kept.sum(dim=1))
    assert torch.equal(torch.stack([latents.rows, latents.indices], dim=1), kept.nonzero())
    assert torch.equal(latents.values, dense[kept]) and torch.equal(latents.to_dense(), dense)
    assert torch.equal(latents.fired(), kept.any(dim=0))
    per_latent, weights = torch.rand(F, dtype=torch.float64), torch.rand_like(dense)
    weighted = (latents.acts * latents.beside(per_latent)).sum() + (latents.to_dense() * weights).sum()
    (weighted + latents.values.sum()).backward()
    assert_close(leaf.grad, ((per_latent + weights + 1) * kept).detach())


def test_an_entry_of_0_or_less_has_not_fired() -> None:
    kept = random_mask()
    latents = masked(torch.linspace(-1, 1, F).expand(kept.shape), kept)
    assert torch.equal(latents.fired(), kept.any(dim=0) & (torch.linspace(-1, 1, F) > 0))


@pytest.mark.parametrize("widths", [[F], [1, F], [3, 4, 11, F], [6, 6, F]], ids=str)
@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_a_split_decodes_each_part_of_the_latents_by_itself(kept: Tensor, widths: list[int]) -> None:
    batch, edges = len(kept), [0, *widths]
    dense, W_dec = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((batch, F), (F, D)))
    weights = torch.randn(len(widths), batch, D, dtype=torch.float64)
    slices = [slice(low, high) for low, high in pairwise(edges)]
    expected = torch.stack([(dense * kept)[:, s] @ W_dec[s] for s in slices])
    values, support = masked(dense, kept).split(torch.tensor(widths))
    found = sparse.decode(values, support, W_dec).view(len(widths), batch, D)
    assert_close(found, expected)
    grads = [torch.autograd.grad((out * weights).sum(), (dense, W_dec)) for out in (found, expected)]
    assert_close(*grads)


# ---- gradients ----


@pytest.mark.parametrize("reused", [False, True])
def test_decode_and_its_gradients_are_those_of_the_dense_product(monkeypatch: pytest.MonkeyPatch, reused: bool) -> None:
    monkeypatch.setattr(sparse, "BAGGED_LATENTS", 5)
    latents = masked(problem(7)[3], random_mask())
    values, W_dec = latents.values.requires_grad_(), torch.randn(F, D, dtype=torch.float64, requires_grad=True)
    assert_close(sparse.decode(values, latents.support, W_dec), latents.to_dense() @ W_dec)
    memory = torch.full_like(W_dec.detach(), torch.nan)

    def fn(values: Tensor, W: Tensor) -> Tensor:
        return sparse.decode(values, latents.support, W, GradientMemory(W_dec=memory.clone()) if reused else None)

    assert torch.autograd.gradcheck(fn, (values, W_dec))


def test_gradients_of_pre_activations_pass_gradcheck() -> None:
    x, W_enc, b_enc, _ = problem(7)
    b_dec = torch.randn(D, dtype=torch.float64)
    support = masked(torch.zeros(7, F), random_mask()).support

    def fn(x: Tensor, W: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        centred = (x - b_dec).detach()
        pre = (centred @ W.t() + b_enc)[support.rows, support.indices].detach()
        return sparse.pre_activations(x, W.t(), b_enc, b_dec, centred, Selection(pre, support))

    inputs = [t.detach().clone().requires_grad_() for t in (x, W_enc.t(), b_enc, b_dec)]
    assert torch.autograd.gradcheck(fn, inputs)


def test_gradient_memory_is_lent_once_until_it_is_free_again() -> None:
    memory = GradientMemory(W_enc=torch.zeros(F, D))
    assert memory.take("W_dec") is None
    for _ in range(2):
        assert memory.take("W_enc") is not None and memory.take("W_enc") is None
        memory.free()


def test_an_empty_support_decodes_to_zero_and_sends_zero_gradients(chunks: None) -> None:
    x, W_enc, b_enc, _ = problem(7)
    b_dec, W_dec = torch.zeros(D, dtype=torch.float64), torch.randn(F, D, dtype=torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (x, W_enc, b_enc, b_dec, W_dec)]
    selection = choose.above(x, W_enc, b_enc, torch.full_like(b_enc, torch.inf), max_density=0.0)
    assert len(selection.pre) == 0
    out = sparse.decode(sparse.pre_activations(*leaves[:4], x, selection), selection.support, leaves[4])
    assert torch.equal(out, torch.zeros(7, D, dtype=torch.float64))
    out.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_shapes_in_signatures_are_checked_at_run_time() -> None:
    support = Support(torch.tensor([0, 1]), torch.tensor([0, 1, 2]), F)
    with pytest.raises(TypeCheckError):
        sparse.decode(torch.ones(2, 1), support, torch.ones(F, D))
