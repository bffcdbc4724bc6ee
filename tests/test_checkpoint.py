"""checkpoint.py: dictionaries come back bit for bit, others can read them, and what is damaged or forged is refused."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from checkpoint import CFG, COUNTERS, WEIGHTS, load_checkpoint, save_checkpoint
from config import TYPES, Config
from runtime import disk
from sae import SAE_TYPES, BaseAutoencoder, TopKSAE, build_sae
from training import Trainer

D, F = 6, 20
FILES = {CFG, WEIGHTS, COUNTERS}

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))
normalised = pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])


def config(sae_type: str = "topk", **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, target_l0=3, l1_coeff=0.01, bandwidth=0.3, batch_size=32,
        num_tokens=320, lr=0.02, dead_after_tokens=64, layer=1, seq_len=16, device="cpu",
    )  # fmt: skip
    return Config(sae_type=sae_type, **(small | changes))


def rows(seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(32, D, generator=rng) * torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5, 0.1]) + 0.7


def trained_sae(sae_type: str, **changes: object) -> BaseAutoencoder:
    """After ten steps: no parameter or buffer is what it was at the start."""
    sae = build_sae(config(sae_type, **changes))
    sae.initialise_from(rows())
    trainer = Trainer(sae.train())
    for step in range(10):
        trainer.step(rows(step), step)
    sae.tokens_since_fired += torch.arange(F)  # as if some had been silent for long
    return sae


def assert_same(loaded: BaseAutoencoder, sae: BaseAutoencoder) -> None:
    assert type(loaded) is type(sae) and loaded.cfg == sae.cfg and not loaded.training
    found, expected = loaded.state_dict(), sae.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        assert found[name].stride() == value.stride(), name


def sums(path: Path, files: tuple[str, ...] = (WEIGHTS, COUNTERS)) -> dict[str, str]:
    """What cfg.json must say: the SHA-256 of the other files, and of the rest of cfg.json."""
    found = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in files}
    cfg = json.loads((path / CFG).read_text()) | {"sha256": found}
    return found | {CFG: hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()}


def reseal(path: Path, files: tuple[str, ...] = (WEIGHTS, COUNTERS)) -> None:
    """Make the sums right again after a change, as who means harm would."""
    cfg = json.loads((path / CFG).read_text())
    (path / CFG).write_text(json.dumps(cfg | {"sha256": sums(path, files)}))


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((path / CFG).read_text()), load_file(path / WEIGHTS)


# ---- checkpoints ----


@normalised
@all_types
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path, sae_type: str, input_unit_norm: bool) -> None:
    sae = trained_sae(sae_type, input_unit_norm=input_unit_norm, seed=5)
    assert sae_type != "batchtopk" or sae.threshold > 0
    save_checkpoint(sae, tmp_path / "a" / "step-000010")
    loaded = load_checkpoint(str(tmp_path / "a" / "step-000010"))
    assert_same(loaded, sae)
    x = rows(99)
    out, expected = loaded(x), sae.eval()(x)
    assert torch.equal(out.sae_out, expected.sae_out) and torch.equal(loaded.encode(x), sae.encode(x))
    assert torch.equal(out.latents.to_dense(), expected.latents.to_dense())


def test_a_float64_sae_is_not_rounded(tmp_path: Path) -> None:
    sae = trained_sae("jumprelu").double()
    with torch.no_grad():
        for p in sae.parameters():
            p += 1e-12
    save_checkpoint(sae, tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), sae)
    assert read(tmp_path / "c")[0]["dtype"] == "float64"


@pytest.mark.parametrize("site, reshape", [("resid_pre", "none"), ("z", "hook_z")])
@normalised
@all_types
def test_files_are_strictly_the_ecosystems(
    tmp_path: Path, sae_type: str, input_unit_norm: bool, site: str, reshape: str
) -> None:
    sae = trained_sae(sae_type, input_unit_norm=input_unit_norm, model_name="gpt2", site=site)
    save_checkpoint(sae, tmp_path / "c")
    assert set(os.listdir(tmp_path / "c")) == FILES
    cfg, tensors = read(tmp_path / "c")

    architecture = sae.cfg.type.sae_lens
    shapes = {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    if architecture == "jumprelu":
        shapes["threshold"] = [F]
    assert {name: list(t.shape) for name, t in tensors.items()} == shapes
    assert all(t.dtype == torch.float32 for t in tensors.values())
    if sae_type == "batchtopk":
        assert (tensors["threshold"] == sae.threshold).all()
    assert_close(tensors["W_dec"].norm(dim=1), torch.ones(F))

    assert cfg.pop("nn_decompositions") == sae.cfg.to_dict()
    assert cfg.pop("sha256") == sums(tmp_path / "c")
    metadata = cfg.pop("metadata")
    assert int(metadata["sae_lens_version"].split(".")[0]) >= 6
    assert metadata.items() >= {
        "model_name": "gpt2", "hook_name": sae.cfg.hook_name, "context_size": 16, "prepend_bos": True,
        "seqpos_slice": [None], "training_architecture": sae_type, "exclude_special_tokens": True,
    }.items()  # fmt: skip
    expected = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "layer_norm" if input_unit_norm else "none",
        "reshape_activations": reshape,
    }  # fmt: skip
    if architecture == "topk":
        expected |= {"k": 3, "rescale_acts_by_decoder_norm": True}
    assert cfg == expected


def foreign_output(path: Path, x: Tensor) -> Tensor:
    """What a library that knows the format and not our code computes from the two files."""
    cfg, w = read(path)
    if cfg["normalize_activations"] == "layer_norm":
        mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    else:
        mean, std = 0.0, 1.0
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    if cfg["architecture"] == "standard":
        acts = pre.relu()
    elif cfg["architecture"] == "topk":
        top = pre.topk(cfg["k"])
        acts = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    else:
        acts = pre.relu() * (pre > w["threshold"])
    return (acts @ w["W_dec"] + w["b_dec"]) * std + mean


@normalised
@all_types
def test_another_reader_of_the_format_gets_our_output(tmp_path: Path, sae_type: str, input_unit_norm: bool) -> None:
    sae = trained_sae(sae_type, input_unit_norm=input_unit_norm)
    save_checkpoint(sae, tmp_path / "c")
    x = rows(99)
    assert_close(foreign_output(tmp_path / "c", x), sae.eval()(x).sae_out.detach(), rtol=1e-5, atol=1e-5)


def test_saving_again_replaces_the_whole_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(trained_sae("jumprelu"), tmp_path / "c")
    sae = trained_sae("topk", seed=2)
    save_checkpoint(sae, tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), sae)
    assert os.listdir(tmp_path) == ["c"] and set(os.listdir(tmp_path / "c")) == FILES


@pytest.mark.parametrize("crashing_file", [1, 2])
@pytest.mark.parametrize("existing", [True, False])
def test_a_crash_while_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, crashing_file: int
) -> None:
    old, new, written = trained_sae("topk"), trained_sae("topk", seed=1), []
    if existing:
        save_checkpoint(old, tmp_path / "c")

    def unplugged(tensors: dict[str, Tensor], path: Path) -> None:
        written.append(path)
        save_file(tensors, path)
        if len(written) == crashing_file:
            path.write_bytes(path.read_bytes()[:20])
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "save_file", unplugged)
        with pytest.raises(OSError, match="Input/output error"):
            save_checkpoint(new, tmp_path / "c")
    assert os.listdir(tmp_path) == (["c"] if existing else [])
    if existing:
        assert_same(load_checkpoint(tmp_path / "c"), old)
    save_checkpoint(new, tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), new)


def test_a_folder_that_holds_other_things_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.tex").write_text("chapter 1")
    with pytest.raises(ValueError, match=r"c: not replaced.*thesis\.tex"):
        save_checkpoint(trained_sae("topk"), tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"] and (tmp_path / "c" / "thesis.tex").read_text() == "chapter 1"


def sealed(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    def with_right_sums(path: Path) -> None:
        damage(path)
        reseal(path)

    return with_right_sums


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return Path.touch, (self.proof,)


def tensors(change: Callable[[dict[str, Tensor]], object], file: str = WEIGHTS) -> Callable[[Path], object]:
    """A damage: change the tensors of a file."""

    def damage(path: Path) -> None:
        loaded = load_file(path / file)
        change(loaded)
        save_file(loaded, path / file)

    return damage


def fields(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """A damage: change the fields of cfg.json."""

    def damage(path: Path) -> None:
        cfg = json.loads((path / CFG).read_text())
        change(cfg)
        (path / CFG).write_text(json.dumps(cfg))

    return damage


def ours(**changes: object) -> Callable[[Path], object]:
    return fields(lambda cfg: cfg["nn_decompositions"].update(changes))


NAN = float("nan")
CHANGED = "does not match its own SHA-256"
DAMAGES = [
    (lambda p: p.rename(p.with_name("moved")), CFG, "no such file"),
    (lambda p: (p / CFG).unlink(), CFG, "no such file"),
    (lambda p: (p / CFG).write_bytes(b"\xff\xfe{}"), CFG, "not JSON"),
    (lambda p: (p / CFG).write_text("[" * 100_000), CFG, "not JSON (RecursionError: maximum recursion depth"),
    (lambda p: (p / CFG).write_text("[1, 2]"), CFG, "holds list, not an object of fields"),
    (lambda p: (p / CFG).write_text('{"architecture": "topk"}'), CFG, "not written by this library"),
    (fields(lambda c: c.update(nn_decompositions=[3])), CFG, "not written by this library"),
    *((fields(change), CFG, CHANGED) for change in (
        lambda c: c["nn_decompositions"].update(target_l0=4),
        lambda c: c.update(normalize_activations="layer_norm"),
        lambda c: c.pop("sha256"),
        lambda c: c.update(sha256=[1]),
        lambda c: c["sha256"].update({CFG: 3}),
    )),
    (lambda p: (p / WEIGHTS).unlink(), WEIGHTS, "incomplete"),
    (lambda p: (p / COUNTERS).unlink(), COUNTERS, "incomplete"),
    (tensors(lambda t: t["b_dec"].add_(1e-7)), WEIGHTS, "does not match its SHA-256"),
    (lambda p: os.truncate(p / WEIGHTS, (p / WEIGHTS).stat().st_size - 1), WEIGHTS, "does not match its SHA-256"),
    (tensors(lambda t: t["threshold_updates"].add_(1), COUNTERS), COUNTERS, "does not match its SHA-256"),
    (lambda p: reseal(p, (COUNTERS,)), WEIGHTS, "does not match its SHA-256"),  # has no sum
    # with sums that were made right again
    *((sealed(damage), file, named) for damage, file, named in [
        (ours(colour="red"), CFG, "unexpected keyword argument 'colour'"),
        (ours(target_l0=F + 1), CFG, f"target_l0 = {F + 1}: "),
        (ours(sae_type="sparse"), CFG, "sae_type = 'sparse': "),
        (ours(act_size=None), CFG, "act_size = None"),
        (ours(dict_size=F + 1), WEIGHTS, f"'b_enc': ({F + 1},)"),
        (ours(sae_type="topk"), WEIGHTS, "'threshold'"),
        (lambda p: os.truncate(p / WEIGHTS, (p / WEIGHTS).stat().st_size - 1), WEIGHTS, "not readable"),
        (lambda p: os.truncate(p / COUNTERS, 0), COUNTERS, "not readable"),
        (tensors(lambda t: t["threshold"].add_(torch.arange(F))), WEIGHTS, "threshold differs"),
        (tensors(lambda t: t["W_enc"][1, 2].fill_(NAN)), WEIGHTS, "W_enc has numbers that are not"),
        (tensors(lambda t: t["b_enc"][0].fill_(-math.inf)), WEIGHTS, "b_enc has numbers that are not"),
        (tensors(lambda t: t["input_scale"].fill_(NAN), COUNTERS), COUNTERS, "input_scale has"),
        (tensors(lambda t: t.pop("b_enc")), WEIGHTS, "'b_enc'"),
        (tensors(lambda t: t.update({"a\nb": torch.ones(1)})), WEIGHTS, "'a\\nb'"),
        (tensors(lambda t: t.update(b_dec=torch.ones(D, 1))), WEIGHTS, f"'b_dec': ({D}, 1)"),
        (tensors(lambda t: t.update(b_dec=torch.ones(0))), WEIGHTS, "not readable"),
        (tensors(lambda t: t.update(b_dec=t["b_dec"].to(torch.float8_e4m3fn))), WEIGHTS, "not readable"),
        (lambda p: torch.save({"W_enc": torch.ones(D, F), "harm": Harm(p / "harm")}, p / WEIGHTS), WEIGHTS, "not read"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("damage, file, named", DAMAGES)
def test_a_damaged_or_malicious_checkpoint_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], object], file: str, named: str
) -> None:
    save_checkpoint(trained_sae("batchtopk"), tmp_path / "c")
    damage(tmp_path / "c")
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "c")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'c' / file}: ") and "\n" not in message and len(message) < 1000
    assert named in message
    assert not (tmp_path / "c" / "harm").exists()


def test_resealing_alone_changes_nothing(tmp_path: Path) -> None:
    sae = trained_sae("batchtopk")
    save_checkpoint(sae, tmp_path / "c")
    reseal(tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), sae)


def test_links_are_followed_as_caches_are_made_of_them(tmp_path: Path) -> None:
    sae = trained_sae("topk")
    save_checkpoint(sae, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in FILES:
        (tmp_path / "snapshot" / file).symlink_to(tmp_path / "blobs" / file)
    (tmp_path / "latest").symlink_to("snapshot")
    assert_same(load_checkpoint(tmp_path / "snapshot"), sae)
    assert_same(load_checkpoint(tmp_path / "latest"), sae)
    new = trained_sae("jumprelu")
    for name in ("latest", "snapshot"):  # links are replaced, and what they lead to is left alone
        save_checkpoint(new, tmp_path / name)
        assert_same(load_checkpoint(tmp_path / name), new)
        assert not any(p.is_symlink() for p in (tmp_path / name, *(tmp_path / name).iterdir()))
    assert_same(load_checkpoint(tmp_path / "blobs"), sae)
    assert set(os.listdir(tmp_path)) == {"blobs", "snapshot", "latest"}


def test_an_sae_that_would_come_back_as_another_class_is_not_saved(tmp_path: Path) -> None:
    class Mine(TopKSAE):
        pass

    problem = r"^Mine: would come back as TopKSAE; give it a sae_type, and add it to SAE_TYPES$"
    with pytest.raises(ValueError, match=problem):
        save_checkpoint(Mine(config()), tmp_path / "c")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_as_float32_and_trains(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = trained_sae("topk").to(dtype)
    save_checkpoint(sae, tmp_path / "c")
    cfg, weights = read(tmp_path / "c")
    assert cfg["dtype"] == str(dtype).removeprefix("torch.") and weights["W_enc"].dtype == dtype
    loaded = load_checkpoint(tmp_path / "c")
    assert type(loaded) is TopKSAE and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.float()) for p, q in zip(loaded.parameters(), sae.parameters()))
    assert torch.equal(loaded.tokens_since_fired, sae.tokens_since_fired)
    before = loaded.W_enc.clone()
    out = Trainer(loaded).step(rows(99), 0)
    assert out.loss.isfinite() and not torch.equal(loaded.W_enc, before)
    assert_close(loaded.W_dec.norm(dim=1), torch.ones(F))


def test_neither_wandb_nor_the_data_sets_are_imported() -> None:
    code = "import sys, checkpoint; print(*{'wandb', 'datasets', 'transformer_lens', 'training'} & sys.modules.keys())"
    root = Path(disk.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("\n", "")


# ---- transcoders and crosscoders ----


@pytest.mark.parametrize("changes", [
    dict(target_site="mlp_out", target_size=4), dict(target_site="mlp_out", target_size=4, skip=True),
    dict(layer=(0, 1, 2), act_size=2),
], ids=["transcoder", "skip", "crosscoder"])  # fmt: skip
@all_types
def test_other_kinds_come_back_as_they_were(tmp_path: Path, sae_type: str, changes: dict) -> None:
    sae = build_sae(config(sae_type, **changes))
    y = None if sae.y_is_x else rows(9)[:, :4]
    sae.initialise_from(rows(), y)
    trainer = Trainer(sae)
    for step in range(3):
        trainer.step(rows(step), step, y)
    save_checkpoint(sae, tmp_path / "sae")
    loaded = load_checkpoint(tmp_path / "sae")
    assert_same(loaded, sae.eval())
    assert torch.equal(loaded(rows()).sae_out, sae(rows()).sae_out)
    said = json.loads((tmp_path / "sae" / CFG).read_text())
    kind = {"standard": "", "topk": "topk_", "jumprelu": "jumprelu_"}[TYPES[sae_type].sae_lens]
    skip = "skip_" * bool(changes.get("skip"))
    assert said["architecture"] == ("crosscoder" if "layer" in changes else f"{kind}{skip}transcoder")
