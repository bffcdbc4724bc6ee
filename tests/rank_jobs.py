"""What forked_runs.py does in each of several processes, or in one for comparison: each job writes what it found."""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import activation_store
import logs
import main
import ranks
from activation_store import ActivationsStore, check_model, load_model
from config import Config
from disk import save_state
from evaluation import evaluate, training_metrics
from logs import RunLog
from sae import SAE_TYPES
from training import Trainer, train

D, F, B = 16, 96, 48
SMALL = dict(act_size=D, dict_size=F, top_k=4, top_k_aux=8, batch_size=B, num_tokens=100 * B, dead_after_tokens=10 * B)


def activations(rows: int) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(rows, D, generator=rng) * torch.rand(D, generator=rng) + torch.randn(D, generator=rng)


def record(name: str, tensors: dict[str, Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, f"{name}-{ranks.rank()}.safetensors")


def one_step() -> None:
    """The gradients of a step in which a third of the latents are dead, and what the step left, for each type."""
    ranks.start("batches", torch.device("cpu"))
    x = activations(B)[ranks.rank() :: ranks.count()]
    for sae_type, sae_class in SAE_TYPES.items():
        sae = sae_class(Config(l1_coeff=0.1, bandwidth=0.3, threshold_init=0.1, input_unit_norm=False, **SMALL)).train()
        sae.initialise_from(x)
        sae.tokens_since_fired[::3] = 20 * B
        trainer = Trainer(sae)
        found: dict[str, Tensor] = {}
        step = trainer.optimizer.step

        def stop(found: dict[str, Tensor] = found, trainer: Trainer = trainer, step=step) -> None:
            names = [name for name, _ in trainer.sae.named_parameters()]
            found |= {f"gradient of {name}": view.grad.clone() for name, view in zip(names, trainer.views)}
            step()

        trainer.optimizer.step = stop
        out = trainer.step(x, 50)
        found |= {name: ranks.mean(term) for name, term in out.losses.items()} | dict(sae.state_dict())
        metrics = training_metrics(sae, x, out)
        found |= {name: torch.tensor(metrics[name]) for name in ("train/loss", "train/l0", "train/l1")}
        found["smallest of the share"] = out.latents.values[out.latents.values > 0].min()
        record(f"one-step-{sae_type}", found)


def fifty_steps() -> None:
    """Everything of each type after 50 steps on a model's activations, and the rows of the first batches."""
    ranks.start("batches", torch.device("cpu"))
    cfg = check_model(
        Config(
            model_name="tiny-gpt2", dataset_path="animals.txt", layer=1, seq_len=32, model_batch_size=8,
            num_batches_in_buffer=4, batch_size=B, num_tokens=50 * B, dict_size=F, top_k=4, lr=0.01, l1_coeff=0.01,
            eval_windows=8, dead_after_tokens=5 * B, device="cpu",
        )
    )  # fmt: skip
    model = load_model(cfg)
    if ranks.count() == 1:
        store = ActivationsStore(model, cfg)
        record("rows", {"x": torch.cat([store.next_batch() for _ in range(20)])})
        return
    saes = [sae_class(cfg) for sae_class in SAE_TYPES.values()]
    found = train(saes, ActivationsStore(model, cfg))
    Path(f"metrics-{ranks.rank()}.json").write_text(json.dumps(found))
    state = {sae.cfg.sae_type: dict(sae.state_dict()) for sae in saes}
    save_state(state, Path(f"fifty-steps-{ranks.rank()}.safetensors"))
    store = ActivationsStore(model, cfg)
    record("rows", {"x": torch.cat([store.next_batch() for _ in range(20)]), "mean": store.mean})


def evaluated() -> None:
    """What each process measures on five windows, of which one has nothing but special tokens."""
    ranks.start("batches", torch.device("cpu"))
    cfg = check_model(
        Config(
            model_name="tiny-gpt2", dataset_path="animals.txt", layer=1, seq_len=32, dict_size=F, top_k=4, device="cpu"
        )
    )
    saes = [SAE_TYPES["topk"](cfg), SAE_TYPES["vanilla"](cfg)]
    tokens = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    tokens[3] = 0
    found = evaluate(load_model(cfg), saes, tokens, torch.linspace(-1, 1, D))
    Path(f"metrics-{ranks.rank()}.json").write_text(json.dumps(found))


# ---- what goes wrong in the second process ----


def cannot_read() -> None:
    next_batch, calls = ActivationsStore.next_batch, iter(range(1000))

    def fail(store: ActivationsStore) -> Tensor:
        if next(calls) == 33 and ranks.rank() == 1:
            raise OSError("the cable is out")
        return next_batch(store)

    ActivationsStore.next_batch = fail


def fills_slowly() -> None:
    """Before main.py: there is time before the first step."""
    next_batch = ActivationsStore.next_batch
    ActivationsStore.next_batch = lambda store: time.sleep(2) or next_batch(store)


def slows_down_after_step_20() -> None:
    """Before main.py: there is time within step 21."""
    step = Trainer.step
    Trainer.step = lambda trainer, x, number: time.sleep(5 * (number == 20)) or step(trainer, x, number)


def reads_nan() -> None:
    next_batch, calls = ActivationsStore.next_batch, iter(range(1000))

    def poison(store: ActivationsStore) -> Tensor:
        x = next_batch(store)
        if next(calls) == 33 and ranks.rank() == 1:
            x[0, 0] = torch.nan
        return x

    activation_store.ActivationsStore.next_batch = poison


def sees_another_disk() -> None:
    if ranks.world_rank() == 1:
        main.os.path.exists = lambda path: False


def dies_once_saved() -> None:
    save, commit = logs.save_state, RunLog._commit

    def late(state: dict, path: Path) -> None:
        if ranks.rank() == 1:
            time.sleep(1)
        save(state, path)

    def last(log: RunLog, state: dict) -> None:
        commit(log, state)
        os.kill(os.getpid(), signal.SIGKILL)

    logs.save_state, RunLog._commit = late, last


# ---- who is gone ----


def never_comes() -> None:
    ranks.TO_JOIN = timedelta(seconds=3)
    if ranks.world_rank() == 0:
        ranks.start("batches", torch.device("cpu"))


def dies_before_the_end() -> None:
    ranks.start("saes", torch.device("cpu"))
    if ranks.world_rank() == 0:
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # as main.py does
        ranks.finish(False)
    if ranks.world_rank() == 2:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def waits() -> None:
    ranks.start("batches", torch.device("cpu"))
    if ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def one_has_more_to_do() -> None:
    """After the end, as the first process does, which alone makes the table."""
    ranks.start("batches", torch.device("cpu"))
    assert not ranks.finish(False)
    if ranks.rank() == 0:
        time.sleep(ranks.GRACE_SECONDS + 1)
