"""Pure metric functions, and the language model with reconstructions in the place of its activations.

A metric is one function here: added to a tuple below, it is summed over the text in float64, logged, and a column of
the table in results.py under its own name. Names that begin with _ are intermediate. A metric is a number for each row
of activations (of Rows) or for each next token that the model predicts (of Predictions), and is averaged over all of
them; or it is made from such averages, or from how often each latent fires (Firing).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from config import Config
from kernels import sparse
from language_model import Model, computing_once, logits_at, ordinary_positions, record, replacing, side_by_side
from runtime import ranks
from runtime.checks import require
from sae import BaseAutoencoder, SAEOutput

ROWS = 4096  # of recorded activations at a time
MAX_LOGITS, MAX_LOGITS_ON_GPU = 1 << 22, 1 << 26  # in one forward pass; fresh memory costs a CPU page faults
DENSE = 0.1  # a latent that fires on a larger share of the rows


class Rows(NamedTuple):
    """Some activations, and what an SAE makes of them. Where it reconstructs others than it reads, y are those."""

    sae: BaseAutoencoder
    y: Float[Tensor, "row d_out"]  # in float64, as are y_hat and mean
    y_hat: Float[Tensor, "row d_out"]
    mean: Float[Tensor, "d_out"]  # of all rows of the text
    out: SAEOutput

    @classmethod
    def of(cls, sae: BaseAutoencoder, y: Tensor, mean: Tensor, out: SAEOutput) -> "Rows":
        """Look at them in float64, and at the hooks of a crosscoder each in its own scale, as its loss does."""
        unit = sae.hook_scales.double().repeat_interleave(sae.cfg.act_size) if len(sae.cfg.layers) > 1 else 1.0
        return cls(sae, y.double() / unit, out.sae_out.double() / unit, mean / unit, out)


class Predictions(NamedTuple):
    """What the model predicts with something else for its activations, beside what it predicts as it is."""

    targets: Int[Tensor, "prediction"]
    p: Float[Tensor, "prediction vocab"]  # as it is
    entropy: Float[Tensor, "prediction"]  # of p
    top: Int[Tensor, "prediction 1"]  # the likeliest by p
    logits: Float[Tensor, "prediction vocab"]
    log_z: Float[Tensor, "prediction"]  # of these: the logarithm of the sum of their exponentials

    @classmethod
    def of(cls, targets: Tensor, logits: Tensor, clean: "Predictions | None" = None) -> "Predictions":
        """Compare with `clean`; without it these are the predictions of the model as it is."""
        log_z = logits.logsumexp(dim=1)
        if clean is not None:
            return cls(targets, clean.p, clean.entropy, clean.top, logits, log_z)
        p = (logits - log_z[:, None]).exp_()
        return cls(targets, p, log_z - torch.linalg.vecdot(p, logits), logits.argmax(1, True), logits, log_z)


class Firing(NamedTuple):
    """How often an SAE's latents fire."""

    sae: BaseAutoencoder
    density: Float[Tensor, "dict_size"]  # the share of the rows on which each fires
    rows_by_l0: Float[Tensor, "dict_size_plus_1"]  # the number of rows on which 0, 1, 2, ... of them fire


# ---- of each row ----


def l0(seen: Rows) -> Float[Tensor, "row"]:
    """Count the latents that fire."""
    return _per_row(seen, seen.out.latents.values > 0)


def l1(seen: Rows) -> Float[Tensor, "row"]:
    """Sum the latents, in units of the activations."""
    return _per_row(seen, seen.out.latents.values)


def _per_row(seen: Rows, values: Tensor) -> Tensor:
    return torch.bincount(seen.out.latents.rows, values.double(), len(seen.y)).double()  # integers where nothing fires


def mse(seen: Rows) -> Float[Tensor, "row"]:
    """Average the squared error of the output over its width, in the SAE's normalised space."""
    target = seen.sae.target(seen.y) if len(seen.sae.cfg.layers) == 1 else seen.y
    return (seen.out.latents.y_hats[-1] - target).double().pow(2).mean(dim=1)


