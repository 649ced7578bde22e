"""`mmkd demo`: three specialists, what they know, and the students that learn from it.

    mmkd demo --workdir RUN                                      # embedded pictures, some minutes
    mmkd demo --workdir RUN --data DIR...                        # real WebDataset sets
    mmkd demo --workdir RUN --data DIR... --seeds 3              # the experiment, with --captions label|modality

Sets are known by the names of their folders, classes and captions by the sets themselves; nothing here says where data
lie. Choices (learning rates, weights, routing) were made on `dev`, a part of the training splits, before any test
split was looked at.

Arguments: `fast` (everything in seconds, to see that it runs), `experiment` (the longer run with its controls).
"""

from ml_collections import ConfigDict

from mmkd_jax.config import parse_arg

# Which modalities each specialist is trained on. What none of them knows (drawings, mixed figures) only students see.
SPECIALISTS = {
    "radiology": ("ct", "mri", "xray", "ultrasound", "mammography", "pet", "radiology"),
    "micro_path": ("histopathology", "microscopy", "cytology", "electron_microscopy"),
    "skin_eye_scope": ("dermoscopy", "fundus", "endoscopy", "photo", "oct", "skin"),
}
# Text tower of each: two architecture families, read back through the same converter.
FAMILIES = {"radiology": "clip", "micro_path": "bert", "skin_eye_scope": "clip"}


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, fast=False, experiment=False)
    config = ConfigDict()
    config.name = "experiment" if args.experiment else "fast" if args.fast else "demo"
    config.specialists = ConfigDict(SPECIALISTS)
    config.families = ConfigDict(FAMILIES)
    config.never_trained = ("nih_cxr",)  # sets that no teacher and no student sees in any training
    config.dev = 0.1  # part of the training splits (by group) that choices are made on
    config.max_side = 96  # px; pictures are stored at about the size that they are used at
    config.views = 2  # stored views of each picture
    config.vocabulary = 2048  # learned from the training captions
    config.bootstrap = 1000
    config.scored = ("odir_fundus", "ham10000", "busi", "lc25000_lung", "bccd_cells")  # those of them that are there
    config.beside = ("nih_cxr",)  # scored too, not in the mean
    # Students: steps in multiples of (stage 1, stage 2); where they start.
    config.students = ("clip_only", "public", "mean", "plus")
    if args.experiment:
        config.students = ("clip_only", "clip_only_3x", "public", "mean", "plus")
    config.steps = ConfigDict({"teacher": 150, "stage1": 50, "stage2": 150})
    if args.experiment:
        config.steps.teacher = 400
    # Overrides of configs/stage1_clip.py:demo and configs/stage2_mmkd.py:demo: for teachers and students, for teachers
    # (smaller patches: they see finer texture than the students, at twice the cost of a step), for stage 2.
    config.both = ()
    config.teacher = ("--config.model.image.patch=8",)
    config.stage2 = ()
    if args.fast:
        config.steps = ConfigDict({"teacher": 16, "stage1": 16, "stage2": 16})
        config.bootstrap = 200
        config.vocabulary = 1024
        config.both = (
            "--config.model.image.image_size=32",
            "--config.model.preprocess.size=32",
            "--config.model.text.vocab_size=1024",
            "--config.batch=48",
        )
    return config
