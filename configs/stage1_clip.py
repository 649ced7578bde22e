"""Stage 1: contrastive pretraining of the student on image-text pairs.

    mmkd train --config configs/stage1_clip.py --workdir RUN \
        --config.data.pairs=PAIRS --config.tokenizer=vocab.txt

The defaults are the settings of the released MMKD-CLIP code (arXiv 2506.22567; github.com/wangshansong1/MMKD-CLIP,
run_configs_400m.py, class b16_400m): ViT-B/16 QuickGELU at 224 px, BERT-base with 256 tokens, AdamW, 20 epochs. The
batch is not among what was released; 1024 is the base class's.

`recipe=biomedclip` is BiomedCLIP's instead (arXiv 2303.00915): timm's ViT-B/16 and PubMedBERT (`--config.towers.text`
names its weights) with 256 tokens, the softmax loss, 32 epochs at batch 4096. The towers are those of its published
weights. Schedule and batch were not checked against the paper's table of hyperparameters; do so before relying on them.

Arguments: `recipe=released|biomedclip`; `smoke` is a model for a CPU in seconds, `demo` the small student of
`mmkd demo`; `text=bert|clip` is the text tower: BERT as released, or CLIP's own, which `demo` takes unless told
otherwise.
"""

from ml_collections import ConfigDict

from mmkd_jax.config import parse_arg
from mmkd_jax.errors import InputError, near
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower

RECIPES = ("released", "biomedclip")
# Placements by name, first match wins: mesh axes of the leading dimensions. Stacked layers are never divided by layer;
# `fsdp` takes the width, `tensor` heads and hidden units. What no rule divides (norms, biases, positions) is small.
SHARDING = (
    ("layers/attention/qkv/kernel$", (None, "fsdp", None, "tensor")),  # [L, D, 3, H, Dh]
    ("layers/attention/qkv/bias$", (None, None, "tensor")),  # [L, 3, H, Dh]
    ("layers/attention/out/kernel$", (None, "tensor", None, "fsdp")),  # [L, H, Dh, D]
    ("layers/mlp/up/kernel$", (None, "fsdp", "tensor")),  # [L, D, M]
    ("layers/mlp/up/bias$", (None, "tensor")),  # [L, M]
    ("layers/mlp/down/kernel$", (None, "tensor", "fsdp")),  # [L, M, D]
    ("tokens/embedding$", (None, "fsdp")),  # [V, D]
    ("patch/kernel$", (None, None, None, None, "fsdp")),  # [1, p, p, 3, D]
    ("projection/(up/|down/)?kernel$", ("fsdp",)),  # [D, E], [D, M], [M, E]
    ("heads/.*kernel$", ("fsdp",)),  # [E, W], [E, 2E], [2E, W]
    (".*", ()),
)


def get_config(arg: str = "") -> ConfigDict:
    """See the file's docstring."""
    args = parse_arg(arg, recipe="released", smoke=False, demo=False, text="")
    if args.recipe not in RECIPES:
        raise InputError(f"unknown recipe {args.recipe!r}; {near(args.recipe, RECIPES)}")
    config = released()
    if args.recipe == "biomedclip":
        config.name, config.epochs, config.batch, config.optimizer.lr = "biomedclip", 32, 4096, 5e-4
    if args.smoke:
        shrink(config, size=32, patch=16, width=32, image_layers=2, text_layers=2, vocabulary=300, context=16)
        config.steps, config.batch, config.log_every, config.save_every = 4, 8, 1, 2
    if args.demo:
        # Chosen on held-out training pictures: from random weights and in few steps one layer learns more a second than
        # three, and CLIP's text tower more than BERT's (whose usual start is a pretrained one).
        shrink(config, size=64, patch=16, width=128, image_layers=1, text_layers=1, vocabulary=2048, context=24)
        config.steps, config.batch, config.log_every, config.save_every = 100, 128, 5, 50
        config.optimizer.lr = 3e-3
        config.data.window = 256  # some thousand pairs are shuffled whole: blocks of one set would come in bursts
        config.data.views.scale = (0.6, 1.0)
    text = args.text or ("clip" if args.demo else "bert")
    if text not in ("bert", "clip"):
        raise InputError(f"text={text}: the text tower is bert or clip")
    if args.recipe == "biomedclip":
        timm_image(config.model.image)
    if text == "clip":
        clip_text(config.model)
    return config