def normalised_mse(seen: Rows) -> Float[Tensor, "row"]:
    """Compute |y - y_hat|^2 / |y|^2 (the loss of Gao et al.'s code, openai/sparse_autoencoder)."""
    return (seen.y - seen.y_hat).pow(2).sum(dim=1) / seen.y.pow(2).sum(dim=1)


def cosine(seen: Rows) -> Float[Tensor, "row"]:
    """Compute the cosine of y and y_hat."""
    return torch.cosine_similarity(seen.y, seen.y_hat, dim=1)


def l2_ratio(seen: Rows) -> Float[Tensor, "row"]:
    """Compute |y_hat| / |y|: below 1 the output is too small (SAELens' l2_ratio)."""
    return seen.y_hat.norm(dim=1) / seen.y.norm(dim=1)


def _squared_error(seen: Rows) -> Tensor:
    return (seen.y - seen.y_hat).pow(2).sum(dim=1)


def _variation(seen: Rows) -> Tensor:
    return (seen.y - seen.mean).pow(2).sum(dim=1)


def _output_power(seen: Rows) -> Tensor:
    return seen.y_hat.pow(2).sum(dim=1)


def _overlap(seen: Rows) -> Tensor:
    return torch.linalg.vecdot(seen.y, seen.y_hat)


# ---- of each prediction ----


def ce(seen: Predictions) -> Float[Tensor, "prediction"]:
    """Measure the cross-entropy of the next token with the SAE's reconstructions in the model, in nats."""
    return seen.log_z - seen.logits.gather(1, seen.targets[:, None]).squeeze(1)


def kl(seen: Predictions) -> Float[Tensor, "prediction"]:
    """Measure how far the spliced model's prediction is from the clean one's: KL(clean || spliced), in nats."""
    return seen.log_z - torch.linalg.vecdot(seen.p, seen.logits) - seen.entropy


def top1_agreement(seen: Predictions) -> Float[Tensor, "prediction"]:
    """Say whether the spliced model's likeliest token is the clean one's."""
    return (seen.logits.gather(1, seen.top).squeeze(1) == seen.logits.amax(dim=1)).double()


# ---- derived from averages ----


def explained_variance(mean: SimpleNamespace) -> Tensor:
    """Compute 1 - sum (y - y_hat)^2 / sum (y - mean(y))^2, over rows and width together."""
    return 1 - mean._squared_error / mean._variation


def relative_bias(mean: SimpleNamespace) -> Tensor:
    """Compute sum |y_hat|^2 / sum y_hat . y, the factor by which y_hat is too long (Rajamanoharan et al. 2024).

    That is the gamma that minimises the sum of |y_hat / gamma - y|^2 (arXiv:2404.16014).
    """
    return mean._output_power / mean._overlap


def ce_degradation(mean: SimpleNamespace) -> Tensor:
    """Compute ce - ce_clean: positive is worse."""
    return mean.ce - mean.ce_clean


def ce_recovered(mean: SimpleNamespace) -> Tensor:
    """Compute (ce_zero - ce) / (ce_zero - ce_clean), the share of zero ablation's loss that the SAE wins back."""
    return (mean.ce_zero - mean.ce) / (mean.ce_zero - mean.ce_clean)


def ce_recovered_mean(mean: SimpleNamespace) -> Tensor:
    """Compute (ce_mean - ce) / (ce_mean - ce_clean): the same against mean ablation."""
    return (mean.ce_mean - mean.ce) / (mean.ce_mean - mean.ce_clean)


# ---- of how often latents fire ----


def dead_share(firing: Firing) -> Tensor:
    """Give the share of the latents that training found dead."""
    return firing.sae.dead.double().mean()


def silent_share(firing: Firing) -> Tensor:
    """Give the share of the latents that fire on no row of this text; the others are alive."""
    return (firing.density == 0).double().mean()


def dense_share(firing: Firing) -> Tensor:
    """Give the share of the latents that fire on more than a tenth of the rows."""
    return (firing.density > DENSE).double().mean()


