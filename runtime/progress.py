"""Show how far training or recording has come: a bar in a terminal or a notebook, lines in a log file."""

import sys
import time

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

from config import Config
from runtime import ranks

SILENT_SECONDS = 60  # without a line, at most, where no bar is shown


class Progress:
    """Count the activations that are done, of num_tokens, on from a step."""

    def __init__(self, cfg: Config, first: int) -> None:
        self._cfg, self._first = cfg, first
        self._began = self._spoke = time.perf_counter()
        in_notebook = issubclass(tqdm, tqdm_notebook)
        self._bar = tqdm(
            initial=first * cfg.batch_size,
            total=cfg.num_steps * cfg.batch_size,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            # None: where standard error is not a terminal.
            disable=True if ranks.world_rank() > 0 else False if in_notebook else None,
            bar_format="{l_bar}{bar}| {remaining} left, {rate_fmt}{postfix}",
        )

    def advance(self, done: int) -> None:
        """Count one more step; where there is no bar, a line says so every minute."""
        self._bar.update(self._cfg.batch_size)
        if self._bar.disable and done < self._cfg.num_steps and time.perf_counter() - self._spoke > SILENT_SECONDS:
            self.say(f"step {done:,}, {self.left(done)} left")

    def left(self, done: int) -> str:
        """Estimate the time that the remaining steps will take."""
        of_step = (time.perf_counter() - self._began) / (done - self._first)
        return tqdm.format_interval(of_step * (self._cfg.num_steps - done))

    def show(self, text: str) -> None:
        """Write beside the bar."""
        self._bar.set_postfix_str(text, refresh=False)

    def say(self, line: str) -> None:
        """Write a line, which a log file has at once."""
        tqdm.write(line)
        sys.stdout.flush()
        self._spoke = time.perf_counter()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
