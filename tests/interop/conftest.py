"""The embedded model and its text, as the other libraries take them."""

from pathlib import Path

import pytest
import torch
from sae_lens import HookedSAETransformer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def windows(tiny_gpt2: Path, tiny_text: Path) -> torch.Tensor:
    """Eight windows of 32 tokens that begin with BOS."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = tokenizer(tiny_text.read_text()[:4000])["input_ids"][: 8 * 31]
    return torch.cat([torch.full((8, 1), tokenizer.bos_token_id), torch.tensor(ids).view(8, 31)], dim=1)


@pytest.fixture(scope="session")
def hooked(tiny_gpt2: Path) -> HookedSAETransformer:
    """tiny_gpt2 as a HookedSAETransformer, which loads by the names of known models only."""
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=model.config.n_embd, n_ctx=64, d_head=8, n_heads=2, d_vocab=model.config.vocab_size,
        act_fn="gelu_new", normalization_type="LN", original_architecture="GPT2LMHeadModel", model_name="tiny",
        default_prepend_bos=True,
    )  # fmt: skip
    ours = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(tiny_gpt2))
    ours.load_and_process_state_dict(
        convert_gpt2_weights(model, cfg), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return ours.eval()
