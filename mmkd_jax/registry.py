"""Finding things by name or by dotted path, so that a lab's own module is as good as one of ours."""

import importlib
from collections.abc import Mapping
from typing import Any

from mmkd_jax.errors import InputError, near


def resolve(name: str, table: Mapping[str, str], what: str = "name") -> Any:
    """The object behind `name`: a key of `table` (name -> dotted path), or a dotted path itself.

    A dotted path names a module (`my_lab.sources.ehr`) or an attribute of one (`my_lab.sources.ehr.records`).

    Raises:
      InputError: nothing of that name is known, or the module or attribute does not exist.
    """
    path = table.get(name, name)
    if "." not in path:
        raise InputError(f"unknown {what} {name!r} (a dotted path works as well); {near(name, table)}")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise InputError(f"{what} {name!r} needs {error.name}, which is not installed; install it") from error
    module_name, attribute = path.rsplit(".", 1)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(f"{what} {name!r}: there is no module {error.name}; check it and PYTHONPATH") from error
        raise InputError(f"{what} {name!r} needs {error.name}, which is not installed; install it") from error
    if not hasattr(module, attribute):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"{what} {name!r}: {module_name} has no {attribute!r}; {near(attribute, public)}")
    return getattr(module, attribute)
