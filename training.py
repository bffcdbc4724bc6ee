"""The training loop: one stream of activations, many SAEs."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

import ranks
from activation_store import ActivationsStore
from config import Config
from evaluation import evaluate, training_metrics
from logs import RunLog
from sae import BaseAutoencoder, SAEOutput

FIRST_SAVE_SECONDS = 60  # into a run, the first time that its state is saved


def learning_rate(cfg: Config, step: int) -> float:
    """Learning rate of step 0, 1, ..., num_steps - 1: linear rise over lr_warmup, then lr, then linear fall to 0."""
    warmup, decay = cfg.lr_warmup * cfg.num_steps, cfg.lr_decay * cfg.num_steps
    rise = (step + 1) / warmup if step + 1 < warmup else 1.0
    left = cfg.num_steps - step
    fall = left / decay if left < decay else 1.0
    return cfg.lr * min(rise, fall)


def sparsity_coefficient(cfg: Config, step: int) -> float:
    """l1_coeff of a step: linear rise over sparsity_warmup."""
    warmup = cfg.sparsity_warmup * cfg.num_steps
    return cfg.l1_coeff * min(1.0, (step + 1) / warmup if warmup else 1.0)


def floor_step(x: Float[Tensor, "batch act_size"], dict_size: int, product_dtype: torch.dtype) -> Callable[[], None]:
    """The least that a training step can cost, ready to be run and timed on x.

    One encoder product into a reused buffer and one fused Adam step over matrices of the size of W_enc and W_dec: no
    step that trains all of both does without them.
    """
    encoder, decoder = (x.new_ones(dict_size, x.shape[1], dtype=torch.float32) for _ in range(2))
    for matrix in (encoder, decoder):
        matrix.grad = torch.ones_like(matrix)
    adam = torch.optim.Adam([encoder, decoder], fused=True)
    x = x.to(product_dtype)
    product = x.new_empty(len(x), dict_size)

    def run() -> None:
        torch.mm(x, encoder.to(product_dtype).t(), out=product)
        adam.step()

    return run


class Stopped(Exception):
    """Training stopped where it was asked to; what it needs to go on is on disk."""


class Trainer:
    """One SAE with its optimiser."""

    def __init__(self, sae: BaseAutoencoder) -> None:
        self.sae, self.cfg = sae, sae.cfg
        # Fused Adam is five times slower on W_enc as it lies, latent by latent: it is given the transposed view.
        self.views = [p.detach() if p.is_contiguous() else p.detach().t() for p in sae.parameters()]
        sae.reuse_gradient_memory(True)
        self.optimizer = torch.optim.Adam(self.views, lr=sae.cfg.lr, betas=(sae.cfg.beta1, sae.cfg.beta2), fused=True)
        self._checked: Tensor | None = None  # of the last step, or of the first with a number that is not finite
        self._failed_at: Tensor | None = None

    def step(self, x: Float[Tensor, "batch act_size"], step: int) -> SAEOutput:
        """One step on a batch, or on this process's share of it; returns the output of its forward pass.

        From the first step on in which a number is not finite the parameters stay as they are: see `failure`.
        """
        sae, cfg = self.sae, self.cfg
        sae.l1_coeff = sparsity_coefficient(cfg, step)
        self.optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        out = sae(x)
        (out.loss / ranks.count()).backward()
        for view, p in zip(self.views, sae.parameters()):
            view.grad = p.grad if p.is_contiguous() else p.grad.t()
        ranks.add_([view.grad for view in self.views])
        sae.project_decoder_gradient()
        norms = torch.stack([view.grad.norm() for view in self.views])
        failed = self._check(x, out.loss.detach(), norms, step)
        # Fused Adam divides gradients by grad_scale as it reads them, and does nothing where found_inf is 1.
        self.optimizer.grad_scale = (norms.norm() / cfg.max_grad_norm).clamp_min(1)
        self.optimizer.found_inf = failed.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.zero_grad()
        sae.constrain()
        return out

    def _check(self, x: Tensor, loss: Tensor, norms: Tensor, step: int) -> Tensor:
        """Whether this step or an earlier one has a number that is not finite, without waiting for the device."""
        checked = torch.cat([ranks.mean(torch.stack([x.abs().amax().float(), loss])), norms])
        now = torch.full((), step + 1, device=x.device)
        if self._checked is None:
            self._checked, self._failed_at = checked, now
        else:
            failed_before = ~self._checked.isfinite().all()
            self._checked = torch.where(failed_before, self._checked, checked)
            self._failed_at = torch.where(failed_before, self._failed_at, now)
        return ~self._checked.isfinite().all()

    def failure(self) -> str | None:
        """What was not finite, and in which step; None while all is well. Waits for the device."""
        names = ["activations", "loss", *(f"gradient of {name}" for name, _ in self.sae.named_parameters())]
        bad = (~self._checked.isfinite()).nonzero().flatten().tolist()
        return f"step {int(self._failed_at)}, {names[bad[0]]}: not finite" if bad else None

    def state(self) -> dict[str, Any]:
        """All that its next steps depend on beside the batches."""
        names = [name for name, _ in self.sae.named_parameters()]
        return {
            "parameters": dict(zip(names, self.views)),
            "buffers": dict(self.sae.named_buffers()),
            "adam": {name: self.optimizer.state[view] for name, view in zip(names, self.views)},
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        for (name, _), view in zip(self.sae.named_parameters(), self.views):
            view.copy_(state["parameters"][name])
            self.optimizer.state[view] = {
                key: value.to(view.device, copy=True) for key, value in state["adam"][name].items()
            }
        for name, buffer in self.sae.named_buffers():
            buffer.copy_(state["buffers"][name])


def train(
    saes: list[BaseAutoencoder],
    store: ActivationsStore,
    log: RunLog | None = None,
    state: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train every SAE on the same batches of `store` for num_tokens; returns each one's metrics on held-out text.

    The SAEs may differ in type and in every field that is not of the stream (Config.stream). Metrics and checkpoints go
    to `log`, if there is one, every log_freq, perf_log_freq and checkpoint_freq steps of the store's Config and at the
    end; so does, every resume_freq steps, the state from which another call goes on to the same end (with the store
    made from the same state); `state` is emptied once it is loaded.
    Where the Config names no GPU, the SAEs are placed on all in turn. Processes that share batches all call this.
    Raises: ValueError when the SAEs do not share the store's stream; FloatingPointError when a number is not finite,
    after the other SAEs were saved; Stopped after a step in which `should_stop` says so.
    """
    cfg = store.cfg
    for sae in saes:
        if sae.cfg.stream != cfg.stream:
            raise ValueError(
                f"{sae.cfg.name}: its stream of activations is not the store's; train it with its own store"
            )
    devices = placements(cfg)
    trainers = [Trainer(sae.to(devices[i % len(devices)]).train()) for i, sae in enumerate(saes)]
    try:
        return _train(trainers, store, log, state, should_stop)
    finally:
        for sae in saes:
            sae.reuse_gradient_memory(False)