def l0_p5(firing: Firing) -> Tensor:
    """Give the L0 that 5% of the rows do not exceed."""
    return _quantile(firing, 0.05)


def l0_median(firing: Firing) -> Tensor:
    """Give the L0 that half of the rows do not exceed."""
    return _quantile(firing, 0.5)


def l0_p95(firing: Firing) -> Tensor:
    """Give the L0 that 95% of the rows do not exceed."""
    return _quantile(firing, 0.95)


def _quantile(firing: Firing, share: float) -> Tensor:
    at_most = firing.rows_by_l0.cumsum(dim=0)
    return (at_most >= share * at_most[-1]).int().argmax()


OF_ROWS = (l0, l1, mse, normalised_mse, cosine, l2_ratio, _squared_error, _variation, _output_power, _overlap)
OF_PREDICTIONS = (ce, kl, top1_agreement)
CE_OF_TEXT = ("ce_clean", "ce_zero", "ce_mean")  # the same for all SAEs of a hook
DERIVED_OF_ROWS = (explained_variance, relative_bias)
DERIVED = (*DERIVED_OF_ROWS, ce_degradation, ce_recovered, ce_recovered_mean)
OF_FIRING = (dead_share, silent_share, dense_share, l0_p5, l0_median, l0_p95)


def averages(sums: Mapping[str, Float[Tensor, "*resample"]]) -> dict[str, Float[Tensor, "*resample"]]:
    """Make the metrics of rows and predictions from their sums over all windows of a text, or over some."""
    of_rows = {metric.__name__ for metric in OF_ROWS}
    summed = [name for name in sums if name not in ("_rows", "_predictions")]
    means = {name: sums[name] / sums["_rows" if name in of_rows else "_predictions"] for name in summed}
    return _with_derived(means, DERIVED if "ce" in means else DERIVED_OF_ROWS)


def _with_derived(
    means: dict[str, Tensor], derived: Iterable[Callable[[SimpleNamespace], Tensor]]
) -> dict[str, Tensor]:
    known = SimpleNamespace(**means)
    found = means | {metric.__name__: metric(known) for metric in derived}
    return {name: value for name, value in found.items() if not name.startswith("_")}


@torch.no_grad()
def training_metrics(sae: BaseAutoencoder, y: Float[Tensor, "batch d_out"], out: SAEOutput) -> dict[str, float]:
    """Measure one training batch, over all processes that share it; this waits for the device."""
    seen = Rows.of(sae, y, ranks.mean(y.double().mean(dim=0)), out)
    of_share = {"loss": out.loss} | {f"{name}_loss": term for name, term in out.losses.items()}
    of_share |= {metric.__name__: metric(seen).mean() for metric in OF_ROWS}
    of_batch = ranks.mean(torch.stack([value.double() for value in of_share.values()])).cpu()
    found = _with_derived(dict(zip(of_share, of_batch)), DERIVED_OF_ROWS) | {"dead_share": sae.dead.double().mean()}
    return {f"train/{name}": float(value) for name, value in found.items()}


@contextlib.contextmanager
def evaluation_mode(*saes: BaseAutoencoder) -> Iterator[None]:
    """Put the SAEs into evaluation mode within, and leave them as they were, whatever happens."""
    with contextlib.ExitStack() as stack:
        for sae in saes:
            stack.callback(sae.train, sae.training)
            sae.eval()
        yield


class Batch(NamedTuple):
    """Some windows of a text."""

    windows: slice
    tokens: Int[Tensor, "window pos"]
    reads: Bool[Tensor, "window pos"]  # where a dictionary reads
    predicts: Bool[Tensor, "window pos"]  # of these, where the next token is known

    @property
    def targets(self) -> Int[Tensor, "prediction"]:
        return self.tokens.roll(-1, dims=1)[self.predicts]


Hooks = tuple[str, ...]


