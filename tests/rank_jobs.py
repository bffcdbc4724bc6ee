"""What forked_runs.py does in each of several processes, or in one for comparison: each job writes what it found."""

import json
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import cache
import evaluation
import logs
from activation_store import ActivationsStore
from config import Config
from evaluation import HeldOut, evaluate, training_metrics
from language_model import check_model, load_model
from logs import RunLog
from runtime import ranks
from runtime.disk import save_state
from sae import SAE_TYPES
from training import Trainer, train

D, F, B = 16, 96, 48
SMALL = dict(
    act_size=D, dict_size=F, target_l0=4, top_k_aux=8, batch_size=B, num_tokens=100 * B, dead_after_tokens=10 * B
)
ON_TEXT = Config(
    model_name="tiny-gpt2", dataset_path="animals.txt", layer=1, seq_len=32, model_batch_size=8,
    num_batches_in_buffer=4, batch_size=B, num_tokens=50 * B, dict_size=F, target_l0=4, lr=0.01,
    eval_windows=8, dead_after_tokens=5 * B, device="cpu",
)  # fmt: skip


def activations(rows: int) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(rows, D, generator=rng) * torch.rand(D, generator=rng) + torch.randn(D, generator=rng)


def record(name: str, tensors: dict[str, Tensor]) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, f"{name}-{ranks.rank()}.safetensors")


def one_step() -> None:
    """Record the gradients of a step in which a third of the latents are dead, and what the step left, by type."""
    ranks.start("batches", torch.device("cpu"))
    x = activations(B)[ranks.rank() :: ranks.count()]
    common = Config(bandwidth=0.3, **SMALL)
    for sae_type, sae_class in SAE_TYPES.items():
        trainer = Trainer(sae_class(replace(common, sae_type=sae_type)))
        sae = trainer.sae
        sae.initialise_from(activations(B))  # a share has quantiles of its own
        sae.tokens_since_fired[::3] = 20 * B
        found: dict[str, Tensor] = {}
        step = trainer.optimizer.step

        def look_and_step(found: dict[str, Tensor] = found, trainer: Trainer = trainer, step=step) -> None:
            names = [name for name, _ in trainer.sae.named_parameters()]
            found |= {f"gradient of {name}": view.grad.clone() for name, view in zip(names, trainer.views)}
            step()

        trainer.optimizer.step = look_and_step
        out = trainer.step(x, 50)
        found |= {name: ranks.mean(term) for name, term in out.losses.items()} | dict(sae.state_dict())
        metrics = training_metrics(sae, x, out)
        found |= {name: torch.tensor(metrics[name]) for name in ("train/loss", "train/l0", "train/l1")}
        found["smallest of the share"] = out.latents.values[out.latents.values > 0].min()
        record(f"one-step-{sae_type}", found)


def fifty_steps() -> None:
    """Record all of each type after 50 steps on a model's activations, and the rows of the first batches."""
    ranks.start("batches", torch.device("cpu"))
    cfg = check_model(ON_TEXT)
    model = load_model(cfg)

    if ranks.count() > 1:
        saes = [sae_class(replace(cfg, sae_type=sae_type)) for sae_type, sae_class in SAE_TYPES.items()]
        found = train(saes, ActivationsStore(model, [cfg]))
        Path(f"metrics-{ranks.rank()}.json").write_text(json.dumps(found))
        state = {sae.cfg.sae_type: dict(sae.state_dict()) for sae in saes}
        save_state(state, Path(f"fifty-steps-{ranks.rank()}.safetensors"))
    store = ActivationsStore(model, [cfg])
    rows = torch.cat([store.next_batch()[cfg.hook_name] for _ in range(20)])
    record("rows", {"x": rows})


def evaluated() -> None:
    """Record what each process measures on five windows, of which one has nothing but special tokens.

    The SAEs are in training, and the processes have different numbers of batches, each of a window.
    """
    ranks.start("batches", torch.device("cpu"))
    evaluation.MAX_LOGITS = 1
    cfg = check_model(ON_TEXT)
    saes = [Trainer(SAE_TYPES[t](replace(cfg, sae_type=t))).sae for t in ("topk", "vanilla", "jumprelu")]
    tokens = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    tokens[3] = 0
    found = evaluate(HeldOut(load_model(cfg), tokens), saes)
    Path(f"metrics-{ranks.rank()}.json").write_text(json.dumps(found))


def never_comes() -> None:
    ranks.TO_JOIN = timedelta(seconds=3)
    if ranks.world_rank() == 0:
        ranks.start("batches", torch.device("cpu"))


def ends_last(stops: str) -> None:
    """The second process has more to train than the first, or is stopped."""
    ranks.start("saes", torch.device("cpu"))
    if ranks.world_rank() == 1:
        time.sleep(1)
        Path("second is done").touch()
    is_whole = ranks.meet(ranks.world_rank() == 1 and stops == "stops", lambda: False)
    assert Path("second is done").exists() and is_whole == (stops != "stops")


# ---- what goes wrong with main.py, or is smaller than in a real run ----


def records_small_files() -> None:
    """Write about 2,500 rows of two hooks, 16 wide, to a file."""
    cache.FILE_BYTES = 2500 * 2 * 16 * 4


def _change_batch_34_of_the_second(change: object) -> None:
    next_batch, calls = ActivationsStore.next_batch, iter(range(1000))

    def changed(store: ActivationsStore) -> dict[str, Tensor]:
        rows = next_batch(store)
        if next(calls) == 33 and ranks.rank() == 1:
            change(rows)
        return rows

    ActivationsStore.next_batch = changed


def cannot_read() -> None:
    def fail(rows: dict[str, Tensor]) -> None:
        raise OSError("the cable is out")

    _change_batch_34_of_the_second(fail)


def reads_nan() -> None:
    def poison(rows: dict[str, Tensor]) -> None:
        for x in rows.values():
            x[0, 0] = torch.nan

    _change_batch_34_of_the_second(poison)


def fills_slowly() -> None:
    """Leave time before the first step."""
    next_batch = ActivationsStore.next_batch
    ActivationsStore.next_batch = lambda store: time.sleep(2) or next_batch(store)


def slows_down_after_step_20() -> None:
    """Leave time within step 21."""
    step = Trainer.step
    Trainer.step = lambda trainer, x, number, y: time.sleep(5 * (number == 20)) or step(trainer, x, number, y)


def sees_another_disk() -> None:
    if ranks.world_rank() == 1:
        os.path.exists = lambda path: False


def dies_once_saved() -> None:
    """The second process is slow to write its state, and the first dies right after its own is there."""
    save, commit = logs.save_state, RunLog._commit

    def late(state: dict, path: Path) -> None:
        if ranks.rank() == 1:
            time.sleep(1)
        save(state, path)

    def last(log: RunLog, state: dict) -> None:
        commit(log, state)
        os.kill(os.getpid(), signal.SIGKILL)

    logs.save_state, RunLog._commit = late, last
