"""training.py: schedules by hand, one step against plain torch, and what `train` reads, writes and waits for."""

import copy
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import activation_store
import training
from activation_store import ActivationsStore
from config import Config, by_stream
from kernels import choose, sparse
from language_model import check_hooks, check_model, load_model, record
from runtime import machine, progress
from runtime.disk import load_state, save_state
from sae import SAE_TYPES, BaseAutoencoder, build_sae
from training import Trainer, learning_rate, sparsity_coefficient, train

D, F, B = 6, 20, 32

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))


def config(sae_type: str = "topk", steps: int = 10, **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, target_l0=3, l1_coeff=0.01, bandwidth=0.3, batch_size=B,
        num_tokens=steps * B, lr=0.01, dead_after_tokens=3 * B, device="cpu",
    )  # fmt: skip
    return Config(sae_type=sae_type, **(small | changes))


def one_of_each(**changes: object) -> list[BaseAutoencoder]:
    return [build_sae(config(sae_type, **changes)) for sae_type in SAE_TYPES]


def rows(step: int) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(B, D, generator=rng) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1]) + 0.7


class Store:
    """Stand in for ActivationsStore, with rows that depend on the step alone."""

    def __init__(self, cfg: Config, served: int = 0, change: Callable[[Tensor, int], Tensor] = lambda x, _: x) -> None:
        self.cfg, self.served, self.change, self.clock = cfg, served, change, SimpleNamespace(seconds=0.0)

    def next_batch(self) -> dict[str, Tensor]:
        self.served += 1
        return {self.cfg.hook_name: self.change(rows(self.served - 1), self.served)}

    def put_back(self) -> None:
        self.served -= 1

    @property
    def state(self) -> dict[str, int]:
        return {"served": self.served}

    @property
    def hooks(self) -> tuple[str, ...]:
        return self.cfg.reads

    def held_out(self) -> str:
        return "held-out rows"


class Recorder:
    """Stand in for RunLog."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, int, dict[str, float]]] = []
        self.checkpoints: list[tuple[BaseAutoencoder, int]] = []
        self.states: list[dict[str, Any]] = []

    def log(self, *line: object) -> None:
        self.lines.append(line)

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> None:
        self.checkpoints.append((sae, step))

    def save_state(self, state: dict[str, Any]) -> None:
        self.states.append(copy.deepcopy(state))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have evaluation give as L0 each SAE's number of evaluations so far: no language model made Store's rows."""
    evaluations = Counter()

    def evaluate(held_out: str, saes: list[BaseAutoencoder]) -> list[dict[str, float]]:
        assert held_out == "held-out rows"
        evaluations.update(id(sae) for sae in saes)
        return [{"l0": evaluations[id(sae)], "explained_variance": 0.5} for sae in saes]

    monkeypatch.setattr(training, "evaluate", evaluate)


# ---- schedules ----


@pytest.mark.parametrize(
    "warmup, decay, steps, expected",
    [
        (0.1, 0.2, 100, {0: 0.1, 4: 0.5, 8: 0.9, 9: 1, 10: 1, 79: 1, 80: 1, 81: 0.95, 90: 0.5, 99: 0.05}),
        (0.0, 0.0, 100, {0: 1, 50: 1, 99: 1}),
        (1.0, 0.0, 100, {0: 0.01, 49: 0.5, 99: 1}),
        (0.0, 1.0, 100, {0: 1, 1: 0.99, 50: 0.5, 99: 0.01}),
        (0.5, 0.5, 4, {0: 0.5, 1: 1, 2: 1, 3: 0.5}),
        (0.05, 0.2, 1, {0: 1}),
    ],
)
def test_learning_rate_rises_stays_and_falls_and_the_sparsity_coefficient_rises_and_stays(
    warmup: float, decay: float, steps: int, expected: dict[int, float]
) -> None:
    cfg = config("vanilla", steps=steps, lr=2.0, lr_warmup=warmup, lr_decay=decay)
    assert {step: learning_rate(cfg, step) / 2 for step in expected} == pytest.approx(expected)
    rates = [learning_rate(cfg, step) for step in range(steps)]
    assert max(rates) == 2 and min(rates) > 0
    cfg = config("vanilla", steps=steps, l1_coeff=4.0, sparsity_warmup=warmup, lr_warmup=0.0, lr_decay=decay)
    expected = {step: 1 if step + 1 >= warmup * steps else (step + 1) / (warmup * steps) for step in expected}
    assert {step: sparsity_coefficient(cfg, step) / 4 for step in expected} == pytest.approx(expected)


# ---- one step ----


