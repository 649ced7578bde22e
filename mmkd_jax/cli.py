"""The command line: `mmkd VERB ...`, the same as `python -m mmkd_jax VERB ...`.

A verb is a module of `mmkd_jax.commands` with `HELP` (one line), `configure(parser)` and `run(args)`. It is imported
when it is called for, and imports what is heavy inside `run`, so that help and wrong arguments answer at once.

Exit codes: 0; 1 for a failure nobody foresaw (with its traceback); 2 for wrong input (one line); 130 when interrupted;
a command may leave with a code of its own through `SystemExit`.
"""

import argparse
import errno
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from mmkd_jax.errors import EXIT_WRONG_INPUT, InputError, near

VERBS = (
    "demo",
    "ingest",
    "leakage",
    "teachers",
    "emit",
    "features",
    "plan",
    "train",
    "status",
    "sweep",
    "checkpoint",
    "sets",
    "eval",
    "compare",
    "encode",
    "export",
    "report",
    "bench",
)
EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141
_ENVIRONMENT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_CHATTY = ("absl", "orbax", "grain", "jax._src.xla_bridge", "etils", "tensorflow_datasets", "transformers")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and that never guesses abbreviations."""

    def __init__(self, **options):
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_config(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Gives a command `--config ADDRESS`, and with it overrides of its fields, which arrive as `args.overrides`.

    What comes in is meant for `mmkd_jax.config.load(args.config, args.overrides)`.
    """
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE.py[:ARGS]",
        help="config file, with arguments after a colon; --config.x.y=VALUE sets one of its fields",
    )
    parser.set_defaults(overrides=[])


def add_teachers(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Gives a command `--teacher NAME=WEIGHTS ...`, which may be repeated; `named_weights` reads what comes in."""
    parser.add_argument(
        "--teacher",
        nargs="+",
        action="extend",
        default=[],
        required=required,
        metavar="NAME=WEIGHTS",
        help="teachers and their weights; a name is that of a spec, or any where the weights describe themselves",
    )


def named_weights(entries: Sequence[str]) -> dict[str, str]:
    """Weights by teacher from entries NAME=WEIGHTS, in the order given.

    Raises:
      InputError: an entry is malformed, its name cannot be a folder's, or a name comes twice.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, _, weights = entry.partition("=")
        if not name or not weights:
            raise InputError(f"--teacher {entry!r} must be NAME=WEIGHTS")
        if "/" in name or name.startswith("."):
            raise InputError(f"--teacher {entry!r}: the name {name!r} cannot be the name of a folder")
        if name in found:
            raise InputError(f"--teacher {name} is given twice ({found[name]}, {weights}); give each its own name")
        found[name] = weights
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process if None.

    Returns:
      The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else ""
    who = f"mmkd {verb}" if verb in VERBS else "mmkd"
    verbose = "--verbose" in argv
    try:
        if verb in ("", "-h", "--help", "help"):
            print(_overview())
        elif verb == "--version":
            print(_version())
        else:
            _run(verb, argv[1:])
        sys.stdout.flush()
    except InputError as error:
        return _complain(who, error, verbose)
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `mmkd teachers list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            raise
        place = f" {error.filename}" if error.filename else ""
        return _complain(who, InputError(f"cannot write or read{place}: {error.strerror}"), verbose)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def load_command(verb: str) -> ModuleType:
    """The module of a verb.

    Raises:
      InputError: there is no such verb.
    """
    if verb not in VERBS:
        raise InputError(f"there is no command {verb!r}; {near(verb, VERBS)}")
    return importlib.import_module(f"mmkd_jax.commands.{verb}")


def parse(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parsed arguments of one command.

    Raises:
      InputError: an argument is unknown, missing or malformed, or the verb is.
    """
    command = load_command(verb)
    description = (command.__doc__ or command.HELP).strip()
    parser = _Parser(prog=f"mmkd {verb}", description=description)
    command.configure(parser)
    parser.add_argument("--verbose", action="store_true", help="show the libraries' log lines and full tracebacks")
    verbose, argv = "--verbose" in argv, [argument for argument in argv if argument != "--verbose"]
    overrides = [argument for argument in argv if _is_override(argument)]
    if overrides and parser.get_default("overrides") is None:
        raise InputError(f"mmkd {verb} takes no config fields; leave out {overrides[0]}")
    argv = [argument for argument in argv if not _is_override(argument)]
    _check_options(parser, argv)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise InputError(f"unexpected argument {unknown[0]!r} (see {parser.prog} --help)")
    if overrides:
        if not args.config:
            raise InputError(f"{overrides[0]} needs a config: --config FILE.py")
        args.overrides = overrides
    args.verbose = verbose  # wherever it stands, also behind a command's own verb
    return args


def _run(verb: str, argv: Sequence[str]) -> None:
    args = parse(verb, argv)
    with warnings.catch_warnings():
        _quieten(args.verbose)
        load_command(verb).run(args)


def _is_override(argument: str) -> bool:
    return re.match(r"--(no)?config\.", argument) is not None


def _check_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Refuses a misspelt option, before argparse complains of what is missing because of it."""
    known = _options(parser)
    for argument in argv[: argv.index("--") if "--" in argv else None]:
        option = argument.split("=")[0]
        if option.startswith("--") and option not in known:
            raise InputError(f"unknown option {option!r}; {near(option, known)}")


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser and of its sub-parsers."""
    known = set()
    for action in parser._actions:
        known.update(name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            known.update(*(_options(child) for child in action.choices.values()))
    return known


def _overview() -> str:
    """The page of `mmkd --help`: every verb with its one line."""
    rows = "\n".join(f"  {verb:<10} {load_command(verb).HELP}" for verb in VERBS)
    return (
        "mmkd: distil many biomedical CLIP teachers into one generalist student, in JAX\n\n"
        "usage: mmkd COMMAND [options]      mmkd COMMAND --help      mmkd --version\n\n"
        f"{rows}\n\n"
        "A first run that needs nothing else: mmkd demo --workdir runs/demo"
    )


def _version() -> str:
    from importlib import metadata

    def of(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "(not installed)"

    return f"mmkd-jax {of('mmkd-jax')}, jax {of('jax')}, flax {of('flax')}"


def _quieten(verbose: bool) -> None:
    """One line for each warning, and silence from chatty libraries unless asked for."""
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO if verbose else logging.WARNING)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    if not verbose:
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = lambda message, category, *rest, **_: print(f"warning: {message}", file=sys.stderr)


def _complain(who: str, error: InputError, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_WRONG_INPUT
