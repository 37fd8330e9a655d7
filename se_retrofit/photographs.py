"""Two real photographs, prepared as a network wants its input."""

from __future__ import annotations

from typing import Any

import timm.data
import torch
import torchvision
from torch import Tensor, nn

from .errors import RetrofitError
from .extras import extra
from .models import Base

__all__ = ["NAMES", "photographs", "prepared_for"]

NAMES = ("china.jpg", "flower.jpg")
FRAMES = 16  # of the still film that a video network gets: what the smallest of torchvision's were trained on


def photographs() -> list[Any]:
    """The photographs that scikit-learn ships, a temple in China and a flower, 640x427, as PIL images.

    Example:
        >>> from se_retrofit.photographs import photographs
        >>> [image.size for image in photographs()]
        [(640, 427), (640, 427)]
    """
    from PIL import Image

    with extra("cli"):
        from sklearn.datasets import load_sample_image

    return [Image.fromarray(load_sample_image(name)) for name in NAMES]


def prepared_for(model: nn.Module, base: Base) -> tuple[Any, ...]:
    """Both photographs as the positional arguments of ``model``, resized and normalised by its library's own rules.

    Args:
        model: a network built from ``base``.
        base: says which library's rules, and for which task: a batch of images, a list of images for detection,
            films that stand still for video, and the photographs as two frames for optical flow.

    Raises:
        RetrofitError: the model takes something else than images.

    Example:
        >>> from se_retrofit.models import Base
        >>> from se_retrofit.photographs import prepared_for
        >>> base = Base.of("torchvision/resnet18")
        >>> [x.shape for x in prepared_for(base.build(), base)]
        [torch.Size([2, 3, 224, 224])]
    """
    images = photographs()
    if base.library == "timm":
        return (torch.stack([_timm_transform(model)(image) for image in images]),)
    transform = torchvision.models.get_model_weights(base.name).DEFAULT.transforms()
    task = type(transform).__name__
    if task in ("ImageClassification", "SemanticSegmentation"):
        return (torch.stack([transform(image) for image in images]),)
    if task == "ObjectDetection":
        return ([transform(image) for image in images],)
    tensors = [torchvision.transforms.functional.pil_to_tensor(image) for image in images]
    if task == "VideoClassification":
        return (torch.stack([transform(image.expand(FRAMES, -1, -1, -1)) for image in tensors]),)
    if task == "OpticalFlow":
        # its networks want sides that are multiples of 8
        first, second = (image[:, :424].unsqueeze(0) for image in tensors)
        return tuple(transform(first, second))
    raise RetrofitError(f"{base} takes inputs of the kind {task}; no photograph can be prepared for that")


def _timm_transform(model: nn.Module) -> Any:
    config = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**config)
    channels = config["input_size"][0]

    def apply(image: Any) -> Tensor:
        pixels = transform(image)
        return pixels if channels == 3 else pixels.mean(0, keepdim=True).expand(channels, -1, -1)

    return apply
