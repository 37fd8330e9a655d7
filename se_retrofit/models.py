"""Networks by name: ``resnet50``, ``timm/resnet50``, ``torchvision/resnet50``; and retrofitted networks inside timm."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
import sys
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import timm
import torchvision
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from timm.models import DefaultCfg, load_model_config_from_hf, load_state_dict_from_hf
from timm.models._hub import load_model_config_from_path
from torch import nn

from .building import check_arguments
from .checkpoints import load_checkpoint as load_checkpoint
from .errors import RetrofitError, brief
from .retrofit import add_se

LIBRARIES = ("timm", "torchvision")
# timm's own prefixes, which it resolves itself; the names after them contain slashes
HUB_SCHEMES = ("hf-hub", "hf_hub")
TIMM_SCHEMES = (*HUB_SCHEMES, "local-dir")
WEIGHTS_ENDS = (".safetensors", ".bin", ".pth", ".pth.tar", ".pt")
# The attributes that record how a network was built and how its images are prepared. They hold plain data, so that the
# network can be pickled without this package.
BASE = "_se_base"
IMAGES = "_se_images"
SETTINGS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # of images, in IMAGES
TIMM_PREFIX = "se_retrofit_"  # of names from register_timm; timm drops everything before a slash


@dataclass(frozen=True)
class Base:
    """The origin of a network: a library, a name in it, and the arguments that it is built with.

    Attributes:
        library: ``"timm"`` or ``"torchvision"``.
        name: the model's name in that library.
        kwargs: arguments for the library's builder that define the architecture (``num_classes``, ``output_stride``,
            ``act_layer="gelu"``, ...), as numbers, switches, names, and lists and dicts of these.

    Raises:
        RetrofitError: If another argument is given, such as ``checkpoint_path`` or ``weights``, or a value of another
            kind. Build such a network yourself, and pass it instead of its name.

    Example:
        >>> from se_retrofit.models import Base
        >>> base = Base.of("timm/resnet18", num_classes=10)
        >>> type(base.build()).__name__
        'ResNet'
    """

    library: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(str(self), self.kwargs)

    @classmethod
    def of(cls, name: str, **kwargs: Any) -> Base:
        """Read a name such as ``resnet50``, ``timm/resnet50``, ``resnet50.a1_in1k`` or ``torchvision/resnet50``.

        Args:
            name: a library and a model separated by a slash, or only a model, which is looked up in timm, then in
                torchvision.
            kwargs: arguments for the library's builder, e.g. ``num_classes=10``.

        Raises:
            RetrofitError: If neither library has a model of that name (the message lists close names), or an argument
                does not define the architecture.

        Example:
            >>> from se_retrofit.models import Base
            >>> str(Base.of("resnet50")), str(Base.of("googlenet"))
            ('timm/resnet50', 'torchvision/googlenet')
        """
        if not isinstance(name, str):
            raise TypeError(f"a model's name must be a string, got {brief(name)} of type {type(name).__name__}")
        if name.split(":")[0] in TIMM_SCHEMES:
            return cls("timm", name, kwargs)
        return cls.listed(name, kwargs)

    @classmethod
    def listed(cls, name: str, kwargs: dict[str, Any]) -> Base:
        """Like ``of``, but only for the libraries' own networks: the name neither downloads nor reads anything."""
        library, _, model = name.rpartition("/")
        if library and library not in LIBRARIES:
            raise RetrofitError(f"no library {library!r} in {name!r}; give timm/NAME or torchvision/NAME")
        libraries = (library,) if library else LIBRARIES
        for candidate in libraries:
            known = _known(candidate, model)
            if known is not None:
                return cls(candidate, known, kwargs)
        raise RetrofitError(f"no model {model!r} in {' or '.join(libraries)}{_close_names(model, libraries)}")

    @classmethod
    def noted(cls, model: nn.Module) -> Base | None:
        """Return the base that is noted on a network; None if there is none."""
        noted = vars(model).get(BASE)
        return None if noted is None else cls(**noted)

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"

    def build(self, pretrained: bool = False) -> nn.Module:
        """Build the network, with random weights or, if ``pretrained``, with the library's own (which it downloads).
        The network remembers its base, for ``save_retrofitted`` and others.

        Raises:
            RetrofitError: If the library can't build it, because of an unknown argument, or because there are no such
                pretrained weights or they can't be downloaded. The message includes the library's own. The download of
                a network on the hub that is neither cached nor reachable is not retried.
        """
        scheme, _, repository = self.name.partition(":")
        if self.library == "timm" and scheme in HUB_SCHEMES:
            _check_hub(repository)
        try:
            with warnings.catch_warnings():
                # torchvision's GoogLeNet and Inception announce a different initialisation for a later version
                warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")
                known = self.in_library()  # which checks the config before anything is built from it
                model = self._timm(pretrained) if self.library == "timm" else self._torchvision(pretrained)
                known.note(model)
                if known is not self:
                    vars(model)[IMAGES] = own_images(model)
                return model
        except Exception as error:  # the errors of a download depend on the library's HTTP client
            weights = "with pretrained weights" if pretrained else "with random weights"
            given = f" and {self.kwargs}" if self.kwargs else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RetrofitError(f"{self.library} can't build {self.name!r} {weights}{given}: {reason}") from error

    def note(self, model: nn.Module) -> None:
        vars(model)[BASE] = asdict(self)

    def in_library(self) -> Base:
        """Return the same network by the library's own name, if this one names a repository of the hub or a folder. The
        architecture options in its config become arguments.

        Raises:
            RetrofitError: If the config can't be read, or has an argument that does not define the architecture.
        """
        if ":" not in self.name:
            return self
        _, architecture, arguments = self._config()
        return Base.listed(f"timm/{architecture}", {**arguments, **self.kwargs})

    def _timm(self, pretrained: bool) -> nn.Module:
        # without a source, timm uses the weights that it is given
        overlay = {"source": "", "state_dict": self._weights()} if pretrained and ":" in self.name else None
        model = timm.create_model(self.name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **self.kwargs)
        if overlay is not None:
            vars(model)["pretrained_cfg"].pop("state_dict", None)
        return model

    def _config(self) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Return the pretrained config, the architecture and the arguments of a repository or folder."""
        scheme, _, place = self.name.partition(":")
        read = load_model_config_from_hf if scheme in HUB_SCHEMES else load_model_config_from_path
        try:
            weights, architecture, arguments = read(place)
            told = {name: weights.get(name) for name in ("num_classes", "global_pool")}
            if size := weights.get("input_size"):
                told["in_chans"], *told["img_size"] = size
            if not weights.get("fixed_input_size"):
                told.pop("img_size", None)
            told = {name: value for name, value in told.items() if value is not None}
            return dict(weights), str(architecture), {**told, **(arguments or {})}
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise RetrofitError(f"config.json of {self.name} does not describe a timm network: {error!r}") from error

    def _weights(self) -> dict[str, Any]:
        """Read the weights of a repository or folder, which older versions of timm would unpickle, and so execute."""
        scheme, _, place = self.name.partition(":")
        if scheme in HUB_SCHEMES:
            name = self._config()[0].get("hf_hub_filename")
            named = {"filename": name} if name else {}
            return dict(load_state_dict_from_hf(place, weights_only=True, **named))
        files = [file for end in WEIGHTS_ENDS for file in sorted(Path(place).glob(f"*{end}"))]
        if not files:
            raise RetrofitError(f"{place} holds no weights: no *{' or *'.join(WEIGHTS_ENDS)}")
        chosen = min(files, key=lambda file: file.name not in ("model.safetensors", "pytorch_model.bin"))
        return dict(timm.models.load_state_dict(str(chosen), weights_only=True))

    def _torchvision(self, pretrained: bool) -> nn.Module:
        kwargs: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
        builder = torchvision.models.get_model_builder(self.name)
        # the detection and segmentation builders download a pretrained backbone by default
        if not pretrained and "weights_backbone" in inspect.signature(builder).parameters:
            kwargs["weights_backbone"] = None
        return builder(**{**kwargs, **self.kwargs})


def own_images(model: nn.Module) -> dict[str, Any]:
    """Return how the images of a network are prepared, in the form that recipes have."""
    return {**settings_of(model), "classes": None, "multi_label": False}


def settings_of(model: nn.Module, image_size: int | None = None) -> dict[str, Any]:
    """Return the size, the mean and so on of a network's images as plain data."""
    own = {name: value for name, value in _own_settings(model).items() if name in SETTINGS}
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels, *size = own["input_size"]
    if convolution is not None and convolution.in_channels == 1 < channels:
        # the network was built for one channel, but its config is for three
        own |= {name: [sum(own[name]) / len(own[name])] for name in ("mean", "std")}
        channels = 1
    own["input_size"] = [channels, *(size if image_size is None else (image_size, image_size))]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def _own_settings(model: nn.Module) -> dict[str, Any]:
    noted, config = vars(model).get(IMAGES), getattr(model, "pretrained_cfg", None)
    if noted is not None:
        return dict(noted)
    if isinstance(config, dict) and config:
        return dict(timm.data.resolve_data_config({}, pretrained_cfg=config))
    default = dict(timm.data.resolve_data_config({"input_size": (3, 224, 224)}))
    base = Base.noted(model)
    if base is None or base.library != "torchvision":
        return default
    try:
        preset = torchvision.models.get_model_weights(base.name).DEFAULT.transforms()
        size, mean, std = preset.crop_size[0], tuple(preset.mean), tuple(preset.std)
        return {
            **default, "input_size": (3, size, size), "mean": mean, "std": std,
            "crop_pct": size / preset.resize_size[0], "interpolation": preset.interpolation.value,
        }  # fmt: skip
    except (AttributeError, ValueError, IndexError):  # no weights, or weights of another task
        return default


