"""The training loop: one stream of activations, many dictionaries; optimiser, schedules, stopping and going on."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from activation_store import Store
from config import Config, number_of, widths_of
from evaluation import evaluate, training_metrics
from kernels import sparse
from kernels.sparse import GradientMemory
from language_model import side_by_side
from logs import RunLog
from runtime import ranks
from runtime.checks import explained, require
from runtime.machine import placements
from runtime.progress import Progress
from sae import BaseAutoencoder, Lent, SAEOutput

THRESHOLD_LR = 3  # of JumpReLU's thresholds, in units of the other parameters' learning rate
MISSED = 0.05  # of target_l0, more than which is said
FIRST_SAVE_SECONDS = 60  # into a run, the first time that its state is saved


def learning_rate(cfg: Config, step: int) -> float:
    """Schedule steps 0 to num_steps - 1: a linear rise over lr_warmup, then the peak, then a linear fall to 0."""
    warmup, decay = cfg.lr_warmup * cfg.num_steps, cfg.lr_decay * cfg.num_steps
    rise = (step + 1) / warmup if step + 1 < warmup else 1.0
    left = cfg.num_steps - step
    fall = left / decay if left < decay else 1.0
    return cfg.peak_lr * min(rise, fall)


def sparsity_coefficient(cfg: Config, step: int) -> float:
    """Schedule a fixed l1_coeff: a linear rise over sparsity_warmup. 0 where L0 is steered."""
    warmup = cfg.sparsity_warmup * cfg.num_steps
    return (cfg.l1_coeff or 0.0) * min(1.0, (step + 1) / warmup if warmup else 1.0)


class Stopped(Exception):
    """Training stopped where it was asked to; what it needs to go on is on disk."""


class Trainer:
    """One dictionary with its optimiser. Decoder norms are folded first, where an SAE comes from another library."""

    def __init__(self, sae: BaseAutoencoder) -> None:
        self.sae, self.cfg = sae.train(), sae.cfg
        sae.fold_decoder_norms()
        by_latent = {} if sparse.on_gpu(sae.W_dec) else {"W_enc": sae.W_enc.detach().t(), "W_dec": sae.W_dec.detach()}
        memory = GradientMemory(**{name: torch.empty_like(weight) for name, weight in by_latent.items()})
        sae.lent = Lent(ranks.count(), ranks.mean, ranks.either, self._num_dead, memory, unit_rows=True)
        # Fused Adam is five times slower on W_enc as it lies, latent by latent: it is given the transposed view.
        self.views = [p.detach() if p.is_contiguous() else p.detach().t() for p in sae.parameters()]
        groups = [{"params": [view]} for view in self.views]  # each has its own learning rate
        self.optimizer = torch.optim.Adam(groups, betas=(sae.cfg.beta1, sae.cfg.beta2), fused=True)
        self.units: list[float] = []  # of the parameters, once the first batch has told the scale of the activations
        self.steps = 0
        # What _check looked at in the last step, or in the first that had a number not finite, and which step that was.
        self._checked, self._at = torch.zeros(2 + len(self.views), device=sae.W_dec.device), torch.tensor(0)
        self._dead: tuple[Tensor, torch.cuda.Event | None] | None = None  # on a GPU: their number, on its way here

    def step(
        self, x: Float[Tensor, "batch d_in"], step: int, y: Float[Tensor, "batch d_out"] | None = None
    ) -> SAEOutput:
        """Train on a batch, or on this process's share of it; returns the output of its forward pass.

        y is what a transcoder is compared with. A new SAE takes b_dec and the scale of the activations from the first
        batch, and its L0 from the last.
        From the first step on in which a number is not finite the optimiser changes nothing: see `failure`.
        """
        sae, cfg = self.sae, self.cfg
        assert all(p.grad is None for p in sae.parameters()), "gradients from before: a step makes its own"
        if not self.units:
            self._begin(x, y)
        sae.l1_coeff = sparsity_coefficient(cfg, step)
        out = sae(x, y)
        (out.loss / ranks.count()).backward()
        lr, groups = learning_rate(cfg, step), self.optimizer.param_groups
        for (name, p), view, unit, group in zip(sae.named_parameters(), self.views, self.units, groups):
            view.grad = p.grad if p.is_contiguous() else p.grad.t()
            if unit != 1:
                view.grad *= unit
            group["lr"] = lr * unit * (THRESHOLD_LR if name == "threshold" else 1)
        ranks.add_([view.grad for view in self.views])
        sae.project_decoder_gradient()
        norms = torch.stack([view.grad.norm() for view in self.views])
        failed = self._check(x if y is None else y, out.loss.detach(), norms, step)
        # Fused Adam divides gradients by grad_scale as it reads them, and does nothing where found_inf is 1.
        self.optimizer.grad_scale = (norms.norm() / cfg.max_grad_norm).clamp_min(1).float()
        self.optimizer.found_inf = failed.float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        sae.zero_grad()
        sae.lent.memory.free()
        sae.constrain()
        sae.after_step(out.latents)
        if step + 1 == cfg.num_steps and self.failure() is None:
            sae.finish(sae.normalise(x)[0])
        self._count_dead()
        self.steps = step + 1
        return out

    def _begin(self, x: Tensor, y: Tensor | None) -> None:
        """Measure the scale of the activations, unless the SAE knows it: parameters are trained in units of it."""
        finite = torch.stack([acts.isfinite().all() for acts in (x, y) if acts is not None]).all()
        if self.sae.input_scale <= 0 and not ranks.either(~finite):
            self.sae.initialise_from(x, y)
        self.units = list(self.sae.units().values())

    def _count_dead(self) -> None:
        """Send the number of dead latents to the host, which waits for it only once the next step is under way."""
        if self.sae.uses_auxk and sparse.on_gpu(self.sae.W_dec):
            device, count = self.sae.W_dec.device, self.sae.dead.sum().to("cpu", non_blocking=True)
            self._dead = count, torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def _num_dead(self) -> int | None:
        """Return the number that the last step sent, once."""
        if self._dead is None:
            return None
        (count, copied), self._dead = self._dead, None
        if copied is not None:
            copied.synchronize()
        return int(count)

    def _check(self, x: Tensor, loss: Tensor, norms: Tensor, step: int) -> Tensor:
        """Find, without waiting, whether this step or an earlier one has a number that is not finite."""
        checked = torch.cat([ranks.mean(torch.stack([x.abs().amax().float(), loss])), norms])
        well = self._checked.isfinite().all()
        self._checked = torch.where(well, checked, self._checked)
        self._at = torch.where(well, step + 1, self._at)
        return ~self._checked.isfinite().all()

    def failure(self) -> str | None:
        """Say what was not finite, and in which step; None while all is well. Waits for the device."""
        names = ["activations", "loss", *(f"gradient of {name}" for name, _ in self.sae.named_parameters())]
        bad = (~self._checked.isfinite()).nonzero().flatten().tolist()
        return f"step {int(self._at)}, {names[bad[0]]}: not finite" if bad else None

    def release(self) -> None:
        """Leave the SAE as one that nobody trains: gradients add up again, each in memory of its own."""
        self.sae.lent = Lent()

    def state(self) -> dict[str, Any]:
        """Collect all that its next steps depend on beside the batches."""
        views = dict(zip(dict(self.sae.named_parameters()), self.views))  # contiguous: saving copies none of them
        adam = {name: self.optimizer.state[view] for name, view in views.items()}
        return {"steps": self.steps, "sae": dict(self.sae.named_buffers()) | views, "adam": adam}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, tensor in self.state()["sae"].items():
            tensor.copy_(state["sae"][name])
        for (name, _), view in zip(self.sae.named_parameters(), self.views):
            adam = state["adam"][name].items()
            self.optimizer.state[view] = {key: value.to(view.device, copy=True) for key, value in adam}
        self.steps, self._dead = state["steps"], None


def train(
    saes: list[BaseAutoencoder],
    store: Store,
    log: RunLog | None = None,
    state: dict[str, Any] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, float]]:
    """Train every SAE on the same batches of `store` for num_tokens; returns each one's metrics on held-out text.

    The SAEs may differ in all that is not of the stream (Config.stream). A new SAE gets its b_dec (Vanilla its b_enc,
    JumpReLU its thresholds too) from the first batch; one that was trained before goes on from where it is. Metrics and
    checkpoints go to `log`, and so does the `state` from which another call, with a store made from it, goes on to the
    same end; it is emptied once it is loaded. Where the Config names no GPU, the SAEs are placed on all in turn.
    Raises: ValueError when an SAE has another stream or hook; MemoryError; FloatingPointError when a number is not
    finite, after the other SAEs were saved; Stopped after a step in which `should_stop` says so.
    """
    cfg = store.cfg
    for sae in saes:
        another = f"{sae.cfg.name}: its stream of activations is not the store's; train it with its own store"
        require(sae.cfg.stream == cfg.stream, another)
        absent = ", ".join({*sae.cfg.widths} - {*store.hooks})
        require(not absent, f"{sae.cfg.name}: the store does not read {absent}; make it with this Config too")
    devices = placements(cfg)
    with contextlib.ExitStack() as stack:
        trainers = []
        remedy = "lower dict_size, or train fewer"
        with explained("out of memory for the SAEs", torch.OutOfMemoryError, remedy=remedy, raised=MemoryError):
            for i, sae in enumerate(saes):
                trainers.append(Trainer(sae.to(devices[i % len(devices)])))
                stack.callback(trainers[-1].release)
        results = _Loop(trainers, store, log, should_stop).run(state)
    for sae in saes:
        sae.eval()
    return results


class _Loop:
    """One call of `train`: the steps, and what is done between them."""

    def __init__(
        self, trainers: list[Trainer], store: Store, log: RunLog | None, should_stop: Callable[[], bool]
    ) -> None:
        self.trainers, self.store, self.log, self.should_stop = trainers, store, log, should_stop
        self.cfg, self.saes = store.cfg, [trainer.sae for trainer in trainers]
        self.held_out = store.held_out()
        self.results: list[dict[str, float]] = []
        self.next_save = time.perf_counter() + FIRST_SAVE_SECONDS

    def run(self, state: dict[str, Any] | None) -> list[dict[str, float]]:
        cfg, log = self.cfg, self.log
        state = {"step": 0, "trainers": {}} if state is None else state
        first = lap = state["step"]
        for trainer, saved in zip(self.trainers, state["trainers"].values()):
            trainer.load_state(saved)
        state.clear()  # gigabytes, perhaps
        progress = Progress(cfg, first)
        in_steps, in_lap, in_evaluations = 0.0, 0.0, 0.0
        read_before = self.store.clock.seconds
        for step in range(first, cfg.num_steps):
            done, began = step + 1, time.perf_counter()
            is_last_step = done == cfg.num_steps
            is_log_step = done % cfg.log_freq == 0 or is_last_step
            is_eval_step = done % cfg.perf_log_freq == 0 or is_last_step
            is_checkpoint_step = is_last_step or (cfg.checkpoint_freq is not None and done % cfg.checkpoint_freq == 0)

            with self._saving_on_failure(step):
                rows = self.store.next_batch()
            with self._saving_on_failure(step, self.store.put_back):
                metrics = [self._step(trainer, rows, step, is_log_step) for trainer in self.trainers]
            asked, is_due = ranks.any_of(self.should_stop(), self._is_due(done))
            # On a GPU only where it is waited for anyway: nothing changes after the step that failed.
            if cfg.torch_device.type == "cpu" or is_log_step or is_eval_step or is_checkpoint_step:
                self._raise_failures(done)
            in_steps += time.perf_counter() - began
            progress.advance(done)

            if is_log_step and any(metrics):
                rate = (done - lap) * cfg.batch_size / (in_steps - in_lap)
                lap, in_lap = done, in_steps
                progress.show(_ranges(metrics, {"train/loss": "loss", "train/l0": "l0"}))
                self._log(done, metrics, {"train/tokens_per_second": rate})
            if is_checkpoint_step and log is not None:
                for sae in self.saes:
                    log.checkpoint(sae, done)
            if is_eval_step:
                progress.say(f"evaluating {number_of([sae.cfg for sae in self.saes])}")
                began = time.perf_counter()
                with self._saving_on_failure(step, self.store.put_back):  # a resumed run repeats the evaluation alone
                    self._evaluate(done)
                in_evaluations += time.perf_counter() - began
                if not is_last_step:
                    found = _ranges(self.results, {"l0": "L0", "explained_variance": "expl. var."})
                    progress.say(f"step {done:,}, {progress.left(done)} left: {found}")
            if (asked or is_due) and not is_last_step and log is not None:
                self._save_state(done)
            if asked and not is_last_step:
                progress.close()
                raise Stopped(f"stopped after step {done:,} of {cfg.num_steps:,}")
        progress.close()
        rate = (cfg.num_steps - first) * cfg.batch_size / in_steps
        reading = self.store.clock.seconds - read_before
        times = {"activations": reading, "training": in_steps - reading, "evaluation": in_evaluations}
        shares = ", ".join(f"{name} {seconds / sum(times.values()):.0%}" for name, seconds in times.items())
        progress.say(f"{rate:,.0f} tokens/s; time: {shares}")
        for sae, found in zip(self.saes, self.results):
            if not sae.cfg.has_fixed_penalty and abs(found["l0"] / sae.cfg.target_l0 - 1) > MISSED:
                missed = f"its L0 is {found['l0']:.1f} on what is held out; train longer to come nearer"
                progress.say(f"{sae.cfg.name}:\n  {missed}")  # two lines of at most 80 columns
        return self.results

    def _step(self, trainer: Trainer, rows: dict[str, Tensor], step: int, is_log_step: bool) -> dict[str, float]:
        """Train one SAE on its hook's rows; returns its metrics on log steps."""
        sae = trainer.sae
        if trainer.steps > step:  # it took this step before another SAE ran out of memory
            return {}
        x = side_by_side(rows, sae.cfg.reads).to(sae.W_dec.device)
        y = None if sae.y_is_x else side_by_side(rows, sae.cfg.writes).to(sae.W_dec.device)
        out = trainer.step(x, step, y)
        if not is_log_step:
            return {}
        return training_metrics(sae, x if y is None else y, out) | {"train/lr": learning_rate(sae.cfg, step)}

    def _evaluate(self, done: int) -> None:
        self.results = evaluate(self.held_out, self.saes)
        self._log(done, [{f"eval/{name}": value for name, value in found.items()} for found in self.results])

    def _log(self, done: int, of_saes: list[dict[str, float]], of_all: Mapping[str, float] = {}) -> None:
        for index, metrics in enumerate(of_saes):
            if self.log is not None and metrics:
                self.log.log(index, done, done * self.cfg.batch_size, metrics | of_all)

    def _is_due(self, done: int) -> bool:
        """Say whether to save the state: every resume_freq steps, or as often as takes 1% of the time."""
        freq = self.cfg.resume_freq
        return time.perf_counter() >= self.next_save if freq is None else done % freq == 0

    def _save_state(self, done: int) -> None:
        began = time.perf_counter()
        self._raise_failures(done)
        trained = {str(i): trainer.state() for i, trainer in enumerate(self.trainers)}
        self.log.save_state({"step": done, "trainers": trained, "store": self.store.state})
        now = time.perf_counter()
        self.next_save = now + max(FIRST_SAVE_SECONDS, 100 * (now - began))

    @contextlib.contextmanager
    def _saving_on_failure(self, done: int, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Save the state where the text cannot be read or memory runs out, so that --resume goes on from there."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if isinstance(error, RuntimeError) and not memory:
                raise
            undo()
            if self.log is not None and 0 < done < self.cfg.num_steps and ranks.count() == 1:
                self._save_state(done)
            lower = f"batch_size = {self.cfg.batch_size}, dict_size or eval_windows, or with fewer SAEs"
            problem = f"out of memory in step {done + 1}; free memory, or begin again with a lower {lower}"
            require(not memory, problem, MemoryError)
            raise

    def _raise_failures(self, done: int) -> None:
        """Save the other SAEs where one met a number that is not finite, and say so."""
        failures = {trainer: failure for trainer in self.trainers if (failure := trainer.failure())}
        if not failures:
            return
        others = [trainer for trainer in self.trainers if trainer not in failures]
        for trainer in others if self.log is not None else []:
            self.log.checkpoint(trainer.sae, done)
        ranks.any_of(False)  # none ends before the first has saved them
        saved = f"; the other {len(others)} SAEs were saved" if others and self.log is not None else ""
        (trainer, failure), *_ = failures.items()
        raise FloatingPointError(
            f"{trainer.cfg.name}: {failure}; lower lr = {trainer.cfg.peak_lr:.3g}, or take another dtype where"
            f" activations overflow; its last checkpoint is as it was{saved}"
        )


def heading(cfgs: list[Config]) -> str:
    """Say of dictionaries that share a stream how many they are, and on which activations."""
    cfg, hooks = cfgs[0], list(widths_of(cfgs))
    where = f"{cfg.model_name} {hooks[0]}" if len(hooks) == 1 else f"{len(hooks)} hooks of {cfg.model_name}"
    return f"{number_of(cfgs)} on {where}, {cfg.num_steps * cfg.batch_size:,} activations"


def _ranges(of_saes: list[dict[str, float]], metrics: dict[str, str]) -> str:
    """Write metrics with their labels, from the lowest to the highest of the SAEs."""
    parts = []
    for name, label in metrics.items():
        values = sorted(found[name] for found in of_saes if found)
        low, high = (f"{values[end]:.3g}" for end in (0, -1))
        parts.append(f"{label} {low}" if low == high else f"{label} {low} to {high}")
    return ", ".join(parts)
