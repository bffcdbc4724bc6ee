"""logs.py: checkpoints that come back bit for bit and that others can read, metrics on disk, W&B without a network."""

import hashlib
import json
import math
import os
import pickle
import re
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
import wandb
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from wandb.proto.wandb_internal_pb2 import Record

import disk
import logs
from config import Config
from logs import RunLog, load_checkpoint, load_progress, save_checkpoint
from sae import SAE_TYPES, BaseAutoencoder, build_sae
from training import Trainer

D, F = 6, 20
FILES = {"cfg.json", "sae_weights.safetensors", "counters.safetensors"}

all_types = pytest.mark.parametrize("sae_type", list(SAE_TYPES))
normalised = pytest.mark.parametrize("input_unit_norm", [True, False], ids=["normalised", "raw"])


def config(sae_type: str = "topk", **changes: object) -> Config:
    small = dict(
        act_size=D, dict_size=F, top_k=3, l1_coeff=0.01, bandwidth=0.3, threshold_init=0.2, batch_size=32,
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


def sums(path: Path) -> dict[str, str]:
    """What cfg.json must say: the SHA-256 of the two other files, and of the rest of cfg.json."""
    files = ["sae_weights.safetensors", "counters.safetensors"]
    found = {file: hashlib.sha256((path / file).read_bytes()).hexdigest() for file in files}
    cfg = json.loads((path / "cfg.json").read_text()) | {"sha256": found}
    return found | {"cfg.json": hashlib.sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()}


def reseal(path: Path) -> None:
    """Make the sums right again after a change, as who means harm would."""
    cfg = json.loads((path / "cfg.json").read_text())
    (path / "cfg.json").write_text(json.dumps(cfg | {"sha256": sums(path)}))


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    return json.loads((path / "cfg.json").read_text()), load_file(path / "sae_weights.safetensors")


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

    architecture = {"vanilla": "standard", "topk": "topk"}.get(sae_type, "jumprelu")
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
        "model_name": "gpt2", "hook_name": sae.cfg.hook_point, "context_size": 16, "prepend_bos": True,
        "seqpos_slice": [None], "training_architecture": sae_type,
    }.items()  # fmt: skip
    expected = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "layer_norm" if input_unit_norm else "none",
        "reshape_activations": reshape,
    }  # fmt: skip
    if architecture == "topk":
        expected |= {"k": 3, "rescale_acts_by_decoder_norm": False}
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


def tensors(path: Path, change: Callable[[dict[str, Tensor]], object], file: str = "sae_weights.safetensors") -> None:
    loaded = load_file(path / file)
    change(loaded)
    save_file(loaded, path / file)


def edit(path: Path, part: str | None = None, **changes: object) -> None:
    cfg = json.loads((path / "cfg.json").read_text())
    (cfg[part] if part else cfg).update(changes)
    (path / "cfg.json").write_text(json.dumps(cfg))


def fields(path: Path, **changes: object) -> None:
    edit(path, "nn_decompositions", **changes)


def drop(path: Path, field: str, part: str | None = None) -> None:
    cfg = json.loads((path / "cfg.json").read_text())
    del (cfg[part] if part else cfg)[field]
    (path / "cfg.json").write_text(json.dumps(cfg))


def truncate(path: Path, size: int) -> None:
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])