def released() -> ConfigDict:
    """The full-size student and every setting, as released where there is a choice."""
    config = ConfigDict()
    config.name = "stage1"
    config.task = "clip"
    config.seed = 0
    config.epochs = 20
    config.steps = 0  # 0: as many as the epochs make
    config.batch = 1024
    # Where the parameters start: the checkpoint of another run, else published weights of a tower, else fresh values.
    config.init = ""
    config.towers = ConfigDict({"image": "", "text": ""})  # weights files: CLIP's, timm's, a BERT's
    config.fresh = ("/projection/", "^sigmoid/")  # patterns of what may start fresh where that source lacks it
    config.model = ConfigDict(ModelSpec().to_dict())
    config.tokenizer = ""  # vocab.txt, tokenizer.json, or CLIP's merges
    config.dtype = "bfloat16"  # of the computation; parameters, similarities and losses are float32
    config.remat = "full"
    # The contrastive loss on the pairs: softmax (CLIP, as released) or sigmoid (SigLIP). The form of losses over the
    # global batch changes nothing but rounding: plain (XLA gathers what it needs), rows (a device's rows against all
    # columns at once) or ring (tiles that travel from device to device; none holds a row of the global batch).
    # `widths`: the loss is also that of the embeddings' first numbers, as many as these, so that they can be cut there.
    config.loss = ConfigDict({"task": "softmax", "form": "plain", "widths": ()})
    # Share of a picture's patches that the first `steps` steps leave out; the steps after them see whole pictures.
    config.patches = ConfigDict({"drop": 0.0, "steps": 0})
    # Micro-batches that a step is encoded in, one after another, by two passes; the step is exactly the same.
    config.accumulate = 1
    # Share that each update leaves of the running mean of the parameters, such as 0.999; the mean is what is evaluated,
    # exported and started from then. 0: none is kept.
    config.ema = 0.0

    config.data = ConfigDict()
    config.data.pairs = ""
    config.data.other_set = False  # True: go on in a run's folder though its data were others
    config.data.rows = "train"  # a row index of the pairs set; "" takes every row
    config.data.caption = "first"
    config.data.block = 256
    config.data.window = 16
    config.data.threads = 16
    config.data.views = ConfigDict(
        {"kind": "random_resized_crop", "scale": (0.9, 1.0), "ratio": (3 / 4, 4 / 3), "seed": 0}
    )

    config.optimizer = ConfigDict()
    config.optimizer.lr = 5e-5
    config.optimizer.warmup = 2000
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    config.optimizer.decay = 0.2
    config.optimizer.clip = 0.0  # largest gradient norm; 0: no clipping, as released

    run(config)
    return config


def run(config: ConfigDict) -> None:
    """How a run goes: spikes, placement on devices, logs and checkpoints."""
    # A step whose loss or gradient norm is so many times the running mean (0: any) is a spike, once `after` steps have
    # been made. Actions: with "skip" it and any that is not finite change nothing, more than `limit` in a row end the
    # run; with "rollback" the run goes on from its last regular checkpoint without the batches up to the spike, at most
    # `limit` times in all.
    config.spikes = ConfigDict({"action": "", "loss": 2.0, "grad_norm": 10.0, "after": 100, "limit": 10})

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1, "slices": 1})  # -1: what the others leave
    config.sharding = SHARDING
    config.unsharded = 0.05  # largest share of parameters that may stay whole on an fsdp mesh
    # The student is judged after every so many steps (0: never) on sets of a pairs set ("": the one trained on; its
    # test rows, or those of `split`, such as "val"): all sets or those named. A metric such as
    # eval/mean/zeroshot/balanced_accuracy can be `best`.
    config.evaluation = ConfigDict(
        {"every": 0, "pairs": "", "sets": (), "split": "", "tasks": ("zeroshot", "retrieval"), "prompts": "ensemble"}
    )
    config.wandb = ""  # a project to write metrics to as well
    config.log_every = 50
    config.save_every = 1000
    config.keep = 3  # of the checkpoints at multiples of save_every
    config.save_minutes = 30.0  # between temporary checkpoints, which go when there is a newer one; 0: none
    config.best = ""  # min:NAME or max:NAME of a reported scalar, whose best checkpoint stays too
    config.watchdog = 30.0  # minutes without a step after which the run ends with exit code 76; 0: never


def timm_image(image: ConfigDict) -> None:
    """timm's vision transformer at the same size: exact GELU, a patch bias, no LayerNorm before the blocks."""
    image.activation, image.norm_epsilon = "gelu", 1e-6
    image.pre_norm, image.patch_bias, image.layout = False, True, "timm"


def clip_text(model: ConfigDict) -> None:
    """CLIP's text tower at the same size: causal, end-of-text token, one projection matrix, byte pairs."""
    text = model.text
    text.kind, text.projection, text.norm_epsilon, text.dropout = "clip", "linear", 1e-5, 0.0
    text.activation = model.image.activation
    text.context = text.positions = min(text.context, 77)
    model.tokenizer.kind = "bpe"


def shrink(
    config: ConfigDict,
    *,
    size: int,
    patch: int,
    width: int,
    image_layers: int,
    text_layers: int,
    vocabulary: int,
    context: int,
) -> None:
    """The same student at a size that a CPU trains, with an optimiser for few steps."""
    spec = ModelSpec(
        image=ImageTower(
            width=width, layers=image_layers, heads=width // 32, patch=patch, image_size=size, mlp_width=4 * width
        ),
        text=TextTower(
            width=width,
            layers=text_layers,
            heads=width // 32,
            mlp_width=4 * width,
            vocab_size=vocabulary,
            positions=context,
            context=context,
            dropout=0.0,
        ),
        embed=width,
        preprocess=Preprocess(size=size),
    )
    config.model = ConfigDict(spec.to_dict())
    config.dtype, config.remat = "float32", "none"
    config.data.threads, config.data.block = 2, 64
    config.optimizer.lr, config.optimizer.warmup, config.optimizer.clip = 1e-3, 20, 1.0
    config.keep = 2
