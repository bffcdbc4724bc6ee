"""Sparse autoencoders. All four share BaseAutoencoder; a type says only how latents are chosen and what it penalises.

    z     = (x - mean) / (std + 1e-5) per token if input_unit_norm, else x        std unbiased
    pre   = (z - b_dec) W_enc + b_enc
    f     = VanillaSAE     relu(pre)
            TopKSAE        relu of the k largest of each row
            BatchTopKSAE   relu of the k * B largest of the batch; in eval mode pre * [pre > threshold]
            JumpReLUSAE    pre * [pre > threshold_j]
    z_hat = f W_dec + b_dec;   sae_out = z_hat * std + mean
    loss  = mean over batch and act_size of (z_hat - z)^2
            + Vanilla            l1_coeff * mean over batch of sum_j f_j ||W_dec_j||
            + JumpReLU           l1_coeff * mean over batch of sum_j [pre_j > threshold_j]
            + TopK, BatchTopK    aux_penalty * AuxK

Sources: TopK and AuxK, Gao et al. 2024 (arXiv:2406.04093); BatchTopK, Bussmann et al. 2024 (arXiv:2412.06410);
JumpReLU, Rajamanoharan et al. 2024 (arXiv:2407.14435); the weighted L1, Conerly et al. 2024 (April update).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

import choose
import ranks
import sparse
from config import Config, SaeType, setting
from sparse import Selection, SparseLatents, Support

NORM_EPS = 1e-5
PROJECTED_ROWS = 1024  # at a time on a CPU: what is multiplied stays in its cache
AUXK_LEAST_VARIANCE = 1e-6
THRESHOLD_MEMORY = 0.9  # of BatchTopK's running mean: about the last ten batches


@dataclass(frozen=True)
class SAEOutput:
    """What `sae(x)` returns: the reconstruction in x's space and shape, and the loss with its named, weighted terms."""

    sae_out: Float[Tensor, "*batch act_size"]
    acts: SparseLatents | Float[Tensor, "rows dict_size"]
    """The latents as the forward pass had them: dense only where too many fire for the sparse code to pay."""
    losses: dict[str, Float[Tensor, ""]]

    @property
    def loss(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.losses.values())).sum()

    @property
    def latents(self) -> SparseLatents:
        return self.acts if isinstance(self.acts, SparseLatents) else SparseLatents.from_dense(self.acts)


class Normalised(NamedTuple):
    """z, and the per-token std and mean that map a reconstruction back."""

    z: Float[Tensor, "batch act_size"]
    std: Float[Tensor, "batch 1"] | float
    mean: Float[Tensor, "batch 1"] | float


class GradientMemory(NamedTuple):
    """Where the gradients of W_enc.t() and W_dec are written, both [dict_size, act_size]; None for fresh memory."""

    W_enc: Tensor | None
    W_dec: Tensor | None


