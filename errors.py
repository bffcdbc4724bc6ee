"""Errors of other libraries, as ours quote them."""

from huggingface_hub import get_token

MOST = 300  # characters


def one_line(error: Exception) -> str:
    """The error's type and text, at most MOST of it, without line breaks and the Hub's token, whoever put it there."""
    text = f"{type(error).__name__}: {error}"
    token = get_token()
    return " ".join((text.replace(token, "<token>") if token else text).split())[:MOST]
