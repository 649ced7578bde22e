"""The reference libraries, imported when they are called for and named when they are missing.

They are no requirement of this project: converted teachers and everything after them run without.
"""

import importlib
from types import ModuleType

from mmkd_jax.errors import InputError

PACKAGES = {"torch": "torch", "open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers"}


def need(name: str) -> ModuleType:
    """The module `name` of a reference library.

    Raises:
      InputError: the library, or one that it needs itself, cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit its torch raises a RuntimeError
        package = name.split(".")[0]
        raise InputError(
            f"the torch backend needs {package}, which cannot be imported ({error}); "
            f"pip install {' '.join(PACKAGES.values())}, or take the flax backend"
        ) from error