class BaseAutoencoder(nn.Module):
    """What the types share: parameters, normalisation, the decoder, the counters of dead latents.

    W_enc [act_size, dict_size] (stored latent by latent, so its gradient is written row by row like the decoder's),
    b_enc [dict_size], W_dec [dict_size, act_size] with rows of norm 1, b_dec [act_size].
    Raises ValueError when cfg.act_size is not given.
    """

    sae_type: ClassVar[SaeType]
    uses_auxk: ClassVar[bool] = False
    weighs_norms: ClassVar[bool] = False
    """Whether the penalty is given the norms of the decoder's rows."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        cfg = replace(cfg, sae_type=self.sae_type)
        if cfg.act_size is None:
            raise ValueError("act_size = None: give the width of the activations, such as 768 for gpt2")
        self.cfg = cfg
        D, F = cfg.act_size, cfg.dict_size
        rng = torch.Generator().manual_seed(cfg.seed)
        directions = torch.randn(F, D, generator=rng)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone().t())
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.l1_coeff = cfg.l1_coeff  # what is in force now: training warms it up
        self._gradient_memory = GradientMemory(None, None)
        self._num_dead: tuple[Tensor, torch.cuda.Event] | None = None  # on a GPU: as counted by the last step
        self.register_buffer("tokens_since_fired", torch.zeros(F, dtype=torch.int64))
        self.register_buffer("input_scale", torch.ones(()))

    def extra_repr(self) -> str:
        cfg = self.cfg
        return f"{cfg.act_size} -> {cfg.dict_size}, {setting(cfg)}, {cfg.model_name} {cfg.hook_point}"

    # ---- what a type says ----

    def select(self, centred: Float[Tensor, "batch act_size"]) -> Selection | None:
        """The latents that can fire or receive gradient; None when they are so many that dense products are faster."""
        raise NotImplementedError

    def activate(self, pre: Tensor, support: Support | None) -> Tensor:
        """Latents f from pre-activations: [nnz] on a support, or dense [batch, dict_size] without one.

        Dense ones follow the rule of evaluation: none of a row's latents depends on the other rows.
        """
        raise NotImplementedError

    def penalty(
        self, pre: Tensor, acts: Tensor, support: Support | None, batch: int, norms: Tensor | None
    ) -> dict[str, Float[Tensor, ""]]:
        """Named loss terms beside the reconstruction's."""
        return {}

    # ---- the shared computation ----

    def forward(self, x: Float[Tensor, "*batch act_size"]) -> SAEOutput:
        """Reconstruct x. In training mode the counters of dead latents move; parameters never do.

        Raises ValueError when x has another width, no rows or no floating-point numbers.
        """
        self._check_input(x)
        z, std, mean = self.normalise(x.reshape(-1, x.shape[-1]))
        centred = (z - self.b_dec).detach()
        selection = self.select(self._for_product(centred))

        W_enc, W_dec = self.W_enc, self.W_dec
        dead = self._dead_indices() if self.uses_auxk and self.training else None
        if dead is not None and len(dead):
            W_enc, W_enc_dead = (w.t() for w in sparse.split_rows(W_enc.t(), dead))
            W_dec, W_dec_dead = sparse.split_rows(W_dec, dead)

        norms = None
        if self.weighs_norms:
            W_dec, norms = sparse.with_row_norms(W_dec)

        memory = self._gradient_memory
        if selection is None:
            support = None
            pre = self.dense_pre_activations(z)
            acts = self.activate(pre, support)
            decoded = acts @ W_dec
        else:
            support = selection.support
            pre = sparse.pre_activations(z, W_enc, self.b_enc, self.b_dec, centred, selection, memory.W_enc)
            acts = self.activate(pre, support)
            decoded = sparse.decode(acts, support, W_dec, memory.W_dec)
        z_hat = decoded + self.b_dec

        losses = {"mse": (z_hat - z).pow(2).mean()} | self.penalty(pre, acts, support, len(z), norms)
        if dead is not None and len(dead):
            auxk = self._auxk(z, centred, (z - z_hat).detach(), W_enc_dead, self.b_enc[dead], W_dec_dead)
            losses["auxk"] = self.cfg.aux_penalty * auxk
        if self.training:
            self._count_fired(acts, support, len(z))
        sae_out = (z_hat * std + mean).view(x.shape)
        return SAEOutput(sae_out, acts if support is None else SparseLatents(acts, support), losses)

    def encode(self, x: Float[Tensor, "*batch act_size"]) -> Float[Tensor, "*batch dict_size"]:
        """Latents of x, dense, as in evaluation whatever the mode: a row's latents do not depend on its batch."""
        self._check_input(x)
        z = self.normalise(x.reshape(-1, x.shape[-1])).z
        acts = self.activate(self.dense_pre_activations(z), None)
        return acts.view(*x.shape[:-1], -1)

    def decode(self, acts: Float[Tensor, "*batch dict_size"]) -> Float[Tensor, "*batch act_size"]:
        """Reconstruction from latents, in z space: a token's mean and scale, if normalised, are not in its latents."""
        return acts @ self.W_dec + self.b_dec

    def normalise(self, x: Float[Tensor, "batch act_size"]) -> Normalised:
        x = x.to(self.W_enc.dtype)
        if not self.cfg.input_unit_norm:
            return Normalised(x, 1.0, 0.0)
        mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
        return Normalised((x - mean) / (std + NORM_EPS), std, mean)

    def dense_pre_activations(self, z: Float[Tensor, "batch act_size"]) -> Float[Tensor, "batch dict_size"]:
        factors = (self._for_product(p) for p in (self.b_enc, z - self.b_dec, self.W_enc))
        return torch.addmm(*factors).to(z.dtype)

    def _for_product(self, matrix: Tensor) -> Tensor:
        return matrix.bfloat16() if self.cfg.product_dtype == "bfloat16" else matrix

    def _check_input(self, x: Tensor) -> None:
        D = self.cfg.act_size
        if not (x.is_floating_point() and x.ndim >= 1 and x.shape[-1] == D and x.numel() > 0):
            raise ValueError(
                f"x = {x.dtype} {list(x.shape)}: give floating-point activations [..., {D}], at least one row"
            )

    # ---- dead latents ----

    @property
    def dead(self) -> Bool[Tensor, "dict_size"]:
        """Latents that have not fired for `cfg.dead_after` training tokens."""
        return self.tokens_since_fired >= self.cfg.dead_after

    @torch.no_grad()
    def _count_fired(self, acts: Tensor, support: Support | None, batch: int) -> None:
        if support is None:
            fired = (acts > 0).any(dim=0)
        else:
            counts = torch.zeros_like(self.b_enc).index_add_(0, support.indices, (acts > 0).to(self.b_enc.dtype))
            fired = counts > 0
        self.tokens_since_fired += batch * ranks.count()
        self.tokens_since_fired.masked_fill_(ranks.either(fired), 0)
        if self.W_dec.is_cuda:
            count = torch.empty((), dtype=torch.int64, pin_memory=True)
            count.copy_(self.dead.sum(), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.W_dec.device))
            self._num_dead = count, copied

    def _dead_indices(self) -> Int[Tensor, "dead"]:
        if not self.W_dec.is_cuda or self._num_dead is None:
            return self.dead.nonzero().squeeze(1)
        # The last step queued a copy of their number to the host. Waiting for that step leaves the device busy with
        # this one's encoder product; asking the device now would wait for the product too.
        count, copied = self._num_dead
        copied.synchronize()
        return torch.nonzero_static(self.dead, size=int(count)).squeeze(1)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        self._num_dead = None
        return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_num_dead": None}  # a CUDA event cannot be copied

    def _auxk(
        self,
        z: Float[Tensor, "batch act_size"],
        centred: Float[Tensor, "batch act_size"],
        error: Float[Tensor, "batch act_size"],
        W_enc: Float[Tensor, "act_size dead"],
        b_enc: Float[Tensor, "dead"],
        W_dec: Float[Tensor, "dead act_size"],
    ) -> Float[Tensor, ""]:
        """AuxK (Gao et al. 2024, appendix A.2): the dead latents alone, as a dictionary, explain the live ones' error.

        It is the error's unexplained share, MSE(e_hat, e) / MSE(mean(e), e).
        """
        k = self.cfg.top_k_aux
        selection = choose.above(self._for_product(centred), W_enc, b_enc, torch.zeros_like(b_enc), choose.MAX_DENSITY)
        if selection is not None:
            selection = choose.at_most(selection, k)
            pre = sparse.pre_activations(z, W_enc, b_enc, self.b_dec, centred, selection)
            e_hat = sparse.decode(torch.relu(pre), selection.support, W_dec)
        else:
            if z.requires_grad:
                pre = (z - self.b_dec) @ W_enc + b_enc
            else:  # b_dec's gradient by a vector, not a batch: what is subtracted is 0, its gradient is not
                pre = centred @ W_enc + (b_enc - (self.b_dec - self.b_dec.detach()) @ W_enc)
            acts = torch.relu(pre)
            if pre.shape[1] > k:
                acts = acts * choose.topk_mask(pre, k)
            e_hat = acts @ W_dec
        unexplained = (e_hat - error).pow(2).mean()
        mean = ranks.mean(error.mean(dim=0))
        variance, power = ranks.mean(torch.stack([(error - mean).pow(2).mean(), error.pow(2).mean()]))
        least = AUXK_LEAST_VARIANCE * power  # less only where all rows are the same, or there is one
        return (variance > least) * unexplained / variance.clamp_min(least)

    # ---- training ----

    @torch.no_grad()
    def initialise_from(self, x: Float[Tensor, "*batch act_size"]) -> None:
        """Before the first step: b_dec becomes a batch's mean, and input_scale the rms distance of its rows from it.

        Raises ValueError on an x that `forward` refuses.
        """
        self._check_input(x)
        z = self.normalise(x.reshape(-1, x.shape[-1])).z
        self.b_dec.copy_(ranks.mean(z.mean(dim=0)))
        self.input_scale.copy_(ranks.mean((z - self.b_dec).pow(2).sum(dim=1).mean()).sqrt())

    def reuse_gradient_memory(self, reuse: bool) -> None:
        """Whether the weights' gradients are written where the last ones were, for who clears these after each step.

        Fresh memory of their size costs a CPU more than the gradients: every page of it is a fault.
        """
        memory = [torch.empty_like(self.W_dec.detach()) if reuse and not self.W_dec.is_cuda else None for _ in range(2)]
        self._gradient_memory = GradientMemory(*memory)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove from W_dec's gradient what would only change the norms of its rows. Before the optimiser step."""
        assert self.W_dec.grad is not None
        rows = len(self.W_dec) if self.W_dec.is_cuda else PROJECTED_ROWS
        for grad, w in zip(self.W_dec.grad.split(rows), self.W_dec.split(rows)):
            parallel = (grad * w).sum(dim=1, keepdim=True)  # rows of W_dec have norm 1
            grad.addcmul_(parallel, w, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put the parameters back where they must be: decoder rows of norm 1. After the optimiser step."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


class VanillaSAE(BaseAutoencoder):
    """ReLU latents and an L1 penalty, weighted by the norms of the decoder rows (which are 1 in training)."""

    sae_type = "vanilla"
    weighs_norms = True

    def select(self, centred: Tensor) -> Selection | None:
        return choose.above(centred, self.W_enc, self.b_enc, torch.zeros_like(self.b_enc), choose.MAX_DENSITY)

    def activate(self, pre: Tensor, support: Support | None) -> Tensor:
        return torch.relu(pre)

    def penalty(
        self, pre: Tensor, acts: Tensor, support: Support | None, batch: int, norms: Tensor | None
    ) -> dict[str, Tensor]:
        return {"l1": self.l1_coeff * (acts * _at(norms, support)).sum() / batch}


class TopKSAE(BaseAutoencoder):
    """The k largest pre-activations of each token, where positive."""

    sae_type = "topk"
    uses_auxk = True

    def select(self, centred: Tensor) -> Selection | None:
        return choose.topk(centred, self.W_enc, self.b_enc, self.cfg.top_k)

    def activate(self, pre: Tensor, support: Support | None) -> Tensor:
        return torch.relu(pre if support is not None else pre * choose.topk_mask(pre, self.cfg.top_k))


class BatchTopKSAE(BaseAutoencoder):
    """The k * batch largest pre-activations of a batch in training; in eval mode those above a learned threshold.

    threshold (buffer, scalar): bias-corrected running mean of the smallest latent a training batch kept. Processes that
    share a batch choose k per token of their own share each, and their thresholds are averaged.
    """

    sae_type = "batchtopk"
    uses_auxk = True

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("threshold_updates", torch.zeros((), dtype=torch.int64))

    def select(self, centred: Tensor) -> Selection | None:
        if self.training:
            selection = choose.batchtopk(centred, self.W_enc, self.b_enc, self.cfg.top_k, guess=0.9 * self.threshold)
            self._update_threshold(selection.pre)
            return selection
        floor = self.threshold.expand_as(self.b_enc)
        return choose.above(centred, self.W_enc, self.b_enc, floor, choose.MAX_DENSITY)

    def activate(self, pre: Tensor, support: Support | None) -> Tensor:
        return pre * (pre > self.threshold) if support is None else torch.relu(pre)

    @torch.no_grad()
    def _update_threshold(self, kept: Float[Tensor, "nnz"]) -> None:
        """With weight (1 - m) / (1 - m^n) on the n-th value, the running mean is free of its start at 0."""
        kept = kept.to(self.threshold.dtype)
        positive = kept > 0
        smallest = torch.where(positive, kept, torch.inf).amin() if len(kept) else self.threshold
        fired = positive.any().to(kept.dtype)
        fired, smallest = ranks.mean(torch.stack([fired, torch.where(fired > 0, smallest, 0)]))
        self.threshold_updates += fired > 0
        weight = (1 - THRESHOLD_MEMORY) / (1 - THRESHOLD_MEMORY ** self.threshold_updates.clamp_min(1))
        self.threshold.lerp_(torch.where(fired > 0, smallest / fired, self.threshold), weight.to(self.threshold.dtype))


class _JumpReLU(torch.autograd.Function):
    """pre * [pre > threshold], with d / d threshold = -(threshold / eps) [|pre - threshold| < eps / 2].

    The straight-through estimator of Rajamanoharan et al. 2024, equation 11, with a rectangular window of width eps.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, eps)
        return pre * (pre > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, eps = ctx.saved_tensors
        d_threshold = -(threshold / eps) * grad * _in_window(pre, threshold, eps)
        return grad * (pre > threshold), d_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """[pre > threshold], with d / d threshold = -(1 / eps) [|pre - threshold| < eps / 2], none to pre (equation 12)."""

    @staticmethod
    def forward(ctx: FunctionCtx, pre: Tensor, threshold: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, eps)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, eps = ctx.saved_tensors
        return None, (-grad / eps * _in_window(pre, threshold, eps)).sum_to_size(threshold.shape), None


def _in_window(pre: Tensor, threshold: Tensor, eps: Tensor) -> Bool[Tensor, "..."]:
    return (pre - threshold).abs() < eps / 2


class JumpReLUSAE(BaseAutoencoder):
    """A learned threshold per latent, and an L0 penalty that reaches it through a straight-through estimator.

    threshold [dict_size], kept at 0 or above by training.
    """

    sae_type = "jumprelu"

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.threshold = nn.Parameter(torch.full((cfg.dict_size,), cfg.threshold_init))

    @property
    def eps(self) -> Float[Tensor, ""]:
        """Width of the window, in the units of the pre-activations."""
        return self.cfg.bandwidth * self.input_scale

    @torch.no_grad()
    def initialise_from(self, x: Tensor) -> None:
        super().initialise_from(x)
        self.threshold.fill_(self.cfg.threshold_init * self.input_scale)

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_(min=0)

    def select(self, centred: Tensor) -> Selection | None:
        window = self.threshold.detach() - self.eps / 2
        return choose.above(centred, self.W_enc, self.b_enc, window, choose.MAX_DENSITY)

    def activate(self, pre: Tensor, support: Support | None) -> Tensor:
        return _JumpReLU.apply(pre, _at(self.threshold, support), self.eps)

    def penalty(
        self, pre: Tensor, acts: Tensor, support: Support | None, batch: int, norms: Tensor | None
    ) -> dict[str, Tensor]:
        fires = _Step.apply(pre, _at(self.threshold, support), self.eps)
        return {"l0": self.l1_coeff * fires.sum() / batch}


def _at(per_latent: Float[Tensor, "dict_size"], support: Support | None) -> Tensor:
    """A number of each latent, beside pre-activations: one per entry of a support, or broadcast over dense rows."""
    return per_latent if support is None else per_latent.index_select(0, support.indices)


SAE_TYPES: dict[SaeType, type[BaseAutoencoder]] = {
    sae_class.sae_type: sae_class for sae_class in (VanillaSAE, TopKSAE, BatchTopKSAE, JumpReLUSAE)
}


def build_sae(cfg: Config) -> BaseAutoencoder:
    """The autoencoder that cfg.sae_type names, on cfg's device."""
    return SAE_TYPES[cfg.sae_type](cfg).to(cfg.torch_device)
