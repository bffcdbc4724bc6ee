"""Find a language model by its name: in a folder, in the Hub's cache, or on the Hub. No torch is imported here."""

import os
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache

from runtime.checks import explained

TINY_LM = Path(__file__).parent.parent / "assets" / "tiny-lm"
ASKED_SECONDS = 5  # that the Hub has to say whether it holds a model


def model_source(model_name: str) -> str:
    """Name what Hugging Face loads for a model_name: a folder, or the name itself."""
    folder = TINY_LM if model_name == "tiny-lm" else Path(model_name).expanduser()
    # An absolute path, as TransformerLens takes some names for other models.
    return str(folder.absolute()) if folder.is_dir() else model_name


def is_on_disk(model_name: str) -> bool:
    """Say whether this disk has the model's configuration. Raises OSError when it is no name of a model."""
    source, problem = model_source(model_name), f"model_name = {model_name!r}: found neither in a folder nor on the Hub"
    with explained(problem, ValueError, remedy="give another", raised=OSError):
        return os.path.isdir(source) or isinstance(try_to_load_from_cache(source, "config.json"), str)


@cache
def find(model_name: str) -> None:
    """Ask the Hub for a model that this disk lacks, once for all Configs: the libraries would try for half a minute.

    Raises OSError when there is no such model, or no answer.
    """
    problem = f"model_name = {model_name!r}: found neither in a folder nor on the Hub"
    if not is_on_disk(model_name):
        with explained(problem, Exception, remedy="give another", raised=OSError):
            HfApi().model_info(model_name, timeout=ASKED_SECONDS)
