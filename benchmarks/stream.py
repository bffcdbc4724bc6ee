"""Tokens/s of the activation store, against a bare Hugging Face forward pass that stops at the same place.

    python benchmarks/stream.py                       # GPT-2 small's architecture, layer 8: about 3 minutes on 2 cores
    python benchmarks/stream.py --device cuda --dtype bfloat16

The model has random weights; its text is the Python standard library, tokenised as it streams. The bare pass is given
ready tokens and a model cut after the blocks it needs, so it has neither text, hooks, buffer nor shuffling to pay for.
"""

import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

import torch
from timing import interleaved, machine, median, print_table, write_json
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where this file runs as a script

from activation_store import ActivationsStore
from config import HINTS, Config
from language_model import check_model, load_model
from runtime.checks import choices
from runtime.models import TINY_LM

SERVED_BATCHES, PASSES = 6, 6  # in one timed run, of the store and of the bare model


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--n-layer", type=int, default=12)
    parser.add_argument("--n-embd", type=int, default=768)
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--model-batch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--dtype", choices=choices(HINTS["dtype"]), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures, in tokens and seconds")
    return parser.parse_args()


def random_gpt2(folder: str, options: Namespace) -> None:
    """Make a folder in GPT-2's format with random weights and the embedded model's tokenizer."""
    torch.manual_seed(0)
    heads = options.n_embd // 64
    config = GPT2Config(n_layer=options.n_layer, n_embd=options.n_embd, n_head=heads, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LM).save_pretrained(folder)


def bare_forward(folder: str, cfg: Config, attention: str) -> Callable[[], None]:
    """Prepare the blocks below cfg.layer of the Hugging Face model, on one batch of windows."""
    model = GPT2Model.from_pretrained(folder, dtype=getattr(torch, cfg.dtype), attn_implementation=attention)
    model.h = model.h[: cfg.layer]
    model.ln_f = torch.nn.Identity()
    model.to(cfg.torch_device).eval()
    tokens = torch.randint(1, 4096, (cfg.model_batch_size, cfg.seq_len), device=cfg.torch_device)

    @torch.no_grad()
    def run() -> None:
        model(tokens, use_cache=False)

    return run


def main(options: Namespace) -> None:
    disable_progress_bar()
    device = torch.device(options.device)
    where = machine(device)
    print(f"{where}\n{options.n_layer} blocks of width {options.n_embd}, blocks.{options.layer}.hook_resid_pre,")
    print(f"{options.model_batch_size} windows of {options.seq_len} tokens, {options.dtype}; median (range)")
    with tempfile.TemporaryDirectory() as folder:
        random_gpt2(folder, options)
        cfg = check_model(
            Config(
                model_name=folder, layer=options.layer, seq_len=options.seq_len, batch_size=options.batch_size,
                model_batch_size=options.model_batch_size, dtype=options.dtype, device=options.device,
                num_batches_in_buffer=8,
            )
        )  # fmt: skip
        model, read = load_model(cfg), []
        store = ActivationsStore(model, [cfg])

        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            read[-1] += (args[0] if args else kwargs["input_ids"]).numel()

        model.original_model.register_forward_pre_hook(count, with_kwargs=True)

        def serve() -> None:
            read.append(0)
            for _ in range(SERVED_BATCHES):
                store.next_batch()

        def bare(attention: str) -> Callable[[], None]:
            run = bare_forward(folder, cfg, attention)
            return lambda: [run() for _ in range(PASSES)] and None

        contenders = {"store": serve} | {f"bare forward, {a}": bare(a) for a in ("eager", "sdpa")}
        seconds = interleaved(contenders, options.repeats, device)
    passed = PASSES * cfg.model_batch_size * cfg.seq_len
    tokens = {name: read[1:] if name == "store" else [passed] * options.repeats for name in seconds}  # after warming up
    rates = {name: [n / s for n, s in zip(tokens[name], times)] for name, times in seconds.items()}
    base = median(rates["bare forward, eager"])
    rows = [
        {
            "": name,
            "tokens/s": f"{median(rate):,.0f} ({min(rate):,.0f}-{max(rate):,.0f})",
            "bare eager = 1": f"{median(rate) / base:.2f}",
        }
        for name, rate in rates.items()
    ]
    print_table(rows)
    write_json(options.json, {"machine": where, "tokens": tokens, "seconds": seconds})


if __name__ == "__main__":
    main(parse())
