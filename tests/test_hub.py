"""Push SAEs to a stand-in for the Hub and load them from it; what the card says; no token is ever shown."""

import json
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, Hub, standing_in

from checkpoint import save_checkpoint
from config import Config
from interop.hub import model_card, push_to_hub
from interop.pretrained import load_pretrained
from sae import SAE_TYPES, BaseAutoencoder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with standing_in(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def make(sae_type: str, **fields: object) -> BaseAutoencoder:
    cfg = Config(**{"sae_type": sae_type, "act_size": 8, "dict_size": 32, "target_l0": 4, "device": "cpu"} | fields)
    sae = SAE_TYPES[sae_type](cfg)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in sae.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.3)
    return sae.eval()


def write_run(sweep: Path, cfg: Config, **metrics: float) -> None:
    (sweep / cfg.name).mkdir(parents=True)
    (sweep / cfg.name / "config.json").write_text(json.dumps(cfg.to_dict()))
    row = {"step": 7, "tokens": 14336} | {f"eval/{name}": value for name, value in metrics.items()}
    (sweep / cfg.name / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize("sae_type", SAE_TYPES)
def test_pushed_then_loaded(hub: Hub, sae_type: str) -> None:
    sae = make(sae_type)
    url = push_to_hub(sae, "someone/saes")
    assert url.endswith(f"/someone/saes/tree/main/{sae.cfg.name}")
    assert hub.commits == 1  # nobody sees half of it
    files = ("README.md", "cfg.json", "sae_weights.safetensors", "counters.safetensors")
    assert hub.repos["someone/saes"].keys() == {"README.md", *(f"{sae.cfg.name}/{name}" for name in files)}

    loaded = load_pretrained(f"someone/saes:{sae.cfg.name}")
    assert type(loaded) is type(sae) and loaded.cfg == sae.cfg
    x = torch.randn(5, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x).sae_out, sae(x).sae_out)


def test_folders_of_this_machine_are_not_pushed(hub: Hub, tmp_path: Path) -> None:
    home = "/home/someone"
    local = {"model_name": f"{home}/models/m", "dataset_path": "~/secret/*.txt", "output_dir": f"{home}/runs"}
    local |= {"activations": f"{home}/acts", "init_from": f"{home}/runs/sae"}
    sae = make("topk", **local)
    write_run(tmp_path, sae.cfg, l0=4.0)
    push_to_hub(sae, "someone/saes", sweep=tmp_path)
    assert {field: getattr(sae.cfg, field) for field in local} == local
    pushed = str(hub.repos["someone/saes"])
    assert not [
        word for word in ("someone/models", "someone-models", "secret", "/home", str(tmp_path)) if word in pushed
    ]
    names = dict(model_name="m", dataset_path="*.txt", activations="acts", init_from="sae")
    public = replace(sae.cfg, **names, output_dir=Config().output_dir)
    assert load_pretrained(f"someone/saes:{public.name}").cfg == public


@pytest.mark.parametrize(
    "path, name", [("secret/a?.txt", "a?.txt"), ("secret/*.py", "*.py"), ("/", "root"), ("user/texts", "user/texts")]
)
def test_the_name_of_local_text_is_published_alone(hub: Hub, path: str, name: str) -> None:
    push_to_hub(make("topk", dataset_path=path), "someone/saes", folder="it")
    assert load_pretrained("someone/saes:it").cfg.dataset_path == name


def test_a_bar_in_a_name_does_not_end_a_cell() -> None:
    card = model_card(make("topk", dataset_path="user/a|b"), "someone/saes", "it")
    assert "| dataset_path | `user/a\\|b` |" in card.splitlines()


def test_a_repository_is_private_if_asked(hub: Hub) -> None:
    push_to_hub(make("topk"), "someone/secret", private=True)
    push_to_hub(make("topk", l1_coeff=2e6), "someone/saes", folder="l1_2e+06")
    assert hub.is_private == {"someone/secret": True, "someone/saes": False}
    assert load_pretrained("someone/saes:l1_2e+06").cfg.target_l0 == 4


def test_a_second_sae_joins_the_first(hub: Hub) -> None:
    first, second = make("topk"), make("vanilla")
    push_to_hub(first, "someone/saes")
    push_to_hub(second, "someone/saes", folder="others/second")
    assert load_pretrained(f"someone/saes:{first.cfg.name}").cfg == first.cfg
    assert load_pretrained("someone/saes:others/second").cfg == second.cfg
    assert hub.repos["someone/saes"]["README.md"] == hub.repos["someone/saes"]["others/second/README.md"]


