"""Config: one frozen dataclass drives a run. TYPES: all that the project knows of a type outside its class in sae.py.

A field's docstring is its --help, its annotation is its check, and the class it stands in says what depends on it: the
stream of activations, what is trained, how it is trained, or neither. No torch is imported here, so that --help and
mistakes are answered at once.
"""

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runtime import checks
from runtime.checks import near, require

if TYPE_CHECKING:
    import torch


class SaeType(NamedTuple):
    """What tables, figures, checkpoints and help texts need to know of a type."""

    label: str
    colour: str  # of its lines, from Okabe and Ito's palette for colour-blind eyes
    fields: tuple[str, ...]  # of Config, that it uses and some other type does not
    sae_lens: str  # the architecture as which SAELens opens its checkpoints
    sae_lens_fields: tuple[tuple[str, str], ...] = ()  # SAELens' name of a further field, and ours
    penalty: str = ""  # the norm that l1_coeff weighs


_AUXK = ("top_k_aux", "aux_penalty")
_PENALTY = ("l1_coeff", "sparsity_warmup")
TYPES = {
    "vanilla": SaeType("Vanilla", "#CC79A7", _PENALTY, "standard", penalty="l1"),
    "topk": SaeType("TopK", "#0072B2", _AUXK, "topk", (("k", "target_l0"),)),
    "batchtopk": SaeType("BatchTopK", "#D55E00", _AUXK, "jumprelu"),
    "jumprelu": SaeType("JumpReLU", "#009E73", (*_PENALTY, *_AUXK, "bandwidth"), "jumprelu", penalty="l0"),
    "matryoshka": SaeType("Matryoshka", "#56B4E9", (*_AUXK, "prefixes"), "jumprelu"),
}  # in the order of tables and legends

# Site -> hook of TransformerLens within one block. Any other hook of a block is a site under TransformerLens' name.
SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_in": "ln1.hook_out",
    "attn_out": "hook_attn_out",
    "mlp_in": "ln2.hook_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}
# What enters the MLP's branch alone, which the second name is only once set_use_hook_mlp_in is called.
_SITE_OF = {hook: site for site, hook in SITES.items()} | {"hook_mlp_in": "ln2.hook_in"}
# How the names of hooks in no block begin; these are sites too.
OUTSIDE = ("hook_embed", "hook_pos_embed", "embed.", "pos_embed.", "ln_final.")


def _hook(layer: int, site: str) -> str:
    return site if site.startswith(OUTSIDE) else f"blocks.{layer}.{SITES.get(site, site)}"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """the activations"""

    model_name: checks.Name = "tiny-lm"
    """Language model: "tiny-lm" (embedded), a Hugging Face name, or a local folder in its format."""
    dataset_path: checks.Name = "python-stdlib"
    """Text: "python-stdlib", a Hub data set, or local .py, .txt, .jsonl or .parquet files (path, folder or glob)."""
    dataset_name: str | None = None
    """Configuration of a Hub data set that has several, such as "sample-10BT" of fineweb."""
    text_column: str | None = None
    """Column of text or of token ids; without it the first there is of text, content, tokens and input_ids is read."""
    activations: checks.Name | None = None
    """Folder of recorded activations to train on, written by `main.py cache`; model and text then serve for evaluation
    alone. Without it the activations come from the model."""
    seq_len: checks.AtLeastTwo = 128
    """Tokens in a context window, the BOS that starts it included."""
    model_batch_size: checks.Positive = 32
    """Windows in one forward pass of the language model."""
    num_batches_in_buffer: checks.AtLeastTwo = 16
    """Batches of the language model that the activation buffer holds; more mix the rows better."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the language model and the activation buffer. The SAE's own numbers are float32."""
    text_seed: checks.Natural = 0
    """Seed of the order of the text and of the shuffling of the activations."""
    num_tokens: checks.Positive = 1_000_000
    """Activations to train on."""
    batch_size: checks.Positive = 2048
    """Activations in one training step."""


