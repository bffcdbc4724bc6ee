"""analysis/latents.py and ablation_table: against what encode, splice and the model say one position at a time."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pandas import DataFrame
from torch import Tensor
from torch.testing import assert_close

from analysis.latents import feature_density, find_latents, match, top_contexts
from analysis.splice import ablation_table, splice
from config import Config
from language_model import Model, check_model, load_model, ordinary_positions, record
from sae import BaseAutoencoder, build_sae


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> Model:
    return load_model(Config(model_name=str(tiny_gpt2), device="cpu"))


@pytest.fixture(scope="module")
def tokens(model: Model, windows_of: Callable) -> Tensor:
    return windows_of(model.tokenizer, 6, 20)[1:]  # the text of the first begins with another BOS


@pytest.fixture(scope="module")
def sae(tiny_gpt2: Path, model: Model, tokens: Tensor) -> BaseAutoencoder:
    small = dict(sae_type="topk", dict_size=64, target_l0=4, seq_len=20, device="cpu")
    cfg = check_model(Config(model_name=str(tiny_gpt2), layer=1, **small))
    sae = build_sae(cfg).eval()
    sae.initialise_from(record(model, tokens, [cfg.hook_name])[cfg.hook_name])
    return sae


@pytest.fixture(scope="module")
def latents(sae: BaseAutoencoder, model: Model, tokens: Tensor) -> Tensor:
    """All of them [window, pos, dict_size], 0 at the BOS."""
    acts = sae.encode(record(model, tokens, [sae.cfg.hook_name])[sae.cfg.hook_name]).detach()
    acts[:, 0] = 0
    return acts


def test_top_contexts_are_the_strongest_places(
    sae: BaseAutoencoder, model: Model, tokens: Tensor, latents: Tensor
) -> None:
    often, never = int((latents > 0).sum(dim=(0, 1)).argmax()), int((latents.amax(dim=(0, 1)) == 0).int().argmax())
    table = top_contexts(sae, model, tokens, [often, never], count=7)
    assert list(table["latent"]) == [often] * 7, "of a latent that never fires there is no context"
    assert_close(torch.tensor(table["activation"]), latents[..., often].flatten().topk(7).values.double())
    for row in table.itertuples():
        assert_close(row.activation, float(latents[row.window, row.position, often]))
        assert row.token == model.to_string(tokens[row.window, row.position : row.position + 1])
        text = model.to_string(tokens[row.window, 1:])
        assert row.context.count("[") == 1 and f"[{row.token}]" in row.context
        assert row.context.replace("[", "").replace("]", "") in text


def test_find_latents_ranks_what_fires_here_against_what_fires_anywhere(
    sae: BaseAutoencoder, model: Model, tokens: Tensor
) -> None:
    density = feature_density(sae, model, tokens)
    text = model.to_string(tokens[0, 1:6])
    table = find_latents(sae, model, text, density, count=64)
    ids = model.to_tokens(text, prepend_bos=True)
    acts = sae.encode(record(model, ids, [sae.cfg.hook_name])[sae.cfg.hook_name]).detach()
    ordinary = ordinary_positions(ids, model.tokenizer)
    ids, acts = ids[ordinary], acts[ordinary]
    share = (acts > 0).double().mean(dim=0)
    assert {*table["latent"]} == {*share.nonzero().flatten().tolist()}
    nats = share * (share / density.clamp(min=1e-6)).log()
    assert table["nats"].is_monotonic_decreasing and table["nats"].iloc[0] > 0
    for row in table.itertuples():
        assert_close((row.nats, row.share), (float(nats[row.latent]), float(share[row.latent])))
        strongest, place = acts[:, row.latent].max(dim=0)
        assert_close(row.activation, float(strongest), rtol=1e-5, atol=1e-5)
        assert row.token == model.to_string(ids[place : place + 1])
    assert find_latents(sae, model, tokens[:1], density.numpy(), count=3).shape == (3, 6)
    with pytest.raises(ValueError, match=re.escape("density = [63]: give one of each of the 64 latents")):
        find_latents(sae, model, text, density[1:])


def test_match_finds_the_nearest_of_another_dictionary(sae: BaseAutoencoder) -> None:
    other, order = build_sae(sae.cfg), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other.W_dec.data.copy_(3 * sae.W_dec.data[order])
    table = match(sae, other)
    assert list(table["latent"]) == list(range(64)) and order[table["nearest"]].tolist() == list(range(64))
    assert_close(torch.tensor(table["cosine"]), torch.ones(64))
    with pytest.raises(ValueError, match="b: writes 8 activations, and a 16; give dictionaries of one hook"):
        match(sae, build_sae(Config(act_size=8, dict_size=16, target_l0=2)))


def test_ablation_table_against_the_model_spliced_by_hand(
    sae: BaseAutoencoder, model: Model, tokens: Tensor, latents: Tensor
) -> None:
    hook, often = sae.cfg.hook_name, latents.sum(dim=(0, 1)).topk(2).indices.tolist()
    never = int((latents.amax(dim=(0, 1)) == 0).int().argmax())
    table = ablation_table(model, sae, tokens, [*often, never])
    clean = model(tokens)[:, 1:-1].double().log_softmax(dim=-1)
    for row in table.itertuples():
        with torch.no_grad(), splice(model, sae, error_term=True, scale={(hook, row.latent): 0.0}):
            log_p = model(tokens)[:, 1:-1].double().log_softmax(dim=-1)
        targets = tokens[:, 2:, None]
        change = (clean.gather(2, targets) - log_p.gather(2, targets)).mean()
        assert_close(row.ce_change, float(change), rtol=1e-4, atol=1e-6)
        assert_close(row.kl, float((clean.exp() * (clean - log_p)).sum(dim=-1).mean()), rtol=1e-4, atol=1e-6)
        assert_close(row.changed, float((clean.argmax(dim=-1) != log_p.argmax(dim=-1)).double().mean()))
    for row in table[:2].itertuples():
        with torch.no_grad(), splice(model, sae, error_term=True, scale={(hook, row.latent): 0.0}):
            shift = (model(tokens)[:, 1:-1].double().softmax(dim=-1) - clean.exp()).sum(dim=(0, 1))
        assert row.loses == [model.to_string(token[None]) for token in shift.topk(5, largest=False).indices]
        assert row.gains == [model.to_string(token[None]) for token in shift.topk(5).indices]
    assert table["loses"].iloc[2] == table["gains"].iloc[2] == []
    assert table["kl"].iloc[0] > 1e-3 and abs(table["kl"].iloc[2]) < 1e-6


def test_several_latents_are_scaled_at_once(
    sae: BaseAutoencoder, model: Model, tokens: Tensor, latents: Tensor
) -> None:
    hook, two = sae.cfg.hook_name, tuple(latents.sum(dim=(0, 1)).topk(2).indices.tolist())
    found = []
    for scale in ({(hook, two): 0.0}, {(hook, latent): 0.0 for latent in two}):
        with torch.no_grad(), splice(model, sae, error_term=True, scale=scale):
            found.append(model(tokens))
    assert torch.equal(*found) and not torch.equal(found[0], model(tokens))


@pytest.mark.parametrize("latents, said", [
    ([0, -1], r"latents = [-1]: there is none; give numbers from 0 to 63"),
    ([64], r"latents = [64]: there is none; give numbers from 0 to 63"),
    (3, "latents = 3: give a list of numbers, or a column such as table['latent']"),
    ([0.5], "latents = [0.5]: give a list of numbers"),
    (DataFrame({"latent": [1]}), "give a list of numbers, or a column such as table['latent']"),
])  # fmt: skip
def test_latents_that_are_none_are_refused(
    sae: BaseAutoencoder, model: Model, tokens: Tensor, latents: object, said: str
) -> None:
    for table in (
        lambda: top_contexts(sae, model, tokens, latents),
        lambda: ablation_table(model, sae, tokens, latents),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            table()
