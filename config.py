"""Config: one frozen dataclass drives a run. Every field is followed by a docstring, which is also its --help."""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import re
import types
import typing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:  # it takes a second, and --help is answered at once
    import torch

SaeType = Literal["vanilla", "topk", "batchtopk", "jumprelu"]
WandbMode = Literal["offline", "online", "disabled"]
Dtype = Literal["float32", "bfloat16", "float16"]
Share = Literal["batches", "saes"]

# Site -> hook of TransformerLens within one block.
SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """One sparse autoencoder: which activations it reads, what it is and how it is trained.

    Raises: ValueError on a bad field, one line with the field, the value and what is allowed.
    """

    # ---- the activations ----
    model_name: str = "tiny-lm"
    """Language model: "tiny-lm" (embedded), a Hugging Face name, or a local folder in its format."""
    layer: int = 2
    """Block whose activations are read, counted from 0."""
    site: str = "resid_pre"
    """Place in the block: resid_pre, resid_mid, resid_post, attn_out, mlp_out or z (all heads, concatenated)."""
    dataset_path: str = "python-stdlib"
    """Text: "python-stdlib", a Hub data set, or local .py, .txt, .jsonl or .parquet files (path, folder or glob)."""
    dataset_name: str | None = None
    """Configuration of a Hub data set that has several, such as "sample-10BT" of fineweb."""
    seq_len: int = 128
    """Tokens in a context window, the BOS that starts it included."""
    model_batch_size: int = 32
    """Windows in one forward pass of the language model."""
    num_batches_in_buffer: int = 16
    """Batches of the language model that the activation buffer holds; more mix the rows better."""
    act_size: int | None = None
    """Width of the activations; found from the model and the site when not given."""
    dtype: Dtype = "float32"
    """Number format of the language model and the activation buffer. The SAE's own numbers are float32."""

    # ---- the autoencoder ----
    sae_type: SaeType = "batchtopk"
    """How latents are chosen: vanilla (L1), topk, batchtopk or jumprelu."""
    dict_size: int = 2048
    """Number of latents."""
    top_k: int = 32
    """Latents kept per token: exactly by topk, on average by batchtopk."""
    l1_coeff: float = 0.0
    """Sparsity coefficient: of the L1 norm for vanilla, of L0 for jumprelu."""
    bandwidth: float = 0.001
    """JumpReLU: width of the straight-through window, for activations of norm 1; scaled to the actual norm."""
    threshold_init: float = 0.001
    """JumpReLU: threshold before training, for activations of norm 1; scaled to the actual norm."""
    top_k_aux: int = 256
    """Dead latents kept per token to explain what the live ones left over (AuxK; topk and batchtopk)."""
    aux_penalty: float = 1 / 32
    """Weight of the AuxK loss."""
    dead_after_tokens: int | None = None
    """A latent is dead once it has not fired for this many tokens; 10 million, or half a shorter run, by default."""
    product_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the encoder product. Weights, losses and Adam stay in float32."""
    input_unit_norm: bool = True
    """Normalise every token's activations to mean 0 and standard deviation 1; the output is mapped back."""

    # ---- training ----
    seed: int = 0
    """Seed of the initial weights, of the order of the text and of the shuffling of the activations."""
    num_tokens: int = 1_000_000
    """Activations to train on."""
    batch_size: int = 2048
    """Activations in one training step."""
    lr: float = 3e-4
    """Peak learning rate of Adam."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.99
    """Adam's decay of the mean squared gradient."""
    max_grad_norm: float = 1.0
    """Gradients with a larger L2 norm, over all parameters together, are scaled down to it."""
    lr_warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    lr_decay: float = 0.2
    """Share of the steps over which, at the end, the learning rate falls linearly to 0."""
    sparsity_warmup: float = 0.1
    """Share of the steps over which l1_coeff rises linearly from 0."""
    device: str = "auto"
    """torch device of the model and the SAEs; "auto" takes a GPU when there is one."""

    # ---- output ----
    wandb_project: str = "nn-decompositions"
    """Weights & Biases project."""
    wandb_mode: WandbMode = "offline"
    """offline needs no key and no network; online sends the runs; disabled writes nothing for W&B."""
    log_freq: int = 50
    """Steps between two log lines of the training metrics."""
    perf_log_freq: int = 1000
    """Steps between two evaluations on held-out text (one more at the end)."""
    eval_windows: int = 64
    """Held-out context windows of one evaluation."""
    checkpoint_freq: int | None = None
    """Steps between two checkpoints; the end only when not given."""
    resume_freq: int | None = None
    """Steps between two writes of the file from which a run resumes; as many as cost 1% of its time when not given."""
    share: Share = "batches"
    """What the processes of torchrun share out: every batch (data parallel), or the SAEs, each whole on one of them."""
    output_dir: str = "runs"
    """Folder under which a run's folder is made."""

    def __post_init__(self) -> None:
        for field, allowed in typing.get_type_hints(type(self)).items():
            self._check_type(field, allowed)
        for field in ("model_name", "dataset_path", "wandb_project", "output_dir"):
            value = getattr(self, field)
            self._require(field, bool(value.strip()) and "\0" not in value, "give a name")
        self._require("site", self.site in SITES, _one_of(self.site, SITES))
        for field in _POSITIVE:
            value = getattr(self, field)
            self._require(field, value is None or value > 0, "give a number above 0")
        for field in _NON_NEGATIVE:
            self._require(field, getattr(self, field) >= 0, "give 0 or more")
        self._require("seq_len", self.seq_len >= 2, "give at least 2: BOS and one token")
        self._require(
            "num_batches_in_buffer", self.num_batches_in_buffer >= 2, "give at least 2: half is refilled at a time"
        )
        for field in ("beta1", "beta2"):
            self._require(field, 0 <= getattr(self, field) < 1, "give a number in [0, 1)")
        for field in ("lr_warmup", "lr_decay", "sparsity_warmup"):
            self._require(field, 0 <= getattr(self, field) <= 1, "give a share between 0 and 1")
        self._require(
            "lr_decay", self.lr_warmup + self.lr_decay <= 1, f"lr_warmup is {self.lr_warmup:g}; together at most 1"
        )
        if self.sae_type in ("topk", "batchtopk"):
            self._require("top_k", self.top_k <= self.dict_size, f"give at most dict_size, {self.dict_size}")
        self._require(
            "num_tokens", self.num_tokens >= self.batch_size, f"give at least one batch, batch_size {self.batch_size}"
        )
        rows = self.model_batch_size * (self.seq_len - 1)
        self._require(
            "num_batches_in_buffer",
            self.num_batches_in_buffer * rows >= 2 * self.batch_size,
            f"{self.num_batches_in_buffer * rows} rows are less than two of batch_size {self.batch_size};"
            f" give at least {-(-2 * self.batch_size // rows)}",
        )
        self._require(
            "wandb_project",
            len(self.wandb_project) <= 128 and not set(self.wandb_project) & set("/\\#?%:"),
            "give at most 128 characters, none of / \\ # ? % :",
        )
        self._require("device", _is_device(self.device), 'give "auto", "cpu", "cuda" or "cuda:1"')

    def _require(self, field: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ValueError(f"{field} = {getattr(self, field)!r}: {remedy}")

    def _check_type(self, field: str, allowed: typing.Any) -> None:
        value = getattr(self, field)
        if typing.get_origin(allowed) is Literal:
            self._require(field, value in get_args(allowed), _one_of(value, get_args(allowed)))
            return
        if type(value) is int:
            self._require(field, abs(value) < 2**63, "give less than 2**63")
        options = get_args(allowed) if isinstance(allowed, types.UnionType) else (allowed,)
        if float in options and type(value) is int:
            object.__setattr__(self, field, float(value))
            return
        names = " or ".join("None" if t is types.NoneType else t.__name__ for t in options)
        self._require(field, type(value) in options, f"give {names}")
        if type(value) is float:
            self._require(field, abs(value) < float("inf"), "give a finite number")

    @property
    def hook_point(self) -> str:
        """TransformerLens name of the hook, such as "blocks.8.hook_resid_pre"."""
        return f"blocks.{self.layer}.{SITES[self.site]}"

    @property
    def torch_device(self) -> "torch.device":
        """`device`, with "auto" resolved on this machine."""
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)

    @property
    def dead_after(self) -> int:
        """`dead_after_tokens`, or its default."""
        return self.dead_after_tokens or min(10_000_000, self.num_tokens // 2)

    @property
    def num_steps(self) -> int:
        """Training steps: whole batches in `num_tokens`."""
        return self.num_tokens // self.batch_size

    @cached_property
    def name(self) -> str:
        """Name of the run, of its folder too: readable, and different whenever a result-changing field differs."""
        result = {f: getattr(self, f) for f in result_fields() if f not in NOT_USED_BY[self.sae_type]}
        digest = hashlib.blake2b(json.dumps(result, sort_keys=True).encode(), digest_size=5).hexdigest()
        plain = re.sub(r"[^A-Za-z0-9_-]", "-", self.model_name)
        model = plain[-40:].strip("-") or "model"
        return f"{model}-L{self.layer}-{self.site}-{self.sae_type}-{self.dict_size}-{self.sparsity_label}-{digest}"

    @property
    def sparsity_label(self) -> str:
        """The setting that decides this SAE's L0, such as "k32" or "l1_0.004"."""
        return f"k{self.top_k}" if self.sae_type in ("topk", "batchtopk") else f"l1_{self.l1_coeff:g}"

    @property
    def stream(self) -> tuple:
        """What decides the stream of activations; SAEs with equal streams are trained on one pass of the model."""
        return tuple(getattr(self, field) for field in _STREAM)

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """Fields and values, ready for JSON; `Config(**d)` gives the same Config back."""
        return dataclasses.asdict(self)


def result_fields() -> list[str]:
    """The fields that what is trained depends on."""
    return [field.name for field in dataclasses.fields(Config) if field.name not in _NOT_IN_RESULT]


def setting(sae: Any) -> str:
    """What decides the L0 of a Config or of a row of `results.load_results`: k=32, or l1=0.004."""
    return f"k={sae.top_k}" if sae.sae_type in ("topk", "batchtopk") else f"l1={sae.l1_coeff:g}"


_POSITIVE = (
    "seq_len", "model_batch_size", "act_size", "dict_size", "top_k", "bandwidth", "top_k_aux", "dead_after_tokens",
    "num_tokens", "batch_size", "lr", "max_grad_norm", "log_freq", "perf_log_freq", "eval_windows", "checkpoint_freq",
    "resume_freq",
)  # fmt: skip
_NON_NEGATIVE = ("layer", "l1_coeff", "threshold_init", "aux_penalty", "seed")
_STREAM = (
    "model_name", "layer", "site", "dataset_path", "dataset_name", "seq_len", "model_batch_size",
    "num_batches_in_buffer", "act_size", "dtype", "seed", "num_tokens", "batch_size", "device",
)  # fmt: skip
_NOT_IN_RESULT = {
    "device", "wandb_project", "wandb_mode", "log_freq", "perf_log_freq", "eval_windows", "checkpoint_freq",
    "resume_freq", "share", "output_dir",
}  # fmt: skip
_JUMPRELU_ONLY = {"bandwidth", "threshold_init"}
_PENALISED_ONLY = {"l1_coeff", "sparsity_warmup"}
_TOP_K_ONLY = {"top_k", "top_k_aux", "aux_penalty"}
NOT_USED_BY: dict[SaeType, set[str]] = {
    "vanilla": _TOP_K_ONLY | _JUMPRELU_ONLY,
    "topk": _PENALISED_ONLY | _JUMPRELU_ONLY,
    "batchtopk": _PENALISED_ONLY | _JUMPRELU_ONLY,
    "jumprelu": _TOP_K_ONLY,
}


def _one_of(value: object, allowed: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}give one of {', '.join(allowed)}"


def _is_device(name: str) -> bool:
    return re.fullmatch(r"auto|(cpu|cuda)(:(0|[1-9][0-9]?))?", name) is not None


def field_groups() -> dict[str, list[str]]:
    """The fields under each comment "# ---- title ----" in Config, for --help."""
    groups: dict[str, list[str]] = {}
    for line in inspect.getsource(Config).splitlines():
        if title := re.fullmatch("    # ---- (.*) ----", line):
            groups[title[1]] = fields = []
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in Config.__dataclass_fields__:
            fields.append(field[1])
    return groups


def by_stream(cfgs: list[Config]) -> list[list[Config]]:
    """The Configs whose SAEs are trained on one pass of the model, together, in the order of each group's first."""
    groups: dict[tuple, list[Config]] = {}
    for cfg in cfgs:
        groups.setdefault(cfg.stream, []).append(cfg)
    return list(groups.values())


def field_docs() -> dict[str, str]:
    """The docstring that follows each field of Config, for --help."""
    body = ast.parse(inspect.getsource(Config)).body[0].body
    return {
        field.target.id: doc.value.value
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)
    }


