"""Write transcoders of all layers as the folder from which circuit-tracer builds its replacement model.

Its format: config.yaml, and layer_<n>.safetensors with W_enc [dict_size, d_model], W_dec [dict_size, d_model], b_enc,
b_dec, the thresholds of a JumpReLU, and W_skip transposed. The hooks are those of circuit-tracer's wrapped
HookedTransformer.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from torch import Tensor
from transformers import AutoConfig

from interop.hub import published
from runtime.checks import require
from runtime.disk import save_tensors, write_durably
from runtime.models import is_on_disk, model_source
from sae import BaseAutoencoder

READS = {"mlp_in": "mlp.hook_in", "resid_mid": "hook_resid_mid"}  # ours, and circuit-tracer's
WRITES = {"mlp_out": "hook_mlp_out"}
CONFIG = "config.yaml"


def save_transcoder_set(transcoders: Sequence[BaseAutoencoder], folder: str | Path) -> None:
    """Write one transcoder per layer, 0 to n - 1, given in any order, into `folder`, replacing such a set there.

    Put on the Hub, it is what `ReplacementModel.from_pretrained(model_name, "user/repo")` of circuit-tracer takes.
    Raises: ValueError when a layer is missing (the last ones are missed where the model is on this disk), the
    transcoders differ in model, hooks or size, they are of type topk, which these files cannot hold, or the folder
    holds anything else; OSError when the disk has no room.
    """
    folder, by_layer = Path(folder), {sae.cfg.layers[0]: sae for sae in transcoders}
    layers = sorted(by_layer)
    each = layers and layers == list(range(len(transcoders)))
    require(each, f"layers {[sae.cfg.layer for sae in transcoders]}: give one transcoder for each layer, from 0 on")
    first = by_layer[0].cfg
    for sae in transcoders:
        cfg = sae.cfg
        fits = cfg.site in READS and cfg.target_site in WRITES
        hooks = f"give transcoders from {' or '.join(READS)} to {' or '.join(WRITES)}"
        require(fits, f"{cfg.name}: reads {cfg.site} and writes {cfg.target_site or cfg.site}; {hooks}")
        require(cfg.sae_type != "topk", f"{cfg.name}: circuit-tracer's files hold no topk; give another type")
        for field in ("model_name", "site", "target_site", "dict_size", "skip"):
            same = getattr(cfg, field) == getattr(first, field)
            require(same, f"{field} = {getattr(cfg, field)!r} and {getattr(first, field)!r}; give one for all layers")
    if is_on_disk(first.model_name):
        blocks = AutoConfig.from_pretrained(model_source(first.model_name)).get_text_config().num_hidden_layers
        require(len(layers) == blocks, f"layers {layers}: {first.model_name} has {blocks} blocks; give one for each")
    held = [path.name for path in folder.iterdir()] if folder.exists() else []
    others = [name for name in held if name != CONFIG and not name.startswith("layer_")]
    require(not others, f"{folder}: not replaced, as it holds {''.join(others[:1])}; give a new folder")
    config = {
        "model_name": published(first).model_name, "model_kind": "transcoder_set",
        "feature_input_hook": READS[first.site], "feature_output_hook": WRITES[first.target_site],
    }  # fmt: skip

    def write(path: Path) -> None:
        path.mkdir()
        (path / CONFIG).write_text(yaml.safe_dump(config))
        for layer in layers:
            save_tensors(_tensors(by_layer[layer]), path / f"layer_{layer}.safetensors")

    write_durably(folder, write)


def _tensors(sae: BaseAutoencoder) -> dict[str, Tensor]:
    tensors = {"W_enc": sae.W_enc.t(), "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.t()
    if sae.cfg.type.sae_lens == "jumprelu":  # behind BatchTopK's threshold too
        tensors["activation_function.threshold"] = sae.threshold.expand_as(sae.b_enc)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
