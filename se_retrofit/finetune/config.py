"""The recipe of a fine-tune, as plain data."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..errors import RetrofitError, brief
from ..plaindata import parse_yaml

__all__ = ["FinetuneConfig"]

# YAML reads 1e-4 (without a point) as text
Number = Annotated[float, BeforeValidator(lambda value: float(value) if isinstance(value, str) else value)]
NotNegative = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, lt=2**63)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML and JSON have lists in place of tuples


class FinetuneConfig(BaseModel):
    """All that decides how a network is fine-tuned. The defaults are common values for fine-tuning a pretrained
    convolutional network, not the result of a search; ``docs/finetuning.md`` has recipes.

    Raises:
        RetrofitError: a field is unknown (the message names close ones), or a value is out of range or of the wrong type.

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
    """Passes over the training data."""
    max_updates: Count | None = None
    """The run ends after so many updates, within an epoch too: a few for a dry run. The schedule is that of the shorter run."""
    batch_size: Count = 64
    """Images in a batch, of one process."""
    grad_accum_steps: Count = 1
    """Batches whose gradients are added up before the weights change."""
    optimizer: str = "adamw"
    """Any name that timm's optimizer factory knows. Norms and biases get no weight decay."""
    optimizer_options: dict[str, Any] = {}
    """Further arguments of the optimizer, such as `{"betas": [0.9, 0.95]}`."""
    lr: Positive = 2e-4
    """Learning rate at its peak: low, because the weights are good already; from scratch take 1e-3."""
    se_lr_scale: NotNegative = 1.0
    """Multiplies `lr` for the SE modules, whose layers have it times 16 / inputs, and 0.01 / inputs at most."""
    head_lr_scale: NotNegative = 5.0
    """Multiplies `lr` for the classifier, which most fine-tunes begin anew; take 1 where it is kept."""
    layer_decay: Annotated[Positive, Field(le=1)] | None = None
    """Multiplies `lr` once more for each layer further from the head: 0.7 to 0.9 for few images."""
    weight_decay: NotNegative = 0.05
    """For weights alone."""
    clip_grad: Positive | None = 1.0
    """The gradient's norm is clipped to this; none for no clipping."""
    schedule: str = "cosine"
    """Any name that timm's scheduler factory knows, but `plateau`."""
    schedule_options: dict[str, Any] = {}
    """Further arguments of timm's `create_scheduler_v2`, such as `{"min_lr": 1e-6}`."""
    warmup_ratio: BelowOne = 0.05
    """Part of the run in which the learning rate rises from a hundredth of `lr`."""
    trainable: Literal["all", "se", "se+head", "norms+head", "head"] = "all"
    """What is trained (of norms the scales and shifts); the rest stays bit for bit as it was, running statistics included."""
    unfreeze_epoch: Count | None = None
    """The first epoch (counted from 1) in which all is trained, whatever `trainable` says."""
    freeze_bn: bool = False
    """Leave the running statistics of the norms as they are: for batches under about 16."""
    num_classes: Count | None = None
    """Give the network a new head where it has another number of classes, or classes of other names; none keeps the head."""
    multi_label: bool = False
    """An image may have several classes: its target is a vector of 0 and 1."""
    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """The loss; `bce` is binary cross-entropy of each class."""
    balance: Literal["loss", "sampling"] | None = None
    """Rare classes weigh more in the loss, or are drawn as often as the others."""
    label_smoothing: BelowOne = 0.1
    """Of the training loss."""
    mixup: NotNegative = 0.0
    """Alpha of mixup, for long runs; 0 for none."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix, for long runs; 0 for none."""
    image_size: Count | None = None
    """Height and width of the images; none for the network's own."""
    transform_options: dict[str, Any] = {}
    """Further arguments of timm's `create_transform` in training: `{"scale": [0.35, 1.0], "hflip": 0.5, "color_jitter": 0.0}` and no
    others by default."""
    keys: Names = ()
    """Of image and class in data whose items are dicts; usual ones, such as `image` and `label`, are found."""
    bad_images: Literal["error", "skip"] = "error"
    """What to do with an image that can't be read; it is named either way."""
    best_metric: Literal["accuracy", "loss", "top5", "precision", "recall", "f1", "map"] = "accuracy"
    """By which the best epoch is chosen; precision, recall and F1 are means over the classes."""
    patience: Count | None = None
    """Stop when so many epochs in a row brought no better `best_metric`."""
    ema_decay: Annotated[Positive, Field(lt=1)] | None = None
    """Evaluate and return an average of the weights: 0.9998 in runs of tens of thousands of updates."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """On CUDA `auto` is bf16 where the GPU has it, else fp16; elsewhere fp32. All but `fp32` allow TF32 in what is left in float32."""
    compile: bool = False
    """Train through `torch.compile`, with SE and the norm before it fused."""
    grad_checkpointing: bool = False
    """Compute activations twice instead of keeping them, by timm's own `set_grad_checkpointing`."""
    find_unused_parameters: bool = False
    """Let several processes train a network of which a step may leave parameters unused; costs a walk over the graph."""
    cpu: bool = False
    """Stay on the CPU."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that load data; none for as many as cores, at most 8, and for tensors in memory 0."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of all that is random."""
    checkpoint_minutes: NotNegative = 10.0
    """At least so often is a checkpoint written within an epoch; 0 for at every look at the loss."""
    log_every: Count = 10
    """Updates between two looks at the loss; each waits for the GPU."""
    trackers: Names = ()
    """Of Accelerate's, such as `["tensorboard", "wandb"]`."""

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
            'multi_label=True needs loss="bce" or "focal": cross-entropy is for one class an image': (
                self.multi_label and self.loss == "cross_entropy"
            ),
            'mixup, cutmix and balance="sampling" need one class an image, not multi_label=True': (
                self.multi_label and (mixes or self.balance == "sampling")
            ),
            'balance="loss" goes with loss="bce" where multi_label=True, and with "cross_entropy" and "focal" elsewhere': (
                self.balance == "loss" and (self.loss == "bce") != self.multi_label
            ),
            f"keys must be that of the image and that of the class, got {list(self.keys)}": len(self.keys)
            not in (0, 2),
            'best_metric="top5" is for one class an image; with multi_label=True take "map" or "f1"': (
                self.best_metric == "top5" and self.multi_label
            ),
            'best_metric="map" needs multi_label=True; for one class an image take "f1" or "recall"': (
                self.best_metric == "map" and not self.multi_label
            ),
        }
        for said, holds in contradictions.items():
            if holds:
                raise ValueError(said)
        return self

    def replace(self, **changes: Any) -> FinetuneConfig:
        """A config like this one, but for ``changes``."""
        return FinetuneConfig(**{**self.model_dump(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, fit for YAML and JSON."""
        return self.model_dump(mode="json")

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
        except (OSError, UnicodeDecodeError) as error:
            raise RetrofitError(f"the config file {source} can't be read: {error}") from error
        where = source if is_path else "the config"
        data = parse_yaml(text, where) or {}
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