@pytest.mark.parametrize("max_grad_norm, clips", [(1e-3, True), (1e3, False)], ids=["clipped", "free"])
@all_types
def test_steps_equal_plain_torch(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, max_grad_norm: float, clips: bool
) -> None:
    """Adam written out, on gradients that are projected, then clipped; then rows of norm 1, thresholds above 0.

    Parameters that are activations are trained in units of their scale, thresholds at three times the rate.
    """
    monkeypatch.setattr(sparse, "BAGGED_LATENTS", 5)
    cfg = config(sae_type, steps=8, max_grad_norm=max_grad_norm, lr_warmup=0.4, sparsity_warmup=0.9, l1_coeff=0.3)
    sae, twin = build_sae(cfg).eval(), build_sae(cfg).train()
    trainer = Trainer(sae)
    norms: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(
            torch.stack([p.grad.norm() for group in optimizer.param_groups for p in group["params"]]).norm().item()
            / optimizer.grad_scale.item()
        )
    )
    m = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    twin.initialise_from(rows(0))
    unit = {name: 1.0 if name in ("W_enc", "W_dec") else twin.input_scale.item() for name in m}
    rate = {name: unit[name] * (3 if name == "threshold" else 1) for name in m}
    for step in range(cfg.num_steps):
        x = rows(step)
        out = trainer.step(x, step)

        twin.l1_coeff = cfg.l1_coeff * (step + 1) / 7.2 if step < 7 else cfg.l1_coeff
        expected = twin(x)
        assert_close(out.losses, expected.losses, rtol=1e-4, atol=1e-5)
        twin.zero_grad()
        expected.loss.backward()
        grads = {name: p.grad * unit[name] for name, p in twin.named_parameters()}
        W = twin.W_dec.detach()
        grads["W_dec"] -= (grads["W_dec"] * W).sum(dim=1, keepdim=True) * W
        norm = torch.cat([g.flatten() for g in grads.values()]).norm().item()
        scale = min(1.0, max_grad_norm / norm)
        assert (scale < 1) == clips
        assert norms[-1] == pytest.approx(norm * scale, rel=1e-3)
        lr = cfg.lr * min(1.0, (step + 1) / 3.2)
        lr = lr * (8 - step) / 1.6 if step == 7 else lr
        with torch.no_grad():
            for name, p in twin.named_parameters():
                m[name] = 0.9 * m[name] + 0.1 * grads[name] * scale
                v[name] = 0.999 * v[name] + 0.001 * (grads[name] * scale) ** 2
                m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.999 ** (step + 1))
                p -= lr * rate[name] * m_hat / (v_hat.sqrt() + 1e-8)
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
            if sae_type == "jumprelu":
                twin.threshold.clamp_(min=0)
        twin.after_step(expected.latents)
        for name, p in twin.named_parameters():
            assert_close(sae.get_parameter(name), p, rtol=1e-4, atol=1e-4, msg=name)
        assert_close(sae.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)
        for name, buffer in twin.named_buffers():
            assert_close(sae.get_buffer(name), buffer, rtol=1e-4, atol=1e-4, msg=name)


@all_types
def test_activations_times_a_number_train_to_the_same_dictionary(sae_type: str) -> None:
    """In float64, since rounding alone would change which latents a batch keeps; some are dead from the start."""
    trained = []
    for factor in (1.0, 0.03, 30.0):
        cfg = config(sae_type, steps=40, l1_coeff=None)
        trainer = Trainer(build_sae(cfg).double())
        trainer.sae.tokens_since_fired[:6] = cfg.dead_after
        for step in range(cfg.num_steps):
            out = trainer.step(factor * rows(step).double(), step)
        sae = trainer.sae.eval()
        units = {name: 1.0 if name.startswith("W_") else factor for name, _ in sae.named_parameters()}
        trained.append({name: p.detach() / units[name] for name, p in sae.named_parameters()} | out.losses)
        x = factor * rows(99).double()
        trained[-1]["out"] = sae(x).sae_out.detach() / factor
        assert_close(sae.decode(sae.encode(x)), sae(x).sae_out)
    for other in trained[1:]:
        assert_close(other, trained[0], rtol=0, atol=0.05 if sae_type == "vanilla" else 1e-6)  # one is at the floor


@pytest.mark.parametrize("sae_type", ["vanilla", "jumprelu"])
@pytest.mark.parametrize("target_l0", [2, 5])
def test_training_ends_at_target_l0(sae_type: str, target_l0: int) -> None:
    cfg = config(sae_type, steps=300, target_l0=target_l0, l1_coeff=None, dict_size=40)
    trainer = Trainer(build_sae(cfg))
    fired = [(trainer.step(rows(step), step).latents.acts > 0).sum().item() / B for step in range(cfg.num_steps)]
    assert fired[0] == pytest.approx(2 * target_l0, abs=0.1)  # from above
    assert sum(fired[-50:]) / 50 == pytest.approx(target_l0, rel=0.15)  # steered there,
    encoded = trainer.sae.eval().encode(rows(cfg.num_steps - 1))
    assert (encoded > 0).sum().item() == pytest.approx(target_l0 * B, rel=0.02)  # and brought there by the last batch