def _train(
    trainers: list[Trainer],
    store: ActivationsStore,
    log: RunLog | None,
    state: dict[str, Any] | None,
    should_stop: Callable[[], bool],
) -> list[dict[str, float]]:
    cfg = store.cfg
    saes = [trainer.sae for trainer in trainers]
    first_step = 0
    if state is not None:
        first_step = state["step"]
        for trainer, saved in zip(trainers, state["trainers"].values()):
            trainer.load_state(saved)
        state.clear()  # gigabytes, perhaps
    held_out = store.held_out_tokens()
    results: list[dict[str, float]] = []

    def save_state(done: int) -> None:
        assert log is not None
        _raise_failures(trainers, log, done)
        trained = {str(i): trainer.state() for i, trainer in enumerate(trainers)}
        log.save_state({"step": done, "trainers": trained, "store": store.state})

    bar = tqdm(
        initial=first_step * cfg.batch_size,
        total=cfg.num_steps * cfg.batch_size,
        unit="tok",
        unit_scale=True,
        dynamic_ncols=True,
        disable=True if ranks.world_rank() > 0 else None,  # None: where standard error is not a terminal
        bar_format="{l_bar}{bar:8}| {remaining} left, {rate_fmt}{postfix}",  # fits 80 columns
    )
    pacer = _Pacer(cfg.resume_freq)
    begun = clock = time.perf_counter()
    timed_tokens, seconds = 0, 0.0
    for step in range(first_step, cfg.num_steps):
        try:
            x, failure = store.next_batch(), None
        except Exception as error:
            failure = error
        if any(ranks.any_of(failure is not None)):
            if failure is None:
                store.put_back()
            if log is not None and step > first_step:
                save_state(step)
            ranks.fail_together()
            raise failure or OSError("another process could not read its share of the text; see what it says")
        if step == 0:
            for sae in saes:
                sae.initialise_from(x.to(sae.W_dec.device))
        done = step + 1
        is_last_step = done == cfg.num_steps
        is_log_step = done % cfg.log_freq == 0 or is_last_step
        is_eval_step = done % cfg.perf_log_freq == 0 or is_last_step
        is_checkpoint_step = is_last_step or (cfg.checkpoint_freq is not None and done % cfg.checkpoint_freq == 0)

        logged = []
        for trainer in trainers:
            on_its_device = x.to(trainer.sae.W_dec.device)
            out = trainer.step(on_its_device, step)
            if is_log_step:
                rate = trainer.optimizer.param_groups[0]["lr"]
                logged.append(training_metrics(trainer.sae, on_its_device, out) | {"train/lr": rate})
            del out
        asked, is_due = ranks.any_of(should_stop(), pacer.is_due(done))
        stops = asked and not is_last_step
        is_save_step = log is not None and not is_last_step and (stops or is_due)
        # On a GPU only where it is waited for anyway: nothing changes after the step that failed.
        if x.device.type == "cpu" or is_log_step or is_eval_step or is_checkpoint_step:
            _raise_failures(trainers, log, done)
        bar.update(cfg.batch_size)
        timed_tokens += cfg.batch_size
        if is_log_step:
            bar.set_postfix_str(_ranges(logged, {"train/loss": "loss", "train/l0": "l0"}), refresh=False)
            elapsed = time.perf_counter() - clock
            speed = {"train/tokens_per_second": timed_tokens / elapsed}
            clock, timed_tokens, seconds = time.perf_counter(), 0, seconds + elapsed
            if log is not None:
                for index, metrics in enumerate(logged):
                    log.log(index, done, done * cfg.batch_size, metrics | speed)

        paused = time.perf_counter()
        if is_eval_step:
            results = evaluate(store.model, saes, held_out, store.mean)
            if log is not None:
                for index, metrics in enumerate(results):
                    log.log(index, done, done * cfg.batch_size, {f"eval/{k}": v for k, v in metrics.items()})
            if not is_last_step:
                left = (time.perf_counter() - begun) / (done - first_step) * (cfg.num_steps - done)
                found = _ranges(results, {"l0": "L0", "explained_variance": "expl. var."})
                tqdm.write(f"step {done:,}, {tqdm.format_interval(left)} left: {found}")
                sys.stdout.flush()  # a log file has it at once
        if is_checkpoint_step and log is not None:
            for sae in saes:
                log.checkpoint(sae, done)
        if is_save_step:
            with pacer:
                save_state(done)
        clock += time.perf_counter() - paused
        if stops:
            bar.close()
            raise Stopped(f"stopped after step {done:,} of {cfg.num_steps:,}")
    bar.close()
    tqdm.write(_speed(cfg, saes, x, cfg.num_steps - first_step, seconds))
    for sae in saes:
        sae.eval()
    return results


