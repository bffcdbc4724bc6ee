"""Dashboards against dense activations and Hugging Face's weights, and their page in a headless Chromium."""

import json
import os
import re
import shutil
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
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

KEPT = 6  # tokens before and after a peak in the lines of the page in the browser, fewer than in its windows
HOSTILE = "</script><script>window.harmed=1</script><img src=x onerror=window.harmed=1><!--"


@pytest.fixture(scope="module")
def cfg(tiny_gpt2: Path, tiny_text: Path) -> Config:
    sizes = dict(layer=1, dict_size=48, target_l0=6, seq_len=24, model_batch_size=4, batch_size=256)
    return check_model(Config(model_name=str(tiny_gpt2), dataset_path=str(tiny_text), device="cpu", **sizes))


@pytest.fixture(scope="module")
def model(cfg: Config) -> TransformerBridge:
    return load_model(cfg)


@pytest.fixture(scope="module")
def tokens(cfg: Config, model: TransformerBridge) -> Tensor:
    """Held-out windows, some of them with an EOS inside."""
    tokens = held_out_windows(cfg, model.tokenizer, 60, choice=4)
    tokens[::3, 9] = model.tokenizer.eos_token_id
    return tokens


Make = Callable[..., BaseAutoencoder]


@pytest.fixture(scope="module")
def make(cfg: Config, model: TransformerBridge, tokens: Tensor) -> Make:
    """Makes SAEs whose latents fire on fractions of the tokens, each at its own rate; latent 5 never does."""

    def some_sae(**changes: object) -> BaseAutoencoder:
        sae = build_sae(check_model(replace(cfg, act_size=None, **changes)))
        sae.initialise_from(record(model, tokens, [sae.cfg.hook_name])[sae.cfg.hook_name].flatten(0, 1))
        F = sae.cfg.dict_size
        with torch.no_grad():
            sae.b_enc.copy_(torch.linspace(-1.5, 0, F) * sae.input_scale / 4)
            sae.b_enc[5] = -1e4
            if hasattr(sae, "threshold"):
                sae.threshold.copy_((torch.linspace(0, 0.4, F) if sae.threshold.ndim else 0.3) * sae.input_scale)
        return sae

    return some_sae


# ---- what latents fire on ----


@pytest.mark.parametrize("sae_type", list(SAE_TYPES))
def test_statistics_are_those_of_the_dense_activations(
    make: Make, cfg: Config, model: TransformerBridge, tokens: Tensor, sae_type: str
) -> None:
    sae = make(sae_type=sae_type).train()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    found = latent_statistics(sae, model, tokens)
    assert sae.training and all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())

    ordinary = ordinary_positions(tokens, model.tokenizer)
    dense = sae.encode(record(model, tokens, [sae.cfg.hook_name])[sae.cfg.hook_name]).detach() * ordinary[..., None]
    flat, peaks, bands, shown = dense.flatten(0, 1), found.peaks, found.bands, found.shown
    fires = flat > 0
    assert found.tokens == ordinary.sum() < tokens.numel() - len(tokens)
    assert found.counts.tolist() == fires.sum(dim=0).tolist() and found.counts[5] == 0
    assert (found.counts > 3 * SAMPLED).any() and (found.counts < len(flat) / 4).any()
    assert_close(torch.tensor(found.maxima), flat.amax(dim=0))
    assert_close(torch.tensor(found.means).float(), flat.sum(dim=0) / fires.sum(dim=0).clamp_min(1))

    windows, latents = np.divmod(peaks["context"], cfg.dict_size)
    order, rows = peaks["context"].argsort(), dense[windows, :, latents]  # [peaks, pos]
    at_peaks = rows[torch.arange(len(rows)), peaks["position"]]
    assert_close(torch.tensor(peaks["value"]), at_peaks)
    assert torch.equal(at_peaks[bands < 0], rows.amax(dim=1)[bands < 0])
    assert len(set(peaks["context"])) == len(peaks)
    index, positions = rows[order].nonzero(as_tuple=True)
    assert shown["context"].tolist() == peaks["context"][order][index].tolist()
    assert shown["position"].tolist() == positions.tolist()
    assert_close(torch.tensor(shown["value"]), rows[order][index, positions])

    bands_seen = set()
    for j in range(cfg.dict_size):
        values, of_latent = flat[fires[:, j], j], bands[latents == j].tolist()
        if len(values):
            edges = torch.linspace(0, 1, BINS + 1) * values.max()
            expected = torch.histogram(values, bins=edges).hist.numpy()
            assert np.abs(found.histograms[j] - expected).sum() <= 2  # one value on an edge
        assert found.histograms[j].sum() == len(values)
        largest = dense[..., j].amax(dim=1).sort(descending=True).values[:STRONGEST]
        assert torch.equal(at_peaks[(latents == j) & (bands < 0)], largest[largest > 0])
        assert of_latent == sorted(of_latent, key=lambda band: (band >= 0, -band))
        assert all(of_latent.count(band) <= PER_BAND for band in range(BANDS))
        if len(values) > 4 * SAMPLED:  # a sample's quantiles are off by a few standard errors
            for peak, band in zip(at_peaks[latents == j], of_latent):
                share = float((values < peak).float().mean())
                assert band < 0 or band / BANDS - 0.2 < share < (band + 1) / BANDS + 0.2
            bands_seen |= {*of_latent}
    assert bands_seen == {-1, *range(BANDS)}


