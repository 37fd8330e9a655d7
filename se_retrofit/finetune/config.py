"""The recipe of a fine-tune, as plain data."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from ..errors import RetrofitError, brief
from ..plaindata import parse_yaml, read_yaml

# YAML reads 1e-4 (without a point) as text
Number = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML and JSON have lists in place of tuples


class FinetuneConfig(BaseModel):
    """The recipe of a fine-tune: every setting that decides how a network is trained. The defaults are common values
    for fine-tuning a pretrained convolutional network, not the result of a search; ``docs/finetuning.md`` has recipes.

    Raises:
        RetrofitError: If a field is unknown (the message names close ones), or a value is not in range or of its type.

    Example:
        >>> from se_retrofit.finetune import FinetuneConfig
        >>> config = FinetuneConfig(epochs=5, trainable="se+head", unfreeze_epoch=3)
        >>> FinetuneConfig.from_yaml(config.to_yaml()) == config
        True
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    epochs: Count = 20
    """Number of passes over the training data."""
    max_updates: Count | None = None
    """Stop after this many updates, even within an epoch: a few for a dry run. The schedule spans the shortened run."""
    batch_size: Count = 64
    """Images per batch and process."""
    grad_accum_steps: Count = 1
    """Number of batches whose gradients are accumulated for each update."""
    optimizer: str = "adamw"
    """Any optimizer that timm's factory knows. Norms and biases get no weight decay."""
    optimizer_options: dict[str, Any] = {}
    """Additional arguments for the optimizer, such as `{"betas": [0.9, 0.95]}`."""
    lr: Positive = 2e-4
    """Peak learning rate. The default is low because the weights are already good; from scratch, use 1e-3."""
    se_lr_scale: NotNegative = 1.0
    """Factor on the rate of SE modules, whose layers learn at `16 * lr / inputs`, at most `max(lr, 0.01) / inputs`."""
    head_lr_scale: NotNegative = 5.0
    """Factor on `lr` for the classifier, which most fine-tunes train from scratch; use 1 if it is kept."""
    layer_decay: Annotated[Positive, Field(le=1)] | None = None
    """Factor on `lr` for each layer further from the head: 0.7 to 0.9 for few images."""
    weight_decay: NotNegative = 0.05
    """Weight decay, applied to weights only."""
    clip_grad: Positive | None = 1.0
    """Maximum norm of the gradient; none disables clipping."""
    schedule: str = "cosine"
    """Any learning-rate schedule that timm's factory knows, except `plateau`."""
    schedule_options: dict[str, Any] = {}
    """Additional arguments for timm's `create_scheduler_v2`, such as `{"min_lr": 1e-6}`."""
    warmup_ratio: BelowOne = 0.05
    """Fraction of the run during which the learning rate rises from a hundredth of `lr`."""
    trainable: Literal["all", "se", "se+head", "norms+head", "head"] = "all"
    """What to train (of norms, scales and shifts). The rest stays the same bit for bit, running statistics included."""
    unfreeze_epoch: Count | None = None
    """First epoch (counting from 1) in which everything is trained, whatever `trainable` says."""
    freeze_bn: bool = False
    """Do not update the norms' running statistics: for batches of fewer than about 16 images."""
    num_classes: Count | None = None
    """Number of classes. The head is replaced if it has another number or other class names; none keeps the head."""
    multi_label: bool = False
    """Allow several classes per image: each target is a vector of zeros and ones."""
    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """Loss function; `bce` is the binary cross-entropy of each class."""
    balance: Literal["loss", "sampling"] | None = None
    """Give rare classes more weight in the loss, or sample them as often as the others."""
    label_smoothing: BelowOne = 0.1
    """Label smoothing of the training loss."""
    mixup: NotNegative = 0.0
    """Alpha of mixup, for long runs; 0 disables it."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix, for long runs; 0 disables it."""
    image_size: Count | None = None
    """Height and width of the images; by default, the network's own."""
    transform_options: dict[str, Any] = {}
    """Arguments for timm's `create_transform` in training, merged into the defaults `{"scale": [0.35, 1.0], "hflip":
    0.5, "color_jitter": 0.0}`."""
    keys: Names = ()
    """Keys of image and class in items that are dicts; common ones, such as `image` and `label`, are recognised."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do with an image that can't be read; the image is reported either way."""
    best_metric: Literal["accuracy", "loss", "top5", "precision", "recall", "f1", "map"] = "accuracy"
    """Metric that selects the best epoch; precision, recall and F1 are means over the classes."""
    patience: Count | None = None
    """Stop after this many epochs in a row without a better `best_metric`."""
    ema_decay: Annotated[Positive, Field(lt=1)] | None = None
    """Evaluate and return a moving average of the weights with this decay: 0.9998 for tens of thousands of updates."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 on CUDA GPUs that have it, fp16 on others, and fp32 elsewhere. All but `fp32` allow TF32."""
    compile: bool = False
    """Train with `torch.compile`, and with each SE module fused with the norm before it."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them, with timm's `set_grad_checkpointing`."""
    find_unused_parameters: bool = False
    """Let several processes train a network that leaves parameters unused in a step; costs a pass over the graph."""
    cpu: bool = False
    """Run on the CPU even if there is a GPU."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Number of data-loading processes; by default one per core, at most 8, and 0 for tensors in memory."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random in a run."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between checkpoints within an epoch; 0 writes one whenever the loss is logged."""
    log_every: Count = 10
    """Log the loss every this many updates, which waits for the GPU."""
    trackers: Names = ()
    """Trackers of Accelerate, such as `["tensorboard", "wandb"]`."""

    if not TYPE_CHECKING:  # where the fields are the arguments

        def __init__(self, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise RetrofitError("; ".join(map(_told, error.errors()))) from None

    @model_validator(mode="after")
    def _agree(self) -> FinetuneConfig:
        mixes = bool(self.mixup or self.cutmix)
        contradictions = {
            f'unfreeze_epoch={self.unfreeze_epoch} needs another trainable than "all", which freezes nothing': (
                self.unfreeze_epoch is not None and self.trainable == "all"
            ),
            f"mixup and cutmix pair the images of a batch: batch_size must be even, got {self.batch_size}": (
                mixes and self.batch_size % 2
            ),
            'multi_label=True needs loss="bce" or "focal": cross-entropy is for one class per image': (
                self.multi_label and self.loss == "cross_entropy"
            ),
            'mixup, cutmix and balance="sampling" need one class per image, not multi_label=True': (
                self.multi_label and (mixes or self.balance == "sampling")
            ),
            'balance="loss" goes with loss="bce" where multi_label=True, and with "cross_entropy" and "focal" elsewhere': (
                self.balance == "loss" and (self.loss == "bce") != self.multi_label
            ),
            f"keys must be that of the image and that of the class, got {list(self.keys)}": len(self.keys)
            not in (0, 2),
            'best_metric="top5" is for one class per image; with multi_label=True use "map" or "f1"': (
                self.best_metric == "top5" and self.multi_label
            ),
            'best_metric="map" needs multi_label=True; for one class per image use "f1" or "recall"': (
                self.best_metric == "map" and not self.multi_label
            ),
        }
        for said, holds in contradictions.items():
            if holds:
                raise ValueError(said)
        return self

    def replace(self, **changes: Any) -> FinetuneConfig:
        """Return a copy of this config with ``changes`` applied."""
        return FinetuneConfig(**{**self.model_dump(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data that YAML and JSON can hold."""
        try:
            return self.model_dump(mode="json")
        except PydanticSerializationError as error:
            raise RetrofitError(f"options in the config must be numbers, text, lists and dicts: {error}") from error

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the recipe as YAML, and also write it to ``path`` if one is given."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> FinetuneConfig:
        """Read a recipe from a YAML file (a ``Path`` or a one-line string) or from YAML text.

        Raises:
            RetrofitError: If the file is missing, is not valid YAML, or has unknown fields or bad values.
        """
        is_path = isinstance(source, Path) or ("\n" not in source and ":" not in source[2:])
        where = source if is_path else "the config"
        data = (read_yaml(Path(source)) if is_path else parse_yaml(str(source), where)) or {}
        if not isinstance(data, dict):
            raise RetrofitError(f"{where} must hold 'field: value' lines, got {type(data).__name__}")
        try:
            return cls(**{str(name): value for name, value in data.items()})
        except RetrofitError as error:
            raise RetrofitError(f"{where}: {error}") from error


def _told(error: Any) -> str:
    """One of pydantic's errors as a sentence."""
    said = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # of several fields together
        return str(said)
    name = str(error["loc"][0])
    if error["type"] != "extra_forbidden":
        return f"{name}: {said}, got {brief(error['input'])}"
    close = difflib.get_close_matches(name, FinetuneConfig.model_fields, n=2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(FinetuneConfig.model_fields)}"
    return f"a fine-tune's config has no field {name!r}; {hint}"
