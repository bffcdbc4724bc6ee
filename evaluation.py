"""Pure metric functions, and the language model with an SAE's reconstructions in the place of its activations.

A metric is one function here: added to a tuple below, it is accumulated over the text, logged, and a column of the
table in results.py under its own name. Names that begin with _ are intermediate. Averages are of what an SAE makes of
rows of activations (Rows), or of what the model then predicts (Predictions); derived metrics are made from averages.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import sparse
from language_model import Model, ordinary_positions, replacing
from runtime import ranks
from runtime.checks import require
from sae import BaseAutoencoder, SAEOutput

MAX_LOGITS, MAX_LOGITS_ON_GPU = 1 << 22, 1 << 26  # in one forward pass; fresh memory costs a CPU page faults


class Rows(NamedTuple):
    """Some activations, and what an SAE makes of them."""

    sae: BaseAutoencoder
    x: Float[Tensor, "rows act_size"]
    out: SAEOutput


class Predictions(NamedTuple):
    """What the model predicts with something else for its activations, beside what it predicts as it is."""

    targets: Int[Tensor, "prediction"]
    p: Float[Tensor, "prediction vocab"]  # as it is
    entropy: Float[Tensor, "prediction"]  # of p
    logits: Float[Tensor, "prediction vocab"]
    log_z: Float[Tensor, "prediction"]  # of these: the logarithm of the sum of their exponentials

    @classmethod
    def of(cls, targets: Tensor, logits: Tensor, clean: "Predictions | None" = None) -> "Predictions":
        """Compare with `clean`; without it these are the predictions of the model as it is."""
        log_z = logits.logsumexp(dim=-1)
        if clean is not None:
            return cls(targets, clean.p, clean.entropy, logits, log_z)
        p = (logits - log_z[:, None]).exp_()
        return cls(targets, p, log_z - torch.linalg.vecdot(p, logits), logits, log_z)


# ---- averages over rows ----


def l0(seen: Rows) -> Tensor:
    """Count the latents that fire, per row."""
    return (seen.out.latents.acts > 0).sum() / len(seen.x)


def l1(seen: Rows) -> Tensor:
    """Sum the latents, per row."""
    return seen.out.latents.acts.sum() / len(seen.x)


def mse(seen: Rows) -> Tensor:
    """Average the squared error of the output, in the SAE's normalised space."""
    return (seen.out.latents.y_hats[-1] - seen.sae.normalise(seen.x)[0]).pow(2).mean()


def _squared_error(seen: Rows) -> Tensor:
    return (seen.x - seen.out.sae_out).double().pow(2).sum() / len(seen.x)


def _mean_x(seen: Rows) -> Tensor:
    return seen.x.double().mean(dim=0)


def _power(seen: Rows) -> Tensor:
    return seen.x.double().pow(2).sum() / len(seen.x)


# ---- averages over predictions, in nats per token ----


def ce(seen: Predictions) -> Tensor:
    """Measure the cross-entropy of the next token with the SAE's reconstructions in the model."""
    return (seen.log_z - seen.logits.gather(1, seen.targets[:, None]).squeeze(1)).mean()


def kl(seen: Predictions) -> Tensor:
    """Measure how far the spliced model's prediction is from the clean one's: KL(clean || spliced)."""
    return (seen.log_z - torch.linalg.vecdot(seen.p, seen.logits) - seen.entropy).mean()


# ---- derived from averages ----


def explained_variance(mean: SimpleNamespace) -> Tensor:
    """Compute 1 - sum (x - x_hat)^2 / sum (x - mean(x))^2, over rows and width together."""
    return 1 - mean._squared_error / (mean._power - mean._mean_x.pow(2).sum())


def dead_share(mean: SimpleNamespace) -> Tensor:
    """Give the share of the latents that training found dead."""
    return mean.sae.dead.double().mean()


def ce_degradation(mean: SimpleNamespace) -> Tensor:
    """Compute ce - ce_clean: positive is worse."""
    return mean.ce - mean.ce_clean


def ce_recovered(mean: SimpleNamespace) -> Tensor:
    """Compute (ce_zero - ce) / (ce_zero - ce_clean), the share of zero ablation's loss that the SAE wins back."""
    return (mean.ce_zero - mean.ce) / (mean.ce_zero - mean.ce_clean)


def ce_recovered_mean(mean: SimpleNamespace) -> Tensor:
    """Compute (ce_mean - ce) / (ce_mean - ce_clean): the same against mean ablation."""
    return (mean.ce_mean - mean.ce) / (mean.ce_mean - mean.ce_clean)


OF_ROWS = (l0, l1, mse, _squared_error)
OF_ACTIVATIONS = (_mean_x, _power)  # the same for all SAEs that read them
OF_PREDICTIONS = (ce, kl)
CE_OF_TEXT = ("ce_clean", "ce_zero", "ce_mean")  # the same for all SAEs of a hook
DERIVED_OF_ROWS = (explained_variance, dead_share)
DERIVED = (*DERIVED_OF_ROWS, ce_degradation, ce_recovered, ce_recovered_mean)


class Averages:
    """Means of metrics over all of a text, from their means over batches."""

    def __init__(self, sums: Mapping[str, Tensor] = {}) -> None:
        """Begin with zeros for what must be there in every process, whether or not it gets a batch."""
        self._sums, self._weights = dict(sums), dict.fromkeys(sums, 0)

    def add(self, metrics: Iterable[Callable[[Any], Tensor]], seen: Rows | Predictions, weight: int) -> None:
        """Take in each metric of a batch of so many rows or predictions."""
        for metric in metrics:
            self.add_value(metric.__name__, metric(seen), weight)

    def add_value(self, name: str, value: Tensor, weight: int) -> None:
        """Take in the mean of a batch."""
        before = self._sums.get(name, torch.zeros(())).to(value.device)
        self._sums[name] = before + value.double() * weight
        self._weights[name] = self._weights.get(name, 0) + weight

    def means(self) -> dict[str, Tensor]:
        """Divide by the weights, over all processes that share the text."""
        counts = ranks.mean(torch.tensor([float(weight) for weight in self._weights.values()], dtype=torch.float64))
        return {name: ranks.mean(total).cpu() / count for (name, total), count in zip(self._sums.items(), counts)}


