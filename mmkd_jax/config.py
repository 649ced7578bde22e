"""Configs: Python files with `get_config(arg)`, colon arguments and `--config.x.y=z` overrides.

`load("configs/stage2_mmkd.py:smoke,res=128", ["--config.optim.lr=1e-3"])` is what every command uses. The syntax is
that of `ml_collections.config_flags`; the overrides are applied here, without absl flags, so that one process can load
many configs with nothing global left behind, required placeholders work, and everything wrong is an `InputError` in
one line that names the near matches (config_flags answers with a bare `AttributeError`, or takes one number for a
tuple in silence).
"""

import ast
import inspect
import linecache
import re
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

from mmkd_jax import io
from mmkd_jax.errors import InputError, near

_OVERRIDE = re.compile(r"--(?P<no>no)?config\.(?P<name>[^=]+)(?:=(?P<value>.*))?", re.DOTALL)
_TRUE, _FALSE = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


def load(address: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config at `address` with `overrides` applied, locked.

    Args:
      address: `path/to/file.py` or `path/to/file.py:arg1,arg2=value`; what follows the colon is `get_config`'s
        argument.
      overrides: strings `--config.a.b=value`; `--config.flag` and `--noconfig.flag` set a boolean. Of several for
        one field the last one counts.

    Raises:
      InputError: no such file, no `get_config` in it, an argument it does not know, an error in the file, an unknown
        field, a value of another type, or a required field that is not set.
    """
    path, arg = split_address(address)
    config = _call(module(path), path, arg)
    _apply(config, overrides)
    to_dict(config)  # refuses what a config file cannot record
    return config.lock()


def split_address(address: str) -> tuple[str, str]:
    """`"a/b.py:x,y=1"` as `("a/b.py", "x,y=1")`; the argument is empty where there is none."""
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", address)
    if match is None:
        raise InputError(f"config {address!r} is not of the form path/to/file.py or path/to/file.py:arguments")
    return match.group(1), match.group(2) or ""


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """A config file's colon arguments, typed by their defaults.

    `parse_arg("smoke,res=128", smoke=False, res=224)` gives `smoke=True, res=128`. A bare name sets a boolean; other
    values take the type of the default (int, float, bool or str; a default of None takes a string).

    Raises:
      InputError: an unknown name, a name given twice, or a value of the wrong type.
    """
    values = dict(defaults)
    seen = set()
    for item in arg.split(",") if arg else ():
        name, equals, text = item.strip().partition("=")
        if name not in defaults:
            raise InputError(f"unknown config argument {name!r}; {near(name, defaults)}")
        if name in seen:
            raise InputError(f"config argument {name!r} is given twice")
        seen.add(name)
        if not equals and not isinstance(defaults[name], bool):
            raise InputError(f"config argument {name!r} needs a value: {name}=VALUE")
        kind = str if defaults[name] is None else type(defaults[name])
        values[name] = _typed(f"config argument {name!r}", text, kind) if equals else True
    return ConfigDict(values)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """`config` as plain JSON values (references resolved, tuples as lists): what a run folder's config.json holds.

    Raises:
      InputError: a required field has no value, or a value has no JSON form.
    """
    try:
        return _plain(config, "config")
    except config_dict.RequiredValueError as error:
        missing = [name for name in _fields(config) if _is_missing(config, name)]
        raise InputError("needs a value: " + ", ".join(f"--config.{name}=..." for name in missing)) from error


def module(path: str) -> types.ModuleType:
    """The config file at `path`, run as a module that is registered nowhere.

    Raises:
      InputError: there is no such file, it does not load, or has no `get_config`.
    """
    file = io.as_path(path)
    if not file.exists():
        raise InputError(f"there is no config file {path}")
    loaded = types.ModuleType("mmkd_config")
    loaded.__file__ = str(file)
    try:
        exec(compile(file.read_text(), str(file), "exec"), loaded.__dict__)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config {path} does not load: {_where(error, str(file))}") from error
    if not callable(getattr(loaded, "get_config", None)):
        raise InputError(f"config {path} has no function get_config(arg='')")
    return loaded


def _call(module: types.ModuleType, path: str, arg: str) -> ConfigDict:
    if arg and not inspect.signature(module.get_config).parameters:
        raise InputError(f"config {path} takes no arguments; leave out {':' + arg!r}")
    try:
        config = module.get_config(arg) if arg else module.get_config()
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    except Exception as error:
        raise InputError(f"config {path} fails: {_where(error, module.__file__)}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config {path}: get_config gives {type(config).__name__}, not a ml_collections.ConfigDict")
    return config


def _where(error: Exception, file: str) -> str:
    """`error` in one line, with the last line of the config file that it passed through."""
    linecache.checkcache(file)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == file else (lines or [None])[-1]
    place = f"line {line}: " if line else ""
    message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return f"{place}{type(error).__name__}: {message}"


def _apply(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets the overridden fields in place, in the order given."""
    for override in overrides:
        name, value = _parse_override(override, config)
        *sections, field = name.split(".")
        _get(config, sections)[field] = value


def _parse_override(override: str, config: ConfigDict) -> tuple[str, Any]:
    """(dotted field, value of its type) of one override."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        raise InputError(f"{override!r} is not of the form --config.field=VALUE")
    name, text = match["name"], match["value"]
    kind = _field_type(config, name)
    if text is None and kind is bool:
        return name, not match["no"]
    if text is None or match["no"]:
        raise InputError(f"{override}: write --config.{name}=VALUE ({kind.__name__})")
    if kind is tuple:
        return name, _tuple(name, text, _get(config, name.split(".")))
    return name, _typed(f"config.{name}", text, kind)


def _field_type(config: ConfigDict, name: str) -> type:
    """Type of the field `name`, one that a command line can set."""
    holder, parts = config, name.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(holder, ConfigDict) or part not in holder:
            raise InputError(f"the config has no field {name!r}; {_suggest(config, parts, depth)}")
        if depth + 1 < len(parts):
            holder = holder[part]
    kind = _type(holder, parts[-1])
    if issubclass(kind, ConfigDict):
        raise InputError(f"config.{name} is a section: set one of its fields ({', '.join(sorted(holder[parts[-1]]))})")
    if kind is type(None):
        raise InputError(f"config.{name} is None and has no type: its file must declare it by config_dict.placeholder")
    if kind not in (bool, int, float, str, tuple):
        raise InputError(f"config.{name} is a {kind.__name__}, which the command line cannot set; a tuple can be")
    return kind


def _suggest(config: ConfigDict, parts: list[str], depth: int) -> str:
    """What may have been meant by the dotted name `parts`, unknown from `depth` on."""
    known = list(_fields(config))
    same = [name for name in known if name.split(".")[-1] == parts[-1]]
    if same:
        return near(".".join(parts), same) if len(same) > 3 else "did you mean " + " or ".join(map(repr, same)) + "?"
    hint = near(".".join(parts), known)
    if hint.startswith("known"):  # nothing is near: only what stands at this level
        hint = near(parts[depth], _get(config, parts[:depth]).keys())
    return hint


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that are not sections."""
    for name in config.keys():  # noqa: SIM118 (a ConfigDict iterates by key through keys() only)
        if issubclass(_type(config, name), ConfigDict):
            yield from _fields(config[name], f"{prefix}{name}.")
        else:
            yield prefix + name


def _type(section: ConfigDict, name: str) -> type:
    """Type of a field, also of a required one that has no value yet."""
    try:
        return section.get_type(name)
    except config_dict.RequiredValueError:
        return section.get_ref(name).get_type()


def _get(config: ConfigDict, parts: Sequence[str]) -> Any:
    """The value at the end of a path of names."""
    for part in parts:
        config = config[part]
    return config


def _is_missing(config: ConfigDict, name: str) -> bool:
    try:
        _get(config, name.split("."))
    except config_dict.RequiredValueError:
        return True
    return False


def _tuple(name: str, text: str, default: tuple | None) -> tuple:
    """`text` as a tuple whose entries have the type of the default's entries."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, tuple | list):
        raise InputError(f"config.{name} is a tuple: write --config.{name}=\"('a', 'b')\" or \"(1,)\", not {text}")
    kinds = {type(entry) for entry in default or ()}
    if kinds == {float}:
        value = [float(entry) if type(entry) is int else entry for entry in value]
    wrong = [entry for entry in value if kinds and type(entry) not in kinds]
    if wrong:
        raise InputError(f"config.{name} holds {'/'.join(sorted(k.__name__ for k in kinds))}, not {wrong[0]!r}")
    return tuple(value)


def _typed(name: str, text: str, kind: type) -> Any:
    """`text` as a bool, int, float or str."""
    if kind is bool:
        if text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise InputError(f"{name} takes {kind.__name__}, not {text!r}")


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, ConfigDict | Mapping):
        return {str(name): _plain(value[name], f"{where}.{name}") for name in value.keys()}  # noqa: SIM118
    if isinstance(value, tuple | list):
        return [_plain(entry, where) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"{where} is a {type(value).__name__}; a config holds numbers, strings, booleans and tuples only")
