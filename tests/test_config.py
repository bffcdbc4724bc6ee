"""config.py: what is refused, what names a run and what decides its stream, field by field."""

import dataclasses
import json
import re

import pytest
import torch

from config import GROUPS, HINTS, RESULT_FIELDS, SITES, SWEEPS, TYPES, Config, unused_by
from runtime.checks import checked, choices

FIELDS = [field.name for field in dataclasses.fields(Config)]
CHANGED = dict(
    model_name="gpt2", dataset_path="corpus.txt", dataset_name="sample-10BT", text_column="story", activations="acts",
    seq_len=64, model_batch_size=16, num_batches_in_buffer=8, dtype="bfloat16", text_seed=1, num_tokens=500_000,
    batch_size=1024, layer=1, site="mlp_in", target_site="mlp_out", skip=True, act_size=256, target_size=128,
    sae_type="vanilla", dict_size=1024, target_l0=16, l1_coeff=0.1, bandwidth=0.01,
    prefixes=(0.5, 1.0), top_k_aux=128, aux_penalty=0.1, dead_after_tokens=1000, product_dtype="bfloat16", seed=1,
    init_from="user/repo", input_unit_norm=True, lr=1e-3,
    beta1=0.8, beta2=0.99, max_grad_norm=2.0, lr_warmup=0.1, lr_decay=0.1, sparsity_warmup=0.2, device="cuda:1",
    wandb_project="other", wandb_mode="disabled", wandb_artifacts=True,
    log_freq=10, perf_log_freq=10, eval_windows=8, checkpoint_freq=10,
    resume_freq=10, share="saes", output_dir="elsewhere",
)  # fmt: skip
OUTPUT = {
    "device", "wandb_project", "wandb_mode", "wandb_artifacts", "log_freq", "perf_log_freq", "eval_windows",
    "checkpoint_freq",     "resume_freq", "share", "output_dir",
}  # fmt: skip
UNUSED = {
    "vanilla": {"top_k_aux", "aux_penalty", "bandwidth", "prefixes"},
    "topk": {"l1_coeff", "sparsity_warmup", "bandwidth", "prefixes"},
    "batchtopk": {"l1_coeff", "sparsity_warmup", "bandwidth", "prefixes"},
    "jumprelu": {"prefixes"},
    "matryoshka": {"l1_coeff", "sparsity_warmup", "bandwidth"},
}
STREAM = {
    "model_name", "dataset_path", "dataset_name", "text_column", "activations", "seq_len", "model_batch_size",
    "num_batches_in_buffer", "dtype", "text_seed", "num_tokens", "batch_size", "device",
}  # fmt: skip


def change(cfg: Config, field: str, value: object) -> Config:
    """Change one field, of a transcoder where others have no such field."""
    of_transcoders = {"target_site": "mlp_out"} if field in ("skip", "target_size") else {}
    return dataclasses.replace(dataclasses.replace(cfg, **of_transcoders), **{field: value})


def test_every_field_stands_in_one_group_and_is_tested_here() -> None:
    grouped = [field for group in GROUPS for field in group.__dataclass_fields__]
    assert grouped == list(CHANGED) == FIELDS == list(HINTS)
    assert all(getattr(Config(), field) != value for field, value in CHANGED.items())
    assert {*FIELDS} - {*RESULT_FIELDS} == OUTPUT


@pytest.mark.parametrize("cfg", [
    Config(), Config(**CHANGED | {"input_unit_norm": False}), Config(layer=(0, 1), target_l0=1),
    Config(lr=0.1 + 0.2, l1_coeff=1e-300, seed=2**53 + 1),
])  # fmt: skip
def test_round_trip_is_exact(cfg: Config) -> None:
    assert Config(**cfg.to_dict()) == cfg
    again = Config(**json.loads(json.dumps(cfg.to_dict())))
    assert again == cfg and again.name == cfg.name and again.stream == cfg.stream
    assert [type(value) for value in again.to_dict().values()] == [type(value) for value in cfg.to_dict().values()]


def test_it_is_frozen_and_takes_keywords_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lr = 1.0
    with pytest.raises(TypeError):
        Config("gpt2")


@pytest.mark.parametrize("sae_type", TYPES)
def test_name_differs_exactly_where_the_result_can(sae_type: str) -> None:
    cfg = Config(sae_type=sae_type)
    changed = CHANGED | {"sae_type": "topk" if sae_type == "vanilla" else "vanilla"}
    same = {f for f in FIELDS if change(cfg, f, changed[f]).name == change(cfg, f, getattr(cfg, f)).name}
    assert same == OUTPUT | UNUSED[sae_type] and unused_by(sae_type) == UNUSED[sae_type]


def test_stream_differs_exactly_where_the_activations_do() -> None:
    cfg = Config()
    assert {f for f in FIELDS if change(cfg, f, CHANGED[f]).stream != cfg.stream} == STREAM


