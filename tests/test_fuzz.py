"""Try what hypothesis makes up: damaged checkpoints, fields of Config, command lines; the same on every run."""

import contextlib
import json
import shutil
import string
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from checkpoint import load_checkpoint, save_checkpoint
from config import HINTS, SITES, Config
from runtime import cli
from sae import SAE_TYPES, BaseAutoencoder, build_sae

FILES = ("cfg.json", "sae_weights.safetensors", "counters.safetensors")
FIELDS = list(HINTS)
PLACES = st.integers(0, 2 * len(SAE_TYPES) - 1)  # in `saved`


def cases(count: int) -> settings:
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def one_line(error: ValueError) -> str:
    message = str(error)
    assert message and len(message.splitlines()) == 1
    return message


# ---- checkpoints ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, BaseAutoencoder]:
    """Save checkpoints of every type, with two seeds each, and return the SAEs in them."""
    saes = {}
    for sae_type in SAE_TYPES:
        for seed in (0, 1):
            cfg = Config(sae_type=sae_type, act_size=2, dict_size=3, target_l0=2, l1_coeff=0.1, seed=seed, device="cpu")
            folder = tmp_path_factory.mktemp("saved") / "c"
            saes[folder] = build_sae(cfg)
            save_checkpoint(saes[folder], folder)
    return saes


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "c"


def assert_refused_or_same(damaged: Path, sae: BaseAutoencoder) -> None:
    try:
        loaded = load_checkpoint(damaged)
    except ValueError as error:
        assert one_line(error).startswith(tuple(f"{damaged / file}: " for file in FILES))
        return
    assert type(loaded) is type(sae) and loaded.cfg == sae.cfg
    found, expected = loaded.state_dict(), sae.state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in expected.items())


def copy(damaged: Path, folder: Path) -> None:
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)


EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0), st.integers(1, 255)),
        st.tuples(st.just("insert"), st.integers(0), st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("delete"), st.integers(0), st.integers(1, 20)),
        st.tuples(st.just("move"), st.integers(0), st.integers(0)),
        st.tuples(st.just("truncate"), st.integers(0), st.none()),
    ),
    min_size=1,
    max_size=3,
)


def edited(data: bytes, edits: list[tuple]) -> bytes:
    for kind, place, value in edits:
        at = place % (len(data) + 1)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ value]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + value :]
        elif kind == "move":
            end = value % (len(data) + 1)
            data = data[end:] + data[:end]
        elif kind == "truncate":
            data = data[:at]
    return data


@cases(600)
@given(which=PLACES, file=st.sampled_from(FILES), edits=EDITS)
def test_a_checkpoint_with_changed_bytes(saved: dict, damaged: Path, which: int, file: str, edits: list) -> None:
    folder = list(saved)[which]
    copy(damaged, folder)
    (damaged / file).write_bytes(edited((damaged / file).read_bytes(), edits))
    assert_refused_or_same(damaged, saved[folder])


@cases(200)
@given(which=PLACES, sources=st.lists(PLACES, min_size=3, max_size=3), order=st.permutations(FILES))
def test_a_checkpoint_put_together_from_others(
    saved: dict, damaged: Path, which: int, sources: list[int], order: list[str]
) -> None:
    """Take each file from any SAE, possibly under another's name."""
    folders = list(saved)
    copy(damaged, folders[which])
    for source, file, name in zip(sources, FILES, order):
        shutil.copy(folders[source] / name, damaged / file)
    assert_refused_or_same(damaged, saved[folders[sources[0]]])


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    inner = [leaf for key, v in value.items() for leaf in leaves(v, (*path, key))] if isinstance(value, dict) else []
    return [path, *inner] if path else inner


@cases(500)
@given(which=PLACES, place=st.integers(0), value=ANY_JSON, drop=st.booleans(), seal=st.booleans())
def test_a_checkpoint_whose_cfg_says_something_else(
    saved: dict, damaged: Path, which: int, place: int, value: object, drop: bool, seal: bool
) -> None:
    """With `seal`, a right sum is put on what is changed; then it is refused, or it is the SAE that cfg.json says."""
    folder = list(saved)[which]
    copy(damaged, folder)
    cfg = json.loads((damaged / "cfg.json").read_text())
    *path, name = (paths := leaves(cfg))[place % len(paths)]
    inner = cfg
    for key in path:
        inner = inner[key]
    if drop:
        del inner[name]
    else:
        inner[name] = value
    if seal and isinstance(cfg.get("sha256"), dict):
        cfg["sha256"].pop("cfg.json", None)
        cfg["sha256"]["cfg.json"] = sha256(json.dumps(cfg, sort_keys=True).encode()).hexdigest()
    (damaged / "cfg.json").write_text(json.dumps(cfg))
    sae = saved[folder]
    if seal and path == ["nn_decompositions"] and drop:  # then the field has its default
        with contextlib.suppress(ValueError):
            load_checkpoint(damaged)
        return
    if seal and path == ["nn_decompositions"]:
        with contextlib.suppress(ValueError, RuntimeError):  # or it has another size
            sae = build_sae(replace(sae.cfg, **{name: value}))
            sae.load_state_dict(saved[folder].state_dict())
    assert_refused_or_same(damaged, sae)


