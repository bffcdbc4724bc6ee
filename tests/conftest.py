"""Checks the shapes in the signatures of sparse.py and sae.py at every call; runs before the tests import them."""

from jaxtyping import install_import_hook

install_import_hook(["sparse", "sae"], "beartype.beartype")
