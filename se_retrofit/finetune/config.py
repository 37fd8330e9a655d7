"""The recipe of a fine-tune, as plain data."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import RetrofitError, brief
from ..plaindata import parse_yaml

__all__ = ["FinetuneConfig"]


@dataclass(frozen=True)
class FinetuneConfig:
    """All that decides how a network is fine-tuned. ``docs/finetuning.md`` gives the reason of each default.

    Args:
        epochs: passes over the training data.
        batch_size: images a step and process.
        grad_accum_steps: batches whose gradients are added up before the weights change.
        optimizer: any name that timm's optimizer factory knows.
        lr: learning rate at its peak.
        se_lr_scale: multiplies ``lr`` for the SE modules, whose layers with more than 16 inputs have it times 16 / inputs.
        head_lr_scale: multiplies ``lr`` for the classifier.
        layer_decay: multiplies ``lr`` once more for each layer further from the head, so that early layers change less; None
            for the same everywhere.
        weight_decay: for weights; norms and biases get none.
        momentum: of optimizers that have one.
        optimizer_options: further arguments of the optimizer.
        clip_grad: the gradient's norm is clipped to this; None for no clipping.
        schedule: any name that timm's scheduler factory knows.
        warmup_ratio: part of the run in which the learning rate rises from a hundredth of ``lr``.
        min_lr: where the schedule ends.
        schedule_options: further arguments of timm's ``create_scheduler_v2``.
        trainable: what is trained: ``"all"``, ``"se"`` or ``"se+head"``.
        unfreeze_epoch: the first epoch (counted from 1) in which all is trained, whatever ``trainable`` says.
        freeze_bn: leave the running statistics of the norms as they are.
        num_classes: give the network a new head for so many classes, where it has another number, or where it was fine-tuned
            on classes of other names; None keeps the head.
        multi_label: an image may have several classes: its target is a vector of 0 and 1, one for each class.
        criterion: the loss: ``"cross_entropy"``, ``"bce"`` (binary cross-entropy of each class) or ``"focal"``.
        class_weights: ``"balanced"`` weighs the rare classes higher in the loss, by the training data; None for equally.
        focal_gamma: how much less the focal loss counts what is classified well already.
        distillation_weight: the teacher's part in the loss, where ``finetune`` is given one.
        distillation_temperature: by which the logits of both are divided.
        sampling: ``"shuffle"`` shows each image once an epoch; ``"balanced"`` draws as many images, each class as often
            as the others.
        best_metric: by which the best epoch is chosen: ``"accuracy"``, ``"loss"``, ``"top5"``, ``"precision"``,
            ``"recall"``, ``"f1"`` (the last three averaged over the classes) or, with ``multi_label``, ``"map"``.
        label_smoothing: in [0, 1).
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        drop_path: highest rate of stochastic depth, rising linearly over the blocks; None leaves the network's own.
        image_size: height and width of the images; None for the model's own.
        crop_scale: smallest part of an image's area that a random crop shows.
        hflip: probability of a horizontal flip.
        color_jitter: strength of timm's colour jitter.
        auto_augment: a policy of timm's, such as ``"rand-m9-mstd0.5"``.
        random_erasing: probability that a rectangle is erased.
        bad_images: what to do with an image that can't be read: ``"error"`` or ``"skip"`` (it is named either way).
        ema_decay: keep an exponential moving average of the weights, evaluate it and return it; None for none.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"auto"``: on CUDA bf16 where the GPU has it, else fp16;
            fp32 elsewhere.
        tf32: let float32 products on CUDA use TF32.
        channels_last: memory format NHWC; None for: on CUDA.
        compile: train through ``torch.compile``, with SE and the norm before it fused (``fuse_se``).
        grad_checkpointing: compute activations once more in the backward pass instead of keeping them, by timm's own
            ``set_grad_checkpointing``: less memory, about a third more time.
        find_unused_parameters: let several processes train a network of which a step may leave parameters unused.
        cpu: stay on the CPU.
        workers: processes that load data; None for as many as the CPU has cores, at most 8, and none for tensors that
            are in memory already.
        seed: random seed.
        patience: stop when so many epochs in a row brought no better validation accuracy; None for never.
        checkpoint_minutes: at least so often is a checkpoint written within an epoch; 0 for at every log line.
        log_every: updates between two looks at the loss (each look waits for the GPU).
        trackers: of Accelerate's, such as ``("tensorboard", "wandb")``.

    Raises:
        RetrofitError: a value is out of range.
        TypeError: a value is of the wrong type.

    Example:
        >>> from se_retrofit.finetune import FinetuneConfig
        >>> config = FinetuneConfig(epochs=5, trainable="se+head", unfreeze_epoch=3)
        >>> FinetuneConfig.from_yaml(config.to_yaml()) == config
        True
    """

    epochs: int = 20
    batch_size: int = 64
    grad_accum_steps: int = 1
    optimizer: str = "adamw"
    lr: float = 2e-4
    se_lr_scale: float = 1.0
    head_lr_scale: float = 5.0
    layer_decay: float | None = None
    weight_decay: float = 0.05
    momentum: float = 0.9
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = 1.0
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    min_lr: float = 0.0
    schedule_options: dict[str, Any] = field(default_factory=dict)
    trainable: str = "all"
    unfreeze_epoch: int | None = None
    freeze_bn: bool = False
    num_classes: int | None = None
    multi_label: bool = False
    criterion: str = "cross_entropy"
    class_weights: str | None = None
    focal_gamma: float = 2.0
    distillation_weight: float = 0.5
    distillation_temperature: float = 4.0
    sampling: str = "shuffle"
    best_metric: str = "accuracy"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_path: float | None = None
    image_size: int | None = None
    crop_scale: float = 0.35
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    bad_images: str = "error"
    ema_decay: float | None = None
    precision: str = "auto"
    tf32: bool = True
    channels_last: bool | None = None
    compile: bool = False
    grad_checkpointing: bool = False
    find_unused_parameters: bool = False
    cpu: bool = False
    workers: int | None = None
    seed: int = 0
    patience: int | None = None
    checkpoint_minutes: float = 10.0
    log_every: int = 10
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _typed(f.name, str(f.type), getattr(self, f.name)))
        for name, (holds, expected) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise RetrofitError(f"{name} must be {expected}, got {brief(value)}")
        if self.unfreeze_epoch is not None and self.trainable == "all":
            raise RetrofitError(
                f'unfreeze_epoch={self.unfreeze_epoch} needs trainable="se" or "se+head": "all" freezes nothing'
            )
        self._check_labels()
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise RetrofitError(
                f"mixup and cutmix pair the images of a batch: batch_size must be even, got {self.batch_size}"
            )

    def _check_labels(self) -> None:
        if self.multi_label and self.criterion == "cross_entropy":
            raise RetrofitError(
                'multi_label=True needs criterion="bce" or "focal": cross-entropy is for one class an image'
            )
        if self.multi_label and (self.mixup or self.cutmix or self.sampling == "balanced"):
            raise RetrofitError('mixup, cutmix and sampling="balanced" need one class an image, not multi_label=True')
        if self.class_weights and (self.criterion == "bce") != self.multi_label:
            raise RetrofitError(
                'class_weights go with criterion="bce" where multi_label=True, and with "cross_entropy" and "focal" '
                f"elsewhere; got criterion={self.criterion!r}, multi_label={self.multi_label}"
            )
        if self.best_metric == "top5" and self.multi_label:
            raise RetrofitError(
                'best_metric="top5" is for one class an image; with multi_label=True take "map" or "f1"'
            )
        if self.best_metric == "map" and not self.multi_label:
            raise RetrofitError(
                'best_metric="map" needs multi_label=True; for one class an image take "f1" or "recall"'
            )

    def replace(self, **changes: Any) -> FinetuneConfig:
        """A config like this one, but for ``changes``."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, fit for YAML and JSON."""
        return {**dataclasses.asdict(self), "trackers": list(self.trackers)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FinetuneConfig:
        """The recipe from plain data; what is not given has its default.

        Raises:
            RetrofitError: a field is unknown (the message names close ones) or out of range.
            TypeError: a value is of the wrong type.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=2)
                hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(known)}"
                raise RetrofitError(f"a fine-tune's config has no field {name!r}{hint}")
        return cls(**data)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML, written to ``path`` too where one is given."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> FinetuneConfig:
        """The recipe from a YAML file (a ``Path``, or a string in one line) or from YAML text.

        Raises:
            RetrofitError: the file is missing, is no YAML, or holds unknown fields or bad values.
        """
        is_path = isinstance(source, Path) or ("\n" not in source and ":" not in source[2:])
        try:
            text = Path(source).read_text(encoding="utf-8") if is_path else str(source)
        except FileNotFoundError as error:
            raise RetrofitError(f"no config file {source}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise RetrofitError(f"{source} can't be read: {error}") from error
        where = source if is_path else "the config"
        data = parse_yaml(text, where)
        if data is None:
            data = {}
        if not isinstance(data, dict):
            raise RetrofitError(f"{where} must hold 'field: value' lines, got {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except (RetrofitError, TypeError) as error:
            raise RetrofitError(f"{where}: {error}") from error


def _one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in values), "one of " + ", ".join(map(repr, values))


AT_LEAST_1 = (
    "epochs", "batch_size", "grad_accum_steps", "unfreeze_epoch", "num_classes", "image_size", "patience", "log_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "se_lr_scale", "head_lr_scale", "weight_decay", "momentum", "min_lr", "mixup", "cutmix", "color_jitter", "workers",
    "seed", "checkpoint_minutes", "focal_gamma",
)  # fmt: skip
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{name: (lambda v: v >= 1, "at least 1") for name in AT_LEAST_1},
    **{name: (lambda v: v > 0, "above 0") for name in ("lr", "clip_grad", "distillation_temperature")},
    **{name: (lambda v: v >= 0, "0 or more") for name in NOT_NEGATIVE},
    **{name: (lambda v: 0 <= v < 1, "at least 0 and below 1") for name in ("warmup_ratio", "label_smoothing", "drop_path")},
    **{name: (lambda v: 0 <= v <= 1, "in [0, 1]") for name in ("hflip", "random_erasing", "distillation_weight")},
    **{name: (lambda v: 0 < v <= 1, "above 0 and at most 1") for name in ("crop_scale", "layer_decay")},
    "ema_decay": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "trainable": _one_of("all", "se", "se+head"),
    "bad_images": _one_of("error", "skip"),
    "criterion": _one_of("cross_entropy", "bce", "focal"),
    "class_weights": _one_of("balanced"),
    "sampling": _one_of("shuffle", "balanced"),
    "best_metric": _one_of("accuracy", "loss", "top5", "precision", "recall", "f1", "map"),
    "precision": _one_of("auto", "fp32", "bf16", "fp16"),
}  # fmt: skip


def _typed(name: str, annotation: str, value: Any) -> Any:
    """``value`` if it is of the annotated type, with the harmless conversions made; else a TypeError."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None and "None" in kinds:
        return None
    kind = kinds[0].split("[")[0]
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
        return value
    if kind == "float":
        # YAML reads 1e-4 (without a point) as text
        with contextlib.suppress(OverflowError, ValueError):
            if not isinstance(value, bool) and isinstance(value, (int, float, str)) and math.isfinite(float(value)):
                return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "dict" and isinstance(value, dict):
        return dict(value)
    if kind == "tuple" and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise TypeError(f"{name} must be {annotation}, got {brief(value)} of type {type(value).__name__}")