@all_types
def test_a_first_batch_that_is_not_finite_reaches_no_parameter(sae_type: str) -> None:
    trainer = Trainer(build_sae(config(sae_type, l1_coeff=None)))
    before = copy.deepcopy(dict(trainer.sae.named_parameters()))
    trainer.step(rows(0).index_fill(0, torch.tensor([3]), float("nan")), 0)
    assert trainer.failure() == "step 1, activations: not finite"
    assert_close(dict(trainer.sae.named_parameters()), before)


@pytest.mark.parametrize("sae_type", ["vanilla", "jumprelu"])
def test_a_last_batch_that_is_not_finite_reaches_no_parameter(sae_type: str) -> None:
    trainer = Trainer(build_sae(config(sae_type, steps=2, l1_coeff=None)))
    trainer.step(rows(0), 0)
    before = copy.deepcopy(dict(trainer.sae.named_parameters()))
    trainer.step(rows(1).index_fill(0, torch.tensor([3]), float("nan")), 1)
    assert trainer.failure() == "step 2, activations: not finite"
    moved = "threshold" if sae_type == "jumprelu" else "b_enc"  # by what comes after the last step
    assert trainer.sae.get_parameter(moved).isfinite().all() and torch.equal(trainer.sae.W_enc, before["W_enc"])


def test_a_target_that_was_missed_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    found = [{"l0": l0, "explained_variance": 1.0} for l0 in (3.0, 2.9, 3.2)]  # where 3 was asked for
    monkeypatch.setattr(training, "evaluate", lambda *_: found)
    saes = [build_sae(config(seed=seed, l1_coeff=None)) for seed in range(3)]
    train(saes, Store(saes[0].cfg))
    lines = capsys.readouterr().out.splitlines()
    said = [lines[at - 1 : at + 1] for at, line in enumerate(lines) if "held out" in line]
    assert said == [[f"{saes[2].cfg.name}:", "  its L0 is 3.2 on what is held out; train longer to come nearer"]]


def test_a_step_refuses_gradients_from_before() -> None:
    trainer = Trainer(build_sae(config()))
    trainer.sae(rows(0)).loss.backward()
    with pytest.raises(AssertionError, match="gradients from before"):
        trainer.step(rows(0), 0)


@pytest.mark.parametrize("sae_type", ["vanilla", "jumprelu"])
def test_a_trainer_gives_decoder_rows_norm_1_and_the_output_stays(sae_type: str) -> None:
    sae = build_sae(config(sae_type)).eval()
    sae.W_dec.data *= torch.linspace(0.2, 5, F)[:, None]
    before = sae(rows(0)).sae_out
    Trainer(sae)
    assert_close(sae.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)
    assert_close(sae.eval()(rows(0)).sae_out, before, rtol=1e-5, atol=1e-5)


@all_types
def test_the_way_for_gpus_trains_as_the_way_for_cpus(monkeypatch: pytest.MonkeyPatch, sae_type: str) -> None:
    """Compare fifty steps, with latents that are dead from the start and others that die and come back."""
    monkeypatch.setattr(choose, "MAX_DENSITY", 1.0)  # on a CPU, always sparse
    trained, dead = [], []
    for on_gpu in (False, True):
        monkeypatch.setattr(sparse, "on_gpu", lambda tensor, on_gpu=on_gpu: on_gpu)
        sae = build_sae(config(sae_type, steps=50, top_k_aux=2))
        sae.initialise_from(rows(0))
        sae.tokens_since_fired[:6] = sae.cfg.dead_after
        sae.b_enc.data[:6] = -2
        trainer = Trainer(sae)
        dead.append([])
        for step in range(50):
            dead[-1].append(int(sae.dead.sum()))
            assert ("auxk" in trainer.step(rows(step), step).losses) == (sae.uses_auxk and dead[-1][-1] > 0)
        trained.append(sae.state_dict())
    assert dead[0] == dead[1] and dead[0][0] == 6 and len({*dead[0]}) > 1
    assert_close(*trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act_size", [1, D])
def test_a_trainer_goes_on_from_a_saved_state(tmp_path: Path, act_size: int) -> None:
    """At width 1 a weight that is stored latent by latent is contiguous either way."""
    trainer, other = (Trainer(build_sae(config(act_size=act_size, input_unit_norm=False))) for _ in range(2))
    trainer.step(rows(0)[:, :act_size], 0)
    save_state(trainer.state(), tmp_path / "state")
    other.load_state(load_state(tmp_path / "state"))
    for each in (trainer, other):
        each.step(rows(1)[:, :act_size], 1)
    for name, value in trainer.sae.state_dict().items():
        assert torch.equal(value, other.sae.state_dict()[name]), name


def test_a_loaded_state_does_not_meet_the_dead_latents_counted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "on_gpu", lambda tensor: True)
    many, few = (Trainer(build_sae(config(dead_after_tokens=2 * B))) for _ in range(2))
    many.sae.tokens_since_fired[:9] = few.sae.tokens_since_fired[:4] = 10**6
    for trainer, latents in ((many, 9), (few, 4)):
        trainer.sae.b_enc.data[:latents] = -1e6
        trainer.step(rows(0), 0)
    few_state = copy.deepcopy(few.state())
    for trainer in (many, few):
        trainer.load_state(few_state)
        trainer.step(rows(1), 1)
    assert_close(many.sae.state_dict(), few.sae.state_dict(), rtol=0, atol=0)


