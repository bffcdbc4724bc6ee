"""Write out each type in dense float64 formulas, which share no code with sae.py or the kernels that they check.

Gradients come from ordinary autograd, except JumpReLU's, whose straight-through estimators are written out by hand.
`params` holds W_enc [D, F], b_enc [F], W_dec [F, O], b_dec [O] and, for JumpReLU [F] and BatchTopK [], threshold, for
Vanilla steering [2], with a skip connection W_skip [D, O]. O is D unless there is a y.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]


class Reference(NamedTuple):
    sae_out: Tensor  # [B, O]
    latents: Tensor  # [B, F]
    losses: dict[str, Tensor]
    grads: dict[str, dict[str, Tensor]]  # term -> name of a parameter, or "x" -> gradient


def reference(
    sae_type: str,
    params: Params,
    x: Tensor,  # [B, D]
    y: Tensor | None = None,  # [B, O], where it is not x
    *,
    hook_scales: Tensor | None = None,  # of several hooks, side by side in x
    training: bool,
    input_unit_norm: bool,
    scale: float,  # s
    target_l0: int,
    l1_coeff: float | None,  # None: L0 is steered
    eps: float,
    aux_penalty: float,
    top_k_aux: int,
    dead: Tensor,  # [F], bool
    widths: list[int],  # of the nested dictionaries
) -> Reference:
    """Output, latents, loss terms, and the gradient of every term with respect to x and every parameter."""
    p = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    x = x.detach().clone().requires_grad_()
    z, std, mean = normalise(x) if input_unit_norm else (x, 1.0, 0.0)
    if hook_scales is not None:
        std = torch.cat([scale.repeat(x.shape[1] // len(hook_scales)) for scale in hook_scales])
        z = x / std
    pre = (z - p["b_dec"] if y is None else z) @ p["W_enc"] + p["b_enc"]  # [B, F]
    if sae_type == "vanilla":
        f = pre.clamp(min=0)
    elif sae_type == "topk":
        f = pre.clamp(min=0) * torch.stack([largest(row, target_l0) for row in pre])
    elif sae_type in ("batchtopk", "matryoshka") and training:
        f = pre.clamp(min=0) * largest(pre, target_l0 * len(x))
    else:
        f = pre * (pre > p["threshold"]).double()
    skip = z @ p["W_skip"] if "W_skip" in p else 0
    y_hat = f @ p["W_dec"] + p["b_dec"] + skip
    sae_out = y_hat * std + mean

    target = z if y is None else y
    variance = unit_of_rows(target.detach(), scale, one_unit=sae_type == "vanilla" or y is not None)
    losses = {"mse": ((y_hat - target) ** 2 / variance).sum() / target.numel()}
    if sae_type == "matryoshka":
        nested = [f[:, :width] @ p["W_dec"][:width] + p["b_dec"] + skip for width in widths]
        of_all = sum(((found - target) ** 2 / variance).sum() for found in nested)
        losses = {"mse": of_all / target.numel() / len(nested)}
    if sae_type == "vanilla":
        c = l1_coeff
        if c is None:
            c = (params["steering"][0] + 2 * params["steering"][1]) / (target.shape[1] * target_l0) ** 0.5
        losses["l1"] = c * (f * p["W_dec"].square().sum(dim=1).sqrt()).sum(dim=1).mean() / scale
    if sae_type == "jumprelu":
        l0 = (pre > p["threshold"]).double().sum(dim=1).mean()
        losses["l0"] = 10 * (l0 / target_l0 - 1) ** 2 if l1_coeff is None else l1_coeff * l0
    if sae_type != "vanilla" and training and dead.any():
        losses["auxk"] = aux_penalty * auxk(pre[:, dead], p["W_dec"][dead], (target - y_hat).detach(), top_k_aux)

    grads = {}
    if sae_type == "jumprelu":
        dz, grads = jumprelu_gradients(p, z.detach(), y, l1_coeff, target_l0, eps, scale)
        for term, found in grads.items():
            found["x"] = torch.autograd.grad(z, x, dz[term], retain_graph=True)[0] if z is not x else dz[term]
    unchosen = () if sae_type == "jumprelu" else ("threshold", "steering")
    wanted = {"x": x} | {name: value for name, value in p.items() if name not in unchosen}
    for term in losses.keys() - grads.keys():
        of = dict(retain_graph=True, materialize_grads=True, allow_unused=True)
        grads[term] = dict(zip(wanted, torch.autograd.grad(losses[term], list(wanted.values()), **of)))
    return Reference(sae_out.detach(), f.detach(), {t: l.detach() for t, l in losses.items()}, grads)


def normalise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    D = x.shape[1]
    mean = x.sum(dim=1, keepdim=True) / D
    std = (((x - mean) ** 2).sum(dim=1, keepdim=True) / (D - 1)).sqrt()
    return (x - mean) / (std + 1e-5), std, mean


def unit_of_rows(target: Tensor, scale: float, one_unit: bool) -> Tensor:
    """What the squared error of each row is divided by [B, 1]."""
    if one_unit:
        return torch.full_like(target[:, :1], scale**2)
    mean = target.sum(dim=1, keepdim=True) / target.shape[1]
    variance = ((target - mean) ** 2).sum(dim=1, keepdim=True) / target.shape[1]
    return torch.where(variance < scale**2 / 10, scale**2 / 10, variance)


def largest(numbers: Tensor, count: int) -> Tensor:
    """1 at the `count` largest of all numbers (which must differ), 0 elsewhere."""
    smallest_kept = numbers.detach().flatten().sort(descending=True).values[count - 1]
    return (numbers >= smallest_kept).double()


def auxk(pre: Tensor, W_dec: Tensor, error: Tensor, top_k_aux: int) -> Tensor:
    """MSE(e_hat, e) / MSE(mean(e), e) of the dead latents: pre [B, dead], W_dec [dead, D], error [B, D]."""
    f = pre.clamp(min=0) * torch.stack([largest(row, min(top_k_aux, len(row))) for row in pre])
    return ((f @ W_dec - error) ** 2).mean() / ((error.mean(dim=0) - error) ** 2).mean()


def jumprelu_gradients(
    p: Params, z: Tensor, y: Tensor | None, l1_coeff: float | None, target_l0: int, eps: float, scale: float
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Gradient of z, and gradients of the parameters, of the first loss and the penalty. No autograd."""
    W_enc, b_enc, W_dec, b_dec, threshold = (
        p[name].detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    )
    B, O = len(z), len(b_dec)
    centred, target = (z - b_dec, z) if y is None else (z, y)
    W_skip = p["W_skip"].detach() if "W_skip" in p else torch.zeros(z.shape[1], O, dtype=z.dtype)
    pre = centred @ W_enc + b_enc  # [B, F]
    fires = (pre > threshold).double()
    window = ((pre - threshold).abs() < eps / 2).double()
    f = pre * fires
    variance = unit_of_rows(target, scale, one_unit=y is not None)
    g = 2 * (f @ W_dec + b_dec + z @ W_skip - target) / (B * O) / variance  # d mse / d y_hat [B, O]
    df = g @ W_dec.T  # [B, F]
    dpre = df * fires
    dcentred = dpre @ W_enc.T  # [B, D]
    zeros = {name: torch.zeros_like(value) for name, value in p.items()}
    mse = {
        "W_enc": centred.T @ dpre,
        "b_enc": dpre.sum(dim=0),
        "W_dec": f.T @ g,
        "b_dec": g.sum(dim=0) - (dcentred.sum(dim=0) if y is None else 0),
        "threshold": (df * -(threshold / eps) * window).sum(dim=0),
    }
    if "W_skip" in p:
        mse["W_skip"] = z.T @ g
    slope = l1_coeff  # d loss / d L0
    if slope is None:
        slope = 20 / target_l0 * (fires.sum() / B / target_l0 - 1)
    l0 = zeros | {"threshold": slope / B * (-(1 / eps) * window).sum(dim=0)}
    return {"mse": dcentred + g @ W_skip.T - (g if y is None else 0), "l0": torch.zeros_like(z)}, {"mse": mse, "l0": l0}
