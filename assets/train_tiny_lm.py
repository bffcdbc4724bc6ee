"""Train the embedded language model, assets/tiny-lm, on the Python standard library.

    python -m assets.train_tiny_lm                    # at most 30 minutes on 2 cores

It learns from the training files only: the files that `documents.is_held_out` keeps for evaluation are never
seen, neither by the tokenizer nor by the model, and give the cross-entropies of the model card.
"""

import argparse
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import text
from runtime.documents import STDLIB, load_documents

VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 256
BATCH = 16
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
UNIFORM_WEIGHTS = (1.0, 3.0, 10.0, 30.0, 100.0)  # pseudo-counts tried for the bigram model; the best one is reported

CARD = """---
library_name: transformers
license: psf-2.0
---
# tiny-lm

A GPT-2 of {parameters:.1f} million parameters ({layers} layers, {width} wide, {heads} heads, context {context}) with a
byte-level BPE tokenizer of {vocab} tokens, trained on the `.py` files of the Python {python} standard library. It is
the default model of this repository: small enough to ship, good enough that sparse autoencoders find features in it.

`python -m assets.train_tiny_lm` made it and makes it again: one pass over {train_tokens:,} training tokens,
{minutes:.0f} minutes on 2 cores. A tenth of the files, chosen by a hash of their path, was never trained on.

Cross-entropy on those held-out files, nats per token, {eval_tokens:,} tokens, each model predicting the same ones:

| model | cross-entropy |
|---|---|
| unigram counts | {unigram:.2f} |
| bigram counts, smoothed by the unigram ({pseudo:g} pseudo-counts, the best of {tried}) | {bigram:.2f} |
| **tiny-lm** (the float16 weights as saved) | **{model:.2f}** |

Every window starts with `{bos}`, which also ends each document. The weights are stored in float16 and are meant
to be loaded in float32.
"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    documents = load_documents(STDLIB, held_out=False)
    bpe.train_from_iterator((d["text"] for d in documents), vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def windows(tokenizer: PreTrainedTokenizerFast, *, held_out: bool) -> Int[Tensor, "window pos"]:
    documents = load_documents(STDLIB, held_out=held_out)
    return torch.stack(list(text.token_windows(documents, tokenizer, CONTEXT)))


def train_model(tokens: Int[Tensor, "window pos"], bos: int) -> GPT2LMHeadModel:
    """Train in one pass over the windows: AdamW with warm-up and cosine decay, matrix products in bfloat16."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4, bos_token_id=bos, eos_token_id=bos,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = tokens[torch.randperm(len(tokens))].split(BATCH)

    def rate(step: int) -> float:
        warmup = (step + 1) / WARMUP_STEPS
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        return min(warmup, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(batches, mininterval=5)
    for batch in bar:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[:, :-1]).logits  # [window, pos - 1, vocab]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def model_cross_entropy(model: GPT2LMHeadModel, tokens: Int[Tensor, "window pos"]) -> float:
    total = 0.0
    for batch in tokens.split(64):
        logits = model(batch[:, :-1]).logits
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / tokens[:, 1:].numel()


def count_cross_entropies(
    train: Int[Tensor, "window pos"], held_out: Int[Tensor, "window pos"]
) -> tuple[float, float, float]:
    """Measure unigram cross-entropy, bigram cross-entropy, and the bigram's pseudo-counts that gave it."""
    unigram: Float[Tensor, "vocab"] = torch.bincount(train[:, 1:].flatten(), minlength=VOCAB_SIZE).double() + 1
    unigram /= unigram.sum()
    pair = train[:, :-1].flatten() * VOCAB_SIZE + train[:, 1:].flatten()
    bigram = torch.bincount(pair, minlength=VOCAB_SIZE**2).view(VOCAB_SIZE, VOCAB_SIZE)
    before, target = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    count, total = bigram[before, target].double(), bigram.sum(1)[before].double()
    by_pseudo = {
        pseudo: -((count + pseudo * unigram[target]) / (total + pseudo)).log().mean().item()
        for pseudo in UNIFORM_WEIGHTS
    }
    best = min(by_pseudo, key=by_pseudo.__getitem__)
    return -unigram[target].log().mean().item(), by_pseudo[best], best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-lm", help="folder to write")
    out = parser.parse_args().out
    torch.manual_seed(0)
    start = time.monotonic()
    tokenizer = train_tokenizer()
    train, held_out = windows(tokenizer, held_out=False), windows(tokenizer, held_out=True)
    print(f"{train.numel():,} training tokens, {held_out.numel():,} held out", flush=True)
    model = train_model(train, tokenizer.bos_token_id)
    minutes = (time.monotonic() - start) / 60

    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    said = out / "tokenizer_config.json"  # by a name that transformers 4 has too
    said.write_text(said.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    unigram, bigram, pseudo = count_cross_entropies(train, held_out)
    cross_entropy = model_cross_entropy(GPT2LMHeadModel.from_pretrained(out, dtype=torch.float32), held_out)
    config = model.config
    card = CARD.format(
        parameters=model.num_parameters() / 1e6, layers=config.n_layer, width=config.n_embd, heads=config.n_head,
        context=CONTEXT, vocab=VOCAB_SIZE, python=platform.python_version(), train_tokens=train.numel(),
        minutes=math.ceil(minutes), eval_tokens=held_out[:, 1:].numel(), unigram=unigram, bigram=bigram,
        model=cross_entropy, pseudo=pseudo, tried=", ".join(f"{w:g}" for w in UNIFORM_WEIGHTS), bos=END_OF_TEXT,
    )  # fmt: skip
    (out / "README.md").write_text(card)
    print(f"unigram {unigram:.3f}  bigram {bigram:.3f}  tiny-lm {cross_entropy:.3f} nats; wrote {out}")


if __name__ == "__main__":
    main()