class OfHooks(NamedTuple):
    """Hold what is known of some hooks on a text.

    sums: the number of each window's rows and predictions, and over the latter the model's cross-entropy as it is
    (ce_clean), and with zeros (ce_zero) or the text's mean (ce_mean) for the activations at all of these hooks.
    """

    mean: Float[Tensor, "d_out"]  # of the activations, in float64
    sums: dict[str, Float[Tensor, "window"]]


class HeldOut:
    """Hold the text that SAEs are evaluated on, and what is the same at every evaluation.

    tokens [window, pos] on any device, which no training text should hold. Special positions (BOS, EOS, padding) are
    neither replaced nor measured, nor is what the model predicts there. Processes that share batches share the windows
    too.
    Raises: ValueError when the tokens do not fit the model, or no position can be measured.
    """

    def __init__(self, model: Model, tokens: Int[Tensor, "window pos"]) -> None:
        check_tokens(model, tokens)
        reads = ordinary_positions(tokens, model.tokenizer)
        require(reads[:, :-1].any(), f"tokens = {list(tokens.shape)}: special ones only; give held-out text")
        predicts = reads.clone()
        predicts[:, -1] = False
        self.model, self.batches, self.windows = model, [], 0
        self._of_hooks: dict[Hooks, OfHooks] = {}
        own = [t[ranks.rank() :: ranks.count()].to(model.cfg.device) for t in (tokens, reads, predicts)]
        for parts in zip(*(batches(t, model.cfg.d_vocab) for t in own)):
            batch = Batch(slice(self.windows, self.windows + len(parts[0])), *parts)
            self.windows = batch.windows.stop
            if batch.predicts.any():
                self.batches.append(batch)

    def of(self, cfg: Config) -> OfHooks:
        """Look up what is known of the hooks that a dictionary writes; measured once."""
        if cfg.writes not in self._of_hooks:
            mean = self._mean(cfg)
            self._of_hooks[cfg.writes] = OfHooks(mean, self._sums(cfg, mean))
        return self._of_hooks[cfg.writes]

    def _mean(self, cfg: Config) -> Float[Tensor, "d_out"]:
        rows = torch.zeros((), dtype=torch.float64, device=self.model.cfg.device)
        total = rows.new_zeros(cfg.d_out)
        for batch in self.batches:
            y = side_by_side(record(self.model, batch.tokens, cfg.writes), cfg.writes)[batch.reads]
            total += y.double().sum(dim=0)
            rows += len(y)
        ranks.add_([total, rows])
        return total / rows

    def _sums(self, cfg: Config, mean: Float[Tensor, "d_out"]) -> dict[str, Float[Tensor, "window"]]:
        sums = {name: mean.new_zeros(self.windows) for name in ("_rows", "_predictions", *CE_OF_TEXT)}
        for batch in self.batches:
            sums["_rows"][batch.windows] = batch.reads.sum(dim=1).double()
            sums["_predictions"][batch.windows] = batch.predicts.sum(dim=1).double()
            with computing_once(self.model, cfg.layers[0]):
                for name, rows in zip(CE_OF_TEXT, (None, torch.zeros_like(mean), mean)):
                    seen = Predictions.of(batch.targets, self.predict(batch, cfg.writes, rows)[0])
                    sums[name][batch.windows] = by_window(ce(seen), batch.predicts)
        return sums

    def predict(
        self, batch: Batch, hooks: Hooks, rows: Float[Tensor, "*row width"] | None = None
    ) -> tuple[Float[Tensor, "prediction vocab"], dict[str, Float[Tensor, "row act_size"]]]:
        """Predict with these rows for the activations at the hooks or, without rows, return the activations too."""
        found: dict[str, Tensor] = {}
        parts = () if rows is None else rows.chunk(len(hooks), dim=-1)

        def change(acts: Tensor, hook: str) -> Tensor:
            if parts:
                return acts.index_put((batch.reads,), parts[hooks.index(hook)].to(acts))
            found[hook] = acts[batch.reads].float()
            return acts

        with replacing(self.model, {hook: partial(change, hook=hook) for hook in hooks}):
            logits = logits_at(self.model, batch.tokens, batch.predicts)
        return logits.float(), found

    def add(self, batch: Batch, tallies: list["Tally"]) -> None:
        """Add a batch to what is known of SAEs that read the same hooks and write the same."""
        cfg = tallies[0].sae.cfg
        with computing_once(self.model, cfg.layers[0]):
            logits, acts = self.predict(batch, tuple({*cfg.reads, *cfg.writes}))
            clean = Predictions.of(batch.targets, logits)
            x, y = side_by_side(acts, cfg.reads), side_by_side(acts, cfg.writes)
            for found in tallies:
                y_hat = found.add_rows(x, y, batch.windows, batch.reads)
                logits, _ = self.predict(batch, cfg.writes, y_hat)
                found.add(Predictions.of(batch.targets, logits, clean), batch.windows, batch.predicts)


