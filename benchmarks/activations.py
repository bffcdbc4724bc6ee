"""What quality.py and findings.py share: recorded activations of the embedded model, and metrics of any coder."""

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # the library, where a benchmark runs as a script

from peers import Coder

from activation_store import ActivationsStore
from config import Config
from evaluation import CE_OF_TEXT, HeldOut, Predictions, ce
from language_model import check_model, load_model, ordinary_positions, record

CACHE = Path(tempfile.gettempdir()) / "nn-decompositions-activations"


class Activations:
    """Serve the same batches in the same order to all, and measure on held-out text what a coder makes of activations.

    The batches, in float16, are written to a file in `cache` once. cfg: decides them, and the held-out text.
    """

    def __init__(self, cfg: Config, cache: Path = CACHE) -> None:
        self.cfg, self.cache = check_model(cfg), cache
        self.model = load_model(self.cfg)
        store = ActivationsStore(self.model, [self.cfg])
        file = cache / f"{hashlib.blake2b(repr(self.cfg.stream).encode(), digest_size=8).hexdigest()}.npy"
        if not file.exists():
            self._write(store, file)
        self._batches = np.load(file, mmap_mode="r")
        self.tokens = store.held_out_tokens()
        self.held_out = HeldOut(self.model, self.tokens)
        self.ordinary = ordinary_positions(self.tokens, self.model.tokenizer)
        self.x = record(self.model, self.tokens, [cfg.hook_name])[cfg.hook_name][self.ordinary].float()
        self.window = self.ordinary.nonzero()[:, 0]  # of each row
        self.power = self._by_window(self.x - self.x.mean(dim=0))
        sums = self.held_out.of(self.cfg).sums
        self.ce_clean, self.ce_zero = (float(sums[ce].sum() / sums["_predictions"].sum()) for ce in CE_OF_TEXT[:2])

    def _write(self, store: ActivationsStore, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (self.cfg.num_steps, self.cfg.batch_size, self.cfg.act_size)
        unfinished = file.with_suffix(".tmp")
        recorded = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
        for step in range(len(recorded)):
            recorded[step] = store.next_batch()[self.cfg.hook_name].numpy()
        recorded.flush()
        unfinished.rename(file)

    def __iter__(self) -> Iterator[Float[Tensor, "batch act_size"]]:
        for batch in self._batches:
            yield torch.from_numpy(batch.astype(np.float32))

    def _by_window(self, rows: Float[Tensor, "row act_size"]) -> Float[Tensor, "window"]:
        """Add up the squares of each window's rows."""
        squares = rows.double().square().sum(dim=1)
        return squares.new_zeros(len(self.tokens)).index_add_(0, self.window, squares)

    @torch.no_grad()
    def measure(self, coder: Coder) -> dict[str, object]:
        """Compute the metrics of held-out text, and each window's squared error, of which intervals are made."""
        fires, x_hat = coder.encode(self.x) > 0, coder.reconstruct(self.x)
        errors = self._by_window(self.x - x_hat)
        ce = self.cross_entropy(x_hat)
        return {
            "explained_variance": float(1 - errors.sum() / self.power.sum()),
            "ce_recovered": (self.ce_zero - ce) / (self.ce_zero - self.ce_clean),
            "l0": float(fires.sum() / len(fires)),
            "silent": float((~fires.any(dim=0)).double().mean()),
            "relative_bias": float(x_hat.square().sum() / (x_hat * self.x).sum()),
            "errors": [float(f"{error:.7g}") for error in errors],
            "powers": [float(f"{power:.7g}") for power in self.power],
        }

    @torch.no_grad()
    def cross_entropy(self, rows: Float[Tensor, "row act_size"]) -> float:
        """Measure the model's mean cross-entropy with these rows for its activations at ordinary positions."""
        total = 0.0
        for batch in self.held_out.batches:
            some = rows[(self.window >= batch.windows.start) & (self.window < batch.windows.stop)]
            total += float(
                ce(Predictions.of(batch.targets, self.held_out.predict(batch, self.cfg.writes, some)[0])).double().sum()
            )
        return total / int(self.ordinary[:, :-1].sum())