@pytest.mark.parametrize(
    "model_name",
    ["EleutherAI/pythia-70m", "..", "/", "~/a b", "C:\\x", "-rf", "a\nb", "x" * 999, "中" * 99, "é\ud800"],
)
def test_name_is_a_plain_file_name(model_name: str) -> None:
    vanilla = {"sae_type": "vanilla"}
    for settings, label in (
        ({"target_l0": 16, "l1_coeff": 1e-9}, "batchtopk-2048-L0-16"),
        (vanilla, "vanilla-2048-L0-32"),
        (vanilla | {"l1_coeff": 1e-9}, "vanilla-2048-l1-1e-09"),
    ):
        cfg = Config(model_name=model_name, **settings)
        assert len(cfg.name) < 150 and re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]+", cfg.name)
        assert f"-L2-resid_pre-{label}-" in cfg.name


def test_names_of_what_looks_alike_differ() -> None:
    models = [Config(model_name=m) for m in ("a/b", "a-b", "a.b", f"{'x' * 60}b", f"y{'x' * 59}b")]
    settings = [Config(sae_type="jumprelu", l1_coeff=c) for c in (0.004, 0.004 + 1e-12)]
    assert len({cfg.name for cfg in models + settings}) == 7


def test_the_hook_of_each_site() -> None:
    hooks = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z"]
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
    hooks, sites = [*hooks, "ln1.hook_out", "ln2.hook_out"], [*sites, "attn_in", "mlp_in"]
    cfgs = [Config(layer=8, site=site) for site in sites]
    assert {*SITES} == {*sites} and [cfg.hook_name for cfg in cfgs] == [f"blocks.8.{hook}" for hook in hooks]
    assert all(cfg.reads == cfg.writes == (cfg.hook_name,) and cfg.is_sae and cfg.kind == "SAE" for cfg in cfgs)
    assert Config(layer=8, site="mlp.hook_post").hook_name == "blocks.8.mlp.hook_post"


def test_what_is_read_and_written_names_the_kind() -> None:
    transcoder = Config(layer=1, site="mlp_in", target_site="mlp_out", act_size=4, target_size=6)
    assert transcoder.reads == ("blocks.1.ln2.hook_out",) and transcoder.writes == ("blocks.1.hook_mlp_out",)
    assert (transcoder.d_in, transcoder.d_out, transcoder.kind) == (4, 6, "transcoder")
    assert transcoder.widths == {"blocks.1.ln2.hook_out": 4, "blocks.1.hook_mlp_out": 6}
    assert dataclasses.replace(transcoder, skip=True).kind == "skip transcoder"
    crosscoder = Config(layer=[0, 3], site="resid_post", act_size=4)
    assert crosscoder.reads == crosscoder.writes == ("blocks.0.hook_resid_post", "blocks.3.hook_resid_post")
    assert (crosscoder.d_in, crosscoder.d_out, crosscoder.kind, crosscoder.layer) == (8, 8, "crosscoder", (0, 3))
    assert "-L0-3-resid_post-" in crosscoder.name and "-L1-mlp_in-to-mlp_out-" in transcoder.name
    same = Config(layer=(2,), target_site="resid_pre")
    assert same == Config(layer=2) and same.is_sae and same.name == Config().name


def test_steps_are_whole_batches() -> None:
    assert [Config(num_tokens=n, batch_size=1000).num_steps for n in (1000, 1999, 2000)] == [1, 1, 2]


def test_the_device_becomes_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config(device="cuda:1").torch_device == torch.device("cuda", 1)
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert Config().torch_device == torch.device(device)


# ---- what a field may be ----


def test_whole_numbers_are_taken_for_floats() -> None:
    cfg = Config(lr=1, beta1=0)
    assert type(cfg.lr) is float and type(cfg.beta1) is float
    assert cfg == Config(lr=1.0, beta1=0.0) and cfg.name == Config(lr=1.0, beta1=0.0).name


def test_a_field_of_several_numbers_takes_a_list_and_one_alone() -> None:
    hint = tuple[float, ...]
    found = [checked("prefixes", value, hint) for value in ([0.25, 1], (0.25, 1.0), 1)]
    assert found == [(0.25, 1.0), (0.25, 1.0), (1.0,)] and type(found[0][1]) is float
    for value, remedy in (((0.25, "x"), "give a list of float"), ([1, float("nan")], "give a finite number")):
        with pytest.raises(ValueError, match=f"^prefixes = {re.escape(repr(value))}: {remedy}$"):
            checked("prefixes", value, hint)