def activations(latents: Tensor, windows: Tensor, values: Tensor) -> np.ndarray:
    found = np.zeros(len(values), dashboard.ACTIVATION)
    found["context"], found["position"], found["value"] = windows * 3 + latents, np.arange(len(values)), values
    return found


@pytest.mark.parametrize("apart", [False, True])
def test_the_best_are_kept_in_memory_that_does_not_grow(apart: bool) -> None:
    """Of each window all, or only the largest, if they are to be apart."""
    rng = torch.Generator().manual_seed(0)
    best, dense = dashboard.Best(3, 5, apart), torch.full((3, 300, 40), -1.0)
    for window in range(300):
        latents, values = torch.randint(3, (40,), generator=rng), torch.rand(40, generator=rng)
        best.add(activations(latents, torch.tensor(window), values), values.numpy())
        assert all(sum(len(s) for _, s in parts) <= 15 for parts in (best.parts[:1], best.parts[1:]))
        dense[latents, window, torch.arange(40)] = values
    kept = best.entries()
    for j in range(3):
        found = kept[kept["context"] % 3 == j]
        largest = dense[j].amax(dim=1) if apart else dense[j].flatten()
        assert found["value"].tolist() == largest.topk(5).values.tolist()
        assert found["value"].tolist() == dense[j, found["context"] // 3, found["position"]].tolist()


def test_the_first_of_equal_activations_is_the_peak_of_a_window() -> None:
    """Latent 1 fires at 2, 3, 3 in window 4, and at 1 in window 6."""
    best, values = dashboard.Best(3, 5, apart=True), torch.tensor([2.0, 5.0, 3.0, 3.0, 1.0])
    best.add(activations(torch.tensor([1, 0, 1, 1, 1]), torch.tensor([4, 4, 4, 4, 6]), values), values.numpy())
    assert best.entries()["position"].tolist() == [1, 2, 4]


# ---- what latents do ----


def test_direct_effects_are_the_formula_with_hugging_face_weights(
    make: Make, model: TransformerBridge, tiny_gpt2: Path
) -> None:
    """A decoder row of zeros has effects and neighbours too, for which there is no formula."""
    hugging_face = GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    scale = hugging_face.transformer.ln_f.weight  # of a norm whose scale and shift matter
    assert scale.std() > 0.05 and hugging_face.transformer.ln_f.bias.abs().max() > 0.05
    sae = make()
    d = sae.W_dec.detach()[1:]
    normed = (d - d.mean(dim=1, keepdim=True)) / d.std(dim=1, correction=0, keepdim=True) * scale
    logits = (normed @ hugging_face.lm_head.weight.t()).detach()
    logits -= logits.mean(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec[0] = 0
    for (ids, found), descending in zip(direct_effects(sae, model, count=7), (True, False), strict=True):
        expected = logits.sort(dim=1, descending=descending).values[:, :7]
        assert_close(found[1:], expected, rtol=1e-3, atol=1e-3)
        assert_close(logits.gather(1, ids[1:]), expected, rtol=1e-3, atol=1e-3)
        assert found[0].isfinite().all()
    assert (nearest_latents(sae.W_dec, torch.arange(48), 4)[1][0] == 0).all()


# ---- the page's data ----


def read_page(path: Path) -> dict[str, Any]:
    scripts = re.findall(r'<script type="text/plain" id="([^"]+)">(.*?)</script>', path.read_text())
    return {name: json.loads(zlib.decompress(b64decode(text))) for name, text in scripts}


@pytest.mark.parametrize(
    ("sae_type", "site"), [*((t, "resid_pre") for t in SAE_TYPES), ("topk", "mlp_out"), ("topk", "z")]
)
def test_page_of_every_type_and_site(
    make: Make, cfg: Config, model: TransformerBridge, tmp_path: Path, sae_type: str, site: str
) -> None:
    sae = make(sae_type=sae_type, site=site)
    page = read_page(dashboard.feature_dashboard(sae, tmp_path / "page.html", model=model, windows=20))
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


def test_page_of_latents_that_never_fire(make: Make, model: TransformerBridge, tmp_path: Path) -> None:
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
    page = read_page(dashboard.feature_dashboard(sae, tmp_path / "page.html", model=model, windows=3))
    assert page["windows"] == [] and not any(page["table"]["counts"]) and not any(page["table"]["top"])
    assert all(latent["histogram"] == latent["contexts"] == [] for latent in page["latents-0"])


def test_token_strings_keep_spaces_that_decoding_one_token_drops() -> None:
    """As Llama's tokenizer has it: "▁the" alone decodes to "the"."""
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁", "▁a", "a", "▁the", "b"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([4]) == "the"
    assert dashboard.token_strings(fast, [4, 5, 1]) == [" the", "b", " "]


# ---- the command line ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset-name", "en"], "dataset_name = 'en': needs its data set; give dataset_path as well"),
        (["--text-column", "a"], "text_column = 'a': needs its data set; give dataset_path as well"),
        (["--windows", "0"], "windows = 0: give 1 or more"),
        (["--windows", "few"], "argument --windows: invalid int value: 'few'"),
    ],
)
def test_what_is_refused(cfg: Config, tmp_path: Path, words: list[str], message: str) -> None:
    save_checkpoint(build_sae(cfg), tmp_path / "sae")
    with pytest.raises(ValueError, match=f"^{message}$"):
        results.main(["dashboard", str(tmp_path / "sae"), *words])


