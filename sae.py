"""Sparse dictionaries. All types share BaseAutoencoder; a type says only how latents are chosen and what it penalises.

    x, y  = the activations at the hooks cfg.reads and cfg.writes, side by side; where these are the same, y is x
    z     = (x - mean) / (std + 1e-5) per token if input_unit_norm, else x        std unbiased
            x with each hook's part divided by its share of the scale, if there are several hooks; y likewise
    s     = sqrt(mean over batch and d_out of (y - mean(y))^2), of the first batch (of z, if y is x)
    v     = the variance of each row of y over d_out, at least s^2 / 10;  s^2 if y is not x, and in VanillaSAE
    pre   = (z - b_dec) W_enc + b_enc;   z W_enc + b_enc if y is not x
    f     = VanillaSAE     relu(pre)
            TopKSAE        relu of the k largest of each row
            BatchTopKSAE   relu of the k * B largest of the batch; in evaluation pre * [pre > threshold]
            JumpReLUSAE    pre * [pre > threshold_j]
            MatryoshkaSAE  as BatchTopKSAE
    y_hat = f W_dec + b_dec (+ z W_skip);   sae_out = y_hat * std + mean
    loss  = mean over batch and d_out of (y_hat - y)^2 / v
            + Vanilla      c * mean over batch of sum_j f_j ||W_dec_j|| / s
            + JumpReLU     10 (L0 / target_l0 - 1)^2         L0 = mean over batch of sum_j [pre_j > threshold_j]
            + all others   aux_penalty * AuxK, JumpReLU too
            Matryoshka     the mean of that error over nested y_hats, each of the latents below a width, + AuxK

Vanilla's c is steered so that target_l0 latents fire per token; where l1_coeff is given, c is l1_coeff and JumpReLU's
term is l1_coeff L0. All terms stay the same when the activations are multiplied by a number.

Sources: TopK and AuxK, Gao et al. 2024 (arXiv:2406.04093); BatchTopK, Bussmann et al. 2024 (arXiv:2412.06410);
JumpReLU, Rajamanoharan et al. 2024 (arXiv:2407.14435); the weighted L1, Conerly et al. 2024 (April update);
Matryoshka, Bussmann et al. 2025 (arXiv:2503.17547). JumpReLU's quadratic term is that of Rajamanoharan et al. 2024,
appendix F.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from config import TYPES, Config, setting
from kernels import choose, sparse, straight_through
from kernels.sparse import GradientMemory, Selection, SparseLatents
from runtime.checks import require

NORM_EPS = 1e-5
PROJECTED_ROWS = 1024  # at a time on a CPU: what is multiplied stays in its cache
TRANSCODER_START = 0.1  # of W_enc: as its decoder rows are random, its first outputs must be small
LEAST_VARIANCE = 0.1  # of a row, in units of s^2: rows near a constant would outweigh all others
AUXK_LEAST_VARIANCE = 1e-6
AUXK_LATENTS = 2  # times d_out: dead latents that are trained at a time
THRESHOLD_MEMORY = 0.9  # of BatchTopK's running mean: about the last ten batches
UNIT = 1e-4  # decoder rows whose norms differ from 1 by less have norm 1
L0_PENALTY = 10  # of JumpReLU, on the squared relative excess of L0
DEAD_THRESHOLD_DECAY = 0.99  # a step
L1_START, L1_GAIN, L1_INTEGRAL_GAIN, MOST_EXCESS = 0.5, 2.0, 0.2, 3.0  # of the controller of Vanilla's coefficient


@dataclass(frozen=True)
class SAEOutput:
    """What `sae(x)` returns: the reconstruction in y's space, the latents, and named, weighted loss terms."""

    sae_out: Float[Tensor, "*batch d_out"]
    latents: SparseLatents
    losses: dict[str, Float[Tensor, ""]]

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.losses.values())).sum()


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _directions(count: int, width: int, rng: torch.Generator) -> Float[Tensor, "count width"]:
    directions = torch.randn(count, width, generator=rng)
    return directions.div_(directions.norm(dim=1, keepdim=True))


def _check(name: str, acts: Tensor, width: int) -> None:
    fits = acts.is_floating_point() and acts.ndim >= 1 and acts.shape[-1] == width and acts.numel() > 0
    give = f"give floating-point activations [..., {width}], at least one row"
    require(fits, f"{name} = {acts.dtype} {list(acts.shape)}: {give}")


