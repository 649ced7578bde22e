"""What counts as a checkpoint: a folder that is whole.

A checkpoint counts once `commit_success.txt` lies in it, which is written last: a protocol that needs no rename, and
so is the same on local disks, mounted buckets and object stores.
"""

import contextlib
import os
from collections.abc import Iterator

from etils import epath

from mmkd_jax import io
from mmkd_jax.errors import InputError

FOLDER = "checkpoints"
COMMIT = "commit_success.txt"  # Orbax's name


class DamagedError(InputError):
    """A checkpoint that was committed cannot be read, or is not what was saved."""


def find(path: str | os.PathLike) -> epath.Path:
    """The folder of one checkpoint, from a run's folder (its latest), a `checkpoints` folder, or the folder itself.

    Raises:
      InputError: there is no committed checkpoint there.
    """
    path = io.as_path(path)
    if (path / COMMIT).exists():
        return path
    for folder in (path / FOLDER, path):
        if steps := committed(folder):
            return folder / str(steps[-1])
    raise InputError(f"{path} holds no checkpoint; give a run's folder, or a folder RUN/{FOLDER}/STEP")


def committed(folder: epath.Path) -> list[int]:
    """The steps whose checkpoints in `folder` are whole, in order."""
    steps = (int(child.name) for child in folder.iterdir() if child.name.isdigit()) if folder.is_dir() else ()
    return sorted(step for step in steps if (folder / str(step) / COMMIT).exists())


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Whatever fails while a committed checkpoint is read is told as one line that names it, and the one before."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the storage libraries raise nearly every kind
        step = int(folder.name) if folder.name.isdigit() else -1
        earlier = [other for other in committed(folder.parent) if other < step]
        advice = "there is none before it in its folder"
        if earlier:
            advice = f"the one before is {earlier[-1]}; a run goes on from there once {step} is moved out of the folder"
        raise DamagedError(f"checkpoint {folder} cannot be read ({one_line(error)}); {advice}") from error


def called(path: str | os.PathLike) -> str:
    """What to call a run, or one of its checkpoints: `RUN`, `RUN-STEP`."""
    folder = io.as_path(path)
    return f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == FOLDER else folder.name


def one_line(error: Exception, longest: int = 300) -> str:
    """An error in one line; storage libraries write pages, with the place at their head and the reason at their end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