# ---- named sweeps: functions that return the Configs of a sweep ----


def tiny_sweep() -> list[Config]:
    """The four types at three sparsity levels each, on the embedded model: minutes on a laptop."""
    common = dict(num_tokens=400_000, batch_size=2048, log_freq=20, perf_log_freq=100)
    jumprelu = dict(sae_type="jumprelu", lr=6e-3, bandwidth=0.03, threshold_init=0.05)
    return [
        *(Config(sae_type="vanilla", l1_coeff=c, lr=4e-3, **common) for c in (0.003, 0.005, 0.008)),
        *(Config(sae_type="topk", top_k=k, lr=3e-3, **common) for k in (16, 32, 64)),
        *(Config(sae_type="batchtopk", top_k=k, lr=3e-3, **common) for k in (16, 32, 64)),
        *(Config(l1_coeff=c, **jumprelu, **common) for c in (0.0003, 0.003, 0.03)),
    ]


def gpt2_sweep() -> list[Config]:
    """GPT-2 small, layer 8 resid_pre, as in the BatchTopK paper (Bussmann et al. 2024)."""
    common = dict(
        model_name="gpt2", layer=8, site="resid_pre", dataset_path="Skylion007/openwebtext", seq_len=128,
        model_batch_size=256, num_batches_in_buffer=16, num_tokens=1_000_000_000, batch_size=4096, lr=3e-4,
        max_grad_norm=1.0, top_k_aux=512, perf_log_freq=1000, log_freq=100,
        checkpoint_freq=10_000,
    )  # fmt: skip
    width = 768
    return [
        *(
            Config(sae_type=t, dict_size=width * 16, top_k=k, **common)
            for t in ("topk", "batchtopk")
            for k in (16, 32, 64)
        ),
        *(Config(sae_type="jumprelu", dict_size=width * 16, l1_coeff=c, **common) for c in (0.001, 0.003, 0.01)),
        *(
            Config(sae_type=t, dict_size=width * expansion, top_k=32, **common)
            for t in ("topk", "batchtopk")
            for expansion in (4, 8, 32)
        ),
    ]


SWEEPS = {"tiny": tiny_sweep, "gpt2": gpt2_sweep}
