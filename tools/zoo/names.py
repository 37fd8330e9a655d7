"""Which networks the two libraries have, of which family, and how to build one."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from se_retrofit.errors import RetrofitError
from se_retrofit.models import TIMM_PREFIX


@dataclass(frozen=True, order=True)
class Entry:
    """One name of one library.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        family: the library's module that defines it, e.g. ``"resnet"`` or ``"detection.faster_rcnn"``.
        model: its name there.
    """

    library: str
    family: str
    model: str

    @property
    def name(self) -> str:
        """Library and model, e.g. ``"timm/resnet50"``: the name that ``se-retrofit add`` takes."""
        return f"{self.library}/{self.model}"

    def build(self, device: str = "meta") -> nn.Module:
        """The network with random weights; on the meta device, where it takes no memory, if its constructor lets it.

        Some constructors read numbers off tensors (``linspace(...).tolist()``), and meta tensors hold none; such a
        network is built on the CPU. Detectors get small images and few proposals.
        """
        if device == "meta":
            try:
                with torch.device("meta"):
                    return self._build()
            except (NotImplementedError, RuntimeError):
                pass
        return self._build()

    def _build(self) -> nn.Module:
        if self.library == "timm":
            return timm.create_model(self.model)
        model = torchvision.models.get_model(self.model, **_no_downloads(self.model))
        if self.family.startswith("detection."):
            _lighten(model)
        return model


def _lighten(detector: Any) -> None:
    """It resizes images to 800 pixels and runs its heads on each of a thousand proposals otherwise, which takes minutes and
    shows no more."""
    if detector.transform.fixed_size is None:
        detector.transform.min_size, detector.transform.max_size = (96,), 128
    if hasattr(detector, "rpn"):
        detector.rpn._pre_nms_top_n = detector.rpn._post_nms_top_n = {"training": 20, "testing": 10}
        detector.roi_heads.fg_bg_sampler.batch_size_per_image = 8
        detector.roi_heads.detections_per_img = 3


def _no_downloads(model: str) -> dict[str, bool | None]:
    """Arguments that keep a torchvision builder from fetching weights, and from the slow initialisation that
    GoogLeNet and Inception-v3 use otherwise."""
    arguments: dict[str, bool | None] = {"weights": None}
    accepted = inspect.signature(torchvision.models.get_model_builder(model)).parameters
    if "weights_backbone" in accepted:
        arguments["weights_backbone"] = None
    if model in ("googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"):
        arguments["init_weights"] = False
    return arguments


def entries(patterns: Iterable[str] = ()) -> list[Entry]:
    """All networks whose name matches one of the patterns (all, without patterns), sorted by library, family, name.

    Args:
        patterns: shell patterns, of a model (``"resnet*"``) or of library and model (``"torchvision/*"``).

    Raises:
        RetrofitError: a pattern matches no name.

    Example:
        >>> from tools.zoo import entries
        >>> [entry.name for entry in entries(["torchvision/resnet1*"])]
        ['torchvision/resnet101', 'torchvision/resnet152', 'torchvision/resnet18']
    """
    every = sorted(_timm_entries() + _torchvision_entries())
    patterns = list(patterns)
    if not patterns:
        return every
    chosen: set[Entry] = set()
    for pattern in patterns:
        matching = [e for e in every if fnmatch.fnmatchcase(e.name if "/" in pattern else e.model, pattern)]
        if not matching:
            raise RetrofitError(
                f"the pattern {pattern!r} matches none of the {len(every)} names; give a model (resnet50), a pattern "
                "('resnet*'), or one with its library ('torchvision/*')"
            )
        chosen.update(matching)
    return sorted(chosen)


def _timm_entries() -> list[Entry]:
    found = []
    for model in timm.list_models(exclude_filters=f"{TIMM_PREFIX}*"):
        module = timm.model_entrypoint(model).__module__
        found.append(Entry("timm", module.rpartition(".")[2], model))
    return found


def _torchvision_entries() -> list[Entry]:
    found = []
    for model in torchvision.models.list_models():
        module = torchvision.models.get_model_builder(model).__module__
        found.append(Entry("torchvision", module.removeprefix("torchvision.models."), model))
    return found