class HeldOutRows:
    """Hold recorded activations that dictionaries are evaluated on where there is no language model.

    rows: by hook. There are metrics of rows and of how often latents fire, none of predictions. Each row counts as a
    window. Processes that share batches share the rows too.
    """

    def __init__(self, rows: Mapping[str, Float[Tensor, "row act_size"]]) -> None:
        self.rows = {hook: acts[ranks.rank() :: ranks.count()] for hook, acts in rows.items()}
        self.count = len(next(iter(self.rows.values())))
        self.batches = [slice(start, min(start + ROWS, self.count)) for start in range(0, self.count, ROWS)]
        self._of_hooks: dict[Hooks, OfHooks] = {}

    def of(self, cfg: Config) -> OfHooks:
        """Look up what is known of the hooks that a dictionary writes; measured once."""
        if cfg.writes not in self._of_hooks:
            y = side_by_side(self.rows, cfg.writes)
            ones = torch.ones(self.count, dtype=torch.float64, device=y.device)
            total, rows = y.sum(dim=0, dtype=torch.float64), ones.sum()
            ranks.add_([total, rows])
            self._of_hooks[cfg.writes] = OfHooks(total / rows, {"_rows": ones})
        return self._of_hooks[cfg.writes]

    def add(self, batch: slice, tallies: list["Tally"]) -> None:
        """Add a batch to what is known of SAEs that read the same hooks and write the same."""
        cfg, rows = tallies[0].sae.cfg, {hook: acts[batch].float() for hook, acts in self.rows.items()}
        x = side_by_side(rows, cfg.reads)
        y = x if cfg.writes == cfg.reads else side_by_side(rows, cfg.writes)
        for found in tallies:
            found.add_rows(x, y, batch, torch.ones(len(x), 1, dtype=torch.bool, device=x.device))


def by_window(values: Float[Tensor, "position"], where: Bool[Tensor, "window pos"]) -> Float[Tensor, "window"]:
    """Sum what was found at some positions, in float64 and in an order that no batch changes."""
    return torch.zeros_like(where, dtype=torch.float64).masked_scatter_(where, values.double()).sum(dim=1)