@dataclass(frozen=True, kw_only=True)
class Dictionary:
    """the dictionary"""

    layer: checks.Layers = (2,)
    """Block whose activations are read, counted from 0. Several, written 0,1,2, make a crosscoder: one dictionary that
    reads and reconstructs all of them."""
    site: checks.Name = "resid_pre"
    """Place in the block: resid_pre, resid_mid, resid_post, attn_in, attn_out, mlp_in, mlp_out, z (all heads,
    concatenated), or any hook that TransformerLens has there, such as mlp.hook_post; or outside, such as hook_embed."""
    target_site: checks.Name | None = None
    """Place in the block that is reconstructed, where it is another: the dictionary is a transcoder."""
    skip: bool = False
    """Whether a transcoder has a linear skip connection beside its latents."""
    act_size: checks.Positive | None = None
    """Width of the activations at the site; found from the model when not given."""
    target_size: checks.Positive | None = None
    """Width at target_site; found from the model when not given."""
    sae_type: Literal[*TYPES] = "batchtopk"
    """How latents are chosen, and which losses are added."""
    dict_size: checks.Positive = 2048
    """Number of latents."""
    target_l0: checks.Positive = 32
    """Latents that fire per token: exactly with topk, on average with the others, which training steers there."""
    l1_coeff: checks.NonNegative | None = None
    """Fixed sparsity coefficient, of vanilla's L1 norm or jumprelu's L0; target_l0 then decides the start alone."""
    bandwidth: checks.PositiveReal = 0.1
    """JumpReLU: width of the straight-through window, in standard deviations of the activations."""
    prefixes: checks.Shares = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Matryoshka: the first latents, as shares of dict_size, that must reconstruct on their own; written 0.25,0.5,1."""
    top_k_aux: checks.Positive | None = None
    """Dead latents kept per token to explain what the live ones left over (AuxK); half of act_size by default."""
    aux_penalty: checks.NonNegative = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_tokens: checks.Positive | None = None
    """Tokens without firing after which a latent is dead; by default a 300th of the run, at most 10 million."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder product. Weights, losses and Adam stay in float32."""
    seed: checks.Natural = 0
    """Seed of the initial weights. Several seeds share one pass of the language model."""
    init_from: checks.Name | None = None
    """Dictionary whose weights to start from, in place of random ones: a folder or user/repo:folder of the Hub, in any
    format that opens here."""
    input_unit_norm: bool = False
    """Normalise every token's activations to mean 0 and standard deviation 1; the output is mapped back. Without it the
    activations stay as they are, and the standard deviation of all of them is the unit of losses and steps."""


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """training"""

    lr: checks.PositiveReal | None = None
    """Peak learning rate of Adam; lower for wider activations and longer runs by default."""
    beta1: checks.Decay = 0.9
    """Adam's decay of the mean gradient."""
    beta2: checks.Decay = 0.999
    """Adam's decay of the mean squared gradient."""
    max_grad_norm: checks.PositiveReal = 1.0
    """Gradients with a larger L2 norm, over all parameters together, are scaled down to it."""
    lr_warmup: checks.Share = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    lr_decay: checks.Share = 0.2
    """Share of the steps over which, at the end, the learning rate falls linearly to 0."""
    sparsity_warmup: checks.Share = 0.1
    """Share of the steps over which a fixed l1_coeff rises linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """the run, which changes no result"""

    device: checks.Device = "auto"
    """torch device of the model and the SAEs; "auto" takes a GPU when there is one."""
    wandb_project: checks.Project = "nn-decompositions"
    """Weights & Biases project."""
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"
    """offline needs no key and no network; online sends the runs; disabled writes nothing for W&B."""
    wandb_artifacts: bool = False
    """Whether W&B gets the checkpoints too; `results.py wandb:...` fetches them again."""
    log_freq: checks.Positive = 50
    """Steps between two log lines of the training metrics."""
    perf_log_freq: checks.Positive = 1000
    """Steps between two evaluations on held-out text (one more at the end)."""
    eval_windows: checks.Positive = 64
    """Held-out context windows of one evaluation."""
    checkpoint_freq: checks.Positive | None = None
    """Steps between two checkpoints; the end only when not given."""
    resume_freq: checks.Positive | None = None
    """Steps between two writes of the file from which a run resumes; when not given, saving takes 1% of the time."""
    share: Literal["batches", "saes"] = "batches"
    """What the processes of torchrun share out: every batch (data parallel), or the SAEs, each whole on one of them."""
    output_dir: checks.Name = "runs"
    """Folder under which a run's folder is made."""


