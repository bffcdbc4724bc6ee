"""training.py: schedules by hand, one step against plain torch, and what `train` reads, writes and waits for."""

import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sparse
import training
from activation_store import ActivationsStore, check_model, load_model
from config import Config
from sae import SAE_TYPES, BaseAutoencoder, build_sae
from training import Trainer, learning_rate, sparsity_coefficient, train

D, F, B = 6, 20, 32

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))


def config(sae_type: str = "topk", steps: int = 10, **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, top_k=3, l1_coeff=0.01, bandwidth=0.3, threshold_init=0.1, batch_size=B,
        num_tokens=steps * B, lr=0.01, dead_after_tokens=3 * B, device="cpu",
    )  # fmt: skip
    return Config(sae_type=sae_type, **(small | changes))


def one_of_each(**changes: object) -> list[BaseAutoencoder]:
    return [build_sae(config(sae_type, **changes)) for sae_type in SAE_TYPES]


class Store:
    """Stands in for ActivationsStore: rows that depend on the step alone."""

    model = None
    mean = torch.zeros(D)

    def __init__(self, cfg: Config) -> None:
        self.cfg, self.served = cfg, 0

    def next_batch(self) -> Tensor:
        rng = torch.Generator().manual_seed(self.served)
        self.served += 1
        return torch.randn(B, D, generator=rng) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1]) + 0.7

    @property
    def state(self) -> dict[str, int]:
        return {"served": self.served}

    def held_out_tokens(self) -> str:
        return "held-out tokens"


class Recorder:
    """Stands in for RunLog."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, int, dict[str, float]]] = []
        self.checkpoints: list[tuple[BaseAutoencoder, int]] = []
        self.states: list[dict] = []

    def log(self, *line: object) -> None:
        self.lines.append(line)

    def checkpoint(self, sae: BaseAutoencoder, step: int) -> None:
        self.checkpoints.append((sae, step))

    def save_state(self, state: dict) -> None:
        self.states.append(state)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation gives as L0 each SAE's number of evaluations so far; Store's rows belong to no language model."""
    evaluations = Counter()

    def evaluate(model: None, saes: list[BaseAutoencoder], tokens: str, mean: Tensor) -> list[dict[str, float]]:
        assert (model, tokens, mean) == (Store.model, "held-out tokens", Store.mean)
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
def test_learning_rate_rises_stays_and_falls(
    warmup: float, decay: float, steps: int, expected: dict[int, float]
) -> None:
    cfg = config(steps=steps, lr=2.0, lr_warmup=warmup, lr_decay=decay)
    assert {step: learning_rate(cfg, step) / 2 for step in expected} == pytest.approx(expected)
    rates = [learning_rate(cfg, step) for step in range(steps)]
    assert max(rates) == 2 and min(rates) > 0


@pytest.mark.parametrize(
    "warmup, steps, expected",
    [
        (0.1, 100, {0: 0.1, 8: 0.9, 9: 1, 10: 1, 99: 1}),
        (0.0, 100, {0: 1, 99: 1}),
        (1.0, 100, {0: 0.01, 49: 0.5, 99: 1}),
        (0.1, 1, {0: 1}),
    ],
)
def test_sparsity_coefficient_rises_and_stays(warmup: float, steps: int, expected: dict[int, float]) -> None:
    cfg = config("vanilla", steps=steps, l1_coeff=4.0, sparsity_warmup=warmup)
    assert {step: sparsity_coefficient(cfg, step) / 4 for step in expected} == pytest.approx(expected)


# ---- one step ----


@pytest.mark.parametrize("max_grad_norm, clips", [(1e-3, True), (1e3, False)], ids=["clipped", "free"])
@all_types
def test_steps_equal_plain_torch(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, max_grad_norm: float, clips: bool
) -> None:
    """Adam written out, on gradients that are projected, then clipped; then rows of norm 1, thresholds above 0."""
    monkeypatch.setattr(sparse, "BAGGED_LATENTS", 5)
    cfg = config(sae_type, steps=8, max_grad_norm=max_grad_norm, lr_warmup=0.4, sparsity_warmup=0.9, l1_coeff=0.3)
    sae, twin, store = build_sae(cfg).train(), build_sae(cfg).train(), Store(cfg)
    trainer = Trainer(sae)
    norms: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: norms.append(
            torch.stack([p.grad.norm() for p in optimizer.param_groups[0]["params"]]).norm().item()
            / optimizer.grad_scale.item()
        )
    )
    m = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(cfg.num_steps):
        x = store.next_batch()
        out = trainer.step(x, step)

        twin.l1_coeff = cfg.l1_coeff * (step + 1) / 7.2 if step < 7 else cfg.l1_coeff
        expected = twin(x)
        assert_close(out.losses, expected.losses, rtol=1e-4, atol=1e-5)
        twin.zero_grad()
        expected.loss.backward()
        grads = {name: p.grad.clone() for name, p in twin.named_parameters()}
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
                v[name] = 0.99 * v[name] + 0.01 * (grads[name] * scale) ** 2
                m_hat, v_hat = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.99 ** (step + 1))
                p -= lr * m_hat / (v_hat.sqrt() + 1e-8)
            twin.W_dec /= twin.W_dec.norm(dim=1, keepdim=True)
            if sae_type == "jumprelu":
                twin.threshold.clamp_(min=0)
        for name, p in twin.named_parameters():
            assert_close(sae.get_parameter(name), p, rtol=1e-4, atol=1e-4, msg=name)
        assert_close(sae.W_dec.norm(dim=1), torch.ones(F), rtol=0, atol=1e-6)
        assert all(p.grad is None or not p.grad.any() for p in sae.parameters())


