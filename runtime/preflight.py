"""Check before a run begins that its machine, its model and its text are there and fit each other."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from cache import check_recorded
from config import Config
from language_model import check_model, ordinary_positions
from runtime import ranks
from runtime.checks import explained, require
from runtime.disk import existing
from runtime.documents import load_documents
from runtime.models import model_source
from text import token_windows


def check(cfgs: list[Config], folder: Path) -> list[Config]:
    """Fill in the widths of named sites, after what can be known about machine, model and text without the weights.

    Raises ValueError or OSError when there is no such model or text, they do not fit, or nothing can be written.
    """
    check_machine(cfgs, folder)
    cfgs = [check_model(cfg) for cfg in cfgs]
    check_activations(cfgs)
    check_texts(cfgs)
    return cfgs


def check_machine(cfgs: list[Config], folder: Path) -> None:
    """Raise ValueError when there is no such device, processes cannot share the batches, or nothing can be written."""
    gpus = torch.cuda.device_count()
    for cfg in cfgs:
        shared = f"batch_size = {cfg.batch_size}: {ranks.count()} processes share it; give a multiple of that"
        require(cfg.batch_size % ranks.count() == 0, shared)
        device, said = cfg.torch_device, f"device = {cfg.device!r}"
        own = f"{said}: each process of torchrun has its own; give {device.type}"
        require(device.index is None or ranks.world_size() == 1, own)
        seen = device.type != "cuda" or (device.index or 0) < gpus
        require(seen, f"{said}: torch sees {gpus} GPUs; give cpu or another")
    asked, is_used = os.environ.get("WANDB_RUN_ID"), cfgs[0].wandb_mode != "disabled"  # by `wandb agent`
    several = f"WANDB_RUN_ID = {asked!r}: one run, and {len(cfgs)} SAEs; give each field one value, or unset it"
    require(asked is None or len(cfgs) == 1 or not is_used, several)
    there = existing(folder)
    said = f"output_dir = {cfgs[0].output_dir!r}"
    with explained(f"{said}: {there} cannot be written to", OSError, remedy="give another"):
        descriptor, file = tempfile.mkstemp(dir=there)
    os.close(descriptor)
    missing = ranks.in_any(not os.path.exists(ranks.from_first(file)))
    os.unlink(file)
    require(not missing, f"{said}: not the same on all machines; give one that all share")


def check_activations(cfgs: list[Config]) -> None:
    """Raise ValueError when a folder of activations that a Config names is not whole, or of something else."""
    for cfg in cfgs:
        if cfg.activations:
            check_recorded(cfg)


def check_texts(cfgs: list[Config]) -> None:
    """Do `check_text` once for what several Configs share."""
    for cfg in {(c.dataset_path, c.dataset_name, c.text_column, c.model_name, c.seq_len): c for c in cfgs}.values():
        check_text(cfg)


def check_text(cfg: Config) -> None:
    """Read the training and the held-out text, each up to its first window with a token that a dictionary may read.

    Raises: ValueError when a part has none, or text or tokenizer cannot be read; OSError when they are out of reach.
    """
    source, said = model_source(cfg.model_name), f"model_name = {cfg.model_name!r}:"
    with explained(f"{said} no tokenizer that can be read", OSError, ValueError, remedy="give another"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)  # none if made without any file
    require(ordinary, f"{said} no tokenizer in that folder; give another")
    vocab_size = AutoConfig.from_pretrained(source).get_text_config().vocab_size
    sizes = f"its tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}"
    require(tokenizer.vocab_size <= vocab_size, f"{said} {sizes}; put the model's own beside it")
    starts = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    require(starts, f"{said} its tokenizer has neither a BOS nor an EOS token; give another")
    said = f"dataset_path = {cfg.dataset_path!r}:"
    for part in ("training text", "held-out tenth"):
        stream = load_documents(cfg.dataset_path, cfg.dataset_name, cfg.text_column, held_out=part == "held-out tenth")
        windows = token_windows(stream, tokenizer, cfg.seq_len)
        with explained(f"{said} cannot be used", ValueError, remedy="give other data"):
            readable = any(ordinary_positions(window[None], tokenizer).any() for window in windows)
        require(readable, f"{said} its {part} does not fill a window of seq_len {cfg.seq_len}; give more text")