def placements(cfg: Config) -> list[torch.device]:
    """Where SAEs are placed in turn: on all GPUs where cfg names none, and torchrun gave this process none."""
    device = cfg.torch_device
    if device.type == "cpu" or device.index is not None or ranks.world_size() > 1:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


class _Pacer:
    """Says when to save the state: every `freq` steps, or where that is None, so that saving takes 1% of the time."""

    def __init__(self, freq: int | None) -> None:
        self.freq = freq
        self._next = time.perf_counter() + FIRST_SAVE_SECONDS

    def is_due(self, done: int) -> bool:
        return time.perf_counter() >= self._next if self.freq is None else done % self.freq == 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        now = time.perf_counter()
        self._next = now + max(FIRST_SAVE_SECONDS, 100 * (now - self._start))


def _raise_failures(trainers: list[Trainer], log: RunLog | None, done: int) -> None:
    """Where an SAE met a number that is not finite, save the others and say so."""
    failures = {trainer: failure for trainer in trainers if (failure := trainer.failure())}
    if not failures:
        return
    others = [trainer for trainer in trainers if trainer not in failures]
    if log is not None:
        for trainer in others:
            log.checkpoint(trainer.sae, done)
    ranks.fail_together()
    saved = f"; the other {len(others)} SAEs were saved" if others and log is not None else ""
    (trainer, failure), *_ = failures.items()
    raise FloatingPointError(
        f"{trainer.cfg.name}: {failure}; lower lr = {trainer.cfg.lr:g}, or take another dtype where activations"
        f" overflow; its last checkpoint is as it was{saved}"
    )