class Tally:
    """What an SAE's metrics on a text are made of: sums over each window, and how often its latents fire."""

    def __init__(self, sae: BaseAutoencoder, held_out: HeldOut | HeldOutRows) -> None:
        known, F = held_out.of(sae.cfg), sae.cfg.dict_size
        self.sae, self.mean, like = sae, known.mean, known.sums["_rows"]
        metrics = (*OF_ROWS, *(OF_PREDICTIONS if "_predictions" in known.sums else ()))
        self.sums = known.sums | {metric.__name__: torch.zeros_like(like) for metric in metrics}
        self.fired, self.rows_by_l0 = like.new_zeros(F), like.new_zeros(F + 1)

    def add_rows(
        self,
        x: Float[Tensor, "row d_in"],
        y: Float[Tensor, "row d_out"],
        windows: slice,
        where: Bool[Tensor, "window pos"],
    ) -> Float[Tensor, "row d_out"]:
        """Take in the metrics of these windows' rows; returns their reconstructions."""
        x, y, mean = (acts.to(self.sae.W_dec.device) for acts in (x, y, self.mean))
        out = self.sae(x, y)
        self.add(Rows.of(self.sae, y, mean, out), windows, where)
        return out.sae_out

    def add(self, seen: Rows | Predictions, windows: slice, where: Bool[Tensor, "window pos"]) -> None:
        """Take in the metrics of these windows' rows or predictions."""
        for metric in OF_ROWS if isinstance(seen, Rows) else OF_PREDICTIONS:
            self.sums[metric.__name__][windows] = by_window(metric(seen).to(where.device), where)
        if isinstance(seen, Rows):
            latents, F = seen.out.latents, self.sae.cfg.dict_size
            self.fired += torch.bincount(latents.indices, (latents.values > 0).double(), F).to(where.device)
            self.rows_by_l0 += torch.bincount(l0(seen).long(), minlength=F + 1).to(where.device)

    def metrics(self) -> dict[str, float]:
        """Make the metrics of the whole text, over all processes that share it."""
        totals = torch.stack([total.sum() for total in self.sums.values()])
        fired, by_l0 = self.fired.clone(), self.rows_by_l0.clone()
        ranks.add_([totals, fired, by_l0])
        firing = Firing(self.sae, fired / by_l0.sum(), by_l0)
        found = averages(dict(zip(self.sums, totals))) | {metric.__name__: metric(firing) for metric in OF_FIRING}
        return {name: float(value) for name, value in found.items()}


@torch.no_grad()
def tally(
    held_out: HeldOut | HeldOutRows, saes: Sequence[BaseAutoencoder], progress: Callable[[list], Iterable] = iter
) -> list[Tally]:
    """Sum the metrics of SAEs on what is held out; `progress` may wrap its batches, as tqdm does."""
    tallies = [Tally(sae, held_out) for sae in saes]
    alike: dict[tuple[Hooks, Hooks], list[Tally]] = {}
    for found in tallies:
        alike.setdefault((found.sae.cfg.reads, found.sae.cfg.writes), []).append(found)
    with evaluation_mode(*saes):
        for batch in progress(held_out.batches):
            for of_hooks in alike.values():
                held_out.add(batch, of_hooks)
    return tallies


def evaluate(held_out: HeldOut | HeldOutRows, saes: Sequence[BaseAutoencoder]) -> list[dict[str, float]]:
    """Compute each SAE's metrics on held-out text, whichever hooks it reads and writes.

    All hooks that a crosscoder writes are replaced at once: in the residual stream the last decides what is predicted.

    Returns for each SAE every metric above by its name, and beside them, in nats per token, the model's cross-entropy
    as it is (ce_clean), with zeros (ce_zero) and with the text's mean (ce_mean) for the activations it reconstructs.
    Of recorded rows there are no metrics of predictions.
    Processes that share the text must all call this, and all get the metrics of the whole.
    """
    return [found.metrics() for found in tally(held_out, saes)]


def check_tokens(model: Model, tokens: Tensor) -> None:
    """Raise ValueError when they are not windows of tokens that the model knows."""
    context, vocab, said = model.cfg.n_ctx, model.cfg.d_vocab, f"tokens = {tokens.dtype} {list(tokens.shape)}"
    windows = tokens.dtype == torch.int64 and tokens.ndim == 2 and len(tokens) and 2 <= tokens.shape[1] <= context
    require(windows, f"{said}: give int64 [window, pos], at least one window of 2 to {context} tokens")
    low, high = (int(token) for token in tokens.aminmax())
    known = f"tokens = {low} to {high}: the model knows 0 to {vocab - 1}; use its own tokenizer"
    require(0 <= low <= high < vocab, known)


def batches(tokens: Int[Tensor, "window pos"], width: int) -> Iterator[Int[Tensor, "window pos"]]:
    """Split windows into batches of at most MAX_LOGITS numbers, `width` of them at each position."""
    most = MAX_LOGITS_ON_GPU if sparse.on_gpu(tokens) else MAX_LOGITS
    yield from tokens.split(max(1, most // (tokens.shape[1] * width)))
