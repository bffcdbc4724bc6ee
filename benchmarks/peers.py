"""A TopK training step of the libraries in requirements-bench.txt, each with its own classes and its usual settings."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def steps(act_size: int, dict_size: int, k: int, x: Tensor) -> dict[str, Callable[[], None]]:
    """Prepare one step on the batch x [batch, act_size] for each library; a line says which are not installed."""
    makers = {"sae_lens": _sae_lens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
    absent = [package for package in makers if importlib.util.find_spec(package) is None]
    if absent:
        print(f"not installed, so not timed: {', '.join(absent)} (requirements-bench.txt)")
    return {
        f"{package}, topk": make(act_size, dict_size, k, x) for package, make in makers.items() if package not in absent
    }


def _sae_lens(act_size: int, dict_size: int, k: int, x: Tensor) -> Callable[[], None]:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=act_size, d_sae=dict_size, k=k, device=str(x.device)))
    adam = torch.optim.Adam(sae.parameters(), lr=1e-6)
    dead = torch.zeros(dict_size, dtype=torch.bool, device=x.device)
    since_fired = torch.zeros(dict_size, device=x.device)

    def run() -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=500, is_logging_step=False
        )
        out = sae.training_forward_pass(given)
        with torch.no_grad():  # the bookkeeping of its trainer
            fired = out.feature_acts.bool().float().sum(-2).bool()
            since_fired.add_(1)
            since_fired[fired] = 0
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return run


def _dictionary_learning(act_size: int, dict_size: int, k: int, x: Tensor) -> Callable[[], None]:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=10_000, activation_dim=act_size, dict_size=dict_size, k=k, layer=0, lm_name="none", device=str(x.device)
    )
    return lambda: trainer.update(500, x)


def _sparsify(act_size: int, dict_size: int, k: int, x: Tensor) -> Callable[[], None]:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(act_size, SparseCoderConfig(num_latents=dict_size, k=k), device=x.device)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-6)

    def run() -> None:
        out = sae(x)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return run