# ---- the loop ----


@pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])
def test_a_new_sae_starts_from_the_first_batch_and_a_trained_one_from_where_it_is(
    no_model: None, input_unit_norm: bool
) -> None:
    """Adam's steps are about lr long: what has moved further was set."""
    saes = one_of_each(steps=2, input_unit_norm=input_unit_norm, lr_warmup=0.0, lr_decay=0.0)
    train(saes, Store(saes[0].cfg))
    started = [build_sae(sae.cfg) for sae in saes]
    for sae in started:
        sae.initialise_from(rows(0))
    before = [copy.deepcopy(sae) for sae in saes]
    train(saes, Store(saes[0].cfg, change=lambda x, _: x + 20.0 * torch.arange(D)))
    for old, new in (*zip(started, before), *zip(before, saes)):
        assert torch.equal(new.input_scale, old.input_scale) and new.input_scale > 0 and not new.training
        for (name, p), was in zip(new.named_parameters(), old.parameters()):
            unit = 1 if name in ("W_enc", "W_dec") else new.input_scale
            assert (p - was).abs().max() < 4 * new.cfg.lr * unit * (3 if name == "threshold" else 1), name
        assert not torch.equal(new.b_dec, old.b_dec)
    assert saes[2].threshold_updates == 4


def test_saes_trained_together_are_those_trained_alone(no_model: None) -> None:
    changes = [
        {},
        {"lr": 0.002, "input_unit_norm": False},
        {"dict_size": 33, "target_l0": 5, "max_grad_norm": 0.01},
        {"l1_coeff": 0.2, "lr_warmup": 0.5, "aux_penalty": 1.0},
    ]
    cfgs = [config(sae_type, **c) for sae_type in SAE_TYPES for c in changes]
    together = [build_sae(cfg) for cfg in cfgs]
    train(together, Store(cfgs[0]))
    for sae, cfg in zip(together, cfgs):
        alone = build_sae(cfg)
        train([alone], Store(cfg))
        for (name, value), expected in zip(sae.state_dict().items(), alone.state_dict().values()):
            assert torch.equal(value, expected), (cfg.name, name)


def test_a_log_file_has_a_line_at_least_every_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    """Here at once; with evaluations the line has their metrics."""
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0)
    (sae,) = [build_sae(config("topk", num_tokens=4 * B, perf_log_freq=2))]
    train([sae], Store(sae.cfg))
    left = r"\d\d:\d\d left"
    said = [
        f"step 1, {left}", f"step 2, {left}", "evaluating 1 SAE", rf"step 2, {left}: L0 1, expl\. var\. 0\.5",
        f"step 3, {left}", "evaluating 1 SAE", r"[\d,]+ tokens/s; time: activations 0%, training \d+%, evaluation \d+%",
    ]  # fmt: skip
    for line, expected in zip(capsys.readouterr().out.splitlines()[: len(said)], said, strict=True):
        assert re.fullmatch(expected, line)


