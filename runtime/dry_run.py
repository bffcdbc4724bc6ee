"""Describe what a run would be: its Configs, its parameters and the memory it takes. Trains and writes nothing.

The Hub is not contacted, so for a model that is not on this disk only its Config is known.
"""

import textwrap
from collections.abc import Iterator

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from config import HINTS, Config, by_stream, unused_by, widths_of
from evaluation import MAX_LOGITS, MAX_LOGITS_ON_GPU
from language_model import check_model
from runtime.cli import INDENTED, WIDTH, written
from runtime.documents import local_files
from runtime.models import is_on_disk, model_source
from runtime.preflight import check_activations, check_texts
from sae import SAE_TYPES
from training import heading

STEP_ROWS, DENSE_ROWS, EVAL_LOGITS = 16, 5, 10  # tensors alive at once: [batch, act_size], [batch, dict_size], logits


def describe(cfgs: list[Config]) -> Iterator[str]:
    """Yield lines of at most 80 columns. Raises ValueError or OSError where a run would before it loads the model."""
    known = {cfg.model_name for cfg in cfgs if is_on_disk(cfg.model_name)}
    cfgs = [check_model(cfg) if cfg.model_name in known else cfg for cfg in cfgs]
    check_activations(cfgs)
    local = [path for path in dict.fromkeys(cfg.dataset_path for cfg in cfgs) if local_files(path)]
    check_texts([cfg for cfg in cfgs if cfg.dataset_path in local and cfg.model_name in known])
    shared = {field for field in HINTS if len({getattr(cfg, field) for cfg in cfgs}) == 1}
    for cfg in cfgs:
        yield cfg.name
        yield from _fields(cfg, HINTS.keys() - shared - unused_by(cfg.sae_type))
    yield f"\nin {'it' if len(cfgs) == 1 else 'each of them'}"
    yield from _fields(cfgs[0], shared - set.intersection(*(unused_by(cfg.sae_type) for cfg in cfgs)))
    for group in by_stream(cfgs):
        yield f"\n{heading(group)}"
        yield from _size(group, group[0].model_name in known)


def _fields(cfg: Config, names: set[str]) -> list[str]:
    values = cfg.to_dict() | cfg.rules
    words = ", ".join(f"{name}\0{written(values[name])}" for name in HINTS if name in names)
    lines = textwrap.wrap(words, WIDTH, break_on_hyphens=False, break_long_words=False, **INDENTED)
    return [line.replace("\0", " ") for line in lines]  # a value stays beside its field


def _size(cfgs: list[Config], is_known: bool) -> Iterator[str]:
    """Count the parameters of the SAEs that share a stream and of its model, and the bytes that training them takes."""
    cfg, device = cfgs[0], cfgs[0].torch_device
    hooks = widths_of(cfgs)
    if not all(hooks.values()):
        size = " and --target-size" if cfg.target_site else ""
        why = "the width of a hook without a name of ours" if is_known else f"{cfg.model_name} is not on this disk"
        yield from _wrapped("parameters", f"unknown: {why}; give --act-size{size}, and the names are the run's")
        return
    logits, number = 0, getattr(torch, cfg.dtype).itemsize
    with torch.device("meta"):
        each = [sum(p.numel() for p in SAE_TYPES[c.sae_type](c).parameters()) for c in cfgs]
        if is_known:
            hf = AutoConfig.from_pretrained(model_source(cfg.model_name))
            model = AutoModelForCausalLM.from_config(hf).num_parameters()
            of_window = cfg.seq_len * hf.get_text_config().vocab_size
            most = MAX_LOGITS if device.type == "cpu" else MAX_LOGITS_ON_GPU
            logits = of_window * min(cfg.eval_windows, max(1, most // of_window))  # as `evaluation.batches` splits them
    of_each = " to ".join(f"{count:,}" for count in sorted({min(each), max(each)}))
    yield from _wrapped("parameters", f"{sum(each):,} in the SAEs, {of_each} in each")
    rows = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
    dense = max((c.dict_size for c in cfgs if "l1_coeff" in c.type.fields), default=0)
    step = cfg.batch_size * (STEP_ROWS * max(c.d_in + c.d_out for c in cfgs) // 2 + DENSE_ROWS * dense)
    buffer = rows * number * sum(hooks.values())
    parts = {
        "weights, gradients and Adam's two means": 16 * sum(each),
        "activation buffer (on a CPU, and a copy to save it)": (1 + (device.type == "cpu")) * buffer,
        "peak of a step or an evaluation": 4 * max(step, EVAL_LOGITS * logits),
    }
    beside = "the libraries" if is_known else "the libraries and the language model"
    if is_known:
        yield from _wrapped("", f"{model:,} in the language model")
        parts["language model"] = model * number
    yield from _wrapped("memory", f"{_bytes(sum(parts.values()))} on {device}, beside {beside}")
    for name, size in parts.items():
        yield f"{_bytes(size):>20}  {name}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _wrapped(title: str, words: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=f"{title:<13}", subsequent_indent=" " * 13)
