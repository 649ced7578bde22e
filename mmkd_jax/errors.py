"""The one exception that a user can cause, and the exit codes of the command line."""

EXIT_WRONG_INPUT = 2
EXIT_PREEMPTED = 75
EXIT_WATCHDOG = 76


class InputError(Exception):
    """Wrong input: one line that says what is wrong and what to do about it.

    The command line prints it without a traceback and leaves with exit code 2.
    """


def near(name: str, known, n: int = 3) -> str:
    """Text that names the entries of `known` closest to `name` ("did you mean ..."), or lists them all."""
    import difflib

    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=n, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else "none are known"
