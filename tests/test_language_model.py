"""language_model.py: recording and replacing against Hugging Face's own modules, and which models are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub_server import standing_in
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from config import SITES, Config
from language_model import (
    check_hooks,
    check_model,
    computing_once,
    load_model,
    logits_at,
    ordinary_positions,
    record,
    replacing,
)
from runtime import models

HOOK = "blocks.2.hook_resid_pre"
HOOKS = [f"blocks.{layer}.{hook}" for layer in (0, 1) for hook in SITES.values()]


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> TransformerBridge:
    return load_model(Config(model_name=str(tiny_gpt2), layer=1, device="cpu"))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hugging_face(tiny_gpt2: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


@torch.no_grad()
def seen_by_hugging_face(hf: GPT2LMHeadModel, tokens: Tensor) -> dict[str, Tensor]:
    """The activations at every hook, and the logits, by forward hooks on the modules of transformers."""
    seen: dict[str, Tensor] = {}

    def entering(module: torch.nn.Module, hook: str) -> None:
        module.register_forward_pre_hook(lambda m, args: seen.update({hook: args[0]}))

    def leaving(module: torch.nn.Module, hook: str) -> None:
        module.register_forward_hook(lambda m, args, out: seen.update({hook: out[0] if type(out) is tuple else out}))

    for layer, block in enumerate(hf.transformer.h):
        hooks = {site: f"blocks.{layer}.{hook}" for site, hook in SITES.items()}
        entering(block, hooks["resid_pre"])
        entering(block.attn.c_proj, hooks["z"])
        leaving(block.attn, hooks["attn_out"])
        entering(block.ln_2, hooks["resid_mid"])
        leaving(block.ln_1, hooks["attn_in"])
        leaving(block.ln_2, hooks["mlp_in"])
        leaving(block.mlp, hooks["mlp_out"])
        leaving(block, hooks["resid_post"])
    seen["logits"] = hf(tokens).logits
    return seen


def test_record_gives_what_hugging_face_computes(
    model: TransformerBridge, hugging_face: GPT2LMHeadModel, tokens: Tensor
) -> None:
    """All hooks in one pass, and each in its own."""
    seen = seen_by_hugging_face(hugging_face, tokens)
    together = record(model, tokens, HOOKS)
    assert together.keys() == set(HOOKS)
    for hook in HOOKS:
        assert together[hook].shape == (3, 20, 16) and not together[hook].requires_grad
        assert_close(together[hook], seen[hook], atol=1e-5, rtol=1e-4)
        assert torch.equal(record(model, tokens, [hook])[hook], together[hook])
        alike = [other for other in HOOKS if (seen[hook] - seen[other]).abs().max() < 1e-3]
        assert alike == [hook] or sorted(alike) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"]


@torch.no_grad()
def test_what_is_replaced_in_the_middle_of_a_block_is_the_residual_stream(
    model: TransformerBridge, hugging_face: GPT2LMHeadModel, tokens: Tensor
) -> None:
    """By Hugging Face's modules: the MLP reads it, and it goes on beside the MLP."""
    body, block = hugging_face.transformer, hugging_face.transformer.h[0]
    x = body.wte(tokens) + body.wpe.weight[: tokens.shape[1]]
    middle = 2 * (x + block.attn(block.ln_1(x))[0]) + 1
    expected = hugging_face.lm_head(body.ln_f(body.h[1](middle + block.mlp(block.ln_2(middle)))))
    seen = []
    hooks = {
        "blocks.0.hook_resid_post": lambda acts: seen.append(acts) or acts,
        "blocks.0.hook_resid_mid": lambda r: 2 * r + 1,
    }
    with replacing(model, hooks):
        assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    assert_close(seen[0], middle + block.mlp(block.ln_2(middle)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hooks, later", [
    (["hook_resid_pre"], ["blocks.0.attn", "blocks.0.mlp", "blocks.1", "unembed"]),
    (["attn.hook_z"], ["blocks.0.mlp", "blocks.1", "unembed"]),
    (["hook_attn_out"], ["blocks.0.mlp", "blocks.1", "unembed"]),
    (["hook_resid_mid"], ["blocks.0.mlp", "blocks.1", "unembed"]),
    (["hook_mlp_out"], ["blocks.1", "unembed"]),
    (["hook_resid_post"], ["blocks.1", "unembed"]),
    (["hook_resid_mid", "hook_resid_pre", "hook_resid_mid"], ["blocks.0.mlp", "blocks.1", "unembed"]),
], ids=str)  # fmt: skip
def test_record_runs_nothing_behind_the_last_hook_and_leaves_no_hook(
    model: TransformerBridge, hugging_face: GPT2LMHeadModel, tokens: Tensor, hooks: list[str], later: list[str]
) -> None:
    calls: list[str] = []
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name in later
    ]
    record(model, tokens, [f"blocks.0.{hook}" for hook in hooks])
    assert calls == []
    with torch.no_grad():
        logits = model(tokens)
    assert set(calls) == set(later)
    for handle in handles:
        handle.remove()
    assert_close(logits, seen_by_hugging_face(hugging_face, tokens)["logits"], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_replacing_several_hooks_is_what_hugging_face_makes_of_it(
    model: TransformerBridge, hugging_face: GPT2LMHeadModel, tokens: Tensor
) -> None:
    """Heads side by side, each function at its own hook, the later one given what the earlier one led to."""
    scale = torch.linspace(-1, 2, 16)
    given: dict[str, Tensor] = {}

    def scaled(acts: Tensor) -> Tensor:
        return given.setdefault("z", acts) * scale

    def shifted(acts: Tensor) -> Tensor:
        return given.setdefault("mlp", acts) + scale

    clean = model(tokens)
    with replacing(model, {"blocks.0.attn.hook_z": scaled, "blocks.1.hook_mlp_out": shifted}):
        replaced = model(tokens)
    assert torch.equal(model(tokens), clean) and (replaced - clean).abs().max() > 0.1
    with pytest.raises(ZeroDivisionError), replacing(model, {HOOKS[0]: lambda acts: 1 / 0}):
        model(tokens)
    assert torch.equal(model(tokens), clean)

    first, second = hugging_face.transformer.h
    first.attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    second.mlp.register_forward_hook(lambda module, args, out: out + scale)
    seen = seen_by_hugging_face(hugging_face, tokens)
    assert_close(replaced, seen["logits"], atol=1e-4, rtol=1e-4)
    assert_close(given["z"] * scale, seen["blocks.0.attn.hook_z"], atol=1e-5, rtol=1e-4)
    assert_close(given["mlp"] + scale, seen["blocks.1.hook_mlp_out"], atol=1e-5, rtol=1e-4)


SMALL = dict(
    vocab_size=200, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=1, head_dim=8)
FAMILIES = {
    "parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=200, hidden_size=16, n_layer=3, n_head=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "soft cap": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, sliding_window=8, final_logit_softcapping=0.1)),
    "shared keys": lambda: Gemma4ForCausalLM(
        Gemma4TextConfig(
            **GROUPED, sliding_window=8, num_kv_shared_layers=1, global_head_dim=8, num_global_key_value_heads=1,
            layer_types=["sliding_attention", "full_attention", "full_attention"], vocab_size_per_layer_input=200,
            hidden_size_per_layer_input=4,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_that_compute_once_and_logits_at_some_positions_change_nothing(
    tmp_path: Path, word_tokenizer: Callable, family: str
) -> None:
    """In any family, to the last bit; and all is as before, even where a pass fails."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made: PreTrainedModel = FAMILIES[family]()
    made.save_pretrained(tmp_path)
    word_tokenizer(bos_token="<bos>", eos_token="<eos>").save_pretrained(tmp_path)
    model = load_model(Config(model_name=str(tmp_path), layer=2, device="cpu"))
    tokens = torch.randint(4, 200, (3, 20), generator=torch.Generator().manual_seed(0))
    where = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) > 0.5
    changes = ({}, {HOOK: torch.zeros_like}, {HOOK: lambda acts: acts + 1}, {})
    calls: list[int] = []
    for layer in (0, 1):
        model.blocks[layer].ln1.register_forward_hook(lambda *_, layer=layer: calls.append(layer))

    expected = []
    for change in changes:
        with replacing(model, change):
            expected.append(model(tokens, return_type="logits"))
    assert (expected[0] - expected[1]).abs().max() > 1e-3 and calls == [0, 1] * 4
    calls.clear()
    with computing_once(model, 2):
        for change, logits in zip(changes, expected):
            with replacing(model, change):
                assert torch.equal(logits_at(model, tokens, where), logits[where])
    assert calls == [0, 1] * (4 if family == "shared keys" else 1)
    with pytest.raises(ZeroDivisionError), computing_once(model, 2), replacing(model, {HOOK: lambda acts: 1 / 0}):
        logits_at(model, tokens, where)
    other = model(tokens.flip(1), return_type="logits")
    assert not torch.equal(other, expected[0]) and torch.equal(model(tokens, return_type="logits"), expected[0])


def test_load_model_freezes_the_raw_weights_in_the_dtype(tiny_gpt2: Path) -> None:
    model = load_model(Config(model_name=str(tiny_gpt2), layer=1, dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_ordinary_positions_are_neither_the_first_nor_special(word_tokenizer: Callable) -> None:
    tokens = torch.tensor([[0, 4, 1, 5, 2, 3], [9, 0, 199, 3, 8, 1]])
    ordinary = ordinary_positions(tokens, word_tokenizer(bos_token="<bos>", eos_token="<eos>"))
    assert ordinary.int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]


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
    assert "\n" not in message


def test_the_hub_is_asked_once_for_a_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The libraries would ask five times, waiting longer each time."""
    with standing_in(monkeypatch, tmp_path) as hub, pytest.raises(OSError, match="neither in a folder nor on the Hub"):
        check_model(Config(model_name="user/none"))
    assert [(method, path) for method, path, _ in hub.requests] == [("GET", "/api/models/user/none")]


def test_one_answer_of_the_hub_serves_all_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, name, timeout: asked.append(name))
    for _ in range(3):
        models.find("user/of-several-configs")
    assert asked == ["user/of-several-configs"]


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
    cfg = Config(model_name=str(tmp_path), layer=1, site="resid_mid", device="cpu")
    with pytest.raises(ValueError, match=r"^site = 'resid_mid': .* has no such hook; give one of resid_pre, resid_p"):
        check_hooks(load_model(cfg), cfg)


@pytest.mark.parametrize("site, width", [
    ("mlp_in", 16), ("attn_in", 16), ("mlp.hook_post", 64), ("mlp.hook_pre", 64), ("attn.hook_q", 16),
    ("attn.hook_z", 16), ("ln2.hook_normalized", 16), ("attn.o.hook_in", 16), ("hook_mlp_in", 16),
])  # fmt: skip
def test_any_hook_of_a_block_is_a_site_and_its_width_is_found(
    model: TransformerBridge, tiny_gpt2: Path, site: str, width: int
) -> None:
    cfg = Config(model_name=str(tiny_gpt2), layer=1, site=site, device="cpu")
    assert check_hooks(model, cfg) == replace(cfg, act_size=width)
    cfg = Config(model_name=str(tiny_gpt2), layer=1, site="resid_pre", target_site=site, device="cpu")
    found = check_hooks(model, cfg)
    assert (found.d_in, found.d_out, found.target_size) == (16, width, width)


@torch.no_grad()
def test_what_enters_the_mlp_alone_is_replaced_without_a_switch(model: TransformerBridge, tokens: Tensor) -> None:
    """hook_mlp_in is the residual stream on its way into the MLP, which ln2.hook_in is too."""
    cfg = Config(layer=1, site="hook_mlp_in")
    assert cfg.reads == ("blocks.1.ln2.hook_in",)
    acts = record(model, tokens, [*cfg.reads, "blocks.1.hook_resid_mid"])
    assert torch.equal(*acts.values())
    expected = []
    model.set_use_hook_mlp_in(True)
    for on, hook in ((True, "blocks.1.hook_mlp_in"), (False, cfg.hook_name), (False, "blocks.1.hook_in")):
        model.set_use_hook_mlp_in(on)
        with replacing(model, {hook: torch.zeros_like}):
            expected.append(model(tokens, return_type="logits"))
    assert torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[2])


@pytest.mark.parametrize("site, hook", [("hook_embed", "hook_embed"), ("ln_final.hook_normalized",) * 2])
def test_a_hook_outside_the_blocks_is_a_site(
    model: TransformerBridge, tiny_gpt2: Path, tokens: Tensor, site: str, hook: str
) -> None:
    cfg = Config(model_name=str(tiny_gpt2), layer=1, site=site, device="cpu")
    assert (cfg.layer, cfg.reads, cfg.writes) == (0, (hook,), (hook,))
    assert check_hooks(model, cfg) == replace(cfg, act_size=16)
    assert Config(layer=1, site="mlp_in", target_site=site).writes == (hook,)
    with pytest.raises(ValueError, match=r"^site = 'hook_embed\.x': .* has no such hook; give one of resid_pre, "):
        check_hooks(model, replace(cfg, site="hook_embed.x"))


def test_a_target_that_comes_first_is_refused(model: TransformerBridge, tiny_gpt2: Path) -> None:
    cfg = Config(model_name=str(tiny_gpt2), layer=1, site="mlp_out", target_site="mlp_in", device="cpu")
    with pytest.raises(ValueError, match=r"^target_site = 'mlp_in': comes before mlp_out in .*; exchange them$"):
        check_hooks(model, cfg)


@pytest.mark.parametrize("site, why", [
    ("attn.hook_attn_scores", "has no vector for each token at"), ("attn.hook_pattern", "has no vector for each tok"),
    ("attn.qkv.hook_out", "has no vector for each token at"), ("hook_attn_in", "cannot be used .*set_use_attn_in"),
    ("mlp.hook_pots", "has no such hook; did you mean mlp.hook_post[?]"),
    ("embed.hook_in", "cannot be used .*; give another$"), ("pos_embed.hook_in", "cannot be used .*; give another$"),
])  # fmt: skip
def test_a_hook_that_is_not_what_it_seems_is_refused(
    model: TransformerBridge, tiny_gpt2: Path, site: str, why: str
) -> None:
    with pytest.raises(ValueError, match=f"^site = '{site}': .*{why}") as error:
        check_hooks(model, Config(model_name=str(tiny_gpt2), layer=1, site=site, device="cpu"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"^target_site = '{site}': "):
        check_hooks(model, Config(model_name=str(tiny_gpt2), layer=1, target_site=site, device="cpu"))


def test_a_hook_that_is_the_same_for_all_windows_is_refused(tmp_path: Path, word_tokenizer: Callable) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    word_tokenizer(bos_token="<bos>", eos_token="<eos>").save_pretrained(tmp_path)
    cfg = Config(model_name=str(tmp_path), layer=1, site="attn.hook_cos", device="cpu")
    with pytest.raises(
        ValueError, match=r"^site = 'attn\.hook_cos': .* has no vector for each token at .*give another$"
    ):
        check_hooks(load_model(cfg), cfg)


def test_a_hook_that_changes_nothing_is_refused(
    model: TransformerBridge, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TransformerLens' issues 1527 and 1673 describe."""
    monkeypatch.setattr(torch, "zeros_like", lambda acts: acts)
    with pytest.raises(ValueError, match=r"does not act through blocks\.1\.hook_mlp_out"):
        check_hooks(model, Config(model_name=str(tiny_gpt2), layer=1, site="mlp_out", device="cpu"))