def _std(rows: Float[Tensor, "batch width"], mean: Callable[[Tensor], Tensor]) -> Float[Tensor, "width"]:
    """Compute each column's standard deviation; `mean` is that of the processes that share the batch."""
    return mean((rows - mean(rows.mean(dim=0))).pow(2).mean(dim=0)).sqrt()


class Lent(NamedTuple):
    """Hold what a trainer lends an SAE while it trains it. The defaults are for an SAE that nobody trains."""

    processes: int = 1
    mean: Callable[[Tensor], Tensor] = _alone  # over the processes that share a batch
    any: Callable[[Tensor], Tensor] = _alone
    num_dead: Callable[[], int | None] | None = None  # which does not wait for a GPU, as counting them would
    memory: GradientMemory = GradientMemory()
    unit_rows: bool = False  # whether the decoder rows are kept at norm 1, so that no loss needs their norms


class BaseAutoencoder(nn.Module):
    """Hold what the types share: parameters, normalisation, the decoder, the counters of dead latents.

    W_enc [d_in, dict_size] (stored latent by latent, so its gradient is written row by row like the decoder's),
    b_enc [dict_size], W_dec [dict_size, d_out] with rows of norm 1, b_dec [d_out]; W_skip [d_in, d_out] with cfg.skip.
    Raises ValueError when cfg does not give the width of each hook.
    """

    sae_type: ClassVar[str]

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        cfg = replace(cfg, sae_type=self.sae_type)
        require(cfg.act_size, "act_size = None: give the width of the activations, such as 768 for gpt2")
        require(cfg.target_size or not cfg.target_site, "target_size = None: give the width at target_site")
        self.cfg, self.uses_auxk = cfg, "aux_penalty" in cfg.type.fields
        self.y_is_x = cfg.target_site is None
        F, rng = cfg.dict_size, torch.Generator().manual_seed(cfg.seed)
        self.W_dec = nn.Parameter(_directions(F, cfg.d_out, rng))
        W_enc = self.W_dec.detach().clone() if self.y_is_x else _directions(F, cfg.d_in, rng)
        self.W_enc = nn.Parameter(W_enc.t())
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out))
        self.W_skip = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_out)) if cfg.skip else None
        self.register_buffer("tokens_since_fired", torch.zeros(F, dtype=torch.int64))
        # What initialise_from measures; 0 in a new SAE, below 0 in a loaded one whose scale is not known yet.
        self.register_buffer("input_scale", torch.zeros(()))
        if not self.y_is_x:
            self.register_buffer("target_scale", torch.zeros(()))
        if len(cfg.layers) > 1:
            self.register_buffer("hook_scales", torch.ones(len(cfg.layers)))  # of each hook, relative to all
        self.l1_coeff = cfg.l1_coeff  # a trainer lets it rise
        self.lent = Lent()

    @property
    def dict_size(self) -> int:
        """Count the latents. Other libraries' evaluations ask a dictionary for this, d_in and d_out."""
        return self.cfg.dict_size

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_out(self) -> int:
        return self.cfg.d_out

    def extra_repr(self) -> str:
        cfg = self.cfg
        hooks = ", ".join(dict.fromkeys((*cfg.reads, *cfg.writes)))
        return f"{cfg.d_in} -> {cfg.dict_size} -> {cfg.d_out}, {setting(cfg)}, {cfg.model_name} {hooks}"

    # ---- what a type says ----

    def select(self, centred: Float[Tensor, "batch d_in"]) -> Selection | None:
        """Choose the latents that can fire or receive gradient; None when they are so many that dense products win."""
        raise NotImplementedError

    def activate(self, code: SparseLatents) -> Tensor:
        """Turn code.pre into activations, on its support or dense.

        Dense ones follow the rule of evaluation: none of a row's latents depends on the other rows.
        """
        raise NotImplementedError

    def losses(
        self, z: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"], code: SparseLatents
    ) -> dict[str, Float[Tensor, ""]]:
        """Name the loss terms, weighted: first how far the reconstructions are from y, then what a type adds."""
        return {"mse": ((code.y_hats - y).pow(2).mean(dim=2) / self.variance(y)).mean()}

    @torch.no_grad()
    def variance(self, y: Float[Tensor, "batch d_out"]) -> Float[Tensor, "*batch"]:
        """Give the unit of each row's squared error: its own variance, so that rows of small norm count as all do.

        This recovers more known features than one unit for all rows (benchmarks/ground_truth.py). A transcoder uses one
        unit, as most of what it does is in the rows with a large target.
        """
        if not self.y_is_x:
            return self.scale.square()
        return y.var(dim=1, correction=0).clamp_min(LEAST_VARIANCE * self.scale.square())

    def reconstruct(self, code: SparseLatents, W_dec: Tensor) -> Float[Tensor, "nested batch d_out"]:
        """Decode the latents into the reconstructions that are compared with y, the output last."""
        if code.support is None:
            decoded = code.acts @ W_dec
        else:
            decoded = sparse.decode(code.acts, code.support, W_dec, self.lent.memory)
        return (decoded + self.b_dec)[None]

    # ---- the shared computation ----

    def forward(self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"] | None = None) -> SAEOutput:
        """Reconstruct y, which is x itself unless cfg has a target_site. No parameter, counter or threshold changes.

        A transcoder's output does not depend on y; without it there are no losses.
        Raises ValueError when x or y has another width, no rows or no floating-point numbers.
        """
        _check("x", x, self.cfg.d_in)
        z, std, mean = self.normalise(x.reshape(-1, x.shape[-1]))
        target = z if self.y_is_x else None if y is None else self.target(y)
        centred = self._centred(z).detach()
        selection = self.select(self._for_product(centred))
        W_enc, W_dec, dead = self._weights()
        if selection is None:
            pre, support = self._dense_product(z, W_enc, self.b_enc), None
        else:
            pre = sparse.pre_activations(z, W_enc, self.b_enc, self._centre, centred, selection, self.lent.memory)
            support = selection.support
        code = SparseLatents(pre, pre, support)
        code = replace(code, acts=self.activate(code))
        y_hats = self.reconstruct(code, W_dec)
        code = replace(code, y_hats=y_hats if self.W_skip is None else y_hats + z @ self.W_skip)
        y_hat = code.y_hats[-1]
        losses = {} if target is None else self.losses(z, target, code)
        if dead is not None and target is not None:
            losses["auxk"] = self.cfg.aux_penalty * self._auxk(z, (target - y_hat).detach(), *dead)
        return SAEOutput((y_hat * std + mean).view(*x.shape[:-1], -1), code, losses)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch dict_size"]:
        """Compute latents, dense, as in evaluation whatever the mode: a row's latents do not depend on its batch."""
        _check("x", x, self.cfg.d_in)
        pre = self._dense_product(self.normalise(x.reshape(-1, x.shape[-1]))[0], self.W_enc, self.b_enc)
        return self.activate(SparseLatents(pre, pre, None)).view(*x.shape[:-1], -1)

    def decode(self, acts: Float[Tensor, "*batch dict_size"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruct from latents, without a skip connection.

        This is y_hat: with input_unit_norm it lacks a token's mean and std, with several hooks the scale of each.
        """
        return acts @ self.W_dec + self.b_dec

    def normalise(self, x: Float[Tensor, "batch d_in"]) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Scale each token as cfg.input_unit_norm says, or each of several hooks to the same standard deviation.

        Returns z, and the std and mean that map a reconstruction back.
        """
        x = x.to(self.W_enc.dtype)
        if len(self.cfg.layers) > 1:
            std = self.hook_scales.repeat_interleave(self.cfg.act_size)
            return x / std, std, 0.0
        if not self.cfg.input_unit_norm:
            return x, 1.0, 0.0
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        return (x - mean) / (std + NORM_EPS), std, mean

    def target(self, y: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Return what y_hat is compared with: y normalised as x is, where y is x; else y itself."""
        _check("y", y, self.cfg.d_out)
        rows = y.reshape(-1, y.shape[-1])
        return self.normalise(rows)[0] if self.y_is_x else rows.to(self.W_dec.dtype)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The s in which losses and latents are measured; 1 before it is known."""
        scale = self.input_scale if self.y_is_x else self.target_scale
        return torch.where(scale > 0, scale, 1)

    @property
    def _centre(self) -> Tensor | None:
        """Return what is subtracted from z before it is encoded: b_dec if y is x, otherwise nothing."""
        return self.b_dec if self.y_is_x else None

    def _centred(self, z: Tensor) -> Tensor:
        return z if self._centre is None else z - self._centre

    def _dense_product(self, z: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        """Compute every pre-activation of normalised activations."""
        centred, bias = self._centred(z), b_enc
        if self.y_is_x and not z.requires_grad:
            # b_dec's gradient by a vector, not a batch: what is subtracted is 0, its gradient is not.
            centred = centred.detach()
            bias = b_enc - (self.b_dec - self.b_dec.detach()) @ W_enc.detach()
        return torch.addmm(*(self._for_product(factor) for factor in (bias, centred, W_enc))).to(z.dtype)

    def _for_product(self, matrix: Tensor) -> Tensor:
        return matrix.bfloat16() if self.cfg.product_dtype == "bfloat16" else matrix

    # ---- dead latents ----

    @property
    def dead(self) -> Bool[Tensor, "dict_size"]:
        """Latents that have not fired for `cfg.dead_after` training tokens."""
        return self.tokens_since_fired >= self.cfg.dead_after

    def _weights(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        """Take W_enc and W_dec for a forward pass, and W_enc, b_enc and W_dec of the dead latents where AuxK is due.

        Of many dead latents it takes those that have been so for longest: more would cost time and bring nothing.
        """
        if not (self.uses_auxk and self.training):
            return self.W_enc, self.W_dec, None
        count = self.lent.num_dead and self.lent.num_dead()
        count = int(self.dead.sum()) if count is None else count
        if count == 0:
            return self.W_enc, self.W_dec, None
        dead = self.tokens_since_fired.topk(min(count, AUXK_LATENTS * self.cfg.d_out)).indices
        W_enc, W_enc_dead = (w.t() for w in sparse.split_rows(self.W_enc.t(), dead))
        W_dec, W_dec_dead = sparse.split_rows(self.W_dec, dead)
        return W_enc, W_dec, (W_enc_dead, self.b_enc[dead], W_dec_dead)

    def _auxk(self, z: Tensor, error: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Float[Tensor, ""]:
        """Have the dead latents alone explain the live ones' error: AuxK (Gao et al. 2024, appendix A.2).

        It is the error's unexplained share, MSE(e_hat, e) / MSE(mean(e), e).
        """
        k, centred = self.cfg.top_k_aux or -(-self.cfg.d_out // 2), self._centred(z).detach()
        floor = torch.zeros_like(b_enc)
        selection = choose.above(self._for_product(centred), W_enc, b_enc, floor, choose.MAX_DENSITY)
        if selection is None:
            pre = self._dense_product(z, W_enc, b_enc)
            acts = torch.relu(pre)
            if pre.shape[1] > k:
                acts = acts * choose.topk_mask(pre, k)
            e_hat = acts @ W_dec
        else:
            selection = choose.at_most(selection, k)
            pre = sparse.pre_activations(z, W_enc, b_enc, self._centre, centred, selection)
            e_hat = sparse.decode(torch.relu(pre), selection.support, W_dec)
        unexplained = (e_hat - error).pow(2).mean()
        mean = self.lent.mean(error.mean(dim=0))
        variance, power = self.lent.mean(torch.stack([(error - mean).pow(2).mean(), error.pow(2).mean()]))
        # Less only where all rows are the same, or there is one; 0 where nothing is left to explain.
        least = (AUXK_LEAST_VARIANCE * power).clamp_min(torch.finfo(power.dtype).tiny)
        return (variance > least) * unexplained / variance.clamp_min(least)

    # ---- training ----

    @torch.no_grad()
    def initialise_from(self, x: Float[Tensor, "*batch d_in"], y: Float[Tensor, "*batch d_out"] | None = None) -> None:
        """Take the scales from a batch and, in a new SAE, b_dec (the mean of y) and what else its type starts from.

        Raises ValueError on an x or y that `forward` refuses.
        """
        _check("x", x, self.cfg.d_in)
        mean, rows = self.lent.mean, x.reshape(-1, x.shape[-1])
        is_new = bool(self.input_scale == 0)
        if len(self.cfg.layers) > 1 and is_new:
            of_hooks = _std(rows, mean).unflatten(0, (-1, self.cfg.act_size)).square().mean(dim=1).sqrt()
            self.hook_scales.copy_(torch.where(of_hooks > 0, of_hooks / of_hooks.square().mean().sqrt(), 1))
        z = self.normalise(rows)[0]
        self.input_scale.copy_(_std(z, mean).square().mean().sqrt())
        target = z if self.y_is_x else self.target(y)
        if not self.y_is_x:
            self.target_scale.copy_(_std(target, mean).square().mean().sqrt())
        if is_new:
            self.b_dec.copy_(mean(target.mean(dim=0)))
            if not self.y_is_x:
                self.W_enc *= TRANSCODER_START * self.units()["W_enc"]
                self.b_enc.copy_(-mean(z.mean(dim=0)) @ self.W_enc)
            self.begin(z)

    def begin(self, z: Float[Tensor, "batch d_in"]) -> None:
        """Set what else a new SAE of this type takes from its first batch."""

    def finish(self, z: Float[Tensor, "batch d_in"]) -> None:
        """Do what this type needs after the last step of training, on the batch of that step."""

    @torch.no_grad()
    def after_step(self, code: SparseLatents) -> None:
        """Move the counters of dead latents by the tokens of a training step, whose latents these were."""
        self.tokens_since_fired += len(code) * self.lent.processes
        self.tokens_since_fired.masked_fill_(self.lent.any(code.fired()), 0)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change the norms of its rows. Before the optimiser step."""
        assert self.W_dec.grad is not None
        rows = len(self.W_dec) if sparse.on_gpu(self.W_dec) else PROJECTED_ROWS
        for grad, w in zip(self.W_dec.grad.split(rows), self.W_dec.split(rows)):
            parallel = (grad * w).sum(dim=1, keepdim=True)  # rows of W_dec have norm 1
            grad.addcmul_(parallel, w, value=-1)

    @torch.no_grad()
    def units(self) -> dict[str, float]:
        """Give the unit of each parameter: s for those of latents or y, 1 for directions, that of y / x between them.

        In these units training is the same whatever the activations are multiplied by. Waits for the device.
        """
        scale = float(self.scale)
        from_x = 1.0 if self.y_is_x else scale / float(torch.where(self.input_scale > 0, self.input_scale, 1))
        others = {"W_enc": from_x, "W_skip": from_x, "W_dec": 1.0}
        return {name: others.get(name, scale) for name, _ in self.named_parameters()}

    @torch.no_grad()
    def constrain(self) -> None:
        """Put the parameters back where they must be: decoder rows of norm 1. After the optimiser step."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def fold_decoder_norms(self) -> Float[Tensor, "dict_size"]:
        """Measure each latent in units of its decoder row's norm, so that the rows have norm 1 and training can begin.

        The reconstruction stays what it was, except that TopK then ranks latents by what they add to it. Returns the
        factors by which the latents were multiplied: 1 where the norms were 1 already.
        """
        norms = self.W_dec.norm(dim=1)
        require(norms.all(), "W_dec has rows of zeros, which cannot be trained; give an SAE without them")
        if (norms - 1).abs().max() < UNIT:
            return torch.ones_like(norms)
        self.W_dec /= norms.unsqueeze(1)
        self.W_enc *= norms
        self.b_enc *= norms
        return norms


class PenalisedAutoencoder(BaseAutoencoder):
    """Hold what the types share that fire above a floor, and whose L0 a penalty decides."""

    @property
    def floor(self) -> Float[Tensor, "dict_size"]:
        """What a latent's pre-activation must exceed for it to fire."""
        raise NotImplementedError

    def raise_floor(self, amount: Float[Tensor, ""]) -> None:
        """Make all latents fire less often, or more often where the amount is below 0."""
        raise NotImplementedError

    @torch.no_grad()
    def meet(self, z: Float[Tensor, "batch d_in"], l0: int) -> None:
        """Raise or lower the floor of all latents by one number, so that `l0` of them fire per row of z."""
        margins = choose.largest(self._centred(z), self.W_enc, self.b_enc - self.floor, l0 * len(z))
        self.raise_floor(self.lent.mean(margins.pre.amin()))

    def begin(self, z: Float[Tensor, "batch d_in"]) -> None:
        """Let twice as many latents fire as should at the end: from too few, dead ones do not come back."""
        self.meet(z, min(2 * self.cfg.target_l0, self.cfg.dict_size))

    def finish(self, z: Float[Tensor, "batch d_in"]) -> None:
        """Take away what is left between the L0 of the last batch and target_l0."""
        if self.cfg.steers_l0:
            self.meet(z, self.cfg.target_l0)


class VanillaSAE(PenalisedAutoencoder):
    """ReLU latents and an L1 penalty, weighted by the norms of the decoder rows (which are 1 in training).

    steering (buffer, [2]): the integral and the latest value of the excess of L0 over target_l0, of which the
    coefficient is a sum: a PI controller. The sum may be below 0 for some steps in which too few latents fire.
    """

    sae_type = "vanilla"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.register_buffer("steering", torch.tensor([L1_START, 0.0]))

    @property
    def floor(self) -> Tensor:
        return torch.zeros_like(self.b_enc)

    def raise_floor(self, amount: Tensor) -> None:
        self.b_enc -= amount

    def select(self, centred: Tensor) -> Selection | None:
        return choose.above(centred, self.W_enc, self.b_enc, self.floor, choose.MAX_DENSITY)

    def activate(self, code: SparseLatents) -> Tensor:
        return torch.relu(code.pre)

    def variance(self, y: Tensor) -> Tensor:
        """Measure the errors of all rows in one unit, as the L1 norm is: with one each, fewer features are found."""
        return self.scale.square()

    def losses(self, z: Tensor, y: Tensor, code: SparseLatents) -> dict[str, Tensor]:
        weighted = code.acts if self.lent.unit_rows else code.acts * code.beside(self.W_dec.norm(dim=1))
        l1 = weighted.sum() / len(code) / self.scale
        return super().losses(z, y, code) | {"l1": self._coefficient() * l1}

    def _coefficient(self) -> Tensor | float:
        """Give l1_coeff or, where L0 is steered, a coefficient in the unit in which d and L0 do not matter.

        A latent that k of them share is worth about 1 / sqrt(d k) of L1 to the first loss.
        """
        if not self.cfg.steers_l0:
            return self.l1_coeff
        integral, excess = self.steering
        return (integral + L1_GAIN * excess) / math.sqrt(self.cfg.d_out * self.cfg.target_l0)

    @torch.no_grad()
    def after_step(self, code: SparseLatents) -> None:
        """Move the coefficient too."""
        super().after_step(code)
        l0 = self.lent.mean((code.acts > 0).sum() / len(code))
        excess = (l0 / self.cfg.target_l0 - 1).clamp(max=MOST_EXCESS)
        integral = (self.steering[0] + L1_INTEGRAL_GAIN * excess).clamp(min=0)
        self.steering.copy_(torch.stack([integral, excess]))


class TopKSAE(BaseAutoencoder):
    """The k largest pre-activations of each token, where positive."""

    sae_type = "topk"

    def select(self, centred: Tensor) -> Selection | None:
        return choose.topk(centred, self.W_enc, self.b_enc, self.cfg.target_l0)

    def activate(self, code: SparseLatents) -> Tensor:
        return torch.relu(code.pre if code.support else code.pre * choose.topk_mask(code.pre, self.cfg.target_l0))


class BatchTopKSAE(BaseAutoencoder):
    """The k * batch largest pre-activations of a batch in training; in evaluation those above a learned threshold.

    threshold (buffer, scalar): bias-corrected running mean of the smallest latent a training batch kept. Processes that
    share a batch choose k per token of their own share each, and their thresholds are averaged.
    """

    sae_type = "batchtopk"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    def select(self, centred: Tensor) -> Selection | None:
        if self.training:
            return choose.batchtopk(centred, self.W_enc, self.b_enc, self.cfg.target_l0, guess=0.9 * self.threshold)
        floor = self.threshold.expand_as(self.b_enc)
        return choose.above(centred, self.W_enc, self.b_enc, floor, choose.MAX_DENSITY)

    def activate(self, code: SparseLatents) -> Tensor:
        return torch.relu(code.pre) if code.support else code.pre * (code.pre > self.threshold)

    @torch.no_grad()
    def after_step(self, code: SparseLatents) -> None:
        """Move the threshold too: with weight (1 - m) / (1 - m^n) on the n-th value, it is free of its start at 0."""
        super().after_step(code)
        kept = torch.where(code.acts > 0, code.acts, torch.inf)
        smallest = kept.amin() if kept.numel() else kept.new_tensor(torch.inf)
        fired = (smallest < torch.inf).to(smallest.dtype)
        fired, smallest = self.lent.mean(torch.stack([fired, torch.where(fired > 0, smallest, 0)]))
        self.threshold_updates += fired > 0
        weight = (1 - THRESHOLD_MEMORY) / (1 - THRESHOLD_MEMORY ** self.threshold_updates.clamp_min(1))
        self.threshold.lerp_(torch.where(fired > 0, smallest / fired, self.threshold), weight.to(self.threshold.dtype))


class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK in which the first latents must reconstruct on their own, for several prefixes F_1 < F_2 < ... < F.

    The loss is the mean over the prefixes of the mean squared error of what the latents below F_i decode to, so that
    general features come first and specific ones do not absorb them (Bussmann et al. 2025).
    """

    sae_type = "matryoshka"

    @property
    def widths(self) -> list[int]:
        return sorted({max(1, round(share * self.cfg.dict_size)) for share in self.cfg.prefixes})

    def reconstruct(self, code: SparseLatents, W_dec: Tensor) -> Float[Tensor, "nested batch d_out"]:
        if code.support is None:
            slices = [slice(*edges) for edges in pairwise([0, *self.widths])]
            parts = torch.stack([code.acts[:, part] @ W_dec[part] for part in slices])
        else:
            acts, support = code.split(torch.tensor(self.widths, device=code.acts.device))
            decoded = sparse.decode(acts, support, W_dec, self.lent.memory)
            parts = decoded.view(len(self.widths), len(code), -1)
        return parts.cumsum(dim=0) + self.b_dec


class JumpReLUSAE(PenalisedAutoencoder):
    """A learned threshold per latent, and an L0 penalty that reaches it through a straight-through estimator.

    threshold [dict_size], kept at 0 or above by training. That of a dead latent falls, as no gradient reaches it.
    """

    sae_type = "jumprelu"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.zeros(cfg.dict_size))

    @property
    def eps(self) -> Float[Tensor, ""]:
        """Width of the window, in the units of the pre-activations."""
        return self.cfg.bandwidth * self.scale

    @property
    def floor(self) -> Tensor:
        return self.threshold.detach()

    def raise_floor(self, amount: Tensor) -> None:
        self.threshold.add_(amount).clamp_(min=0)

    @torch.no_grad()
    def after_step(self, code: SparseLatents) -> None:
        super().after_step(code)
        self.threshold *= torch.where(self.dead, DEAD_THRESHOLD_DECAY, 1.0)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold_decoder_norms(self) -> Tensor:
        factors = super().fold_decoder_norms()
        self.threshold *= factors
        return factors

    def select(self, centred: Tensor) -> Selection | None:
        return choose.above(centred, self.W_enc, self.b_enc, self.floor - self.eps / 2, choose.MAX_DENSITY)

    def activate(self, code: SparseLatents) -> Tensor:
        return straight_through.jumprelu(code.pre, code.beside(self.threshold), self.eps)

    def losses(self, z: Tensor, y: Tensor, code: SparseLatents) -> dict[str, Tensor]:
        fires = straight_through.fires(code.pre, code.beside(self.threshold), self.eps)
        l0 = fires.sum() / len(code)
        if not self.cfg.steers_l0:
            return super().losses(z, y, code) | {"l0": self.l1_coeff * l0}
        # The L0 of all processes, with this one's gradient; in evaluation they may differ in their number of batches.
        of_all = self.lent.mean(l0.detach()) + l0 - l0.detach() if self.training else l0
        return super().losses(z, y, code) | {"l0": L0_PENALTY * (of_all / self.cfg.target_l0 - 1).square()}


SAE_TYPES: dict[str, type[BaseAutoencoder]] = {
    sae_class.sae_type: sae_class for sae_class in (VanillaSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE)
}
assert SAE_TYPES.keys() == TYPES.keys(), "a type is a class here and a row in config.TYPES"


def build_sae(cfg: Config) -> BaseAutoencoder:
    """Build the autoencoder that cfg.sae_type names, on cfg's device."""
    return SAE_TYPES[cfg.sae_type](cfg).to(cfg.torch_device)
