"""Dashboards against dense activations and Hugging Face's weights, and their page in a headless Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.testing import assert_close
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import results
from analysis import dashboard
from analysis.dashboard import BANDS, BINS, LEVELS, PER_BAND, SAMPLED, STRONGEST, direct_effects, latent_statistics
from analysis.latents import nearest_latents
from checkpoint import save_checkpoint
from config import Config
from language_model import check_model, load_model, ordinary_positions, record
from sae import SAE_TYPES, BaseAutoencoder, build_sae
from text import held_out_windows

HOSTILE = "</script><script>window.harmed=1</script><img src=x onerror=window.harmed=1><!--"
WINDOWS = 60
LENS_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")  # of a jumprelu in SAELens


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path, tiny_text: Path) -> Config:
    return check_model(
        Config(
            model_name=str(tiny_gpt2), dataset_path=str(tiny_text), layer=1, dict_size=48, top_k=6, seq_len=24,
            model_batch_size=4, batch_size=256, device="cpu",
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(cfg: Config) -> TransformerBridge:
    return load_model(cfg)


@pytest.fixture(scope="module")
def tokens(cfg: Config, model: TransformerBridge) -> Tensor:
    """Held-out windows, some of them with an EOS inside."""
    tokens = held_out_windows(cfg, model.tokenizer, WINDOWS, choice=4)
    tokens[::3, 9] = model.tokenizer.eos_token_id
    return tokens


def some_sae(cfg: Config, model: TransformerBridge, tokens: Tensor) -> BaseAutoencoder:
    """Make an SAE whose latents fire on fractions of the tokens, each at its own rate; latent 5 never does."""
    sae = build_sae(cfg)
    sae.initialise_from(record(model, tokens, [cfg.hook_name])[cfg.hook_name].flatten(0, 1))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-1.5, 0, cfg.dict_size) * sae.input_scale / 4)
        sae.b_enc[5] = -1e4
        if cfg.sae_type == "batchtopk":
            sae.threshold.copy_(0.3 * sae.input_scale)
        if cfg.sae_type == "jumprelu":
            sae.threshold.copy_(torch.linspace(0, 0.4, cfg.dict_size) * sae.input_scale)
    return sae


def dense_activations(sae: BaseAutoencoder, model: TransformerBridge, tokens: Tensor) -> Tensor:
    """Encode every position, [window, pos, dict_size], with zeros at the special ones."""
    x = record(model, tokens, [sae.cfg.hook_name])[sae.cfg.hook_name]
    return sae.encode(x).detach() * ordinary_positions(tokens, model.tokenizer)[..., None]


# ---- what latents fire on ----


@pytest.mark.parametrize("sae_type", list(SAE_TYPES))
def test_statistics_are_those_of_the_dense_activations(
    cfg: Config, model: TransformerBridge, tokens: Tensor, sae_type: str
) -> None:
    sae = some_sae(replace(cfg, sae_type=sae_type), model, tokens).train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    found = latent_statistics(sae, model, tokens)
    assert sae.training and all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())

    ordinary, dense = ordinary_positions(tokens, model.tokenizer), dense_activations(sae, model, tokens)
    flat = dense.flatten(0, 1)
    fires = flat > 0
    assert found.tokens == ordinary.sum() < tokens.numel() - len(tokens)
    assert torch.equal(found.counts, fires.sum(dim=0)) and found.counts[5] == 0
    assert (found.counts > 3 * SAMPLED).any() and (found.counts < len(flat) / 4).any()
    assert_close(found.maxima, flat.amax(dim=0))
    assert_close(found.means, flat.sum(dim=0) / fires.sum(dim=0).clamp_min(1))
    bands_seen = set()
    for j in range(cfg.dict_size):
        values = flat[fires[:, j], j]
        if len(values):
            edges = torch.linspace(0, 1, BINS + 1) * values.max()
            expected = torch.histogram(values, bins=edges).hist.long()
            assert (found.histograms[j] - expected).abs().sum() <= 2  # one value on an edge
        assert found.histograms[j].sum() == len(values)

        contexts, peaks = found.contexts[j], dense[..., j].amax(dim=1)
        strongest = [c for c in contexts if c.band < 0]
        assert len(strongest) == min(STRONGEST, int((peaks > 0).sum()))
        found_peaks = torch.tensor([c.values[c.positions.index(c.peak)] for c in strongest])
        assert_close(found_peaks, peaks.sort(descending=True).values[: len(strongest)])
        assert len({c.window for c in contexts}) == len(contexts)
        assert all(sum(c.band == band for c in contexts) <= PER_BAND for band in range(BANDS))
        for c in contexts:
            row = dense[c.window, :, j]
            assert c.positions == row.nonzero().squeeze(1).tolist()
            assert_close(torch.tensor(c.values), row[c.positions])
            assert c.peak in c.positions and (c.band >= 0 or row[c.peak] == row.max())
            if c.band >= 0 and len(values) > 4 * SAMPLED:  # a sample's quantiles are off by a few standard errors
                share = float((values < row[c.peak]).float().mean())
                assert c.band / BANDS - 0.2 < share < (c.band + 1) / BANDS + 0.2
                bands_seen.add(c.band)
    assert bands_seen == set(range(BANDS))


def test_the_best_are_kept_in_memory_that_does_not_grow() -> None:
    rng = torch.Generator().manual_seed(0)
    best, scores = dashboard.Best(3, 5, torch.device("cpu")), []
    for step in range(300):
        latents = torch.randint(3, (40,), generator=rng)
        values = torch.rand(40, generator=rng)
        best.add(dashboard.Activations(latents, 40 * step + torch.arange(40), values), values)
        assert all(sum(len(s) for _, s in parts) <= 15 for parts in (best.parts[:1], best.parts[1:]))
        scores.append((latents, values))
    latents, values = (torch.cat(parts) for parts in zip(*scores))
    kept = best.entries()
    for j in range(3):
        assert torch.equal(kept.values[kept.latents == j], values[latents == j].topk(5).values)
    assert torch.equal(values[kept.places], kept.values)


def test_equal_activations_are_one_peak_of_a_window() -> None:
    """Latent 1 fires at 2, 3, 3 in window 4, and at 1 in window 6; the first of the threes is the peak."""
    found = dashboard.Activations(
        torch.tensor([1, 0, 1, 1, 1]), torch.tensor([40, 41, 42, 45, 61]), torch.tensor([2.0, 5.0, 3.0, 3.0, 1.0])
    )
    peaks = dashboard.window_peaks(found, dict_size=2, pos=10)
    assert list(zip(peaks.latents.tolist(), peaks.places.tolist())) == [(0, 41), (1, 42), (1, 61)]


# ---- what latents do ----


def test_direct_effects_are_the_formula_with_hugging_face_weights(
    cfg: Config, model: TransformerBridge, tokens: Tensor, tiny_gpt2: Path
) -> None:
    hugging_face = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    scale = hugging_face.transformer.ln_f.weight  # of a norm whose scale and shift matter
    assert scale.std() > 0.05 and hugging_face.transformer.ln_f.bias.abs().max() > 0.05
    sae = some_sae(cfg, model, tokens)
    d = sae.W_dec.detach()
    normed = (d - d.mean(dim=1, keepdim=True)) / d.std(dim=1, correction=0, keepdim=True) * scale
    logits = (normed @ hugging_face.lm_head.weight.t()).detach()
    logits -= logits.mean(dim=1, keepdim=True)
    for found, descending in zip(direct_effects(sae, model, count=7), (True, False), strict=True):
        expected = logits.sort(dim=1, descending=descending).values[:, :7]
        assert_close(found.logits, expected, rtol=1e-3, atol=1e-3)
        assert_close(logits.gather(1, found.tokens), expected, rtol=1e-3, atol=1e-3)


def test_a_decoder_row_of_zeros_has_effects_and_neighbours_all_the_same(
    cfg: Config, model: TransformerBridge, tokens: Tensor
) -> None:
    sae = some_sae(cfg, model, tokens)
    with torch.no_grad():
        sae.W_dec[3] = 0
    effects, (_, cosines) = direct_effects(sae, model, 4), nearest_latents(sae.W_dec, torch.arange(48), 4)
    assert all(side.logits.isfinite().all() for side in effects)
    assert cosines.isfinite().all() and (cosines[3] == 0).all()


# ---- the page's data ----


def read_page(path: Path) -> dict[str, Any]:
    scripts = re.findall(r'<script type="application/json" id="([^"]+)">(.*?)</script>', path.read_text(), re.DOTALL)
    return {name: json.loads(text) for name, text in scripts}


@pytest.mark.parametrize(
    ("sae_type", "site"), [*((t, "resid_pre") for t in SAE_TYPES), ("topk", "mlp_out"), ("topk", "z")]
)
def test_page_of_every_type_and_site(
    cfg: Config, model: TransformerBridge, tokens: Tensor, tmp_path: Path, sae_type: str, site: str
) -> None:
    site_cfg = check_model(replace(cfg, sae_type=sae_type, site=site, act_size=None))
    sae = some_sae(site_cfg, model, tokens)
    path = dashboard.feature_dashboard(sae, tmp_path / "page.html", model=model, windows=20)
    page = read_page(path)
    table, latents = page["table"], page["latents-0"]
    assert len(table["counts"]) == len(latents) == cfg.dict_size
    read = held_out_windows(cfg, model.tokenizer, 20, choice=4)
    assert table["tokens"] == ordinary_positions(read, model.tokenizer).sum()
    assert (table["promoted"] is None) == (site == "z") == all(latent["effects"] is None for latent in latents)
    fired = next(j for j, count in enumerate(table["counts"]) if count)
    window, peak, band, *levels = latents[fired]["contexts"][0]
    assert band == -1 and dict(zip(levels[::2], levels[1::2]))[peak] == LEVELS
    assert table["ids"][page["windows"][window][0]] == model.tokenizer.eos_token_id
    for j, latent in enumerate(latents):
        peaks = [page["windows"][window][peak] for window, peak, band, *_ in latent["contexts"] if band < 0]
        most = sorted(set(peaks), key=lambda i: (-peaks.count(i), peaks.index(i)))
        assert table["top"][j] == most[: dashboard.TABLE_TOKENS]
    shown = "".join(table["strings"][i] for i in page["windows"][window])
    assert shown == model.tokenizer.decode([table["ids"][i] for i in page["windows"][window]])


def test_token_strings_keep_spaces_that_decoding_one_token_drops() -> None:
    """As Llama's tokenizer has it: "▁the" alone decodes to "the"."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "▁a", "a", "▁the", "b"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([4]) == "the"
    assert dashboard.token_strings(fast, [4, 5, 1]) == [" the", "b", " "]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_name": "en"}, "dataset_name = 'en': needs its data set; give dataset_path as well"),
        ({"windows": 0}, "windows = 0: give 1 or more"),
    ],
)
def test_what_is_refused(cfg: Config, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        dashboard.feature_dashboard(build_sae(cfg), tmp_path / "page.html", **given)


# ---- the command line ----


def test_command_writes_beside_the_checkpoint(
    cfg: Config, model: TransformerBridge, tokens: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_checkpoint(some_sae(cfg, model, tokens), tmp_path / "step-000007")
    results.main(["dashboard", str(tmp_path / "step-000007"), "--windows", "3"])
    page = tmp_path / "step-000007.html"
    assert capsys.readouterr().out == f"48 latents, {page.stat().st_size / 1e6:.1f} MB: {page}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007", "step-000007.html"]


def test_command_opens_another_library_s_sae_on_a_text_of_its_own(
    cfg: Config, model: TransformerBridge, tokens: Tensor, tmp_path: Path
) -> None:
    """A jumprelu of SAELens whose model has another name here, and which does not name its text."""
    sae = some_sae(replace(cfg, sae_type="jumprelu", input_unit_norm=False), model, tokens)
    save_file(
        {name: sae.state_dict()[name].contiguous() for name in LENS_TENSORS}, tmp_path / "sae_weights.safetensors"
    )
    metadata = {"model_name": "unknown", "hook_name": cfg.hook_name, "context_size": cfg.seq_len}
    lens = {"architecture": "jumprelu", "d_in": cfg.act_size, "d_sae": cfg.dict_size, "metadata": metadata}
    (tmp_path / "cfg.json").write_text(json.dumps(lens))
    page = tmp_path / "page.html"
    words = ["--model-name", cfg.model_name, "--dataset-path", cfg.dataset_path, "--windows", "20"]
    results.main(["dashboard", str(tmp_path), *words, "--output", str(page)])
    table, read = read_page(page)["table"], held_out_windows(cfg, model.tokenizer, 20, choice=4)
    assert table["counts"] == latent_statistics(sae, model, read).counts.tolist()
    text = f"the held-out tenth of {cfg.dataset_path}: {table['tokens']:,} tokens in 20 windows"
    assert ["Text", text] in table["facts"] and ["Model", cfg.model_name] in table["facts"]


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, results.__file__, "dashboard", "gone"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("results.py: gone") and len(done.stderr.splitlines()) == 1


# ---- in a browser ----


@pytest.fixture(scope="module")
def html(cfg: Config, model: TransformerBridge, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 300 latents; the names of a data set and a token would be code in HTML, another has control characters."""
    cfg = replace(cfg, dict_size=300, sae_type="vanilla")
    sae = some_sae(cfg, model, tokens)
    statistics = latent_statistics(sae, model, tokens)
    effects = direct_effects(sae, model, 10)
    ids = effects[0].tokens[0, :2].tolist()
    with pytest.MonkeyPatch.context() as patch:
        plain = dashboard.token_strings

        def strings(tokenizer: PreTrainedTokenizerFast, all_ids: list[int]) -> list[str]:
            changed = dict(zip(ids, [HOSTILE, " a\n\t\0\u202eb"]))
            return [changed.get(i, text) for i, text in zip(all_ids, plain(tokenizer, all_ids))]

        patch.setattr(dashboard, "token_strings", strings)
        nearest = nearest_latents(sae.W_dec, torch.arange(300), 10)
        text = dashboard.page(sae, model.tokenizer, HOSTILE, tokens, statistics, effects, nearest)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (browser and driver):
        reason = "no Chromium with its chromedriver: install Debian's chromium and chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


Open = Callable[..., WebDriver]


@pytest.fixture
def visit(chromium: WebDriver, html: Path) -> Iterator[Open]:
    """Open the page at a size; afterwards nothing was logged to the console and nothing requested from a network."""

    def visit(address: str = "", width: int = 1280, scheme: str = "light") -> WebDriver:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get("about:blank")
        chromium.get(html.as_uri() + address)
        return chromium

    chromium.get_log("performance")
    yield visit
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "about:")) for url in asked)
    assert chromium.execute_script("return window.harmed") is None


def texts(page: WebDriver, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return page.execute_script(script, selector)


def latents_shown(page: WebDriver) -> list[int]:
    return [int(text) for text in texts(page, "#rows a")]


def press(page: WebDriver, *keys: str) -> None:
    for key in keys:
        page.switch_to.active_element.send_keys(key)


def focused(page: WebDriver, attribute: str) -> str:
    return page.execute_script("return document.activeElement[arguments[0]]", attribute)


def wait_for(page: WebDriver, opened: int | None) -> None:
    heading = [] if opened is None else [f"Latent {opened}"]
    WebDriverWait(page, 10).until(lambda _: texts(page, "#detail:not([hidden]) h2") == heading)


def test_table_sorts_by_every_column(visit: Open, html: Path) -> None:
    page, table = visit(), read_page(html)["table"]
    by_number = list(range(300))
    fired = [j for j in by_number if table["counts"][j]]
    assert latents_shown(page)[:12] == by_number[:12]
    assert len(latents_shown(page)) < 60  # the rows in sight alone
    for key, values, down in [("density", table["counts"], True), ("max", table["maxima"], True)]:
        head = page.find_element(By.CSS_SELECTOR, f"th[data-key={key}]")
        for descending in (down, not down):
            head.find_element(By.TAG_NAME, "button").click()
            assert head.get_attribute("aria-sort") == ("descending" if descending else "ascending")
            expected = sorted(fired, key=values.__getitem__, reverse=descending)
            assert latents_shown(page)[:12] == expected[:12]
        assert page.execute_script("return document.querySelectorAll('[aria-sort]').length") == 1
    page.find_element(By.CSS_SELECTOR, "th[data-key=top] button").click()
    page.find_element(By.CSS_SELECTOR, "th[data-key=top] button").click()
    first = {j: table["strings"][table["top"][j][0]].strip().lower() for j in fired}
    assert latents_shown(page)[:30] == sorted(fired, key=lambda j: first[j], reverse=True)[:30] and len(fired) < 300
    page.execute_script("document.getElementById('scroll').scrollTop = 1e9")
    WebDriverWait(page, 10).until(lambda _: latents_shown(page)[-1] == max(set(by_number) - set(fired)))
    assert len(latents_shown(page)) < 60


def test_search(visit: Open, html: Path) -> None:
    page, table = visit(), read_page(html)["table"]
    field, strings = page.find_element(By.ID, "search"), table["strings"]

    def having(text: str) -> list[int]:
        return [
            j for j in range(300)
            if any(text.lower() in strings[i].lower() for i in table["top"][j] + table["promoted"][j])
        ]  # fmt: skip

    query = next(s for s in (strings[tokens[0]] for tokens in table["top"] if tokens) if len(s.strip()) > 2).strip()
    field.send_keys(query.upper())
    assert latents_shown(page) == having(query)[: len(latents_shown(page))] and 0 < len(having(query)) < 300
    assert texts(page, "#found") == [f"{len(having(query))} of 300"]
    assert all(query.lower() in row.replace("·", " ").lower() for row in texts(page, "#rows .latent"))
    spaced = next(s for s in (strings[i] for i in table["promoted"][3]) if s.startswith(" ") and len(s) > 2)
    field.send_keys(Keys.ESCAPE, "·" + spaced[1:])  # as the page writes it
    assert latents_shown(page) and set(latents_shown(page)) <= set(having(spaced))
    for words, expected in [(" #17 ", [17]), ("⇥␀1", []), ("<b>nothing</b>", [])]:
        field.send_keys(Keys.ESCAPE, words)
        assert latents_shown(page) == expected and texts(page, "#found") == [f"{len(expected)} of 300"]
    assert "<b>nothing</b>" in texts(page, "#rows")[0]
    field.send_keys(Keys.ESCAPE, "↵⇥␀")
    assert 0 in latents_shown(page)


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", "").removesuffix("%"))


def numbers(page: WebDriver, selector: str) -> list[float]:
    return [number(text) for text in texts(page, selector)]


def test_every_number_in_the_table_is_that_of_the_data(visit: Open, html: Path) -> None:
    """They agree to the digits that are shown."""
    page, table = visit(), read_page(html)["table"]
    assert dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd")))["L0"] == (
        f"{sum(table['counts']) / table['tokens']:.1f}"
    )
    for cells, latent in zip(page.find_elements(By.CSS_SELECTOR, "#rows .latent"), latents_shown(page)):
        density, largest = (cells.find_element(By.CSS_SELECTOR, f".col-{name}").text for name in ("density", "max"))
        if table["counts"][latent]:
            assert number(density) == pytest.approx(100 * table["counts"][latent] / table["tokens"], rel=0.06)
            assert number(largest) == pytest.approx(table["maxima"][latent], rel=0.006)
        else:
            assert (density, largest) == ("never", "\N{EN DASH}")


def test_every_number_of_a_latent_is_that_of_the_data(visit: Open, html: Path) -> None:
    data = read_page(html)
    table = data["table"]
    j = max(range(256), key=lambda j: len(data["latents-0"][j]["contexts"]))
    latent, page = data["latents-0"][j], visit(f"#latent-{j}")
    wait_for(page, j)
    count, maximum = table["counts"][j], table["maxima"][j]
    lines = "[...e.childNodes].map((n) => n.textContent)"
    said = page.execute_script(f"return [...document.querySelectorAll('.numbers dd')].map((e) => {lines})")
    (density, one_in), (fires, of), (largest, *_), (mean, *_) = said
    assert number(density) == pytest.approx(100 * count / table["tokens"], rel=0.06)
    assert one_in == f"1 token in {round(table['tokens'] / count):,}"
    assert (fires, of) == (f"{count:,}", f"of {table['tokens']:,} tokens")
    assert number(largest) == pytest.approx(maximum, rel=0.006)
    assert number(mean) == pytest.approx(table["means"][j], rel=0.006) != pytest.approx(maximum, rel=0.1)
    bars = "return [...document.querySelectorAll('.histogram rect:not(.hit)')].map((bar) => bar.getBBox().height > 0)"
    assert page.execute_script(bars) == [count > 0 for count in latent["histogram"]]
    for name, (_, logits) in zip(("up", "down"), latent["effects"]):
        assert numbers(page, f".{name} .number") == pytest.approx(logits, abs=0.0051) and len(logits) == 10
    assert latent["effects"][0][1][0] > 0 > latent["effects"][1][1][0]
    assert table["promoted"][j] == latent["effects"][0][0]  # all of them are searched
    nearest, cosines = latent["nearest"]
    assert numbers(page, ".nearest b") == nearest and len(nearest) == 10
    assert numbers(page, ".nearest .number") == pytest.approx(cosines, abs=0.0051) and cosines[0] > cosines[-1]

    titles = ["Strongest contexts", *(f"Percentiles {p} to {p + 25}" for p in (75, 50, 25, 0))]
    sections = page.find_elements(By.CSS_SELECTOR, ".contexts")
    for section, title, band in zip(sections, titles, [-1, *reversed(range(BANDS))], strict=True):
        of_band = [dict(zip(c[3::2], c[4::2]))[c[1]] / LEVELS * maximum for c in latent["contexts"] if c[2] == band]
        shown = [number(e.text) for e in section.find_elements(By.CSS_SELECTOR, ".value")]
        assert shown == pytest.approx(of_band, rel=0.006) and section.text.startswith(title)


def test_hovering_and_tabbing_tell_each_token_s_activation(visit: Open, html: Path) -> None:
    data = read_page(html)
    table, piece = data["table"], data["latents-0"]
    j, n = next(
        (j, n)
        for j, latent in enumerate(piece)
        for n, c in enumerate(latent["contexts"])
        if any(level < 900 for level in c[4::2]) and len(c) > 7
    )
    page, context = visit(f"#latent-{j}"), piece[j]["contexts"][n]
    wait_for(page, j)
    assert focused(page, "id") == "detail"
    button = page.find_elements(By.CSS_SELECTOR, ".context")[n]
    page.execute_script("arguments[0].focus()", button)
    press(page, Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    levels = dict(zip(context[3::2], context[4::2]))
    whole = page.find_elements(By.CSS_SELECTOR, ".whole .token")
    shades = page.execute_script(
        "return [...document.querySelectorAll('.whole .token')]"
        ".map((t) => [Number(t.style.getPropertyValue('--share')), getComputedStyle(t).backgroundColor])"
    )
    shares = [levels.get(p, 0) / LEVELS for p in range(1, len(data["windows"][context[0]]))]
    assert [share for share, _ in shades] == pytest.approx(shares, abs=1e-3)
    assert len({colour for _, colour in shades}) == len(set(shares))
    tip = page.find_element(By.ID, "tip")
    for position, level in sorted(levels.items()):
        press(page, Keys.TAB)
        assert page.switch_to.active_element == whole[position - 1]
        told = f"activation (\\S+), {round(100 * level / LEVELS)}% of max"
        WebDriverWait(page, 10).until(lambda _: tip.is_displayed())
        by_key = re.search(told, tip.text)
        assert f"id {table['ids'][data['windows'][context[0]][position]]}" in tip.text
        assert number(by_key[1]) == pytest.approx(level / LEVELS * table["maxima"][j], rel=0.006)
        webdriver.ActionChains(page).move_to_element(whole[position - 1]).perform()
        assert re.search(told, tip.text)[1] == by_key[1]
    silent = next(p for p in range(1, len(whole) + 1) if p not in levels)
    webdriver.ActionChains(page).move_to_element(whole[silent - 1]).perform()
    assert "does not fire" in tip.text
    button.click()
    assert button.get_attribute("aria-expanded") == "false" and not texts(page, ".whole")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_focus_stays_in_the_latent(visit: Open, width: int) -> None:
    page = visit("#latent-1", width)
    wait_for(page, 1)
    page.execute_script("document.querySelector('.bar button:nth-of-type(2)').focus()")
    for latent in (2, 3):
        press(page, Keys.ENTER)
        wait_for(page, latent)
        assert focused(page, "title") == "Next latent (j)"
    page.execute_script("document.querySelector('.context').focus()")
    for latent in (4, 5):
        press(page, "j")
        wait_for(page, latent)
        assert focused(page, "id") == "detail"
    if width == 390:  # the table is behind
        webdriver.ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        assert page.execute_script("return document.activeElement.closest('#list')") is None
        press(page, Keys.ESCAPE)
        wait_for(page, None)
        press(page, "k")
        assert focused(page, "hash") == "#latent-4"
        press(page, Keys.ENTER)
        wait_for(page, 4)
        press(page, "/")
        assert focused(page, "id") == "search"
        wait_for(page, None)


def test_keyboard_alone(visit: Open) -> None:
    page = visit()
    press(page, "j", "j", Keys.ARROW_DOWN, "k")
    assert focused(page, "hash") == "#latent-2"
    press(page, Keys.ENTER)
    wait_for(page, 2)
    assert focused(page, "id") == "detail"
    press(page, "j")
    wait_for(page, 3)
    assert page.current_url.endswith("#latent-3")
    press(page, Keys.ESCAPE)
    wait_for(page, None)
    assert focused(page, "hash") == "#latent-3"
    press(page, "/")
    assert focused(page, "id") == "search"
    press(page, "#28", Keys.ARROW_DOWN)
    assert focused(page, "hash") == "#latent-28"
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press(page, Keys.ENTER)
    wait_for(page, 28)
    page.back()
    wait_for(page, None)
    press(page, "/", Keys.ESCAPE, Keys.ESCAPE, Keys.END)
    assert focused(page, "hash") == "#latent-299"
    press(page, Keys.HOME)
    assert focused(page, "hash") == "#latent-0"


def test_a_latent_that_never_fired_and_one_that_is_not_there(visit: Open) -> None:
    page = visit("#latent-5")
    wait_for(page, 5)
    assert "fired on none" in texts(page, "#detail .note")[0] and not texts(page, ".context")
    page = visit("#latent-300")
    wait_for(page, None)


def test_text_never_becomes_html(visit: Open) -> None:
    """Nor does a control character change how the text after it is written."""
    page = visit("#latent-0")
    wait_for(page, 0)
    promoted = texts(page, ".up .token")
    assert HOSTILE in [text.replace("·", " ") for text in promoted]
    assert "·a↵⇥␀⟨202E⟩b" in promoted
    assert any(HOSTILE in text for text in texts(page, "#facts dd"))
    assert page.execute_script("return document.images.length") == 0
    policy = page.find_element(By.CSS_SELECTOR, "meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert policy.split(";")[0] == "default-src 'none'"


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_nothing_is_wider_than_the_screen(visit: Open, width: int) -> None:
    for address in ("", "#latent-1"):
        page = visit(address, width)
        wait_for(page, 1 if address else None)
        wider = page.execute_script(
            "return [document.documentElement, ...document.querySelectorAll('#scroll, #detail:not([hidden])')]"
            ".filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.id || e.tagName)"
        )
        assert wider == []
    covers = page.execute_script("return document.elementFromPoint(20, 300).closest('#detail') !== null")
    assert covers == (width < 1280), "on a narrow screen a latent covers the table"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit: Open, scheme: str) -> None:
    """WCAG asks for at least 4.5, for text on the page and on the strongest shade."""
    page = visit("#latent-0", scheme=scheme)
    wait_for(page, 0)
    measured = page.execute_script(
        """
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const over = (...colours) => {
          for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const page = getComputedStyle(document.body).backgroundColor;
        const names = [".token.peak", ".numbers dt", ".up .number", ".down .number", "#facts dt", ".value", ".chip i"];
        return [...names, "h2"].map((name) => {
          const style = getComputedStyle(document.querySelector(name));
          return [name, over(page, style.color), over(page, style.backgroundColor)];
        });
        """
    )

    def luminance(colour: list[int]) -> float:
        parts = [c / 255 for c in colour[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    for name, ink, ground in measured:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) > 4.5, name
    dark = luminance(measured[-1][1]) > luminance(measured[-1][2])
    assert dark == (scheme == "dark")