def _check_hub(repository: str) -> None:
    """Raise an error at once if a repository is not cached and the hub can't be reached."""
    name, _, revision = repository.partition("@")
    try:
        if huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or None) is None:
            url = huggingface_hub.hf_hub_url(name, "config.json", revision=revision or None)
            huggingface_hub.get_hf_file_metadata(url, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return  # the hub has answered, or the name is invalid: timm raises the error
    except Exception as error:  # the type depends on the hub's HTTP client
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RetrofitError(
            f"{name} is not in the cache of the Hugging Face hub, and the hub can't be reached: {reason}. Check the "
            "connection (and HF_HUB_OFFLINE and HF_ENDPOINT), or give a folder with the network: local-dir:PATH"
        ) from error


def register_timm(*patterns: str) -> list[str]:
    """Register retrofitted networks with timm, so that ``timm.create_model`` and timm's scripts can build them by name.

    ``resnet50`` is registered as ``se_retrofit_resnet50``, with the same pretrained tags: with ``pretrained=True``, the
    base gets its weights before the retrofit. Keyword arguments that start with ``se_`` are passed to ``add_se``, all
    others to timm. Nothing else in timm changes, and registering a name again has no effect.

    Args:
        patterns: shell-style patterns of timm architectures, such as ``"resnet*"``; by default all architectures.

    Returns:
        The new names, sorted. Whether a network can be retrofitted is only known when it is built.

    Raises:
        RetrofitError: If a pattern matches no timm architecture.

    Example:
        >>> import timm
        >>> from se_retrofit.models import register_timm
        >>> register_timm("resnet18")
        ['se_retrofit_resnet18']
        >>> model = timm.create_model("se_retrofit_resnet18", num_classes=10, se_reduction=16)
        >>> type(model).__name__, model.layer1[0].se_attention.hidden
        ('ResNet', 4)
    """
    names: set[str] = set()
    every = [name for name in timm.list_models() if not name.startswith(TIMM_PREFIX)]
    for pattern in patterns or ("*",):
        found = fnmatch.filter(every, pattern)
        if not found:
            hint = _close_names(pattern, ("timm",))
            raise RetrofitError(f"the pattern {pattern!r} matches no architecture of timm{hint}")
        names.update(found)
    for name in sorted(names):
        if not timm.is_model(TIMM_PREFIX + name):
            _register(name)
    return sorted(TIMM_PREFIX + name for name in names)


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {key.removeprefix("se_"): kwargs.pop(key) for key in list(kwargs) if key.startswith("se_")}
        return add_se(timm.models.model_entrypoint(name)(pretrained=pretrained, **kwargs), **options)

    build.__name__ = build.__qualname__ = TIMM_PREFIX + name
    # timm looks up the pretrained tags of a name in the module of its builder
    home = ModuleType(f"{__name__}.timm.{name}")
    cfgs = {cfg.tag or "": cfg for cfg in timm.models.get_arch_pretrained_cfgs(name).values()}
    vars(home)["default_cfgs"] = {build.__name__: DefaultCfg(tags=deque(cfgs), cfgs=cfgs)} if cfgs else {}
    build.__module__ = home.__name__
    sys.modules[home.__name__] = home
    try:
        timm.models.register_model(build)
    finally:
        del sys.modules[home.__name__]


def _known(library: str, name: str) -> str | None:
    """Return the library's own spelling of a name, or None if it has no such model."""
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        return None
    if library == "timm":
        return next((spelling for spelling in (name, name.lower()) if timm.is_model(spelling)), None)
    return name.lower() if name.lower() in torchvision.models.list_models() else None


def _close_names(name: str, libraries: tuple[str, ...]) -> str:
    """Return a hint for an error: the libraries' names that are close to a name; empty if none is."""
    listed = {"timm": timm.list_models, "torchvision": torchvision.models.list_models}
    names = dict.fromkeys(known for library in libraries for known in listed[library]())
    close = difflib.get_close_matches(name.lower(), names, n=3)
    return f"; close names: {', '.join(close)}" if close else ""