# ---- the loop ----


@pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])
def test_b_dec_is_the_first_batchs_mean_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, no_model: None, input_unit_norm: bool
) -> None:
    saes = [sae.eval() for sae in one_of_each(steps=2, input_unit_norm=input_unit_norm)]
    seen: list[tuple[int, Tensor, bool]] = []
    original = Trainer.step

    def spy(trainer: Trainer, x: Tensor, step: int) -> object:
        seen.append((step, trainer.sae.b_dec.detach().clone(), trainer.sae.training))
        return original(trainer, x, step)

    monkeypatch.setattr(Trainer, "step", spy)
    train(saes, Store(saes[0].cfg))
    x = Store(saes[0].cfg).next_batch()
    if input_unit_norm:
        x = (x - x.mean(dim=1, keepdim=True)) / (x.std(dim=1, keepdim=True) + 1e-5)
    assert [step for step, _, _ in seen] == [0] * 4 + [1] * 4 and all(training for _, _, training in seen)
    for step, b_dec, _ in seen:
        assert torch.allclose(b_dec, x.mean(dim=0), atol=1e-6) == (step == 0)
    assert not any(sae.training for sae in saes)


def test_saes_trained_together_are_those_trained_alone(no_model: None) -> None:
    changes = [
        {},
        {"lr": 0.002, "input_unit_norm": False},
        {"dict_size": 33, "top_k": 5, "max_grad_norm": 0.01},
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
    assert results == [{"l0": 3, "explained_variance": 0.5}] * 4
    out, err = capfd.readouterr()
    *evaluations, speed = out.splitlines()
    for line, n, step in zip(evaluations, (1, 2), (4, 8), strict=True):
        assert re.fullmatch(rf"step {step}, \d\d:\d\d left: L0 {n}, expl\. var\. 0\.5", line)
    assert speed.startswith("4 SAEs: ") and len(speed) <= 80 and err == "", "no bar where there is no terminal"
    assert log.checkpoints == [(sae, step) for step in checkpoints for sae in saes]
    assert all(tokens == step * B for _, step, tokens, _ in log.lines)
    logged = [(step, index) for index, step, _, metrics in log.lines if "train/loss" in metrics]
    evaluated = [(step, index, metrics) for index, step, _, metrics in log.lines if "train/loss" not in metrics]
    assert logged == [(step, index) for step in (3, 6, 9, 10) for index in range(4)]
    assert [(step, i, metrics["eval/l0"]) for step, i, metrics in evaluated] == [
        (step, i, n) for n, step in enumerate((4, 8, 10), start=1) for i in range(4)
    ]
    for index, step, _, metrics in log.lines:
        if "train/loss" in metrics:
            assert metrics["train/lr"] == learning_rate(saes[index].cfg, step - 1)
            assert 0 < metrics["train/tokens_per_second"] < float("inf")
            assert metrics["train/l0"] <= F and metrics["train/explained_variance"] < 1


@pytest.mark.parametrize(
    "field, value", [("seed", 1), ("layer", 0), ("batch_size", 16), ("num_tokens", 32), ("seq_len", 64)]
)
def test_an_sae_of_another_stream_is_refused(field: str, value: int) -> None:
    saes, store = [build_sae(config()), build_sae(config(**{field: value}))], Store(config())
    with pytest.raises(ValueError, match="its stream of activations is not the store's") as error:
        train(saes, store)
    assert str(error.value).startswith(saes[1].cfg.name) and "\n" not in str(error.value)
    assert store.served == 0


def test_only_log_steps_wait_for_the_device(monkeypatch: pytest.MonkeyPatch, no_model: None) -> None:
    """The sparse code looks at its data to choose the faster way: on the CPU alone, where nothing is waited for."""
    allowed = {"batchtopk", "_smallest_kept_in_sample", "above", "_bags_by_latent", "failure"}
    waits: list[tuple[int, str]] = []
    saes = one_of_each(log_freq=4, dead_after_tokens=B)
    for sae in saes:
        sae.tokens_since_fired += B  # latents are dead from the start, so AuxK is at work
    store = Store(saes[0].cfg)
    for method in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__repr__"):
        original = getattr(Tensor, method)

        def spy(tensor: Tensor, *args: object, original: object = original, **options: object) -> object:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).parent != Path(training.__file__).parent:
                frame = frame.f_back
            waits.append((store.served, frame.f_code.co_name))
            return original(tensor, *args, **options)

        monkeypatch.setattr(Tensor, method, spy)
    train(saes, store)
    monkeypatch.undo()
    by_step = {step: {name for s, name in waits if s == step} - allowed for step in range(1, 11)}
    assert {step for step, names in by_step.items() if names} == {4, 8, 10}
    assert by_step[4] == {"training_metrics"}
    assert allowed <= {name for _, name in waits}