def unreadable(path: Path, header: bytes, length: int | None = None) -> None:
    length = len(header) if length is None else length
    (path / "sae_weights.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(2000))


def entry(name: str, shape: list[int], offsets: list[int]) -> bytes:
    return json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return Path.touch, (self.proof,)


def a_pickle(path: Path) -> None:
    (path / "sae_weights.safetensors").write_bytes(pickle.dumps(Harm(path / "harm")) + bytes(2000))


def a_torch_pickle(path: Path) -> None:
    torch.save({"W_enc": torch.ones(D, F), "harm": Harm(path / "harm")}, path / "sae_weights.safetensors")


def sealed(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    def with_right_sums(path: Path) -> None:
        damage(path)
        reseal(path)

    return with_right_sums


NAN, DEEP = float("nan"), "[" * 100_000 + "]" * 100_000
CFG, WEIGHTS, COUNTERS = "cfg.json", "sae_weights.safetensors", "counters.safetensors"
DAMAGES = [
    (lambda p: p.rename(p.with_name("moved")), CFG, "no such file"),
    (lambda p: (p / CFG).unlink(), CFG, "no such file"),
    (lambda p: ((p / CFG).unlink(), (p / CFG).mkdir()), CFG, "no such file"),
    (lambda p: (p / CFG).write_text('{"architecture": '), CFG, "not JSON"),
    (lambda p: (p / CFG).write_bytes(b"\xff\xfe{}"), CFG, "not JSON"),
    (lambda p: (p / CFG).write_text(DEEP), CFG, "not JSON (maximum recursion depth"),
    (lambda p: (p / CFG).write_text("9" * 5000), CFG, "not JSON (Exceeds the limit"),
    (lambda p: os.truncate(p / CFG, 2**20 + 1), CFG, "1,048,577 bytes"),
    (lambda p: (p / CFG).write_text("[1, 2]"), CFG, "holds list, not an object of fields"),
    (lambda p: (p / CFG).write_text('{"architecture": "topk"}'), CFG, "not written by this library"),
    (lambda p: fields(p, colour="red"), CFG, "['colour'] are unknown"),
    (lambda p: drop(p, "lr", "nn_decompositions"), CFG, "['lr'] are missing"),
    (lambda p: drop(p, "d_in"), CFG, "d_in is missing"),
    (lambda p: drop(p, "model_name", "metadata"), CFG, "metadata.model_name is missing"),
    (lambda p: drop(p, "sha256"), CFG, "['sha256'] are missing"),
    (lambda p: drop(p, CFG, "sha256"), CFG, "sha256: ['cfg.json'] are missing"),
    (lambda p: edit(p, sha256=[1]), CFG, "sha256: "),
    (lambda p: edit(p, "sha256", **{CFG: 3}), CFG, "does not match its own SHA-256"),
    (lambda p: edit(p, colour="red"), CFG, "['colour'] are unknown"),
    (lambda p: edit(p, metadata=3), CFG, "metadata.sae_lens_version is missing"),
    (lambda p: fields(p, top_k=F + 1), CFG, f"top_k = {F + 1}: "),
    (lambda p: fields(p, top_k="3"), CFG, "top_k = '3': "),
    (lambda p: fields(p, top_k=[[[3]]]), CFG, "top_k holds a list"),
    (lambda p: fields(p, act_size=None), CFG, "act_size = None: "),
    (lambda p: fields(p, lr=NAN), CFG, "lr = nan: "),
    (lambda p: edit(p, dtype="int8"), CFG, "dtype is not one of"),
    (lambda p: edit(p, dtype=["float32"]), CFG, "dtype is not one of"),
    # one of our fields and what SAELens reads say different things, or nothing but the sum tells
    (lambda p: fields(p, dict_size=F + 1), CFG, f"d_sae is missing or not {F + 1}"),
    (lambda p: edit(p, d_sae=float(F)), CFG, f"d_sae is missing or not {F},"),
    (lambda p: fields(p, sae_type="topk"), CFG, "architecture is missing or not 'topk'"),
    (lambda p: fields(p, sae_type="jumprelu"), CFG, "training_architecture is missing or not 'jumprelu'"),
    (lambda p: edit(p, normalize_activations="none"), CFG, "normalize_activations is missing or not 'layer_norm'"),
    (lambda p: fields(p, input_unit_norm=False), CFG, "normalize_activations is missing or not 'none'"),
    (lambda p: edit(p, "metadata", colour="red"), CFG, "metadata: [] are missing, ['colour'] are unknown"),
    (lambda p: edit(p, "metadata", hook_name="blocks.2.hook_z"), CFG, "metadata.hook_name is missing or not"),
    (lambda p: fields(p, top_k=4), CFG, "does not match its own SHA-256"),
    # the tensors
    (sealed(lambda p: tensors(p, lambda t: t["threshold"].add_(torch.arange(F)))), WEIGHTS, "threshold differs"),
    (sealed(lambda p: tensors(p, lambda t: t["W_enc"][1, 2].fill_(NAN))), WEIGHTS, "W_enc has numbers that are not"),
    (sealed(lambda p: tensors(p, lambda t: t["b_enc"][0].fill_(-math.inf))), WEIGHTS, "b_enc has numbers that are not"),
    (sealed(lambda p: tensors(p, lambda t: t["input_scale"].fill_(NAN), COUNTERS)), COUNTERS, "input_scale has"),
    (sealed(lambda p: (fields(p, dict_size=2**40), edit(p, d_sae=2**40))), WEIGHTS, "truncated"),
    (sealed(lambda p: edit(p, dtype="float16")), WEIGHTS, "is F32"),
    (sealed(lambda p: edit(p, dtype="float64")), WEIGHTS, "truncated"),
    (lambda p: (p / WEIGHTS).unlink(), WEIGHTS, "incomplete"),
    (lambda p: (p / COUNTERS).unlink(), COUNTERS, "incomplete"),
    (lambda p: truncate(p, -1), WEIGHTS, "not readable"),
    (lambda p: truncate(p, 30), WEIGHTS, "truncated: it has 30 bytes, by cfg.json at least 960"),
    (lambda p: truncate(p, 0), WEIGHTS, "truncated"),
    (lambda p: os.truncate(p / COUNTERS, 0), COUNTERS, "not readable"),
    (lambda p: tensors(p, lambda t: t["b_dec"].add_(1e-7)), WEIGHTS, "does not match its SHA-256"),
    (lambda p: tensors(p, lambda t: t["threshold_updates"].add_(1), COUNTERS), COUNTERS, "does not match its SHA-256"),
    *(
        (seal(damage), file, named)
        for damage, file, named in [
            (lambda p: tensors(p, lambda t: t.pop("b_enc")), WEIGHTS, "['b_enc'] are missing"),
            (lambda p: tensors(p, lambda t: t.update({"a\nb": torch.ones(1)})), WEIGHTS, "['a\\nb'] are unknown"),
            (lambda p: tensors(p, lambda t: t.update({"../x": torch.ones(1)})), WEIGHTS, "['../x'] are unknown"),
            (lambda p: tensors(p, lambda t: t.update(b_dec=torch.ones(D, 1))), WEIGHTS, f"b_dec is F32 [{D}, 1]"),
            (lambda p: tensors(p, lambda t: t.update(b_dec=t["b_dec"].double())), WEIGHTS, f"b_dec is F64 [{D}]; "),
            (lambda p: tensors(p, lambda t: t.update(b_dec=t["b_dec"].view(torch.int32))), WEIGHTS, "b_dec is I32"),
            (lambda p: tensors(p, lambda t: t.clear(), COUNTERS), COUNTERS, "'input_scale'"),
            (a_pickle, WEIGHTS, "not readable"),
            (a_torch_pickle, WEIGHTS, "not readable"),
            (lambda p: unreadable(p, b"{}", length=10 * 2**30), WEIGHTS, "not readable"),
            (lambda p: unreadable(p, b"{}", length=2**64 - 1), WEIGHTS, "not readable"),
            (lambda p: unreadable(p, DEEP.encode()), WEIGHTS, "not readable"),
            (lambda p: unreadable(p, entry("\\n", [9], [0, 1])), WEIGHTS, "not readable"),
            (lambda p: unreadable(p, entry("a\nb", [1], [4, 8])), WEIGHTS, "not readable"),
            (lambda p: unreadable(p, entry("x", [1], [2**62, 2**62 + 4])), WEIGHTS, "not readable"),
        ]
        for seal in (lambda damage: damage, sealed)
    ),
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


def test_a_header_of_ten_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    """Also where the file is as long as it says, of zeros that take no place on the disk."""
    save_checkpoint(trained_sae("topk"), tmp_path / "c")
    unreadable(tmp_path / "c", b"{}", length=10 * 2**30)
    os.truncate(tmp_path / "c" / WEIGHTS, 11 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="not readable"):
        load_checkpoint(tmp_path / "c")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kilobytes


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


def test_no_pickle_and_no_code_from_elsewhere() -> None:
    for file in Path(disk.__file__).parent.glob("*.py"):
        harmless = r"torch\.load\([^()]*, weights_only=True\)|, allow_pickle=False\)"
        text = re.sub(harmless, "", file.read_text())
        found = re.findall(r"pickle|torch\.(?:load|save)\b|trust_remote_code=True|\beval\(|\bexec\(", text)
        assert not [word for word in found if word != "eval("], file  # sae.eval()


# ---- a run's output ----


def two_configs(**changes: object) -> list[Config]:
    return [config("topk", **changes), config("jumprelu", **changes)]


def log_something(log: RunLog) -> None:
    log.log(0, 2, 64, {"train/loss": 0.5, "train/l0": 3.0})
    log.log(1, 2, 64, {"train/loss": 0.25})
    log.log(0, 4, 128, {"train/loss": 0.125})
    log.log(0, 4, 128, {"eval/ce": 1.5})


def test_metrics_config_and_checkpoints_lie_in_the_folder_of_their_sae(tmp_path: Path) -> None:
    cfgs = two_configs(wandb_mode="disabled")
    log = RunLog(tmp_path / "sweep", cfgs)
    log_something(log)
    sae = trained_sae("jumprelu", wandb_mode="disabled")
    log.checkpoint(sae, 4)
    log.close()
    path = tmp_path / "sweep" / cfgs[1].name / "step-000004"
    assert_same(load_checkpoint(path), sae)
    first, second = (tmp_path / "sweep" / cfg.name for cfg in cfgs)
    assert [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 2, "tokens": 64, "train/loss": 0.5, "train/l0": 3.0},
        {"step": 4, "tokens": 128, "train/loss": 0.125},
        {"step": 4, "tokens": 128, "eval/ce": 1.5},
    ]
    assert (second / "metrics.jsonl").read_text() == '{"step": 2, "tokens": 64, "train/loss": 0.25}\n'
    assert [Config(**json.loads((f / "config.json").read_text())) for f in (first, second)] == cfgs
    assert set(os.listdir(tmp_path / "sweep")) == {cfg.name for cfg in cfgs}, "disabled writes nothing for W&B"


@pytest.fixture
def visitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A server that W&B takes for its own and for its proxy, on a machine without a key. It accepts later, if ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
        wandb.teardown()  # its service reads the environment when it starts
        yield server
        wandb.teardown()


def records(file: Path) -> Iterator[Record]:
    """A .wandb file is a LevelDB log: blocks of 32768 bytes of fragments, each checksum [4], length [2], type [1]."""
    data, position, whole = file.read_bytes(), 7, b""
    while position < len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a record in one fragment, or its last one
            yield Record.FromString(whole)
            whole = b""


def test_wandb_offline_is_one_run_per_sae_grouped_by_sweep_without_a_network(
    tmp_path: Path, visitors: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    cfgs = two_configs(wandb_project="features")
    log = RunLog(tmp_path / "sweep-7", cfgs)
    log_something(log)
    log.close()
    wandb.teardown()  # the service writes its last records after a run's end
    with pytest.raises(BlockingIOError):
        visitors.accept()
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""

    history: dict[str, list[dict]] = {}
    for file in sorted((tmp_path / "sweep-7" / "wandb").glob("offline-run-*/*.wandb")):
        found = list(records(file))
        (run,) = (r.run for r in found if r.WhichOneof("record_type") == "run")
        assert (run.project, run.run_group) == ("features", "sweep-7")
        (cfg,) = (cfg for cfg in cfgs if cfg.name == run.display_name)
        saved = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert saved.items() >= cfg.to_dict().items()
        rows = [r.history.item for r in found if r.WhichOneof("record_type") == "history"]
        history[cfg.sae_type] = [{i.nested_key[0]: json.loads(i.value_json) for i in items} for items in rows]
    first = [{"_step": 2, "tokens": 64, "train/loss": 0.5, "train/l0": 3.0},
             {"_step": 4, "tokens": 128, "train/loss": 0.125, "eval/ce": 1.5}]  # fmt: skip
    second = [{"_step": 2, "tokens": 64, "train/loss": 0.25}]
    assert history.keys() == {"topk", "jumprelu"}
    for sae_type, expected in (("topk", first), ("jumprelu", second)):
        assert len(history[sae_type]) == len(expected)
        assert all(row.items() >= wanted.items() for row, wanted in zip(history[sae_type], expected))


# ---- going on after an interruption ----


def test_a_resumed_log_repeats_and_loses_nothing(tmp_path: Path, visitors: socket.socket) -> None:
    """Killed at step 6, in the middle of a line, and resumed from the state of step 4, twice."""
    cfgs, folder = two_configs(wandb_project="features"), tmp_path / "sweep-7"
    log = RunLog(folder, cfgs)
    log_something(log)
    log.save_state({"step": 4, "store": {"order": torch.arange(3)}})
    for index in (0, 1):
        log.log(index, 6, 192, {"train/loss": 0.0625})
    log.close()
    file = folder / cfgs[1].name / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 8, "tok')
    progress = load_progress(folder)
    assert (progress["group"], progress["step"]) == (0, 4) and progress["store"]["order"].tolist() == [0, 1, 2]

    RunLog(folder, cfgs, 0, progress["log"]).close()
    log = RunLog(folder, cfgs, 0, progress["log"])
    for step in (6, 8):
        for index in (0, 1):
            log.log(index, step, 32 * step, {"train/loss": 0.0625 if step == 6 else 0.03})
    log.finish()
    log.close()
    wandb.teardown()
    assert load_progress(folder) == {"group": 1}
    steps = {"topk": [2, 4, 4, 6, 8], "jumprelu": [2, 6, 8]}
    for cfg in cfgs:
        lines = (folder / cfg.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == steps[cfg.sae_type]
        found = [r for run in sorted(folder.glob("wandb/*/*.wandb")) for r in records(run)]
        runs = [r.run for r in found if r.WhichOneof("record_type") == "run" and r.run.display_name == cfg.name]
        (run_id,) = {run.run_id for run in runs}
        files = sorted(folder.glob(f"wandb/offline-run-*/run-{run_id}.wandb"))
        assert len(files) == 3
        rows = [r.history.item for f in files for r in records(f) if r.WhichOneof("record_type") == "history"]
        sent = [int(i.value_json) for items in rows for i in items if i.nested_key[0] == "_step"]
        assert sent == sorted(set(steps[cfg.sae_type]))


def test_metrics_shorter_than_the_state_says_are_not_made_up(tmp_path: Path) -> None:
    cfgs = two_configs(wandb_mode="disabled")
    log = RunLog(tmp_path, cfgs)
    log_something(log)
    log.save_state({"step": 4})
    file = tmp_path / cfgs[0].name / "metrics.jsonl"
    os.truncate(file, 10)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: 10 bytes, \d+ when the state was saved; restore the file"):
        RunLog(tmp_path, cfgs, 0, load_progress(tmp_path)["log"])


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_a_damaged_state_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    log = RunLog(tmp_path, two_configs(wandb_mode="disabled"))
    log.save_state({"step": 4, "store": {"order": torch.arange(1000)}})
    file = tmp_path / "resume.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        content = bytearray(b"what is this")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"resume\.safetensors: damaged .*; remove it to train from the beginning$"):
        load_progress(tmp_path)


# ---- W&B in trouble ----


@pytest.fixture
def key(visitors: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone logged in, to a service that never answers."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()


def test_an_unreachable_wandb_leaves_the_runs_offline(
    tmp_path: Path, key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "sweep", two_configs(wandb_mode="online"))
    log_something(log)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("W&B cannot be used as online (") and line.endswith("; metrics are also in metrics.jsonl")
    assert len(list((tmp_path / "sweep").glob("*/metrics.jsonl"))) == 2
    assert len(list((tmp_path / "sweep").glob("wandb/offline-run-*"))) == 2


def test_a_failing_wandb_run_is_let_go_and_metrics_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfgs = two_configs(wandb_mode="disabled")
    log = RunLog(tmp_path, cfgs)

    def fail(row: dict, step: int) -> None:
        raise BrokenPipeError("the service\nis gone")

    monkeypatch.setattr(log._runs[0], "log", fail)
    log_something(log)
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    file = tmp_path / cfgs[0].name / "metrics.jsonl"
    assert line == f"W&B failed at step 2 (BrokenPipeError: the service is gone); metrics go on in {file}"
    assert len(file.read_text().splitlines()) == 3


def test_a_slow_wandb_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "WANDB_SECONDS", 0.05)
    log = RunLog(tmp_path, two_configs(wandb_mode="disabled"))
    slow = Event()
    monkeypatch.setattr(log._runs[1], "finish", slow.wait)
    log.close()
    slow.set()
    assert f"W&B is slow: what it has not been sent lies in {tmp_path}/wandb" in capsys.readouterr().out