def test_the_time_is_told_of_each_call_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_model: None
) -> None:
    """A clock on which a batch takes 3 s to read and 1 s to train on, and an evaluation 2 s."""
    now = [0.0]

    def taking(seconds: float, function: Callable) -> Callable:
        def timed(*args: Any) -> Any:
            now[0] += seconds
            return function(*args)

        return timed

    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(training, "evaluate", taking(2, training.evaluate))
    monkeypatch.setattr(Trainer, "step", taking(1, Trainer.step))
    cfg = config("topk", num_tokens=4 * B)
    store = Store(cfg)
    batch, clock = store.next_batch, machine.Clock(torch.device("cpu"))

    def read() -> dict[str, Tensor]:
        with clock.running():
            return taking(3, batch)()

    store.next_batch, store.clock = read, clock
    for _ in range(2):
        train([build_sae(cfg)], store)
        said = capsys.readouterr().out
        assert f"{4 * B / 16:,.0f} tokens/s; time: activations 67%, training 22%, evaluation 11%" in said


def test_num_tokens_is_whole_batches_and_each_trains_every_sae_once(no_model: None) -> None:
    cfg = config(num_tokens=10 * B + B - 1)
    saes, store = [build_sae(cfg), build_sae(config("batchtopk", num_tokens=cfg.num_tokens))], Store(cfg)
    with torch.no_grad():
        saes[0].b_enc[7] = -1e9  # never fires, so it counts all tokens
    train(saes, store)
    assert store.served == 10
    assert saes[0].tokens_since_fired[7] == 10 * B and saes[1].threshold_updates == 10


@pytest.mark.parametrize("checkpoint_freq, checkpoints", [(5, [5, 10]), (4, [4, 8, 10]), (None, [10])])
def test_logs_evaluations_and_checkpoints_come_at_their_steps(
    no_model: None, capfd: pytest.CaptureFixture[str], checkpoint_freq: int | None, checkpoints: list[int]
) -> None:
    saes = one_of_each(log_freq=3, perf_log_freq=4, checkpoint_freq=checkpoint_freq)
    store, log = Store(saes[0].cfg), Recorder()
    results = train(saes, store, log)
    assert results == [{"l0": 3, "explained_variance": 0.5}] * len(saes)
    out, err = capfd.readouterr()
    *evaluations, speed = (line for line in out.splitlines() if line != f"evaluating {len(saes)} SAEs")
    for line, n, step in zip(evaluations, (1, 2), (4, 8), strict=True):
        assert re.fullmatch(rf"step {step}, \d\d:\d\d left: L0 {n}, expl\. var\. 0\.5", line)
    assert " tokens/s; time: activations 0%, training " in speed and len(speed) <= 80 and err == "", (
        "no bar where there is no terminal"
    )
    assert log.checkpoints == [(sae, step) for step in checkpoints for sae in saes]
    assert all(tokens == step * B for _, step, tokens, _ in log.lines)
    logged = [(step, index) for index, step, _, metrics in log.lines if "train/loss" in metrics]
    evaluated = [(step, index, metrics) for index, step, _, metrics in log.lines if "train/loss" not in metrics]
    assert logged == [(step, index) for step in (3, 6, 9, 10) for index in range(len(saes))]
    assert [(step, i, metrics["eval/l0"]) for step, i, metrics in evaluated] == [
        (step, i, n) for n, step in enumerate((4, 8, 10), start=1) for i in range(len(saes))
    ]
    for index, step, _, metrics in log.lines:
        if "train/loss" in metrics:
            assert metrics["train/lr"] == learning_rate(saes[index].cfg, step - 1)
            assert 0 < metrics["train/tokens_per_second"] < float("inf")
            assert metrics["train/l0"] <= F and metrics["train/explained_variance"] < 1


@pytest.mark.parametrize(
    "field, value", [("text_seed", 1), ("layer", 0), ("batch_size", 16), ("num_tokens", 32), ("seq_len", 64)]
)
def test_an_sae_of_another_stream_or_hook_is_refused(field: str, value: int) -> None:
    saes, store = [build_sae(config()), build_sae(config(**{field: value}))], Store(config())
    said = "its stream of activations is not the store's|the store does not read blocks.0.hook_resid_pre; make it with"
    with pytest.raises(ValueError, match=said) as error:
        train(saes, store)
    assert str(error.value).startswith(saes[1].cfg.name) and "\n" not in str(error.value)
    assert store.served == 0