def _finish(
    sae: BaseAutoencoder, means: dict[str, Tensor], derived: Iterable[Callable[[SimpleNamespace], Tensor]]
) -> dict[str, float]:
    """Name the metrics: the averages, and what is derived from them."""
    known = SimpleNamespace(sae=sae, **means)
    found = means | {metric.__name__: metric(known) for metric in derived}
    return {name: float(value) for name, value in found.items() if not name.startswith("_")}


@torch.no_grad()
def training_metrics(sae: BaseAutoencoder, x: Float[Tensor, "batch act_size"], out: SAEOutput) -> dict[str, float]:
    """Measure one training batch, over all processes that share it; this waits for the device."""
    averages = Averages()
    averages.add_value("loss", out.loss, len(x))
    for name, term in out.losses.items():
        averages.add_value(f"{name}_loss", term, len(x))
    averages.add((*OF_ROWS, *OF_ACTIVATIONS), Rows(sae, x.to(out.sae_out.dtype), out), len(x))
    return {f"train/{name}": value for name, value in _finish(sae, averages.means(), DERIVED_OF_ROWS).items()}


@contextlib.contextmanager
def evaluation_mode(*saes: BaseAutoencoder) -> Iterator[None]:
    """Put the SAEs into evaluation mode within, and leave them as they were, whatever happens."""
    with contextlib.ExitStack() as stack:
        for sae in saes:
            stack.callback(sae.train, sae.training)
            sae.eval()
        yield


@torch.no_grad()
def evaluate(
    model: Model,
    saes: list[BaseAutoencoder],
    tokens: Int[Tensor, "window pos"],
    mean: Float[Tensor, "act_size"],
) -> list[dict[str, float]]:
    """Compute each SAE's metrics on `tokens`, which no training text should hold; all SAEs read the same hook.

    tokens [window, pos] on any device; mean [act_size], on the model's: the activations' mean over training text.
    Special positions (BOS, EOS, padding) are neither replaced nor measured, nor is what the model predicts there.
    Returns for each SAE every metric above by its name, and beside them, in nats per token, the model's cross-entropy
    as it is (ce_clean), with zeros (ce_zero) and with the mean (ce_mean) for its activations.
    Processes that share batches share the windows too: all must call this, and all get the metrics of the whole.
    Raises: ValueError when tokens or mean do not fit the model, or no position can be measured.
    """
    check_tokens(model, tokens)
    act_size, hook = saes[0].cfg.act_size, saes[0].cfg.hook_name
    fits = mean.shape == (act_size,) and mean.isfinite().all()
    require(fits, f"mean = {mean.dtype} {list(mean.shape)}: give {act_size} finite numbers, the store's mean")
    predicted = ordinary_positions(tokens, model.tokenizer)[:, :-1].any()
    require(predicted, f"tokens = {list(tokens.shape)}: special ones only; give held-out text")
    zero = mean.new_zeros((), dtype=torch.float64)
    of_text = Averages({"_mean_x": zero.expand(act_size)} | dict.fromkeys(("_power", *CE_OF_TEXT), zero))
    of_saes = [Averages({metric.__name__: zero for metric in (*OF_ROWS, *OF_PREDICTIONS)}) for _ in saes]
    share = tokens[ranks.rank() :: ranks.count()].to(mean.device)
    with evaluation_mode(*saes):
        for batch in batches(share, model.cfg.d_vocab):
            replaced = ordinary_positions(batch, model.tokenizer)
            counted = replaced[:, :-1]  # the last position of a window predicts nothing that is known
            if not counted.any():
                continue
            targets = batch[:, 1:][counted]

            def predict(
                rows: Tensor | None, batch: Tensor = batch, replaced: Tensor = replaced, counted: Tensor = counted
            ) -> tuple[Float[Tensor, "prediction vocab"], Float[Tensor, "row act_size"]]:
                """Predict with these rows for the activations at ordinary positions; return those there were, too."""
                found = torch.empty(0)

                def change(acts: Tensor) -> Tensor:
                    nonlocal found
                    found = acts[replaced]
                    return acts if rows is None else acts.index_put((replaced,), rows.to(acts))

                with replacing(model, {hook: change}):
                    logits = model(batch, return_type="logits")
                return logits[:, :-1][counted].float(), found.float()

            logits, x = predict(None)
            clean = Predictions.of(targets, logits)
            of_text.add(OF_ACTIVATIONS, Rows(saes[0], x, None), len(x))
            of_text.add_value("ce_clean", ce(clean), len(targets))
            for name, rows in (("ce_zero", torch.zeros_like(x)), ("ce_mean", mean.expand_as(x))):
                of_text.add_value(name, ce(Predictions.of(targets, predict(rows)[0], clean)), len(targets))
            for sae, averages in zip(saes, of_saes):
                out = sae(x.to(sae.W_dec.device))
                averages.add(OF_ROWS, Rows(sae, x.to(sae.W_dec.device), out), len(x))
                spliced = Predictions.of(targets, predict(out.sae_out.to(x.device))[0], clean)
                averages.add(OF_PREDICTIONS, spliced, len(targets))
    means = of_text.means()
    return [_finish(sae, means | averages.means(), DERIVED) for sae, averages in zip(saes, of_saes)]


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
