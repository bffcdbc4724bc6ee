"""Train the sparse dictionaries of a sweep: python main.py --help."""

import os
import signal
import sys
from pathlib import Path

from runtime import cli


class StopAfterStep:
    """Note whether SIGTERM or Ctrl-C asked to stop; a call after each step tells.

    A second Ctrl-C raises KeyboardInterrupt, and so does one before the first step, when there is nothing to save. With
    several processes the first Ctrl-C always waits for a step, as some may already have begun.
    """

    def __init__(self, processes: int) -> None:
        self.asked, self.has_begun = False, processes > 1
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def __call__(self) -> bool:
        self.has_begun = True
        return self.asked

    def _ask(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and (self.asked or not self.has_begun):
            raise KeyboardInterrupt
        self.asked = True
        if int(os.environ.get("RANK", 0)) == 0:
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """Do what the words ask for; return 0 when done or stopped as asked, 2 after an error, 130 when stopped at once."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:  # the first process alone speaks, unless another has an error to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    folder = None
    try:
        if answer := cli.answer(words):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # what is piped into `head` ends there
            print(answer)
            return 0
        options = cli.parse(words)

        from runtime import models  # late: a mistaken word is answered at once, and a mistaken model before the next

        for cfg in options.cfgs if not options.dry_run else []:
            models.find(cfg.model_name)
        import sweep  # which takes seconds

        if options.dry_run:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            sweep.estimate(options.cfgs)
            return 0
        if options.is_cache:
            stopped = sweep.record(options.cfgs, StopAfterStep(processes))
            done = f"to train on them: --activations {options.cfgs[0].output_dir}"
            print(f"{stopped}; the same command goes on" if stopped else done)
            return 0
        cfgs, folder = sweep.begin(options.cfgs, options.name, options.resume)
        stopped = sweep.run(cfgs, folder, StopAfterStep(processes))
        if stopped is not None:
            print(f"{stopped}; {_how_to_go_on(folder)}")
        return 0
    except KeyboardInterrupt:
        if rank == 0:
            otherwise = "the same command goes on" if words[:1] == [cli.CACHE] else "no state was saved"
            print(f"main.py: stopped at once; {_how_to_go_on(folder) or otherwise}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        hint = _how_to_go_on(folder) if isinstance(error, OSError | MemoryError) else ""
        process = f"rank {rank}: " if processes > 1 else ""
        print(f"main.py: {process}{' '.join(str(error).split())}{'; ' if hint else ''}{hint}", file=sys.stderr)
        return 2


def _how_to_go_on(folder: Path | None) -> str:
    """Name the command that goes on with a sweep, where a state was saved."""
    saved = folder is not None and any(folder.glob("resume*.safetensors"))
    program = "torchrun ..." if "WORLD_SIZE" in os.environ else "python"
    return f"to go on: {program} main.py --resume {folder}" if saved else ""


def command() -> None:
    """Run `nn-decompositions`, which is `python main.py`."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a sweep begins
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    command()