# ---- Config ----

NUMBERS = st.sampled_from([0, 1, 2, 127, 2048, 2**31, 2**63 - 1, 2**63, -(2**63), 10**400, -0.0, 5e-324, 1e308])
ODD_NAMES = ["float32", "disabled", "gpt2", "../../x", "/", "..", "a\0b", "a\nb", "x" * 999, "é" * 99, "中" * 99]
NAMES = st.sampled_from([*SAE_TYPES, *SITES, *ODD_NAMES])
DEVICES = st.sampled_from(
    ["cpu", "cuda", "auto", "cpu:0", "cuda:7", "cuda:²", "cuda:٣", "cuda:01", "cuda:200", "cuda:1\n"]
)
ANY = st.one_of(ANY_JSON, NUMBERS, NAMES, st.binary(max_size=4), st.sets(st.integers(), max_size=2))
STRINGS = st.one_of(NAMES, st.text(max_size=99), st.text("/.\0\n~-é中\ud800", max_size=99))
REALS = st.one_of(NUMBERS, st.floats(), st.floats(0, 1))
LIKELY = {str: STRINGS, float: REALS, bool: st.booleans(), tuple: st.lists(REALS, max_size=3).map(tuple)}


def values(field: str) -> st.SearchStrategy:
    if field == "device":
        return st.one_of(DEVICES, ANY)
    kind = type(Config.__dataclass_fields__[field].default)
    return st.one_of(LIKELY.get(kind, st.one_of(NUMBERS, st.integers(-3, 5000))), ANY)


@cases(800)
@given(
    changes=st.lists(st.sampled_from(FIELDS).flatmap(lambda f: st.tuples(st.just(f), values(f))), max_size=3).map(dict)
)
def test_a_config_of_anything(changes: dict[str, object]) -> None:
    try:
        cfg = Config(**changes)
    except ValueError as error:
        assert one_line(error).split(" = ")[0] in FIELDS
        return
    assert Config(**json.loads(json.dumps(cfg.to_dict()))) == cfg
    assert set(cfg.name) <= set(string.ascii_letters + string.digits + "-_.+") and cfg.name[0] not in "-."
    assert len(cfg.name) < 200
    assert cfg.torch_device and cfg.num_steps >= 1 and cfg.hook_name and hash(cfg.stream)


# ---- the command line ----

ODD_WORDS = ["tiny", "topk", "--", "-", "--no-", "None", "True", "nan", "1e400", "-1", "0", "²", "cuda:²", "a\0b"]
WORDS = st.one_of(
    st.sampled_from(ODD_WORDS), st.integers(-10, 10**20).map(str), st.floats().map(str), st.text(max_size=9)
)
OPTIONS = st.sampled_from(FIELDS).map(lambda field: f"--{field.replace('_', '-')}")


def likely(option: str) -> st.SearchStrategy:
    return st.lists(st.one_of(values(option[2:].replace("-", "_")).map(str), WORDS), min_size=1, max_size=2)


@cases(200)
@given(
    first=st.lists(st.sampled_from(["tiny", "gpt2", "²"]), max_size=1),
    options=st.lists(OPTIONS.flatmap(lambda option: st.tuples(st.just(option), likely(option))), max_size=3),
    joined=st.booleans(),
)
def test_a_command_line_of_anything(first: list[str], options: list[tuple[str, list[str]]], joined: bool) -> None:
    args = list(first)
    for option, values in options:
        args += [f"{option}={value}" for value in values] if joined else [option, *values]
    assume(not {"-h", "--help"} & set(args))
    try:
        cfgs = cli.parse(args).cfgs
    except ValueError as error:
        assert one_line(error)
    else:
        assert cfgs and all(isinstance(cfg, Config) for cfg in cfgs)


YAML = st.sampled_from(
    ["target_l0", "lr", ": ", ":", "- ", "[", "]", "{", "}", ",", "\n", "  ", "1e-3", "2", "null", "~", "'"]
)
TAGS = st.sampled_from(
    ["!!int x", "!!float []", "!!timestamp x", "!!bool 3", "!!binary é", "!!set {}", "&a", "*a", "<<: "]
)


@cases(200)
@given(words=st.lists(YAML | YAML | TAGS | st.text(max_size=3), max_size=12))
def test_a_file_of_overrides_of_anything(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes("".join(words).encode("utf-8", "surrogatepass"))
    try:
        given = cli.read_overrides(file)
    except ValueError as error:
        assert str(error).startswith(f"--overrides: {file}: ")
    else:
        assert set(given) <= set(FIELDS) and all(given.values())