def test_fields_of_few_values() -> None:
    few = {field: values for field, hint in HINTS.items() if (values := choices(hint))}
    for field in ("input_unit_norm", "skip", "wandb_artifacts"):
        assert few.pop(field) == ("True", "False")
    assert few["sae_type"] == tuple(TYPES)
    assert list(few) == ["dtype", "sae_type", "product_dtype", "wandb_mode", "share"]
    assert all(checked(field, value, HINTS[field]) == value for field, values in few.items() for value in values)


POSITIVE = [
    "model_batch_size", "dict_size", "target_l0", "bandwidth", "top_k_aux", "dead_after_tokens", "num_tokens",
    "batch_size", "lr", "max_grad_norm", "log_freq", "perf_log_freq", "eval_windows", "act_size", "checkpoint_freq",
    "resume_freq",
]  # fmt: skip
REFUSED = [
    *((field, 0, "above 0") for field in POSITIVE),
    *((field, -3, "above 0") for field in POSITIVE),
    *((field, -1, "0 or more") for field in ("layer", "l1_coeff", "aux_penalty", "seed")),
    *((field, " ", "give a name") for field in ("model_name", "dataset_path", "wandb_project", "output_dir")),
    ("model_name", "a\0b", "give a name"),
    *((field, None, "give int") for field in ("seq_len", "seed", "target_l0")),
    *((field, "3", "give int or None") for field in ("act_size", "checkpoint_freq")),
    *((field, value, "between 0 and 1") for field in ("lr_warmup", "sparsity_warmup") for value in (-0.1, 1.1)),
    *((field, value, "[0, 1)") for field in ("beta1", "beta2") for value in (-0.1, 1.0)),
    *((field, value, "finite") for field in ("lr", "l1_coeff") for value in (float("nan"), float("inf"))),
    ("target_l0", True, "give int"),
    *(("layer", value, "give a list of int") for value in (None, True, "2", (0, 1.5))),
    *(("layer", value, "0 or more, several in rising order") for value in ((), (1, 1), (2, 0), (-1, 0))),
    ("lr", "0.1", "give float"),
    ("dict_size", 2048.0, "give int"),
    ("input_unit_norm", 1, "give bool"),
    ("dataset_name", 3, "give str or None"),
    ("model_name", None, "give str"),
    *((field, 2**63, "less than 2**63") for field in ("seed", "layer", "dict_size", "act_size")),
    ("lr", 10**400, "less than 2**63"),
    ("seq_len", 1, "at least 2"),
    ("num_batches_in_buffer", 1, "at least 2"),
    ("lr_decay", 1.1, "between 0 and 1"),
    ("lr_decay", 0.96, "lr_warmup is 0.05"),
    ("target_l0", 2049, "at most dict_size, 2048"),
    ("num_tokens", 2047, "give at least a batch of 2048"),
    ("sae_type", "batch_topk", "did you mean batchtopk? give one of vanilla, topk, batchtopk, jumprelu"),
    ("sae_type", None, "give one of vanilla"),
    *((field, " ", "give a name") for field in ("site", "target_site", "init_from")),
    ("site", "resid_per", "did you mean resid_pre? give one of resid_pre, resid_mid"),
    ("target_site", "mlp_on", "did you mean mlp_in? give one of resid_pre, resid_mid"),
    ("dtype", "fp32", "give one of float32, bfloat16, float16"),
    ("wandb_mode", "on", "give one of offline, online, disabled"),
    *(
        ("device", device, '"auto", "cpu"')
        for device in ("gpu", "cuda:", "cuda:x", "mps", "", "cuda:²", "cuda:01", "cuda:1\n", "cuda:999")
    ),
]


@pytest.mark.parametrize("field, value, remedy", REFUSED)
def test_bad_values_are_refused_in_one_line(field: str, value: object, remedy: str) -> None:
    with pytest.raises(ValueError) as error:
        Config(**{field: value})
    message = str(error.value)
    assert message.startswith(f"{field} = {value!r}: ") and remedy in message and "\n" not in message


@pytest.mark.parametrize("fields, message", [
    (dict(skip=True), "skip = True: give a target_site that is not resid_pre"),
    (dict(target_size=8, target_site="resid_pre"), "target_size = 8: give a target_site that is not resid_pre"),
    (dict(layer=(0, 1), target_site="mlp_out"), "layer = (0, 1): a transcoder is of one layer; give target_site"),
    (dict(layer=(0, 1), input_unit_norm=True), "input_unit_norm = True: it is for an SAE of one layer"),
    (dict(target_site="mlp_out", input_unit_norm=True), "input_unit_norm = True: it is for an SAE of one layer"),
])  # fmt: skip
def test_what_a_kind_has_not_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        Config(**fields)
    assert str(error.value).startswith(message)


# ---- the named sweeps ----


