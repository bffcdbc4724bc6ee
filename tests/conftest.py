"""Shared fixtures. Importing this has the shapes in the signatures of sae.py and kernels/ checked at every call."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

install_import_hook(["kernels", "sae"], "beartype.beartype")
torch.set_num_threads(1)  # more make tensors as small as these slower, above all where the cores have other work
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the programs that tests run

LONGEST = ("test_ranks", "test_resume", "test_main", "test_notebooks", "test_training")
END_OF_TEXT = "<|endoftext|>"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: each runs whole on one worker, and none should be left for the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def sentences(count: int, seed: int) -> list[str]:
    """Text with something to learn: the words of a sentence follow from each other."""
    rng = random.Random(seed)
    animals = ["cat", "dog", "hen", "fox", "owl", "cow"]
    verbs = dict(zip(animals, ["purrs", "barks", "clucks", "sneaks", "hoots", "moos"]))
    places = ["barn", "garden", "kitchen", "forest", "river", "attic"]
    colours = ["red", "blue", "grey", "green"]
    lines = []
    for _ in range(count):
        animal = rng.choice(animals)
        other = rng.choice(animals)
        lines.append(
            f"The {rng.choice(colours)} {animal} {verbs[animal]} in the {rng.choice(places)} at {rng.randint(1, 12)},"
            f" and the {other} {verbs[other]} back."
        )
    return lines


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .txt file of 6000 lines, some 47 documents."""
    path = tmp_path_factory.mktemp("text") / "animals.txt"
    path.write_text("\n".join(sentences(6000, seed=0)) + "\n")
    return path


@pytest.fixture(scope="session")
def windows_of() -> Callable[[PreTrainedTokenizerFast, int, int], torch.Tensor]:
    """Makes so many windows of so many tokens: BOS, and text that goes on from window to window."""

    def make(tokenizer: PreTrainedTokenizerFast, count: int, pos: int) -> torch.Tensor:
        text = " ".join(["The grey owl hoots in the attic at 7, and the red fox sneaks back."] * 12)
        ids = torch.tensor(tokenizer(text)["input_ids"][: count * (pos - 1)]).view(count, pos - 1)
        return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), ids], dim=1)

    return make


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a GPT-2 that has learnt `sentences`: two layers, 16 wide, context 64, and a small BPE tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    lines = sentences(2000, seed=1)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines, vocab_size=320, special_tokens=[END_OF_TEXT])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    ids = tokenizer("\n".join(lines))["input_ids"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2,
                bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
        windows = torch.tensor(ids[: len(ids) // 63 * 63]).view(-1, 63)
        windows = torch.cat([torch.zeros(len(windows), 1, dtype=torch.int64), windows], dim=1)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        for _ in range(60):
            batch = windows[torch.randint(len(windows), (16,))]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def word_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Makes tokenizers of 200 tokens, 7 is the word "w7". 0 to 3 are special, "<sep>" only to tokenizer.json."""

    def make(**roles: str) -> PreTrainedTokenizerFast:
        special = ["<bos>", "<eos>", "<pad>", "<sep>"]
        vocab = {word: i for i, word in enumerate(special + [f"w{i}" for i in range(4, 200)])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(special)
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **roles)

    return make


@pytest.fixture(scope="session")
def fork_all() -> Iterator[Callable[..., list[dict]]]:
    """Runs main.py, or a job, in one or several processes; see forked_runs.py."""
    script = Path(__file__).parent / "forked_runs.py"
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:

        def run(*args: str, cwd: Path, **how: object) -> list[dict]:
            print(json.dumps({"args": args, "cwd": str(cwd), **how}), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def fork(fork_all: Callable[..., list[dict]]) -> Callable[..., dict]:
    """`fork_all` in one process."""

    def run(*args: str, cwd: Path, **how: object) -> dict:
        (answer,) = fork_all(*args, cwd=cwd, **how)
        return answer

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_text: Path) -> Callable[[], Path]:
    """Makes working folders in which only a model and a text lie."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("place")
        (folder / "tiny-gpt2").symlink_to(tiny_gpt2)
        (folder / "animals.txt").symlink_to(tiny_text)
        return folder

    return make
