"""What a run would be: its Configs, and estimates of parameters, memory and time. Trains and writes nothing.

Time is measured, on this machine, in a few steps of the SAEs and a few passes of the model. The Hub is not asked: of a
model that is not on this disk only what its Config says is known.
"""

import functools
import json
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import psutil
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import text
from activation_store import check_model, check_text, load_model, model_source, record
from cli import WIDTH
from config import NOT_USED_BY, Config, by_stream
from evaluation import MAX_LOGITS, evaluate
from sae import BaseAutoencoder, build_sae
from training import Trainer, floor_step, heading, placements, synchronise

REPEATS, SECONDS = 3, 3.0  # of each thing that is timed, unless all together take longer
L0 = 64  # of Vanilla and JumpReLU where they are timed
TIMED_PARAMETERS = 1 << 20  # in each of W_enc and W_dec of an SAE that is timed; what a larger one takes is calculated
TIMED_LOGITS = 1 << 23  # enough to be as slow, each, as those of an evaluation: fresh memory costs a CPU more
STEP_ROWS, DENSE_ROWS, EVAL_LOGITS = 16, 5, 10  # tensors alive at once: [batch, act_size], [batch, dict_size], logits


def describe(cfgs: list[Config]) -> Iterator[str]:
    """Lines of at most 80 columns, each of them when it is known. Raises ValueError where a run would, early."""
    disable_progress_bar()
    is_known = {cfg.model_name: _is_known(cfg.model_name) for cfg in cfgs}
    cfgs = [check_model(cfg) if is_known[cfg.model_name] else cfg for cfg in cfgs]
    for cfg in {c.dataset_path: c for c in cfgs}.values():
        if text.local_files(cfg.dataset_path) and is_known[cfg.model_name]:
            check_text(cfg)
    groups = by_stream(cfgs)

    yield from _configs(cfgs)
    for group in groups:
        cfg = group[0]
        yield ""
        yield heading(group)
        if cfg.act_size is None:
            yield _line(
                "parameters",
                f"unknown: {cfg.model_name} is not on this disk; --act-size gives its width (names depend on it)",
            )
        else:
            yield from _size(group, is_known[cfg.model_name])
    known = [group for group in groups if group[0].act_size is not None]
    if known:
        yield ""
        yield from _time(known)


def _configs(cfgs: list[Config]) -> Iterator[str]:
    """Each Config's name and what it alone has, then what all have."""
    fields = cfgs[0].to_dict()
    shared = {f for f in fields if len({getattr(cfg, f) for cfg in cfgs}) == 1}
    for cfg in cfgs:
        yield cfg.name
        if own := [f for f in fields if f not in shared | NOT_USED_BY[cfg.sae_type]]:
            yield _fields(cfg, own)
    unused = set.intersection(*(NOT_USED_BY[cfg.sae_type] for cfg in cfgs))
    yield f"\nin {'it' if len(cfgs) == 1 else 'each of them'}"
    yield _fields(cfgs[0], [f for f in fields if f in shared - unused])


def _fields(cfg: Config, names: list[str]) -> str:
    indent = "    "
    words = ", ".join(f"{name}\0{getattr(cfg, name)}" for name in names)  # no line ends between a field and its value
    filled = textwrap.fill(
        words, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return filled.replace("\0", " ")


def _size(cfgs: list[Config], is_known: bool) -> Iterator[str]:
    """Parameters of the SAEs that share a stream and of its model, and the memory that training them takes."""
    cfg, width = cfgs[0], cfgs[0].act_size
    each = [_parameters(c) for c in cfgs]
    low, high = min(each), max(each)
    of_each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    yield _line("parameters", f"{sum(each):,} in the SAEs, {of_each} in each")
    rows = cfg.num_batches_in_buffer * cfg.model_batch_size * (cfg.seq_len - 1)
    is_cpu = cfg.torch_device.type == "cpu"
    parts = {
        "weights": 4 * sum(each),
        "gradients": 4 * sum(each),
        "Adam's two means": 8 * sum(each),
        f"activation buffer{', and a copy while the state is saved' if is_cpu else ''}": (
            (2 if is_cpu else 1) * rows * width * cfg.torch_dtype.itemsize
        ),
    }
    logits = 0
    if is_known:
        hf = AutoConfig.from_pretrained(model_source(cfg.model_name))
        with torch.device("meta"):
            model = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf).parameters())
        yield _line("", f"{model:,} in the language model")
        parts["language model"] = model * cfg.torch_dtype.itemsize
        vocab = hf.get_text_config().vocab_size
        logits = min(MAX_LOGITS, cfg.eval_windows * cfg.seq_len * vocab)
    widths = [STEP_ROWS * width + DENSE_ROWS * c.dict_size * (c.sae_type in ("vanilla", "jumprelu")) for c in cfgs]
    step, evaluation = 4 * cfg.batch_size * max(widths), 4 * EVAL_LOGITS * logits
    parts["a step's peak" if step > evaluation else "an evaluation's peak"] = max(step, evaluation)
    beside = "" if is_known else ", and the language model"
    yield _line("memory", f"{_bytes(sum(parts.values()))} on {cfg.torch_device}, beside the libraries{beside}")
    for name, size in parts.items():
        yield f"{_bytes(size):>20}  {name}"