def test_tiny_sweep_is_four_types_at_three_levels_on_one_stream() -> None:
    cfgs = SWEEPS["tiny"]()
    assert [cfg.sae_type for cfg in cfgs] == [t for t in ("vanilla", "topk", "batchtopk", "jumprelu") for _ in range(3)]
    assert len({cfg.name for cfg in cfgs}) == len(cfgs) and len({cfg.stream for cfg in cfgs}) == 1
    assert [cfg.target_l0 for cfg in cfgs] == [16, 32, 64] * 4
    assert {f for cfg in cfgs for f in FIELDS if getattr(cfg, f) != getattr(Config(), f)} == {
        "sae_type", "target_l0", "num_tokens", "log_freq", "perf_log_freq"
    }  # fmt: skip
    assert {cfg.model_name for cfg in cfgs} == {"tiny-lm"} and {cfg.wandb_mode for cfg in cfgs} == {"offline"}


def test_gpt2_sweep_is_the_batchtopk_paper_s_on_one_stream() -> None:
    cfgs = SWEEPS["gpt2"]()
    assert len({cfg.name for cfg in cfgs}) == 15 and len({cfg.stream for cfg in cfgs}) == 1
    assert {(cfg.model_name, cfg.hook_name) for cfg in cfgs} == {("gpt2", "blocks.8.hook_resid_pre")}
    by_type = {t: [c for c in cfgs if c.sae_type == t] for t in TYPES}
    sizes = {(768 * 16, 16), (768 * 16, 32), (768 * 16, 64), (768 * 4, 32), (768 * 8, 32), (768 * 32, 32)}
    for sae_type, expected in (
        ("topk", sizes),
        ("batchtopk", sizes),
        ("jumprelu", {s for s in sizes if s[0] == 12288}),
    ):
        found = [(cfg.dict_size, cfg.target_l0) for cfg in by_type[sae_type]]
        assert {*found} == expected and len(found) == len(expected)
    assert not by_type["vanilla"] and not by_type["matryoshka"]


def test_the_sweeps_of_other_kinds_are_on_one_stream() -> None:
    transcoders, crosscoder = SWEEPS["transcoders"](), SWEEPS["crosscoder"]()
    assert [(cfg.layer, cfg.target_l0) for cfg in transcoders] == [(l, k) for l in range(4) for k in (8, 16, 32)]
    assert {(cfg.kind, cfg.site, cfg.target_site) for cfg in transcoders} == {("transcoder", "mlp_in", "mlp_out")}
    assert {(cfg.kind, cfg.layer) for cfg in crosscoder} == {("crosscoder", (0, 1, 2, 3))}
    of_gpt2 = SWEEPS["gpt2-transcoders"]()
    assert {(cfg.hook_name, cfg.writes[0], cfg.dict_size, cfg.target_l0) for cfg in of_gpt2} == {
        ("blocks.8.ln2.hook_out", "blocks.8.hook_mlp_out", 768 * 16, k) for k in (16, 32, 64)
    }
    for cfgs in (transcoders, crosscoder, of_gpt2):
        assert len({cfg.stream for cfg in cfgs}) == 1 and len({cfg.name for cfg in cfgs}) == len(cfgs)


# ---- the rules ----


def test_defaults_depend_on_length_width_and_sparsity() -> None:
    cfg = Config(num_tokens=488 * 2048, act_size=256)
    assert cfg.peak_lr == 0.01 and cfg.dead_after == 488 * 2048 // 300
    assert Config(num_tokens=100 * 2048, act_size=256).peak_lr == 0.01  # a higher one leaves most latents dead
    assert Config(num_tokens=8 * 488 * 2048, act_size=256).peak_lr == pytest.approx(0.005)
    assert Config(num_tokens=488 * 2048, act_size=64).peak_lr == 0.02  # directions turn by as much in any width
    assert Config(num_tokens=10**10).dead_after == 10**7  # however long the run
    assert Config(num_tokens=200_000, dict_size=98304).dead_after == 8 * 98304 // 32  # what is rare is not dead
    assert Config(num_tokens=10**8, act_size=256).rules == {"lr": 0.00215, "dead_after_tokens": 333_333}
    assert Config().rules == {"dead_after_tokens": 3333}  # the width is not known yet
    assert not Config(lr=0.0012345, dead_after_tokens=5).rules  # what is given is shown as it is
    assert Config(lr=0.1).peak_lr == 0.1 and Config(dead_after_tokens=5).dead_after == 5


@pytest.mark.parametrize("sae_type", list(TYPES))
def test_a_coefficient_that_is_given_takes_the_place_of_steering(sae_type: str) -> None:
    penalised = sae_type in ("vanilla", "jumprelu")
    steered, fixed = Config(sae_type=sae_type), Config(sae_type=sae_type, l1_coeff=0)
    assert steered.steers_l0 is penalised and not fixed.steers_l0
    assert fixed.has_fixed_penalty is penalised and not steered.has_fixed_penalty
    if penalised:
        Config(sae_type=sae_type, l1_coeff=0.1, dict_size=8, target_l0=32)  # which is the start alone
