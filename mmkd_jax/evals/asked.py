"""Which sets are asked for: names that are not there, and sets that nothing is asked of, are refused."""

from collections.abc import Sequence

from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import base


def chosen(sets: Sequence[base.EvalSet], names: Sequence[str] | None) -> list[base.EvalSet]:
    """The sets of these names in their order, or all.

    Raises:
      InputError: an unknown name, or nothing to evaluate on.
    """
    known = {one.name: one for one in sets}
    for name in names or ():
        if name not in known:
            raise InputError(f"there is no evaluation set {name!r}; {near(name, known)}")
    if not known:
        raise InputError("the set of pairs has no test rows with classes and no val or test rows with captions")
    return [known[name] for name in dict.fromkeys(names)] if names else list(sets)


def check(sets: Sequence[base.EvalSet], tasks: Sequence[str], *, named: bool) -> None:
    """Refuses sets that were asked for by name and that no task is for: they must not be left out unsaid.

    Raises:
      InputError: there are some, or no set has a task, or a task is unknown.
    """
    modules = base.find(tasks)
    idle = [one.name for one in sets if not any(module.applies(one) for module in modules.values())]
    if idle and (named or len(idle) == len(sets)):
        raise InputError(f"none of the tasks {', '.join(tasks)} applies to {', '.join(idle)}; name other tasks")