GROUPS = (Stream, Dictionary, Optimisation, Run)
OF_TEXT = ("model_name", "dataset_path", "dataset_name", "text_column", "seq_len", "dtype")  # decide its activations


@dataclass(frozen=True, kw_only=True)
class Config(Run, Optimisation, Dictionary, Stream):
    """One dictionary: which activations it reads, what it is, how it is trained, and what the run puts out.

    Raises: ValueError on a bad field, one line with the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for field, hint in HINTS.items():
            object.__setattr__(self, field, checks.checked(field, getattr(self, field), hint))
        self._require(
            "lr_decay", self.lr_warmup + self.lr_decay <= 1, f"lr_warmup is {self.lr_warmup}; at most 1 in all"
        )
        fits = self.has_fixed_penalty or self.target_l0 <= self.dict_size
        self._require("target_l0", fits, f"give at most dict_size, {self.dict_size}")
        self._require("num_tokens", self.num_tokens >= self.batch_size, f"give at least a batch of {self.batch_size}")
        rows, batches = self.model_batch_size * (self.seq_len - 1), self.num_batches_in_buffer
        least = -(-2 * self.batch_size // rows)
        too_few = f"{batches * rows} rows are less than two of batch_size {self.batch_size}; give at least {least}"
        self._require("num_batches_in_buffer", batches >= least, too_few)
        for field in ("site", "target_site"):
            named = _SITE_OF.get(getattr(self, field), getattr(self, field))
            object.__setattr__(self, field, named)
            site = named or self.site
            others = "or a hook of TransformerLens such as mlp.hook_post"
            known = site in SITES or "hook_" in site
            self._require(field, known, f"{near(site, SITES)}give one of {', '.join(SITES)}, {others}")
        if self.site.startswith(OUTSIDE) and self.target_site is None:
            object.__setattr__(self, "layer", (0,))
        if len(self.layer) == 1:
            object.__setattr__(self, "layer", self.layer[0])
        if self.target_site == self.site:
            object.__setattr__(self, "target_site", None)
        of_transcoders = f"give a target_site that is not {self.site}"
        one_layer = "a transcoder is of one layer; give target_site or several layers"
        self._require("layer", not self.target_site or len(self.layers) == 1, one_layer)
        self._require("skip", not self.skip or self.target_site, of_transcoders)
        self._require("target_size", not self.target_size or self.target_site, of_transcoders)
        self._require("input_unit_norm", not self.input_unit_norm or self.is_sae, "it is for an SAE of one layer")

    def _require(self, field: str, holds: bool, remedy: str) -> None:
        require(holds, f"{field} = {getattr(self, field)!r}: {remedy}")

    @property
    def type(self) -> SaeType:
        return TYPES[self.sae_type]

    @property
    def layers(self) -> tuple[int, ...]:
        """`layer`, also where it is one."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of the hook that is read, such as "blocks.8.hook_resid_pre"; of several, the first."""
        return self.reads[0]

    @property
    def reads(self) -> tuple[str, ...]:
        """The hooks whose activations, side by side, are the dictionary's x."""
        return tuple(_hook(layer, self.site) for layer in self.layers)

    @property
    def writes(self) -> tuple[str, ...]:
        """The hooks whose activations, side by side, it reconstructs: its y."""
        return tuple(_hook(layer, self.target_site or self.site) for layer in self.layers)

    @property
    def is_sae(self) -> bool:
        """Whether it reconstructs the one hook that it reads."""
        return self.target_site is None and len(self.layers) == 1

    @property
    def kind(self) -> str:
        """What the literature calls such a dictionary."""
        if self.is_sae:
            return "SAE"
        return f"{'skip ' * self.skip}transcoder" if self.target_site else "crosscoder"

    @property
    def widths(self) -> dict[str, int | None]:
        """The width of each hook that is read or written."""
        return dict.fromkeys(self.writes, self.target_size) | dict.fromkeys(self.reads, self.act_size)

    @property
    def d_in(self) -> int:
        """Width of x."""
        assert self.act_size, "check_hooks finds it"
        return self.act_size * len(self.layers)

    @property
    def d_out(self) -> int:
        """Width of y."""
        size = self.target_size if self.target_site else self.act_size
        assert size, "check_hooks finds it"
        return size * len(self.layers)

    @property
    def torch_device(self) -> "torch.device":
        """`device`, with "auto" resolved on this machine."""
        import torch

        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(auto if self.device == "auto" else self.device)

    @property
    def dead_after(self) -> int:
        """`dead_after_tokens`, or its default: in which a latent of average frequency fires 8 times at least."""
        average = self.dict_size // self.target_l0
        return self.dead_after_tokens or min(10_000_000, max(self.num_tokens // 300, 8 * average))

    @property
    def peak_lr(self) -> float:
        """`lr`, or its default: Adam then turns a direction by up to 0.16 a step, less in a run of over 488 steps."""
        return self.lr or 0.16 / max(self.d_in, self.d_out) ** 0.5 * min(1.0, 488 / self.num_steps) ** (1 / 3)

    @property
    def rules(self) -> dict[str, float]:
        """The values that rules give to fields that are None; no lr before the widths are known."""
        lr = {"lr": float(f"{self.peak_lr:.3g}")} if all(self.widths.values()) else {}
        values = lr | {"dead_after_tokens": self.dead_after}
        return {field: value for field, value in values.items() if getattr(self, field) is None}

    @property
    def steers_l0(self) -> bool:
        """Whether training steers the sparsity penalty so that target_l0 latents fire per token."""
        return "l1_coeff" in self.type.fields and self.l1_coeff is None

    @property
    def has_fixed_penalty(self) -> bool:
        """Whether l1_coeff decides L0, and not target_l0."""
        return "l1_coeff" in self.type.fields and self.l1_coeff is not None

    @property
    def num_steps(self) -> int:
        """Training steps: whole batches in `num_tokens`."""
        return self.num_tokens // self.batch_size

    @cached_property
    def name(self) -> str:
        """Name of the run, of its folder too: readable, and different whenever a result-changing field differs."""
        result = {field: getattr(self, field) for field in RESULT_FIELDS if field not in unused_by(self.sae_type)}
        digest = hashlib.blake2b(json.dumps(result, sort_keys=True).encode(), digest_size=5).hexdigest()
        model = re.sub(r"[^A-Za-z0-9_-]", "-", self.model_name)[-40:].strip("-") or "model"
        sparsity = setting(self).replace("=", "-")
        layers = "-".join(map(str, self.layers))
        sites = re.sub("[^A-Za-z0-9_-]", "_", "-to-".join(filter(None, (self.site, self.target_site))))
        return f"{model}-L{layers}-{sites}-{self.sae_type}-{self.dict_size}-{sparsity}-{digest}"

    @property
    def stream(self) -> tuple:
        """What decides the stream of activations; SAEs with equal streams are trained on one pass of the model."""
        return tuple(getattr(self, field) for field in (*Stream.__dataclass_fields__, "device"))

    def to_dict(self) -> dict[str, Any]:
        """Return fields and values, ready for JSON; `Config(**d)` gives the same Config back."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


HINTS = typing.get_type_hints(Config, include_extras=True)
HINTS = {field.name: HINTS[field.name] for field in dataclasses.fields(Config)}
RESULT_FIELDS = [field for field in HINTS if field not in Run.__dataclass_fields__]


def unused_by(sae_type: str) -> set[str]:
    """List the fields of Config that some other type uses and this one does not."""
    return {field for row in TYPES.values() for field in row.fields} - set(TYPES[sae_type].fields)


def setting(sae: Any) -> str:
    """Say what decides the L0 of a Config, or of a row of `results.load_results`: L0=32, or l1=0.004 (jumprelu: l0)."""
    fixed = "l1_coeff" in TYPES[sae.sae_type].fields and sae.l1_coeff is not None and sae.l1_coeff == sae.l1_coeff
    return f"{TYPES[sae.sae_type].penalty}={sae.l1_coeff:g}" if fixed else f"L0={sae.target_l0:g}"


def number_of(cfgs: list[Config]) -> str:
    """Say how many dictionaries there are, and of which kind: 12 SAEs, 1 transcoder, 5 dictionaries."""
    kind, *others = {cfg.kind.removeprefix("skip ") for cfg in cfgs}
    one, several = ("dictionary", "dictionaries") if others else (kind, f"{kind}s")
    return f"1 {one}" if len(cfgs) == 1 else f"{len(cfgs)} {several}"


def widths_of(cfgs: Sequence[Config]) -> dict[str, int | None]:
    """Give the width of each hook that any of the Configs reads or writes."""
    return {hook: width for cfg in cfgs for hook, width in cfg.widths.items()}


def by_stream(cfgs: list[Config]) -> list[list[Config]]:
    """Group the Configs whose SAEs are trained on one pass of the model, in the order of each group's first."""
    groups: dict[tuple, list[Config]] = {}
    for cfg in cfgs:
        groups.setdefault(cfg.stream, []).append(cfg)
    return list(groups.values())


# ---- named sweeps: functions that return the Configs of a sweep ----


def tiny_sweep() -> list[Config]:
    """Four types at three sparsity levels each, on the embedded model: minutes on a laptop."""
    common = dict(num_tokens=300_000, log_freq=20, perf_log_freq=100)
    types = ("vanilla", "topk", "batchtopk", "jumprelu")
    return [Config(sae_type=t, target_l0=k, **common) for t in types for k in (16, 32, 64)]


def gpt2_sweep() -> list[Config]:
    """GPT-2 small, layer 8 resid_pre: the widths and sparsities of the BatchTopK paper (Bussmann et al. 2024)."""
    common = dict(
        model_name="gpt2", layer=8, dataset_path="Skylion007/openwebtext", model_batch_size=256,
        num_tokens=1_000_000_000, batch_size=4096, log_freq=100, checkpoint_freq=10_000,
    )  # fmt: skip
    width, types = 768, ("topk", "batchtopk", "jumprelu")
    return [
        *(Config(sae_type=t, dict_size=width * 16, target_l0=k, **common) for t in types for k in (16, 32, 64)),
        *(Config(sae_type=t, dict_size=width * n, **common) for t in types[:2] for n in (4, 8, 32)),
    ]


def transcoders_sweep() -> list[Config]:
    """Transcoders of every MLP of the embedded model, at three sparsity levels each: minutes on a laptop."""
    common = dict(site="mlp_in", target_site="mlp_out", num_tokens=200_000, log_freq=20)
    return [Config(layer=layer, target_l0=k, **common) for layer in range(4) for k in (8, 16, 32)]


def gpt2_transcoders_sweep() -> list[Config]:
    """GPT-2 small, the MLP of layer 8, 768*16 latents; all layers with --layer 0 1 2 3 4 5 6 7 8 9 10 11."""
    return [replace(cfg, site="mlp_in", target_site="mlp_out") for cfg in gpt2_sweep()[:9]]


def crosscoder_sweep() -> list[Config]:
    """One dictionary over all layers of the embedded model, at three sparsity levels."""
    common = dict(layer=(0, 1, 2, 3), site="resid_post", num_tokens=200_000, log_freq=20)
    return [Config(target_l0=k, **common) for k in (16, 32, 64)]


SWEEPS = {
    "tiny": tiny_sweep, "gpt2": gpt2_sweep, "transcoders": transcoders_sweep,
    "gpt2-transcoders": gpt2_transcoders_sweep, "crosscoder": crosscoder_sweep,
}  # fmt: skip