def _speed(cfg: Config, saes: list[BaseAutoencoder], x: Tensor, steps: int, seconds: float) -> str:
    """Tokens/s of the run without its evaluations, and how near it came to the floor of its SAEs' steps."""
    # Measured on few latents, for little memory, and scaled up.
    latents = min(max(sae.cfg.dict_size for sae in saes), max(1024, (1 << 23) // x.shape[1]))
    per_latent: dict[str, float] = {}
    floor = 0.0
    for sae in saes:
        dtype = sae.cfg.product_dtype
        if dtype not in per_latent:
            run = floor_step(x, latents, getattr(torch, dtype))
            run()
            synchronise(x.device)
            start = time.perf_counter()
            for _ in range(3):
                run()
            synchronise(x.device)
            per_latent[dtype] = (time.perf_counter() - start) / 3 / latents
        floor += per_latent[dtype] * sae.cfg.dict_size * steps
    floor /= min(len(placements(cfg)), len(saes))
    rate = steps * cfg.batch_size / seconds
    return f"{_number(saes)}: {rate:,.0f} tokens/s; the floor of their steps is {floor / seconds:.0%} of the time"


def heading(cfgs: list[Config]) -> str:
    """Of what is said about SAEs that share a stream: how many, on which activations."""
    cfg = cfgs[0]
    return f"{_number(cfgs)} on {cfg.model_name} {cfg.hook_point}, {cfg.num_steps * cfg.batch_size:,} activations"


def _number(saes: list[BaseAutoencoder] | list[Config]) -> str:
    return "1 SAE" if len(saes) == 1 else f"{len(saes)} SAEs"


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ranges(of_saes: list[dict[str, float]], metrics: dict[str, str]) -> str:
    """Metrics by their labels, from the lowest to the highest of the SAEs."""
    parts = []
    for name, label in metrics.items():
        values = sorted(found[name] for found in of_saes)
        low, high = f"{values[0]:.3g}", f"{values[-1]:.3g}"
        parts.append(f"{label} {low}" if low == high else f"{label} {low} to {high}")
    return ", ".join(parts)