def test_command_writes_beside_the_checkpoint(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(make(), tmp_path / "step-000007")
    results.main(["dashboard", str(tmp_path / "step-000007"), "--windows", "3"])
    page = tmp_path / "step-000007.html"
    assert capsys.readouterr().out == f"48 latents, {page.stat().st_size / 1e6:.1f} MB: {page}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000007", "step-000007.html"]


def test_command_opens_another_library_s_sae_on_a_text_of_its_own(
    make: Make, cfg: Config, model: TransformerBridge, tmp_path: Path
) -> None:
    """A jumprelu of SAELens whose model has another name here, and which does not name its text."""
    sae = make(sae_type="jumprelu", input_unit_norm=False)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    save_file({name: sae.state_dict()[name].contiguous() for name in names}, tmp_path / "sae_weights.safetensors")
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


# ---- in a browser ----


@pytest.fixture(scope="module")
def html(make: Make, model: TransformerBridge, tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 300 latents; the names of a data set and a token would be code in HTML, another has control characters,
    and one that is read in the first window has a run of spaces."""
    sae = make(dict_size=300, sae_type="vanilla")
    changed = dict(zip(direct_effects(sae, model, 2)[0][0][0].tolist(), [HOSTILE, " a\n\t\0\u202eb"]))
    changed[int(tokens[0, 5])] = ";" + 7 * " "
    plain = dashboard.token_strings
    path = tmp_path_factory.mktemp("page") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dashboard, "token_strings", lambda t, ids: [changed.get(i, s) for i, s in zip(ids, plain(t, ids))]
        )
        path.write_text(dashboard.page(sae, model, HOSTILE, tokens).replace("KEPT = 48", f"KEPT = {KEPT}"))
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not (browser and driver):
        reason = "no Chromium with its chromedriver: install Debian's chromium and chromium-driver"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    words = "headless=new no-sandbox disable-gpu disable-background-networking no-first-run disable-dev-shm-usage"
    for word in (*words.split(), f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


Open = Callable[..., WebDriver]


@pytest.fixture
def visit(chromium: WebDriver, html: Path) -> Iterator[Open]:
    """Open the page at a size; afterwards nothing was logged to the console and nothing requested from a network."""

    def visit(latent: int | None = None, width: int = 1280, scheme: str = "light") -> WebDriver:
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chromium.get("about:blank")
        chromium.get(html.as_uri() + ("" if latent is None else f"#latent-{latent}"))
        wait_for(chromium, latent if latent != 300 else None)
        return chromium

    chromium.get_log("performance")
    yield visit
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "about:", "chrome:")) for url in asked)
    assert chromium.execute_script("return window.harmed") is None


def each(page: WebDriver, selector: str, expression: str) -> list[Any]:
    """Evaluate JavaScript for each element e that a selector finds."""
    return page.execute_script(
        f"return [...document.querySelectorAll(arguments[0])].map((e) => {expression})", selector
    )


def texts(page: WebDriver, selector: str) -> list[str]:
    return each(page, selector, "e.textContent")


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", "").removesuffix("%"))


def latents_shown(page: WebDriver) -> list[int]:
    return [int(text) for text in texts(page, "#rows a")]


def wait_for(page: WebDriver, opened: int | None) -> None:
    heading = [] if opened is None else [f"Latent {opened}"]
    WebDriverWait(page, 10).until(lambda _: texts(page, "#detail:not([hidden]) h2") == heading)


def press(page: WebDriver, *keys: str, opened: int | None, focus: str) -> None:
    """Press keys, then expect a latent, or none, to be open and an element, by its address, title or id, in focus."""
    for key in keys:
        page.switch_to.active_element.send_keys(key)
    wait_for(page, opened)
    (focused,) = each(page, ":focus", "e.hash || e.title || e.id")
    assert focused == focus


def test_table(visit: Open, html: Path) -> None:
    """It sorts by every column, and its numbers are those of the data, to the digits that are shown."""
    page, table = visit(), read_page(html)["table"]
    fired, never = ([j for j in range(300) if bool(table["counts"][j]) == fires] for fires in (True, False))
    assert latents_shown(page)[:12] == list(range(12)) and 5 in never
    assert len(latents_shown(page)) < 60  # the rows in sight alone
    facts = dict(zip(texts(page, "#facts dt"), texts(page, "#facts dd")))
    assert facts["L0"] == f"{sum(table['counts']) / table['tokens']:.1f}"
    for latent, density, largest in zip(latents_shown(page), texts(page, "td.col-density"), texts(page, "td.col-max")):
        if latent in fired:
            assert number(density) == pytest.approx(100 * table["counts"][latent] / table["tokens"], rel=0.06)
            assert number(largest) == pytest.approx(table["maxima"][latent], rel=0.006)
        else:
            assert (density, largest) == ("never", "\N{EN DASH}")
    first = {j: table["strings"][table["top"][j][0]].strip().lower() for j in fired}
    columns = [("density", table["counts"], True), ("max", table["maxima"], True), ("top", first, False)]
    for key, values, down in columns:
        head = page.find_element(By.CSS_SELECTOR, f"th[data-key={key}]")
        for descending in (down, not down):
            head.find_element(By.TAG_NAME, "button").click()
            assert head.get_attribute("aria-sort") == ("descending" if descending else "ascending")
            assert latents_shown(page)[:12] == sorted(fired, key=values.__getitem__, reverse=descending)[:12]
        assert len(texts(page, "[aria-sort]")) == 1
    page.execute_script("document.getElementById('scroll').scrollTop = 1e9")
    WebDriverWait(page, 10).until(lambda _: latents_shown(page)[-1] == never[-1])
    assert len(latents_shown(page)) < 60


def found(page: WebDriver) -> list[str]:
    """Wait until the contexts have been searched too; return what is said of them."""
    WebDriverWait(page, 10).until(lambda _: not texts(page, "#found")[0].startswith("reading"))
    return texts(page, "#found")


def test_search_of_tokens(visit: Open, html: Path) -> None:
    """Latents that have it among their tokens come before those that have it in their contexts alone."""
    page, table = visit(), read_page(html)["table"]
    field, strings = page.find_element(By.ID, "search"), table["strings"]

    def having(text: str) -> list[int]:
        tokens = ([strings[i].lower() for i in top + up] for top, up in zip(table["top"], table["promoted"]))
        return [j for j, of_latent in enumerate(tokens) if any(text.lower() in token for token in of_latent)]

    query = next(s for s in (strings[tokens[0]] for tokens in table["top"] if tokens) if len(s.strip()) > 2).strip()
    field.send_keys(query.upper())
    assert latents_shown(page)[:12] == having(query)[:12] and 12 < len(having(query)) < 300
    assert found(page)[0].startswith(f"{len(having(query))} by token, then ")
    assert latents_shown(page)[:12] == having(query)[:12]
    marked = each(page, "#rows .chip", "[e.textContent.replace('·', ' '), e.classList.contains('found')]")
    assert all((query.lower() in text.lower()) == mark for text, mark in marked)
    spaced = next(s for s in (strings[i] for i in table["promoted"][3]) if s.startswith(" ") and len(s) > 2)
    field.send_keys(Keys.ESCAPE, "·" + spaced[1:])  # as the page writes it
    assert found(page)[0].startswith(f"{len(having(spaced))} by token, ")
    assert latents_shown(page)[: min(12, len(having(spaced)))] == having(spaced)[:12]
    for words, expected in [
        (" #17 ", [17]),
        ("#300", []),
        ("⇥␀1", []),
        ("·\N{MULTIPLICATION SIGN}0", []),
        ("<b>(nothing[</b>", []),
    ]:
        field.send_keys(Keys.ESCAPE, words)
        said = f"{len(expected)} of 300" if "#" in words else "0 by token, then 0 by context"
        assert found(page) == [said] and latents_shown(page) == expected
    assert "<b>(nothing[</b>" in texts(page, "#rows")[0]
    field.send_keys(Keys.ESCAPE, "↵⇥␀")
    assert 0 in latents_shown(page)


def test_search_of_contexts(visit: Open, html: Path) -> None:
    """A text that no token holds whole is found where lines show it, and marked there and in the whole windows."""
    page, data = visit(), read_page(html)
    strings, windows = data["table"]["strings"], data["windows"]
    latents = [latent for name, piece in data.items() if name.startswith("latents") for latent in piece]

    def places(query: str, window: int) -> set[int]:
        """Find the positions in a window, from 1, of the tokens in which it has the text."""
        owners = [(c, p) for p, i in enumerate(windows[window]) if p for c in strings[i]]
        any_run = re.sub(" {2,}", " {2,}", re.escape(query).replace("\\ ", " "))
        hits = re.finditer(any_run, "".join(c for c, _ in owners), re.IGNORECASE)
        return {p for hit in hits for _, p in owners[slice(*hit.span())]}

    def lines(query: str, j: int) -> list[list[int]]:
        shown = ((places(query, w), peak) for w, peak, *_ in latents[j]["contexts"])
        return [sorted(p for p in at if -KEPT <= p - peak < KEPT) for at, peak in shown]

    def at_peaks(query: str, j: int) -> int:
        """Count the contexts of a latent that have the text at the token on which it fires most, or beside that."""
        return sum(bool({peak - 1, peak, peak + 1} & places(query, w)) for w, peak, *_ in latents[j]["contexts"])

    pairs = (strings[a][-2:] + strings[b][:3] for a, b in zip(windows[0][1:], windows[0][2:]))
    queries = ((q, [j for j in range(300) if any(lines(q, j))]) for q in pairs if not any(q in s for s in strings))
    query, having = next((query, having) for query, having in queries if 3 < len(having) < 100)
    having.sort(key=lambda j: -at_peaks(query, j))
    assert at_peaks(query, having[0]) > at_peaks(query, having[-1])
    page.execute_script(
        "said = []; new MutationObserver(() => said.push(document.getElementById('found').value))"
        ".observe(document.getElementById('found'), { childList: true })"
    )
    page.find_element(By.ID, "search").send_keys(query.upper())
    assert found(page) == [f"0 by token, then {len(having)} by context"]
    assert latents_shown(page) == having[: len(latents_shown(page))]
    assert "reading contexts: 85%" in page.execute_script("return said")  # 256 of 300

    press(page, Keys.ENTER, opened=having[0], focus="detail")
    of_lines = "[...e.querySelectorAll('.token')].map((token) => token.classList.contains('found'))"
    flags = each(page, ".context", of_lines)
    contexts = latents[having[0]]["contexts"]
    for line, marked, (_, peak, *_) in zip(lines(query, having[0]), flags, contexts, strict=True):
        assert [max(1, peak - KEPT) + n for n, mark in enumerate(marked) if mark] == line
    n = next(n for n, line in enumerate(flags) if any(line))
    if not texts(page, ".whole"):
        page.execute_script("document.querySelectorAll('.context')[arguments[0]].click()", n)
    marked = each(page, ".whole .token", "e.classList.contains('found')")
    assert {p for p, mark in enumerate(marked, 1) if mark} == places(query, contexts[n][0])
    press(page, "/", Keys.ESCAPE, opened=having[0], focus="search")
    assert not texts(page, "#detail .found") and texts(page, "#found") == ["300 latents"]
    press(page, query, opened=having[0], focus="search")
    assert each(page, ".context", of_lines) == flags
    first, second, *_, after_run = (strings[i] for i in windows[0][:7])
    for text in (f";  {after_run}", first[-2:] + second):  # a run as it is shortened; the first token is not shown
        press(page, Keys.ESCAPE, text, opened=having[0], focus="search")
        assert found(page) == [f"0 by token, then {sum(any(lines(text, j)) for j in range(300))} by context"]


def test_a_context_whose_place_is_out_of_sight_opens(visit: Open, html: Path) -> None:
    page, data = visit(0), read_page(html)
    inside = """(() => { const [token, line] = [e, e.parentElement].map((e) => e.getBoundingClientRect());
        return line.left <= token.left && token.right <= line.right; })()"""
    query = "".join(data["table"]["strings"][i] for i in data["windows"][0][7:9])
    ActionChains(page).drag_and_drop_by_offset(page.find_element(By.ID, "divider"), 800, 0).perform()
    page.find_element(By.ID, "search").send_keys(query)
    found(page)
    page.find_element(By.CSS_SELECTOR, "th[data-key=density] button").click()  # else those that fire there come first
    seen = set()
    for latent in latents_shown(page)[:12]:
        page.execute_script(f"location.hash = '#latent-{latent}'")
        wait_for(page, latent)
        marks = each(page, ".context .found", inside)
        assert len(texts(page, ".whole")) == (len(marks) > 0 and not any(marks))
        seen.add(len(texts(page, ".whole")))
    assert seen == {0, 1}


@pytest.mark.parametrize("width", [1280, 390])
def test_the_list_shows_tokens_whole_and_can_be_widened(visit: Open, width: int) -> None:
    """Its rows are as high as their tokens need; the one that keys lead to is in sight."""
    page = visit(3 if width == 1280 else None, width)
    cut = """(() => { const [chip, cell] = [e, e.parentElement].map((e) => e.getBoundingClientRect());
        return chip.right > cell.right || chip.bottom > cell.bottom || e.scrollWidth > e.clientWidth; })()"""
    assert len(texts(page, "td.col-top .chip")) > 50 and not any(each(page, "td.col-top .chip", cut))
    heights = each(page, "#rows .latent", "e.offsetHeight")
    assert min(heights) == 36 < max(heights)
    for key in [Keys.HOME, *"jjjjjjjjjjjjjjjjjjjjjjjjjkkkkk", Keys.END, *"kkkkkkkkkkjjj"]:
        page.find_element(By.TAG_NAME, "body").send_keys(key)
        ((top, bottom, low, high),) = each(
            page,
            "tr.current",
            """(() => {
            const row = e.getBoundingClientRect(), list = document.getElementById("scroll").getBoundingClientRect();
            return [row.top, row.bottom, list.top + 32, list.bottom]; })()""",
        )
        assert low <= top + 1 and bottom <= high + 1
    for _ in range(10):  # upwards, to rows whose heights were only guessed
        ((row, before),) = each(page, "tr.current", "[e.querySelector('a').hash, e.getBoundingClientRect().top]")
        page.execute_script("document.getElementById('scroll').scrollTop -= 50")
        page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        ((same, after),) = each(page, "tr.current", "[e.querySelector('a').hash, e.getBoundingClientRect().top]")
        assert same == row and after == pytest.approx(before + 50, abs=2)
    if width == 1280:
        before = each(page, "#list", "e.offsetWidth")[0]
        ActionChains(page).drag_and_drop_by_offset(page.find_element(By.ID, "divider"), 200, 0).perform()
        assert each(page, "#list", "e.offsetWidth")[0] == pytest.approx(before + 200, abs=8)
        assert sum(each(page, "#rows .latent", "e.offsetHeight > 36")) < sum(height > 36 for height in heights)


def test_every_number_of_a_latent_is_that_of_the_data(visit: Open, html: Path) -> None:
    table, piece = (read_page(html)[name] for name in ("table", "latents-0"))
    j = max(range(256), key=lambda j: len(piece[j]["contexts"]))
    latent, page, count, maximum = piece[j], visit(j), table["counts"][j], table["maxima"][j]
    said = each(page, ".numbers dd", "[...e.childNodes].map((n) => n.textContent)")
    (density, one_in), (fires, of), (largest, *_), (mean, *_) = said
    assert number(density) == pytest.approx(100 * count / table["tokens"], rel=0.06)
    assert one_in == f"1 token in {round(table['tokens'] / count):,}"
    assert (fires, of) == (f"{count:,}", f"of {table['tokens']:,} tokens")
    assert number(largest) == pytest.approx(maximum, rel=0.006)
    assert number(mean) == pytest.approx(table["means"][j], rel=0.006) != pytest.approx(maximum, rel=0.1)
    bars = each(page, ".histogram rect:not(.hit)", "e.getBBox().height > 0")
    assert bars == [count > 0 for count in latent["histogram"]]
    raised, suppressed, lowered = latent["effects"]
    assert len(raised) == 10 and raised[0] > 0 > lowered[0]
    for name, expected in (("up", table["promoted"][j]), ("down", suppressed)):
        assert each(page, f".{name} .token", "Number(e.dataset.token)") == expected
    nearest, cosines = latent["nearest"]
    assert texts(page, ".nearest b") == [str(j) for j in nearest] and len(nearest) == 10 and cosines[0] > cosines[-1]
    for name, expected in (("up", raised), ("down", lowered), ("nearest", cosines)):
        assert [number(text) for text in texts(page, f".{name} .number")] == pytest.approx(expected, abs=0.0051)

    titles = ["Strongest contexts", *(f"Percentiles {p} to {p + 25}" for p in (75, 50, 25, 0))]
    sections = page.find_elements(By.CSS_SELECTOR, ".contexts")
    for section, title, band in zip(sections, titles, [-1, *reversed(range(BANDS))], strict=True):
        of_band = [dict(zip(c[3::2], c[4::2]))[c[1]] / LEVELS * maximum for c in latent["contexts"] if c[2] == band]
        shown = [number(e.text) for e in section.find_elements(By.CSS_SELECTOR, ".value")]
        assert shown == pytest.approx(of_band, rel=0.006) and section.text.startswith(title)


def test_hovering_and_tabbing_tell_each_token_s_activation(visit: Open, html: Path) -> None:
    table, piece, windows = (read_page(html)[name] for name in ("table", "latents-0", "windows"))
    contexts = [(j, n, c) for j, latent in enumerate(piece) for n, c in enumerate(latent["contexts"])]
    j, n, context = next((j, n, c) for j, n, c in contexts if min(c[4::2]) < 900 and len(c) > 7)
    page, levels, ids = visit(j), dict(zip(context[3::2], context[4::2])), windows[context[0]]
    button = page.find_elements(By.CSS_SELECTOR, ".context")[n]
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    whole = page.find_elements(By.CSS_SELECTOR, ".whole .token")
    shades = each(page, ".whole .token", "[e.style.getPropertyValue('--share'), getComputedStyle(e).backgroundColor]")
    shares = [levels.get(p, 0) / LEVELS for p in range(1, len(ids))]
    assert [float(share or 0) for share, _ in shades] == pytest.approx(shares, abs=1e-3)
    assert len({colour for _, colour in shades}) == len(set(shares))
    tip = page.find_element(By.ID, "tip")
    for position, level in sorted(levels.items()):
        page.switch_to.active_element.send_keys(Keys.TAB)
        assert page.switch_to.active_element == whole[position - 1]
        told = f"activation (\\S+), {round(100 * level / LEVELS)}% of max"
        WebDriverWait(page, 10).until(lambda _: tip.is_displayed())
        by_key = re.search(told, tip.text)
        assert f"id {table['ids'][ids[position]]}" in tip.text
        assert number(by_key[1]) == pytest.approx(level / LEVELS * table["maxima"][j], rel=0.006)
        ActionChains(page).move_to_element(whole[position - 1]).perform()
        assert re.search(told, tip.text)[1] == by_key[1]
    silent = next(p for p in range(1, len(whole) + 1) if p not in levels)
    ActionChains(page).move_to_element(whole[silent - 1]).perform()
    assert "does not fire" in tip.text
    button.click()
    assert button.get_attribute("aria-expanded") == "false" and not texts(page, ".whole")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_focus_stays_in_the_latent(visit: Open, width: int) -> None:
    page = visit(1, width)
    page.execute_script("document.querySelector('.bar button:nth-of-type(2)').focus()")
    for latent in (2, 3):
        press(page, Keys.ENTER, opened=latent, focus="Next latent (j)")
    page.execute_script("document.querySelector('.context').focus()")
    for latent in (4, 5):
        press(page, "j", opened=latent, focus="detail")
    if width == 390:  # the table is behind
        ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
        assert not texts(page, "#list :focus")
        press(page, Keys.ESCAPE, opened=None, focus="#latent-5")
        press(page, "k", opened=None, focus="#latent-4")
        press(page, Keys.ENTER, opened=4, focus="detail")
        press(page, "/", opened=None, focus="search")


def test_addresses_and_keyboard(visit: Open) -> None:
    """Latent 5 never fired, latent 300 is not there."""
    page = visit(5)
    assert "fired on none" in texts(page, "#detail .note")[0] and not texts(page, ".context")
    page = visit(300)
    press(page, "j", "j", Keys.ARROW_DOWN, "k", opened=None, focus="#latent-2")
    press(page, Keys.ENTER, opened=2, focus="detail")
    press(page, "j", opened=3, focus="detail")
    assert page.current_url.endswith("#latent-3")
    press(page, Keys.ESCAPE, opened=None, focus="#latent-3")
    press(page, "/", opened=None, focus="search")
    press(page, "#28", Keys.ARROW_DOWN, opened=None, focus="#latent-28")
    assert each(page, ":focus", "getComputedStyle(e).outlineStyle") == ["solid"]
    press(page, Keys.ENTER, opened=28, focus="detail")
    page.back()
    wait_for(page, None)
    press(page, "/", Keys.ESCAPE, Keys.ESCAPE, Keys.END, opened=None, focus="#latent-299")
    press(page, Keys.HOME, opened=None, focus="#latent-0")


def test_text_never_becomes_html(visit: Open) -> None:
    """Nor does a control character change how the text after it is written."""
    page = visit(0)
    promoted = texts(page, ".up .token")
    assert HOSTILE in [text.replace("·", " ") for text in promoted] and "·a↵⇥␀⟨202E⟩b" in promoted
    assert any(HOSTILE in text for text in texts(page, "#facts dd"))
    assert page.execute_script("return document.images.length") == 0
    (policy,) = each(page, "meta[http-equiv='Content-Security-Policy']", "e.content")
    assert policy.split(";")[0] == "default-src 'none'"


@pytest.mark.parametrize("width", [1280, 390, 360])
def test_nothing_is_wider_than_the_screen(visit: Open, width: int) -> None:
    for latent in (None, 1):
        page = visit(latent, width)
        wider = each(page, "html, #scroll, #detail:not([hidden])", "e.scrollWidth > e.clientWidth")
        assert len(wider) >= 2 and not any(wider)
    covers = page.execute_script("return document.elementFromPoint(20, 300).closest('#detail') !== null")
    assert covers == (width < 1280), "on a narrow screen a latent covers the table"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit: Open, scheme: str) -> None:
    """WCAG asks for at least 4.5, for text on the page and on the strongest shade."""
    page = visit(0, scheme=scheme)
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
        c = np.array(colour[:3]) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722))

    for name, ink, ground in measured:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) > 4.5, name
    _, ink, ground = measured[-1]
    assert (luminance(ink) > luminance(ground)) == (scheme == "dark")
