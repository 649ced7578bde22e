"""`mmkd encode`: embeddings of pictures and texts from a trained student, as one .npz file.

Folders are searched for pictures. A file given with --texts has one text a line. The result holds `image`
float32 [n, embed] with `image_path`, and `text` float32 [m, embed] with `text_line`, all rows of unit length.
"""

import argparse

HELP = "write embeddings of pictures and texts from a checkpoint"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder or one of its checkpoints")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="pictures, or folders of pictures")
    parser.add_argument("--texts", nargs="+", default=[], metavar="TEXT|FILE", help="texts, or .txt files, one a line")
    parser.add_argument("--out", required=True, metavar="FILE.npz", help="where to write")


def run(args: argparse.Namespace) -> None:
    """Encodes and writes."""
    import io as memory

    import numpy as np

    import mmkd_jax
    from mmkd_jax import io
    from mmkd_jax.errors import InputError

    paths = [path for place in args.images for path in pictures(place)]
    texts = [line for text in args.texts for line in lines(text)]
    if not paths and not texts:
        raise InputError("nothing to encode: give --images or --texts")
    out = io.as_path(args.out)
    if out.exists():
        raise InputError(f"{out} exists; choose another --out")
    student = mmkd_jax.load(args.checkpoint)
    arrays = {}
    if paths:
        arrays.update(image=student.encode_image(paths), image_path=np.array(paths))
    if texts:
        arrays.update(text=student.encode_text(texts), text_line=np.array(texts))
    buffer = memory.BytesIO()
    np.savez(buffer, **arrays)
    io.write_bytes(out, buffer.getvalue())
    print(f"{len(paths)} pictures and {len(texts)} texts -> {out}")


def pictures(place: str) -> list[str]:
    """A picture, or all pictures below a folder in order of name, hidden ones left out."""
    import os

    from mmkd_jax import io
    from mmkd_jax.errors import InputError

    path = io.as_path(place)
    if not path.is_dir():
        return [os.fspath(path)]
    found = sorted(os.fspath(child) for child in _below(path) if child.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{path} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def _below(folder):
    """All files below a folder; epath has no recursive glob, as it costs a call a folder on an object store."""
    for child in folder.iterdir():
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _below(child)
        else:
            yield child


def lines(text: str) -> list[str]:
    """A text, or the lines of a .txt file that are not empty."""
    from mmkd_jax import io
    from mmkd_jax.errors import InputError

    if not text.endswith(".txt"):
        return [text]
    path = io.as_path(text)
    if not path.exists():
        raise InputError(f"there is no text file {path}")
    return [line for line in path.read_text().splitlines() if line.strip()]
