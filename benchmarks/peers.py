"""Trainers of the libraries in requirements-bench.txt, each with its own classes and the settings its documents give.

SAELens: docs/training_saes.md. dictionary_learning: dictionary_learning_demo, but its warm-ups, made for long runs,
take a twentieth of the steps, and thresholds are averaged over the second half. sparsify: its trainer's defaults.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Coder(NamedTuple):
    """What is measured of a dictionary: both take rows of activations as the model has them."""

    encode: Callable[[Float[Tensor, "row act_size"]], Float[Tensor, "row dict_size"]]
    reconstruct: Callable[[Float[Tensor, "row act_size"]], Float[Tensor, "row act_size"]]


class Contender(NamedTuple):
    """A dictionary in training: `step` takes a batch and its number, counted from 0."""

    step: Callable[[Float[Tensor, "batch act_size"], int], object]
    finish: Callable[[], Coder]


def contender(
    library: str, sae_type: str, dict_size: int, k: float, num_steps: int, x: Tensor, lr: float | None = None
) -> Contender:
    """Prepare the training of a library's dictionary, at its own learning rate if none is given.

    k is the target L0; of sae_lens' vanilla, which has none, it is the coefficient of L1.
    The batch x [batch, act_size], the first of num_steps, tells libraries that scale their inputs by how much.
    """
    return LIBRARIES[library](sae_type, dict_size, k, num_steps, x, lr)


def _sae_lens(sae_type: str, dict_size: int, k: float, num_steps: int, x: Tensor, lr: float | None) -> Contender:
    from sae_lens import SAE
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    quadratic = dict(jumprelu_sparsity_loss_mode="quadratic", target_l0=k, l0_coefficient=5.0, jumprelu_bandwidth=0.01)
    architecture, fields = {
        "vanilla": ("standard", dict(l1_coefficient=k)),
        "topk": ("topk", dict(k=k)),
        "batchtopk": ("batchtopk", dict(k=k)),
        "matryoshka": (
            "matryoshka_batchtopk", dict(k=k, matryoshka_widths=[dict_size // 4, dict_size // 2, dict_size])
        ),
        "jumprelu": ("jumprelu", quadratic),
    }[sae_type]  # fmt: skip
    sae_class, cfg_class = get_sae_training_class(architecture)
    scaling = "expected_average_only_in"
    sae = sae_class(cfg_class(d_in=x.shape[1], d_sae=dict_size, normalize_activations=scaling, **fields)).to(x.device)
    lr = lr or 3e-4
    cfg = SAETrainerConfig(
        total_training_samples=num_steps * len(x), train_batch_size_samples=len(x), lr=lr, lr_end=lr / 10,
        lr_decay_steps=num_steps // 5, device=str(x.device),
    )  # fmt: skip
    trainer = SAETrainer(cfg, sae, iter([x]))
    scale = trainer.activation_scaler.scaling_factor = float(x.shape[1] ** 0.5 / x.norm(dim=1).mean())

    def step(x: Tensor, number: int) -> None:
        trainer.n_training_steps = number
        trainer.step(x)

    def finish() -> Coder:
        sae.fold_activation_norm_scaling_factor(scale)
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            trained = SAE.load_from_disk(folder)
        return Coder(trained.encode, trained)

    return Contender(step, finish)


def _dictionary_learning(
    sae_type: str, dict_size: int, k: int, num_steps: int, x: Tensor, lr: float | None
) -> Contender:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    averaged = dict(k=k, threshold_start_step=num_steps // 2, threshold_beta=0.99)
    groups = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
    trainer_class, fields = {
        "topk": (TopKTrainer, averaged),
        "batchtopk": (BatchTopKTrainer, averaged),
        "matryoshka": (MatryoshkaBatchTopKTrainer, averaged | {"group_fractions": groups}),
        "jumprelu": (JumpReluTrainer, dict(target_l0=k, sparsity_warmup_steps=num_steps // 20)),
    }[sae_type]
    trainer = trainer_class(
        steps=num_steps, activation_dim=x.shape[1], dict_size=dict_size, layer=0, lm_name="none", device=str(x.device),
        warmup_steps=num_steps // 20, decay_start=num_steps * 4 // 5, **({"lr": lr} if lr else {}), **fields,
    )  # fmt: skip
    norm = x.square().sum(dim=1).mean().sqrt()

    def finish() -> Coder:
        trainer.ae.scale_biases(norm)
        return Coder(trainer.ae.encode, trainer.ae)

    return Contender(lambda x, number: trainer.update(number, x / norm), finish)


def _sparsify(sae_type: str, dict_size: int, k: int, num_steps: int, x: Tensor, lr: float | None) -> Contender:
    from schedulefree import ScheduleFreeWrapper
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    assert sae_type == "topk", "its only type"
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=dict_size, k=k), device=x.device)
    sae.b_dec.data = x.mean(dim=0)
    lr = lr or 5e-3 / (dict_size / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
    optimizer.train()

    def step(x: Tensor, number: int) -> None:
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    def encode(x: Tensor) -> Tensor:
        acts, indices, pre = sae.encode(x)
        return torch.zeros_like(pre).scatter_(1, indices, acts)

    def finish() -> Coder:
        optimizer.eval()
        return Coder(encode, lambda x: sae(x).sae_out)

    return Contender(step, finish)


LIBRARIES = {"sae_lens": _sae_lens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
TYPES = dict.fromkeys(LIBRARIES, ("topk", "batchtopk", "jumprelu", "matryoshka")) | {"sparsify": ("topk",)}


def steps(act_size: int, dict_size: int, k: int, x: Tensor) -> dict[str, Callable[[], object]]:
    """Prepare one TopK step on the batch x [batch, act_size] for each library; a line says which are not installed."""
    absent = [library for library in LIBRARIES if importlib.util.find_spec(library) is None]
    if absent:
        print(f"not installed, so not timed: {', '.join(absent)} (requirements-bench.txt)")
    made = {name: contender(name, "topk", dict_size, k, 10_000, x) for name in LIBRARIES if name not in absent}
    return {f"{name}, topk": lambda step=peer.step: step(x, 500) for name, peer in made.items()}
