"""Describe what a run would be: its Configs, its parameters and the memory it takes. Trains and writes nothing.

The Hub is not asked: of a model that is not on this disk, only what its Config says is known.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config import Config, by_stream, unused_by
from evaluation import MAX_LOGITS
from language_model import check_model, model_source
from runtime.cli import WIDTH, written
from runtime.documents import local_files
from sae import SAE_TYPES
from text import check_text
from training import heading

STEP_ROWS, DENSE_ROWS, EVAL_LOGITS = 16, 5, 10  # tensors alive at once: [batch, act_size], [batch, dict_size], logits


def describe(cfgs: list[Config]) -> Iterator[str]:
    """Yield lines of at most 80 columns. Raises ValueError or OSError where a run would before it loads the model."""
    known = {cfg.model_name for cfg in cfgs if _is_known(cfg.model_name)}
    cfgs = [check_model(cfg) if cfg.model_name in known else cfg for cfg in cfgs]
    for cfg in {cfg.dataset_path: cfg for cfg in cfgs}.values():
        if local_files(cfg.dataset_path) and cfg.model_name in known:
            check_text(cfg)
    yield from _configs(cfgs)
    for group in by_stream(cfgs):
        name = group[0].model_name
        yield f"\n{heading(group)}"
        if group[0].act_size is None:
            yield _line("parameters", f"unknown: {name} is not on this disk; give --act-size (it changes the names)")
        else:
            yield from _size(group, name in known)


def _is_known(model_name: str) -> bool:
    """Say whether this disk has the model's configuration."""
    versions = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{model_name.replace('/', '--')}", "snapshots")
    return Path(model_source(model_name)).is_dir() or any(versions.glob("*/config.json"))


def _configs(cfgs: list[Config]) -> Iterator[str]:
    """Write each Config's name and what it alone has, then what all have."""
    fields = list(cfgs[0].to_dict())
    shared = {field for field in fields if len({getattr(cfg, field) for cfg in cfgs}) == 1}
    for cfg in cfgs:
        yield cfg.name
        if own := [field for field in fields if field not in shared | unused_by(cfg.sae_type)]:
            yield _fields(cfg, own)
    unused = set.intersection(*(unused_by(cfg.sae_type) for cfg in cfgs))
    yield f"\nin {'it' if len(cfgs) == 1 else 'each of them'}"
    yield _fields(cfgs[0], [field for field in fields if field in shared - unused])


def _fields(cfg: Config, names: list[str]) -> str:
    words = ", ".join(f"{name}\0{written(getattr(cfg, name))}" for name in names)  # a value stays beside its field
    how = dict(initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    return textwrap.fill(words, WIDTH, **how).replace("\0", " ")


def _size(cfgs: list[Config], is_known: bool) -> Iterator[str]:
    """Count the parameters of the SAEs that share a stream and of its model, and the bytes that training them takes."""
    cfg, width, device = cfgs[0], cfgs[0].act_size, cfgs[0].torch_device
    with torch.device("meta"):
        each = [_parameters(SAE_TYPES[c.sae_type](c)) for c in cfgs]
    of_each = " to ".join(dict.fromkeys(f"{count:,}" for count in (min(each), max(each))))
    yield _line("parameters", f"{sum(each):,} in the SAEs, {of_each} in each")
    rows = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
    number = getattr(torch, cfg.dtype).itemsize
    parts = {"weights": 4 * sum(each), "gradients": 4 * sum(each), "Adam's two means": 8 * sum(each)}
    if device.type == "cpu":
        parts["activation buffer, and a copy while the state is saved"] = 2 * rows * width * number
    else:
        parts["activation buffer"] = rows * width * number
    logits = 0
    if is_known:
        hf = AutoConfig.from_pretrained(model_source(cfg.model_name))
        with torch.device("meta"):
            model = _parameters(AutoModelForCausalLM.from_config(hf))
        yield _line("", f"{model:,} in the language model")
        parts["language model"] = model * number
        logits = min(MAX_LOGITS, cfg.eval_windows * cfg.seq_len * hf.get_text_config().vocab_size)
    dense = [c.dict_size for c in cfgs if c.type.sparsity != "top_k"]
    step = 4 * cfg.batch_size * (STEP_ROWS * width + DENSE_ROWS * max(dense, default=0))
    evaluation = 4 * EVAL_LOGITS * logits
    parts["a step's peak" if step > evaluation else "an evaluation's peak"] = max(step, evaluation)
    beside = "the libraries" if is_known else "the libraries and the language model"
    yield _line("memory", f"{_bytes(sum(parts.values()))} on {device}, beside {beside}")
    for name, size in parts.items():
        yield f"{_bytes(size):>20}  {name}"


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _line(title: str, words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=f"{title:<12} ", subsequent_indent=" " * 13)
