"""What a dataset stands for until a flag says otherwise (method section 4), and how flags and preset make a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import (
    MASKS,
    BadImages,
    ConfigError,
    DataConfig,
    DatasetName,
    JudgeName,
    JudgeStatistics,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
    Precision,
    RunConfig,
    TrainConfig,
    TransformName,
)

HOLE_RATIO = 0.35
MASK_RATIO = 0.7
NOISE_STD = 0.1
POOLED_LATENT = 128
SIGREG_WEIGHT = 0.03
SLICES = 256
BATCH_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One dataset's row. `pooled_*` takes the place of its namesake when the latent is pooled.

    Attributes:
        pooled_judge_statistics: for crop-resize. A pooled judge hardly sees contrast with own ones, and at 32 px
            training stalls (docs/results.md); CelebA's are the author's.
    """

    size: int
    channels: int
    hidden: int
    map_channels: int
    pooled_map_channels: int
    crop_ratio: float
    lr: float
    pooled_lr: float
    pooled_judge_statistics: JudgeStatistics = "own"
    steps: int | None = None
    epochs: int | None = None


PRESETS: dict[str, Preset] = {
    # the method's toy is 28 px, which the model's stride of 8 does not divide
    "shapes": Preset(
        size=32, channels=1, hidden=32, map_channels=16, pooled_map_channels=32,
        crop_ratio=0.3, lr=1e-3, pooled_lr=1e-3, pooled_judge_statistics="target", steps=400,
    ),
    # pooled, the rate of docs/results/small.md
    "cifar10": Preset(
        size=32, channels=3, hidden=64, map_channels=32, pooled_map_channels=64,
        crop_ratio=0.3, lr=1e-4, pooled_lr=3e-4, pooled_judge_statistics="target", epochs=50,
    ),
    "celeba": Preset(
        size=128, channels=3, hidden=128, map_channels=32, pooled_map_channels=128,
        crop_ratio=0.15, lr=1e-4, pooled_lr=1e-3, epochs=50,
    ),
    # folders below SMALL px take the CIFAR-10 model, at a rate that reaches 24 dB in 2,000 steps
    "small folder": Preset(
        size=32, channels=3, hidden=64, map_channels=32, pooled_map_channels=64,
        crop_ratio=0.3, lr=1e-3, pooled_lr=3e-4, pooled_judge_statistics="target", epochs=50,
    ),
    "folder": Preset(
        size=128, channels=3, hidden=128, map_channels=32, pooled_map_channels=128,
        crop_ratio=0.15, lr=1e-4, pooled_lr=1e-3, epochs=50,
    ),
}  # fmt: skip
SMALL = 64


def make_config(
    dataset: DatasetName,
    *,
    data: str | Path | None = None,
    size: int | None = None,
    latent: int | None = None,
    masked: bool = False,
    objective: ObjectiveName = "self-teaching",
    judge: JudgeName | None = None,
    judge_statistics: JudgeStatistics | None = None,
    transform: TransformName | None = None,
    crop_ratio: float | None = None,
    crop_ratio_max: float | None = None,
    crops: int = 1,
    mask_ratio: float | None = None,
    noise_std: float | None = None,
    sigreg_weight: float | None = None,
    slices: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    precision: Precision = "fp32",
    bad_images: BadImages = "error",
) -> RunConfig:
    """The run that a dataset's preset and these overrides describe; None leaves the preset's value.

    Args:
        dataset: picks the preset.
        data: where the images are; not for shapes.
        size: of the images, pixels, divisible by 8.
        latent: features of a pooled latent. None is the preset's spatial latent, or 128 when `masked`.
        masked: cut a hole into the input; `mask_ratio` is then the hole's share.
        (the rest): as in `ObjectiveConfig`, `TrainConfig` and `DataConfig`.

    Raises:
        ConfigError: a value out of range, or one that would have no effect.
    """
    preset = PRESETS["small folder" if dataset == "folder" and size is not None and size < SMALL else dataset]
    if masked and latent is None:
        latent = POOLED_LATENT
    pooled = latent is not None
    if steps is None and epochs is None:
        steps, epochs = preset.steps, preset.epochs
    if dataset == "shapes" and data is not None:
        raise ConfigError(
            "--data has no effect with shapes, which are made on the fly; use `folder` for your own images"
        )
    return RunConfig(
        model=ModelConfig(
            size=preset.size if size is None else size,
            channels=preset.channels,
            hidden=preset.hidden,
            map_channels=preset.pooled_map_channels if pooled else preset.map_channels,
            latent=latent,
        ),
        objective=_objective(
            objective,
            masked,
            judge,
            judge_statistics,
            transform,
            crop_ratio,
            crop_ratio_max,
            crops,
            mask_ratio,
            noise_std,
            sigreg_weight,
            slices,
            preset,
            pooled,
        ),
        data=DataConfig(
            dataset=dataset,
            root=None if data is None else str(Path(data).expanduser().absolute()),
            size=preset.size if size is None else size,
            channels=preset.channels,
            bad_images=bad_images,
        ),
        train=TrainConfig(
            steps=steps,
            epochs=epochs,
            batch_size=BATCH_SIZE if batch_size is None else batch_size,
            lr=(preset.pooled_lr if pooled else preset.lr) if lr is None else lr,
            seed=seed,
            precision=precision,
        ),
    )


def _objective(
    name: ObjectiveName,
    masked: bool,
    judge: JudgeName | None,
    judge_statistics: JudgeStatistics | None,
    transform: TransformName | None,
    crop_ratio: float | None,
    crop_ratio_max: float | None,
    crops: int,
    mask_ratio: float | None,
    noise_std: float | None,
    sigreg_weight: float | None,
    slices: int | None,
    preset: Preset,
    pooled: bool,
) -> ObjectiveConfig:
    teaching = name == "self-teaching"
    if teaching and transform is None:
        transform = "crop-resize"
    if judge_statistics is None:
        judge_statistics = preset.pooled_judge_statistics if pooled and transform == "crop-resize" else "own"
    hole_ratio = None
    if masked:
        if transform in MASKS:
            raise ConfigError(
                f"--transform {transform} cannot be with --masked: --mask-ratio is the hole's share there"
            )
        hole_ratio, mask_ratio = (HOLE_RATIO if mask_ratio is None else mask_ratio), None

    def default(given: float | None, value: float, used: bool) -> float | None:
        return value if used and given is None else given

    return ObjectiveConfig(
        name=name,
        hole_ratio=hole_ratio,
        judge="step-frozen" if teaching and judge is None else judge,
        judge_statistics=judge_statistics,
        transform=transform,
        crop_ratio=default(crop_ratio, preset.crop_ratio, transform == "crop-resize"),
        crop_ratio_max=crop_ratio_max,
        crops=crops,
        mask_ratio=default(mask_ratio, MASK_RATIO, transform in MASKS),
        noise_std=default(noise_std, NOISE_STD, transform == "noise"),
        sigreg_weight=default(sigreg_weight, SIGREG_WEIGHT, teaching),
        slices=SLICES if teaching and slices is None else slices,
    )
