"""Diagnosis of slides: attention over tiles, and a probe on the mean tile; heat maps of what was attended to.

    mmkd eval --config configs/diagnosis.py --config.root=DIR --checkpoint RUN --teacher NAME=WEIGHTS --out OUT
    mmkd eval --config configs/diagnosis.py --config.root=DIR --config.features=DIR/features --out OUT
    mmkd eval --config configs/diagnosis.py:made --config.tiles=DATA/lc25000_lung --checkpoint RUN --out OUT

A table names slides, their patients, labels and splits. A slide is a folder of tiles, a file that OpenSlide reads, or
has its features in a file already. With the argument `made`, slides are put together from a labelled set of tiles: a
slide is positive where a few of its tiles show the class `positive`, and which they are is known, so that it can be
told whether attention finds them.
"""

from ml_collections import ConfigDict

from mmkd_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, made=False, smoke=False)
    config = ConfigDict()
    config.task = "diagnosis"
    config.name = "slides"
    config.root = ""  # folder of the table and, unless paths are absolute, of the slides
    config.table = "slides.csv"
    config.slide, config.patient, config.label, config.split = "slide", "patient", "label", "split"
    config.path = "slides/{slide}"  # of a slide, with its name
    config.classes = ()  # in order; (): those of the table, sorted
    config.truth = ""  # a table slide,x,y,positive of tiles whose diagnosis is known: x and y as in their places
    config.features = ""  # folder of features SLIDE.npy, float16 or float32 [tiles, width], instead of an encoder
    config.magnification, config.pixels = 20.0, 256  # of the tiles of whole-slide images
    config.models = ("attention", "probe")
    config.pictures = 4  # heat maps of tested slides, those of most different classes first
    config.heads = ConfigDict({"steps": 300, "batch": 16, "lr": 2e-3, "checkpoints": 3, "hidden": 64, "attention": 32,
                               "dropout": 0.25, "decay": 1e-2})  # fmt: skip
    # Slides made of tiles, WebDataset folder `tiles`: `negative` classes make up a slide, `positive` the few others.
    config.tiles = ""
    config.made = ConfigDict({"positive": "lung squamous cell carcinoma", "negative": ("benign lung tissue",
                              "lung adenocarcinoma"), "train": 120, "val": 40, "test": 80, "side": 5, "few": 2,
                              "seed": 0})  # fmt: skip
    if args.made:
        config.name = "made"
        config.truth = "tiles.csv"
    if args.smoke:
        config.made.train, config.made.val, config.made.test = 16, 8, 16
        config.heads.steps, config.heads.checkpoints = 30, 1
    return config