# ---- numbers that are not finite ----


class BrokenStore(Store):
    """NaN or Inf in one activation of batch 5."""

    def next_batch(self) -> Tensor:
        batch = super().next_batch()
        if self.served == 5:
            batch[3, 2] = self.number
        return batch


def test_topk_with_nothing_finite_in_a_batch_ends_as_the_others_do(no_model: None) -> None:
    """Wide enough for the search by group maxima, which finds no candidate then."""
    sae = build_sae(config(dict_size=2048))
    store = Store(sae.cfg)
    serve = store.next_batch
    store.next_batch = lambda: serve() * torch.nan
    with pytest.raises(FloatingPointError, match="step 1, activations: not finite"):
        train([sae], store)


def poison(sae: BaseAutoencoder, tensor: str) -> None:
    """From the fifth step on the loss, or the gradient of a parameter, is not finite."""
    if tensor == "loss":
        penalty = sae.penalty
        calls = iter(range(1, 100))
        sae.penalty = lambda *args: penalty(*args) | {"bad": torch.tensor(torch.inf if next(calls) >= 5 else 0.0)}
    else:
        parameter = getattr(sae, tensor.split()[-1])
        calls = iter(range(1, 100))
        parameter.register_hook(lambda grad: grad * torch.nan if next(calls) >= 5 else grad)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_stop_the_run_before_they_reach_a_parameter(
    no_model: None, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    monkeypatch.setattr(BrokenStore, "number", number, raising=False)
    saes, untroubled, log = one_of_each(), one_of_each(), Recorder()
    with pytest.raises(FloatingPointError, match=f"^{saes[0].cfg.name}: step 5, activations: not finite; lower lr = "):
        train(saes, BrokenStore(saes[0].cfg), log)
    assert log.checkpoints == []
    store = Store(saes[0].cfg)
    trainers = [Trainer(sae) for sae in untroubled]
    for step in range(4):
        x = store.next_batch()
        for trainer in trainers:
            if step == 0:
                trainer.sae.initialise_from(x)
            trainer.step(x, step)
    for sae, expected in zip(saes, untroubled):
        for (name, found), p in zip(sae.named_parameters(), expected.parameters()):
            assert_close(found, p, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("tensor", ["loss", "gradient of W_enc", "gradient of b_dec"])
def test_an_sae_whose_loss_or_gradient_is_not_finite_is_named_and_the_others_are_saved(
    no_model: None, tensor: str
) -> None:
    saes, log = one_of_each(checkpoint_freq=2), Recorder()
    poison(saes[2], tensor)
    match = f"^{saes[2].cfg.name}: step 5, {tensor}: not finite; .*; the other 3 SAEs were saved$"
    with pytest.raises(FloatingPointError, match=match):
        train(saes, Store(saes[0].cfg), log)
    assert [step for sae, step in log.checkpoints if sae is saes[2]] == [2, 4]
    assert [step for sae, step in log.checkpoints if sae is saes[0]] == [2, 4, 5]


def test_without_looking_nothing_changes_after_the_step_that_failed() -> None:
    """On a GPU `failure` is asked for some steps later; what it says and saves is of the first."""
    sae = build_sae(config("jumprelu")).train()
    trainer, store = Trainer(sae), Store(sae.cfg)
    for step in range(3):
        trainer.step(store.next_batch(), step)
    before = [p.detach().clone() for p in sae.parameters()]
    trainer.step(store.next_batch() * torch.nan, 3)
    for step in range(4, 7):
        trainer.step(store.next_batch(), step)
    assert trainer.failure() == "step 4, activations: not finite"
    assert_close([p.detach() for p in sae.parameters()], before, rtol=1e-6, atol=0)
    assert trainer.optimizer.state[trainer.views[0]]["step"] == 3


def test_after_training_gradients_add_up_again(no_model: None) -> None:
    """While it lasts they are written over each other."""
    sae = build_sae(config(dead_after_tokens=10**9))
    store = Store(sae.cfg)
    train([sae], store)
    sae.train()
    batches = [store.next_batch() for _ in range(2)]
    alone = []
    for x in batches:
        sae.zero_grad()
        sae(x).loss.backward()
        alone.append(sae.W_dec.grad.clone())
    sae.zero_grad()
    for x in batches:
        sae(x).loss.backward()
    assert_close(sae.W_dec.grad, alone[0] + alone[1])


# ---- the state ----


@pytest.mark.parametrize("freq, expected", [(3, [3, 6, 9]), (5, [5]), (None, [])])
def test_the_state_is_saved_every_resume_freq_steps_but_not_at_the_end(
    no_model: None, freq: int | None, expected: list[int]
) -> None:
    saes, log = one_of_each(resume_freq=freq), Recorder()
    train(saes, Store(saes[0].cfg), log)
    assert [state["step"] for state in log.states] == expected


def test_by_default_saving_takes_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: now)
    pacer, saved = training._Pacer(None), 0.0
    for step in range(100_000):
        now += 0.5
        if pacer.is_due(step):
            with pacer:
                now, saved = now + 7, saved + 7
    assert 0.005 < saved / now < 0.011


def test_a_failing_store_leaves_the_state_of_the_step_before(no_model: None) -> None:
    saes, log = one_of_each(), Recorder()
    store = Store(saes[0].cfg)
    serve = store.next_batch

    def fail_at_the_7th() -> Tensor:
        if store.served == 6:
            raise OSError("the network is gone")
        return serve()

    store.next_batch = fail_at_the_7th
    with pytest.raises(OSError, match="gone"):
        train(saes, store, log)
    (state,) = log.states
    assert state["step"] == 6 and state["store"] == {"served": 6}


# ---- on a language model ----


def real_run(model_path: Path, text: Path, steps: int, seed: int = 0) -> tuple[list[BaseAutoencoder], Recorder]:
    cfgs = [
        check_model(
            config(
                sae_type, model_name=str(model_path), dataset_path=str(text), act_size=None, layer=1,
                dict_size=64, top_k=4, batch_size=64, num_tokens=steps * 64, seq_len=32, model_batch_size=8,
                num_batches_in_buffer=4, eval_windows=8, log_freq=1, perf_log_freq=10**6, seed=seed,
            )
        )
        for sae_type in SAE_TYPES
    ]  # fmt: skip
    saes, log = [build_sae(cfg) for cfg in cfgs], Recorder()
    log.results = train(saes, ActivationsStore(load_model(cfgs[0]), cfgs[0]), log)
    return saes, log


def test_training_on_a_language_model_learns(tiny_gpt2: Path, tiny_text: Path) -> None:
    saes, log = real_run(tiny_gpt2, tiny_text, steps=90)
    for index, sae in enumerate(saes):
        losses = [line[3]["train/loss"] for line in log.lines if line[0] == index and "train/loss" in line[3]]
        thirds = [sum(losses[i : i + 30]) for i in (0, 30, 60)]
        assert all(later < earlier for earlier, later in pairwise(thirds)), sae.cfg.sae_type
        assert log.results[index]["explained_variance"] > 0.7
        assert log.results[index]["ce_recovered"] > 0.9 and abs(log.results[index]["ce_degradation"]) < 0.1
        assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


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
    assert training.placements(config(device="cuda")) == gpus
    assert training.placements(config(device="cuda:1")) == gpus[1:2] and training.placements(config()) == [
        torch.device("cpu")
    ]

    moved: list[tuple[BaseAutoencoder, torch.device]] = []
    monkeypatch.setattr(training, "placements", lambda cfg: gpus[:2])
    monkeypatch.setattr(BaseAutoencoder, "to", lambda sae, device: (moved.append((sae, device)), sae)[1])
    saes = one_of_each()
    moved.clear()
    train(saes, Store(saes[0].cfg))
    assert moved == list(zip(saes, [*gpus[:2], *gpus[:2]]))


def test_with_a_process_for_each_gpu_none_takes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert training.placements(config(device="cuda")) == [torch.device("cuda")]