def _parameters(cfg: Config) -> int:
    D, F = cfg.act_size, cfg.dict_size
    return 2 * D * F + F + D + (F if cfg.sae_type == "jumprelu" else 0)


def _time(groups: list[list[Config]]) -> Iterator[str]:
    """Seconds of all groups, one after the other: steps and passes measured alone, times how many there are."""
    start = _start_seconds()
    timed = {cfg: _timed(cfg) for group in groups for cfg in group}
    trainers = {cfg: _trainer(cfg) for cfg in timed.values()}
    seconds = _step_seconds(trainers)
    total = {"steps of the SAEs": 0.0, "the language model": 0.0, "evaluations": 0.0}
    passes: dict[tuple, tuple[float, float]] = {}
    unknown = set()
    for group in groups:
        cfg, count = group[0], len(group)
        for c in group:
            step = seconds[timed[c]]
            if more := c.dict_size - timed[c].dict_size:
                step += more * _seconds_per_latent(c.act_size, c.batch_size, c.product_dtype, placements(c)[0])
            total["steps of the SAEs"] += c.num_steps * step / len(placements(c))
        if not _has_weights(cfg.model_name):
            unknown.add(cfg.model_name)
            continue
        of_passes = (cfg.model_name, cfg.hook_point, cfg.seq_len, cfg.dtype, cfg.device)
        if of_passes not in passes:
            passes[of_passes] = _model_seconds(cfg, trainers[timed[cfg]].sae)
        window, evaluated = passes[of_passes]
        total["the language model"] += window * cfg.num_steps * cfg.batch_size / (cfg.seq_len - 1)
        evaluations = -(-cfg.num_steps // cfg.perf_log_freq)
        # What all SAEs share (the model as it is, with zeros, with the mean) costs about as much as two of them.
        total["evaluations"] += evaluated * cfg.eval_windows * evaluations * (2 + count) / 3
    where = "at the speed that this machine has now"
    if unknown:
        total = {"steps of the SAEs": total["steps of the SAEs"]}
        where += f", without passes of {', '.join(sorted(unknown))} (not on this disk)"
    else:
        total["the start"] = start
    yield _line("time", f"about {_duration(sum(total.values()))} {where}")
    for name, part in total.items():
        yield f"{_duration(part):>20}  {name}"
    decide = {"vanilla", "jumprelu"} & {cfg.sae_type for cfg in timed}
    active = f", {L0} active ones a token in Vanilla and JumpReLU" if decide else ""
    yield _line("", f"Assumed: no dead latents{active}.")


def _start_seconds() -> float:
    """Of a run's start, which is ours: the imports. So long this process has lived."""
    return time.time() - psutil.Process().create_time()


def _timed(cfg: Config) -> Config:
    """The SAE that is timed in place of cfg's: of no more latents than are quickly timed, and one for all alike."""
    most = max(4 * cfg.top_k, L0, TIMED_PARAMETERS // cfg.act_size)
    dict_size = min(cfg.dict_size, most)
    top_k = min(cfg.top_k, dict_size) if cfg.sae_type in ("topk", "batchtopk") else 1
    same = dict(act_size=cfg.act_size, batch_size=cfg.batch_size, num_tokens=1000 * cfg.batch_size)
    numbers = dict(dtype=cfg.dtype, product_dtype=cfg.product_dtype, input_unit_norm=cfg.input_unit_norm)
    memory = dict(num_batches_in_buffer=cfg.num_batches_in_buffer, model_batch_size=cfg.model_batch_size)
    return Config(
        sae_type=cfg.sae_type, dict_size=dict_size, top_k=top_k, device=cfg.device, lr=1e-6, seq_len=cfg.seq_len,
        site=cfg.site, layer=cfg.layer, model_name=cfg.model_name, **same, **numbers, **memory,
    )  # fmt: skip


def _batch(cfg: Config) -> Tensor:
    rng = torch.Generator().manual_seed(1)  # not the seed of the latents
    x = torch.randn(cfg.batch_size, cfg.act_size, generator=rng)
    return x.to(placements(cfg)[0], cfg.torch_dtype)


@torch.no_grad()
def _trainer(cfg: Config) -> Trainer:
    """An SAE as it is after the first few hundred steps: Vanilla's and JumpReLU's latents fire L0 times a token."""
    x = _batch(cfg)
    sae = build_sae(cfg).to(x.device).train()
    sae.initialise_from(x)
    pre = sae.dense_pre_activations(sae.normalise(x[:64]).z).flatten()
    cut = pre.topk(min(64 * L0, len(pre))).values[-1]
    if cfg.sae_type == "vanilla":
        sae.b_enc -= cut
    elif cfg.sae_type == "jumprelu":
        sae.threshold.fill_(cut)
    return Trainer(sae)


def _step_seconds(trainers: dict[Config, Trainer]) -> dict[Config, float]:
    """Of a step of each, in turn as in training: each finds the caches full of the others' weights."""
    found: dict[Config, list[float]] = {cfg: [] for cfg in trainers}
    until = time.perf_counter() + SECONDS
    for repeat in range(1 + REPEATS):  # the first does not count
        for cfg, trainer in trainers.items():
            x = _batch(cfg)
            found[cfg].append(_seconds(functools.partial(trainer.step, x, 500), x.device))
        if repeat > 0 and time.perf_counter() > until:
            break
    return {cfg: statistics.median(times[1:]) for cfg, times in found.items()}


@functools.cache
def _seconds_per_latent(act_size: int, batch_size: int, product_dtype: str, device: torch.device) -> float:
    """Of the floor of a step: what one more latent costs."""
    latents = max(1024, TIMED_PARAMETERS // act_size)
    run = floor_step(torch.randn(batch_size, act_size, device=device), latents, getattr(torch, product_dtype))
    run()
    return statistics.median(_seconds(run, device) for _ in range(REPEATS)) / latents


@torch.no_grad()
def _model_seconds(cfg: Config, sae: BaseAutoencoder) -> tuple[float, float]:
    """Of a window of training text, and of one in an evaluation of one SAE."""
    model, device = load_model(cfg), cfg.torch_device
    logits = TIMED_LOGITS if device.type == "cpu" else MAX_LOGITS
    tokens = torch.randint(model.cfg.d_vocab, (max(1, logits // (cfg.seq_len * model.cfg.d_vocab)), cfg.seq_len))
    mean = torch.zeros(cfg.act_size, device=device)
    record(model, tokens.to(device), cfg.hook_point)
    passed = _seconds(lambda: record(model, tokens.to(device), cfg.hook_point), device)
    evaluated = _seconds(lambda: evaluate(model, [sae], tokens, mean), device)
    return passed / len(tokens), evaluated / len(tokens)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def _is_known(model_name: str) -> bool:
    """Whether this disk has the model's configuration."""
    return _is_local(model_name) or any((version / "config.json").is_file() for version in _cached(model_name))


def _has_weights(model_name: str) -> bool:
    return _is_local(model_name) or any(_is_whole(version) for version in _cached(model_name))


def _is_local(model_name: str) -> bool:
    return Path(model_source(model_name)).is_dir()


def _cached(model_name: str) -> Iterator[Path]:
    """The versions of the model in the cache of the Hub."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return cache.glob(f"models--{model_name.replace('/', '--')}/snapshots/*")


def _is_whole(version: Path) -> bool:
    """Whether the weights are there: one file, or all that an index names."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        index = version / f"{file}.index.json"
        parts = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else [file]
        if all((version / part).is_file() for part in parts):
            return True
    return False


def _duration(seconds: float) -> str:
    for unit, size in {"days": 86400, "h": 3600, "min": 60}.items():
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _line(title: str, words: str) -> str:
    return textwrap.fill(words, WIDTH, initial_indent=f"{title:<12} ", subsequent_indent=" " * 13)