def test_a_folder_of_another_library_at_the_root_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    sae = make("topk")
    save_checkpoint(sae, tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae/cfg.json").read_text())
    del cfg["nn_decompositions"], cfg["sha256"]
    weights = (tmp_path / "sae/sae_weights.safetensors").read_bytes()
    hub.repos["someone/else"] = {"cfg.json": json.dumps(cfg).encode(), "sae_weights.safetensors": weights}
    hub.repos["someone/else"]["large.bin"] = b"not asked for"
    loaded = load_pretrained("someone/else")
    x = torch.randn(5, 8)
    assert torch.equal(loaded.encode(x), sae.encode(x))
    assert not any("large.bin" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    "source, says",
    [
        ("someone/none", "someone/none: no such folder, and not loaded from the Hub"),
        ("someone/saes", "holds no SAE"),
        ("someone/saes:no/such", "holds no SAE"),
        ("runs/tiny/none/step-000195", "no such folder"),
        ("someone/saes:../../secrets", "no such folder"),
        ("..:x", "no such folder"),
    ],
)
def test_what_is_not_there(hub: Hub, source: str, says: str) -> None:
    push_to_hub(make("topk"), "someone/saes")
    with pytest.raises(ValueError, match=says) as caught:
        load_pretrained(source)
    assert "\n" not in str(caught.value)


def test_the_token_is_sent_and_never_shown(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    sae = make("topk")
    push_to_hub(sae, "someone/saes")
    assert ("POST", "/api/repos/create", f"Bearer {TOKEN}") in hub.requests
    shown = json.dumps({path: data.decode(errors="replace") for path, data in hub.repos["someone/saes"].items()})
    for status in (401, 403, 404, 400):
        hub.refuse = status  # and the answer repeats the token
        for act in (lambda: push_to_hub(sae, "someone/saes"), lambda: load_pretrained("someone/more")):
            with pytest.raises(ValueError) as caught:
                act()
            assert "\n" not in str(caught.value)
            shown += "".join(traceback.format_exception(caught.value))
    output = capfd.readouterr()
    assert TOKEN not in shown + output.out + output.err
    assert "<token>" in shown  # the refusals had it


@pytest.mark.parametrize("repo_id, folder", [("saes", None), ("someone/saes/more", None), ("a/b", "../c"), ("a/b", "")])
def test_names_that_are_none(hub: Hub, repo_id: str, folder: str | None) -> None:
    with pytest.raises(ValueError, match="give a folder, or user/repo"):
        push_to_hub(make("topk"), repo_id, folder=folder)
    assert hub.requests == []


def test_the_card(hub: Hub, tmp_path: Path) -> None:
    sae = make("topk")
    write_run(tmp_path / "a", sae.cfg, l0=4.0, ce_recovered=0.75, of_a_metric_to_come=0.1234567)
    write_run(tmp_path / "a", replace(sae.cfg, target_l0=5), l0=5.0, ce_recovered=0.8765)
    write_run(tmp_path / "b", sae.cfg)
    push_to_hub(sae, "someone/saes", sweep=tmp_path / "a", folder="a/folder")
    card = hub.repos["someone/saes"]["README.md"].decode()
    assert card == model_card(sae, "someone/saes", "a/folder", tmp_path / "a")
    lines = card.splitlines()
    assert lines[0] == "---" and "library_name: saelens" in lines
    assert 'sae = SAE.from_pretrained("someone/saes", "a/folder")' in lines
    assert 'sae = load_pretrained("someone/saes:a/folder")' in lines
    assert f"A TopK sparse autoencoder: 32 latents of the 8 activations at `{sae.cfg.hook_name}` of `tiny-lm`." in card
    assert "After 7 steps, 14,336 tokens;" in card and "0.8765" not in card
    assert {"| l0 | 4 |", "| ce_recovered | 0.75 |", "| of_a_metric_to_come | 0.123457 |"} <= set(lines)
    assert "| target_l0 | `4` |" in lines and "| hook" not in card and "nan" not in card

    for there, fields in ((True, dict(target_site="mlp_out", target_size=8)), (False, dict(layer=(0, 1)))):
        for sae_type in ("topk", "vanilla"):
            card = model_card(make(sae_type, site="mlp_in", **fields), "someone/saes", "it")
            assert ("sae_lens" in card) == (there and sae_type == "vanilla")

    card = model_card(sae, "someone/saes", "a/folder", tmp_path / "b")
    assert "Not evaluated yet." in card and "nan" not in card
    for other, sweep, count in ((make("vanilla"), tmp_path / "a", 0), (sae, tmp_path, 2)):
        with pytest.raises(ValueError, match=rf"sweep = .*: holds {count} runs named .*; give the folder"):
            model_card(other, "someone/saes", "a/folder", sweep)
