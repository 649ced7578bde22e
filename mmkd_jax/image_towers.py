"""Image towers as data: what the weights of a vision transformer, a ResNet or a Swin transformer do not tell."""

import dataclasses

from mmkd_jax.errors import InputError

ACTIVATIONS = ("gelu", "quick_gelu")  # exact (erf) GELU; x * sigmoid(1.702 x)
RESNETS = ("modified_resnet", "resnet")


def require(condition: bool, message: str) -> None:
    """InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)


@dataclasses.dataclass(frozen=True)
class ImageTower:
    """A vision transformer with a class token (OpenAI / open_clip, or timm's variant of it).

    `layout` names the published naming and structure of the weights: `openai` has a LayerNorm before the blocks and
    no patch bias; `timm` has neither the first LayerNorm nor a bare projection matrix, but a patch bias.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 16
    image_size: int = 224
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    pre_norm: bool = True
    patch_bias: bool = False
    layout: str = "openai"
    kind: str = "vit"

    def __post_init__(self):
        require(self.kind == "vit", f"a vision transformer of kind {self.kind!r}, not vit")
        require(self.layout in ("openai", "timm"), f"image layout {self.layout!r} is not one of openai, timm")
        require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is not one of {ACTIVATIONS}")
        require(self.width % self.heads == 0, f"image width {self.width} is not a multiple of {self.heads} heads")
        require(
            self.image_size % self.patch == 0,
            f"image size {self.image_size} is not a multiple of the patch size {self.patch}",
        )

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.layout} ViT /{self.patch}"


@dataclasses.dataclass(frozen=True)
class ResNetTower:
    """A ResNet of bottleneck blocks, with BatchNorm as at inference.

    `modified_resnet` is OpenAI's: a stem of three convolutions, average pools instead of strides, attention pooling
    with `heads` heads (which weights do not tell). `resnet` is the plain one, average-pooled, and has no heads.
    `stages` counts the blocks of each stage; `width` is that of the first stage's inner convolutions.
    """

    kind: str = "modified_resnet"
    width: int = 64
    stages: tuple[int, ...] = (3, 4, 6, 3)
    heads: int = 32
    image_size: int = 224
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        require(self.kind in RESNETS, f"ResNet kind {self.kind!r} is not one of {', '.join(RESNETS)}")
        require(min(self.stages, default=0) > 0, f"stages {self.stages}: each needs at least one block")
        if self.kind == "resnet":
            require(self.heads == 0, f"a plain ResNet pools by an average and has no heads, not {self.heads}")
            return
        require(
            self.heads > 0 and self.features % self.heads == 0,
            f"{self.features} features of the ResNet are not a multiple of {self.heads} heads",
        )
        require(
            self.image_size % self.stride == 0,
            f"image size {self.image_size} is not a multiple of the ResNet's stride {self.stride}",
        )

    @property
    def features(self) -> int:
        """Width after the last stage: 2048 for a ResNet-50."""
        return self.width * 2 ** (len(self.stages) + 1)

    @property
    def stride(self) -> int:
        """Pixels a cell of the last stage: 32 for four stages."""
        return 2 ** (len(self.stages) + 1)

    @property
    def layout(self) -> str:
        """The published naming follows from the kind."""
        return self.kind

    @property
    def title(self) -> str:
        """For people."""
        pool = "average pool" if self.kind == "resnet" else f"attention pool ({self.heads} heads)"
        return f"ResNet-{3 * sum(self.stages) + 2}, {pool}"


@dataclasses.dataclass(frozen=True)
class SwinTower:
    """A Swin transformer, average-pooled.

    `stages` counts the blocks of each stage, every second one with shifted windows; `width` and `heads` are those of
    the first stage and double from stage to stage. `window` is in tokens, `mlp_ratio` the MLP's width over the stage's.
    """

    kind: str = "swin"
    width: int = 96
    stages: tuple[int, ...] = (2, 2, 6, 2)
    heads: int = 3
    window: int = 7
    patch: int = 4
    image_size: int = 224
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        require(self.kind == "swin", f"a Swin transformer of kind {self.kind!r}, not swin")
        require(self.activation in ACTIVATIONS, f"activation {self.activation!r} is not one of {ACTIVATIONS}")
        require(self.width % self.heads == 0, f"image width {self.width} is not a multiple of {self.heads} heads")
        require(
            len(self.stages) > 0 and all(depth > 0 and depth % 2 == 0 for depth in self.stages),
            f"stages {self.stages}: blocks come in pairs, without and with shifted windows",
        )
        step = self.patch * self.window * 2 ** (len(self.stages) - 1)
        require(
            self.image_size % step == 0,
            f"image size {self.image_size} is not a multiple of {step}, which whole windows in every stage take",
        )

    @property
    def features(self) -> int:
        """Width of the last stage: 768 for Swin-T."""
        return self.width * 2 ** (len(self.stages) - 1)

    @property
    def layout(self) -> str:
        """The published naming follows from the kind."""
        return self.kind

    @property
    def title(self) -> str:
        """For people."""
        return f"Swin /{self.patch}, stages {'-'.join(map(str, self.stages))}"


IMAGE_TOWERS = {"vit": ImageTower, "modified_resnet": ResNetTower, "resnet": ResNetTower, "swin": SwinTower}