def test_only_log_steps_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    """On a CPU `failure` looks at every step; the number of dead latents is on its way since the step before."""
    monkeypatch.setattr(sparse, "on_gpu", lambda tensor: True)
    allowed = {"failure", "_num_dead"}
    waits: list[tuple[int, str]] = []
    saes = one_of_each(log_freq=4, dead_after_tokens=B)
    for sae in saes:
        sae.tokens_since_fired += B  # latents are dead from the start, so AuxK is at work
    store, folders = Store(saes[0].cfg), [Path(module.__file__).parent for module in (training, sparse)]
    looks = ("item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "__repr__")
    for method in looks:
        original = getattr(Tensor, method)

        def spy(tensor: Tensor, *args: object, original: object = original, **options: object) -> object:
            frame = sys._getframe(1)
            while (code := frame.f_code).co_name.startswith("<") or Path(code.co_filename).parent not in folders:
                frame = frame.f_back
            waits.append((store.served, code.co_name))
            return original(tensor, *args, **options)

        monkeypatch.setattr(Tensor, method, spy)
    train(saes, store)
    monkeypatch.undo()
    by_step = {step: {name for s, name in waits if s == step} - allowed for step in range(1, 11)}
    assert by_step.pop(1) == {"_begin", "initialise_from", "units", "_weights"}  # once
    assert {step for step, names in by_step.items() if names} == {4, 8, 10}
    assert by_step[4] == {"training_metrics", "_rows"}
    assert allowed <= {name for _, name in waits}


# ---- numbers that are not finite ----


def break_one_number(number: float) -> Callable[[Tensor, int], Tensor]:
    """Put NaN or Inf into one activation of batch 5."""
    broken = torch.zeros(B, D)
    broken[3, 2] = number
    return lambda x, served: x + broken if served == 5 else x


def test_topk_with_nothing_finite_in_a_batch_ends_as_the_others_do(no_model: None) -> None:
    """Wide enough for the search by group maxima, which finds no candidate then."""
    sae = build_sae(config(dict_size=2048))
    with pytest.raises(FloatingPointError, match="step 1, activations: not finite"):
        train([sae], Store(sae.cfg, change=lambda x, _: x * torch.nan))


def poison(sae: BaseAutoencoder, tensor: str) -> None:
    """Make the loss, or the gradient of a parameter, not finite from the fifth step on."""
    calls = iter(range(1, 100))
    if tensor == "loss":
        losses = sae.losses
        sae.losses = lambda *args: losses(*args) | {"bad": torch.tensor(torch.inf if next(calls) >= 5 else 0.0)}
    else:
        parameter = sae.get_parameter(tensor.split()[-1])
        parameter.register_hook(lambda grad: grad * torch.nan if next(calls) >= 5 else grad)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_stop_the_run_before_they_reach_a_parameter(
    no_model: None, number: float
) -> None:
    saes, untroubled, log = one_of_each(), one_of_each(), Recorder()
    with pytest.raises(FloatingPointError, match=f"^{saes[0].cfg.name}: step 5, activations: not finite; lower lr = "):
        train(saes, Store(saes[0].cfg, change=break_one_number(number)), log)
    assert log.checkpoints == []
    for sae, expected in zip(saes, untroubled):
        expected.initialise_from(rows(0))
        trainer = Trainer(expected)
        for step in range(4):
            trainer.step(rows(step), step)
        for (name, found), p in zip(sae.named_parameters(), expected.parameters()):
            assert_close(found, p, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("tensor", ["loss", "gradient of W_enc", "gradient of b_dec"])
def test_an_sae_whose_loss_or_gradient_is_not_finite_is_named_and_the_others_are_saved(
    no_model: None, tensor: str
) -> None:
    saes, log = one_of_each(checkpoint_freq=2), Recorder()
    poison(saes[2], tensor)
    match = f"^{saes[2].cfg.name}: step 5, {tensor}: not finite; .*; the other {len(saes) - 1} SAEs were saved$"
    with pytest.raises(FloatingPointError, match=match):
        train(saes, Store(saes[0].cfg), log)
    assert [step for sae, step in log.checkpoints if sae is saes[2]] == [2, 4]
    assert [step for sae, step in log.checkpoints if sae is saes[0]] == [2, 4, 5]


def test_without_looking_nothing_changes_after_the_step_that_failed() -> None:
    """On a GPU `failure` is asked for some steps later; what it says and saves is of the first."""
    sae = build_sae(config("jumprelu"))
    trainer = Trainer(sae)
    for step in range(3):
        trainer.step(rows(step), step)
    before = [p.detach().clone() for p in sae.parameters()]
    for step in range(3, 7):
        trainer.step(rows(step) * (torch.nan if step == 3 else 1), step)
    assert trainer.failure() == "step 4, activations: not finite"
    assert_close([p.detach() for p in sae.parameters()], before, rtol=1e-6, atol=0)
    assert trainer.optimizer.state[trainer.views[0]]["step"] == 3


def test_after_training_gradients_add_up_again_in_memory_of_their_own(no_model: None) -> None:
    sae = build_sae(config(dead_after_tokens=10**9))
    train([sae], Store(sae.cfg))
    sae.train()
    alone = []
    for step in range(2):
        sae.zero_grad()
        sae(rows(step)).loss.backward()
        alone.append(sae.W_dec.grad)
    sae.zero_grad()
    for step in range(2):
        sae(rows(step)).loss.backward()
    assert_close(sae.W_dec.grad, alone[0] + alone[1])


# ---- the state ----


@pytest.mark.parametrize("freq, expected", [(3, [3, 6, 9]), (5, [5]), (None, [])])
def test_the_state_is_saved_every_resume_freq_steps_but_not_at_the_end(
    no_model: None, freq: int | None, expected: list[int]
) -> None:
    saes, log = one_of_each(resume_freq=freq), Recorder()
    train(saes, Store(saes[0].cfg), log)
    assert [state["step"] for state in log.states] == expected


def test_by_default_saving_takes_a_hundredth_of_the_time(no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a step takes 20 seconds and saving 7."""
    now = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)

    class Slow(Recorder):
        def save_state(self, state: dict) -> None:
            nonlocal now
            now += 7
            super().save_state(state)

    def step_ends() -> bool:
        nonlocal now
        now += 20
        return False

    sae, log = build_sae(config(num_tokens=300 * B)), Slow()
    train([sae], Store(sae.cfg), log, should_stop=step_ends)
    assert log.states[0]["step"] == 3, "a minute into the run"
    assert 0.005 < 7 * len(log.states) / now < 0.011


def fail_at(calls: int, function: Callable, error: Exception) -> Callable:
    """Wrap a function so that one of its calls raises."""
    count = iter(range(1, 10**6))

    def failing(*args: Any) -> Any:
        if next(count) == calls:
            raise error
        return function(*args)

    return failing


def test_a_failing_store_leaves_the_state_of_the_step_before(no_model: None) -> None:
    saes, log = one_of_each(), Recorder()
    store = Store(saes[0].cfg)
    store.next_batch = fail_at(7, store.next_batch, OSError("the network is gone"))
    with pytest.raises(OSError, match="gone"):
        train(saes, store, log)
    (state,) = log.states
    assert state["step"] == 6 and state["store"] == {"served": 6}


GPU_FULL = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
CPU_FULL = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


@pytest.mark.parametrize("full", [GPU_FULL, CPU_FULL], ids=["GPU", "CPU"])
@pytest.mark.parametrize(
    "function, calls, step",
    [("step", 3 * 4 + 2, 5), ("evaluate", 2, 6), ("evaluate", 4, 10)],
    ids=["second SAE in step 5", "evaluation after step 6", "last evaluation"],
)
def test_a_run_that_is_out_of_memory_goes_on_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch, function: str, calls: int, step: int, full: Exception
) -> None:
    def evaluate(model: None, saes: list[BaseAutoencoder], *_: object) -> list[dict[str, float]]:
        return [{"l0": sae.b_enc.sum().item(), "explained_variance": sae.W_enc.norm().item()} for sae in saes]

    def evaluations(*logs: Recorder) -> list[tuple]:
        return [line for log in logs for line in log.lines if "eval/l0" in line[3]]

    monkeypatch.setattr(training, "evaluate", evaluate)
    saes, troubled, resumed = (one_of_each(perf_log_freq=3, log_freq=2)[1:4] for _ in range(3))
    cfg, (log, before, after) = saes[0].cfg, (Recorder() for _ in range(3))
    results = train(saes, Store(cfg), log)

    place = Trainer if function == "step" else training
    with monkeypatch.context() as patch:
        patch.setattr(place, function, fail_at(calls, getattr(place, function), full))
        with pytest.raises(MemoryError, match=rf"^out of memory in step {step}; free memory, or begin") as error:
            train(troubled, Store(cfg), before)
    assert "\n" not in str(error.value) and "batch_size = 32" in str(error.value)
    (state,) = before.states
    assert state["step"] == state["store"]["served"] == step - 1
    assert train(resumed, Store(cfg, **state["store"]), after, state) == results
    assert evaluations(before, after) == evaluations(log)
    assert [n for _, n in after.checkpoints] == [10] * 3 and after.states == []
    for sae, expected in zip(resumed, saes):
        assert_close(sae.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_another_error_in_a_step_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    saes, log = one_of_each(), Recorder()
    monkeypatch.setattr(Trainer, "step", fail_at(9, Trainer.step, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train(saes, Store(saes[0].cfg), log)
    assert log.states == []


# ---- on a language model ----


def real_run(model_path: Path, text: Path, steps: int, seed: int = 0) -> tuple[list[BaseAutoencoder], Recorder]:
    cfgs = [
        check_model(
            config(
                sae_type, model_name=str(model_path), dataset_path=str(text), act_size=None, layer=1,
                dict_size=64, target_l0=4, batch_size=64, num_tokens=steps * 64, seq_len=32, model_batch_size=8,
                num_batches_in_buffer=4, eval_windows=8, log_freq=1, perf_log_freq=10**6, seed=seed,
            )
        )
        for sae_type in SAE_TYPES
    ]  # fmt: skip
    saes, log = [build_sae(cfg) for cfg in cfgs], Recorder()
    log.results = train(saes, ActivationsStore(load_model(cfgs[0]), cfgs), log)
    return saes, log


def test_training_on_a_language_model_learns(tiny_gpt2: Path, tiny_text: Path) -> None:
    saes, log = real_run(tiny_gpt2, tiny_text, steps=90)
    for index, sae in enumerate(saes):
        losses = [line[3]["train/loss"] for line in log.lines if line[0] == index and "train/loss" in line[3]]
        thirds = [sum(losses[i : i + 30]) for i in (0, 30, 60)]
        assert all(later < earlier for earlier, later in pairwise(thirds)), sae.cfg.sae_type
        nested = sae.cfg.sae_type == "matryoshka"  # which pays for its prefixes
        assert log.results[index]["explained_variance"] > (0.85 if nested else 0.9)
        assert log.results[index]["ce_recovered"] > 0.95
        assert abs(log.results[index]["ce_degradation"]) < (0.2 if nested else 0.08)
        assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


def test_all_kinds_train_on_one_pass_of_the_model(
    tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SAEs of two layers, a transcoder with and without a skip connection, and a crosscoder; each alone is the same."""
    passes = []
    monkeypatch.setattr(activation_store, "record", lambda *args: (passes.append(args[2]), record(*args))[1])
    common = dict(
        model_name=str(tiny_gpt2), dataset_path=str(tiny_text), act_size=None, dict_size=64, target_l0=4, batch_size=64,
        num_tokens=60 * 64, seq_len=32, model_batch_size=8, num_batches_in_buffer=4, eval_windows=8,
        perf_log_freq=10**6, lr=0.01,
    )  # fmt: skip
    transcoder = dict(layer=1, site="mlp_in", target_site="mlp_out")
    model = load_model(config("topk", **common | dict(layer=0)))
    cfgs = [
        check_hooks(model, config(sae_type, **common | place))
        for sae_type, place in (
            ("topk", dict(layer=0)), ("jumprelu", dict(layer=1)), ("topk", transcoder),
            ("batchtopk", transcoder | dict(skip=True)), ("batchtopk", dict(layer=(0, 1), site="resid_post")),
        )
    ]  # fmt: skip
    assert len(by_stream(cfgs)) == 1
    saes = [build_sae(cfg) for cfg in cfgs]
    results = train(saes, ActivationsStore(model, cfgs))
    together = len(passes)
    assert {*passes[0]} == {hook for cfg in cfgs for hook in cfg.widths} and len({*passes[0]}) == 6
    for cfg, found, sae in zip(cfgs, results, saes):
        assert found["explained_variance"] > 0.5 and found["ce_recovered"] > 0.7, cfg.name
        passes.clear()
        alone = build_sae(cfg)
        (expected,) = train([alone], ActivationsStore(model, [cfg]))
        assert len(passes) == together
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert_close(sae.state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-4)


def test_the_seed_alone_decides_the_weights(tiny_gpt2: Path, tiny_text: Path) -> None:
    first, again, other = (real_run(tiny_gpt2, tiny_text, steps=20, seed=seed)[0] for seed in (0, 0, 1))
    for sae, same, different in zip(first, again, other):
        for name, value in sae.state_dict().items():
            assert torch.equal(value, same.state_dict()[name]), name
        assert not torch.allclose(sae.W_dec, different.W_dec, atol=0.1)


# ---- several devices ----


def test_saes_are_placed_on_the_devices_in_turn(no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    gpus = [torch.device("cuda", index) for index in range(3)]
    assert machine.placements(config(device="cuda")) == gpus
    assert machine.placements(config(device="cuda:1")) == gpus[1:2]
    assert machine.placements(config()) == [torch.device("cpu")]

    moved: list[tuple[BaseAutoencoder, torch.device]] = []
    monkeypatch.setattr(training, "placements", lambda cfg: gpus[:2])
    monkeypatch.setattr(BaseAutoencoder, "to", lambda sae, device: (moved.append((sae, device)), sae)[1])
    saes = one_of_each()
    moved.clear()
    train(saes, Store(saes[0].cfg))
    assert moved == list(zip(saes, itertools.cycle(gpus[:2])))


def test_with_a_process_for_each_gpu_none_takes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert machine.placements(config(device="cuda")) == [torch.device("cuda")]
