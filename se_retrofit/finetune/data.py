"""Batches in the same order and with the same augmentation whether or not a run was interrupted."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, TensorDataset, default_collate

from ..errors import RetrofitError
from ..fields import fields_of
from .randomness import EPOCH, ORDER, SAMPLE, derive, seed_all
from .targets import class_numbers, image_weights, targets_together
from .workers import begin_worker, told_plainly

if TYPE_CHECKING:
    from .config import FinetuneConfig  # pydantic, which is from an extra

# What reading a broken image or a missing file raises. Anything else is a bug in the data set, and is not caught.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MOST_REPLACEMENTS = 10
END = object()
Key = tuple[int, int, bool]  # epoch, index, whether the item counts


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, their classes (numbers, or a vector for each image), and which of them count: padding in the last batch
    and replacements for unreadable images do not. ``complaints`` names the images that could not be read."""

    images: Tensor
    targets: Tensor
    counts: Tensor
    complaints: list[str]

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory; a DataLoader calls this. Tensors that are on a GPU already stay there."""
        images, targets, counts = (
            value.pin_memory() if value.device.type == "cpu" else value
            for value in (self.images, self.targets, self.counts)
        )
        return Batch(images, targets, counts, self.complaints)


def stream(
    data: Any, config: FinetuneConfig, transform: Callable[[Any], Any] | None, *, name: str, train: bool = False,
    rank: int = 0, world: int = 1, pin_memory: bool = False,
) -> Stream:  # fmt: skip
    """Return the batches of this process, from a Dataset or a DataLoader.

    A Dataset is shuffled, split over the processes and loaded here; items that are PIL images go through ``transform``.
    A DataLoader is used as it is. Whatever an item holds after image and class is ignored; in a dict, image and class
    are found by ``config.keys``, or by common names.
    """
    balanced, keys, seed = train and config.balance == "sampling", config.keys, config.seed
    if isinstance(data, DataLoader):
        if world > 1 or balanced:
            what = f"{world} processes need" if world > 1 else 'balance="sampling" needs'
            raise RetrofitError(f"{what} a Dataset as {name}, got a DataLoader; give its data set")
        return LoaderStream(data, name=name, keys=keys, seed=seed)
    if isinstance(data, (str, bytes, IterableDataset)) or not hasattr(data, "__getitem__"):
        hint = "; load_data and load_split of se_retrofit.finetune open data by name" if isinstance(data, str) else ""
        raise TypeError(
            f"{name} must be a Dataset of (image, class) pairs with indices, or a DataLoader, got {type(data).__name__}{hint}"
        )
    order = Order(
        data, config.batch_size, name=name, train=train, seed=seed, rank=rank, world=world,
        weights=image_weights(data, keys) if balanced else None,
    )  # fmt: skip
    workers = default_workers(data, world) if config.workers is None else config.workers
    items = Items(data, transform, keys=keys, seed=seed, name=name)
    return DatasetStream(items, order, bad_images=config.bad_images, workers=workers, pin_memory=pin_memory)


def default_workers(data: Any, world: int) -> int:
    """Return 0 for tensors in memory; otherwise this process's share of the machine's cores, at most 8."""
    while isinstance(data, Subset):
        data = data.dataset
    if isinstance(data, TensorDataset):
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(1, min(8, (os.cpu_count() or 1) // here))


class Order(Sampler[list[Key]]):
    """Which items make up the batches of this process; together, the processes use those of one with larger batches."""

    def __init__(
        self, data: Any, batch_size: int, *, name: str, train: bool, seed: int, rank: int, world: int,
        weights: Tensor | None = None,
    ) -> None:  # fmt: skip
        try:
            length = len(data)
        except TypeError as error:
            raise RetrofitError(f"{name} doesn't know its length; give a data set with __len__") from error
        if length < (world if train else 1):
            raise RetrofitError(f"{name} holds {length} images, fewer than there are processes ({world})")
        self.weights = weights
        self.length, self.train, self.seed, self.rank, self.world = length, train, seed, rank, world
        whole = length // (batch_size * world)
        if train and whole == 0:  # fewer images than one batch make one smaller batch
            batch_size, whole = max(length // world, 1), 1
        self.batch_size = batch_size
        self.count = whole if train else -(-length // (batch_size * world))
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.length))
        if self.train:
            generator = torch.Generator().manual_seed(derive(self.seed, ORDER, self.epoch))
            if self.weights is None:
                order = torch.randperm(self.length, generator=generator).tolist()
            else:
                order = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
        for number in range(self.start, self.count):
            first = (number * self.world + self.rank) * self.batch_size
            places = range(first, first + self.batch_size)
            if self.world == 1:
                places = range(first, min(first + self.batch_size, self.length))
            # All processes must make the same number of steps of equal size, so the last batches are padded.
            yield [(self.epoch, order[place % self.length], place < self.length) for place in places]


class Items(Dataset[tuple[Any, Any, bool, list[str]]]):
    """The caller's data set, seeded for each item, with unreadable images replaced and reported."""

    def __init__(
        self, data: Any, transform: Callable[[Any], Any] | None, *, keys: Sequence[str], seed: int, name: str
    ) -> None:
        self.data, self.transform, self.keys, self.seed, self.name = data, transform, keys, seed, name
        if hasattr(data, "_max_retries"):
            data._max_retries = 1  # timm's ImageDataset would skip unreadable images itself

    def __getitem__(self, key: Key) -> tuple[Any, Any, bool, list[str]]:
        epoch, index, counts = key
        complaints: list[str] = []
        for attempt in range(MOST_REPLACEMENTS):
            at = (index + attempt) % len(self.data)
            seed_all(self.seed, SAMPLE, epoch, at)
            try:
                image, target = pair_of(self.data[at], self.keys, self.name)
                if self.transform is not None and isinstance(image, Image.Image):
                    image = self.transform(image)
            except RetrofitError:  # a ValueError, but not due to the image
                raise
            except (*UNREADABLE, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not hasattr(self.data, "_max_retries"):
                    raise
                complaints.append(f"{name_of(self.data, at)}: {type(error).__name__}: {error}")
            else:
                return image, target, counts and not complaints, complaints
        raise RetrofitError(f"{MOST_REPLACEMENTS} images of {self.name} in a row can't be read; first {complaints[0]}")

    def __getitems__(self, keys: list[Key]) -> Any:
        """Return a batch; for tensors in memory, where nothing is random or unreadable, by a single lookup."""
        tensors, indices = in_memory(self.data, [index for _, index, _ in keys])
        if len(tensors) < 2 or tensors[1].dim() not in (1, 2):
            return [self[key] for key in keys]
        images, targets = (tensor[indices] for tensor in tensors[:2])
        return Batch(images, class_numbers(targets), torch.tensor([counts for _, _, counts in keys]), [])


def in_memory(data: Any, indices: list[int]) -> tuple[tuple[Tensor, ...], list[int]]:
    """Return the tensors of a TensorDataset or a Subset of one, and the items' indices in them; else no tensors."""
    if type(data) is Subset:
        return in_memory(data.dataset, [data.indices[index] for index in indices])
    return (data.tensors if type(data) is TensorDataset else ()), indices


def pair_of(item: Any, keys: Sequence[str], name: str) -> tuple[Any, Any]:
    """Return the image and class of a data set's item, or the images and classes of a loader's batch."""
    parts = fields_of(item, keys)
    if len(parts) >= 2:
        return parts[0], parts[1]
    if isinstance(item, Mapping):
        raise RetrofitError(
            f"{name} gives dicts with the keys {', '.join(map(str, item))}: say which are image and class, such as "
            'keys=("image", "label")'
        )
    got = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    raise RetrofitError(f"{name} must give (image, class) pairs, got {got}")


def gives_images(data: Any, keys: Sequence[str] = ()) -> bool:
    """Return whether the items of a data set are PIL images, which go through the transform."""
    if isinstance(data, (DataLoader, IterableDataset, TensorDataset)) or not hasattr(data, "__len__"):
        return False
    for index in range(min(len(data), MOST_REPLACEMENTS)):
        try:
            item = data[index]
        except UNREADABLE:
            continue
        return isinstance(fields_of(item, keys)[0], Image.Image)
    return False


def name_of(data: Any, index: int) -> str:
    """Return the file of an item if the data set knows it, otherwise its number."""
    if isinstance(data, Subset):
        return name_of(data.dataset, data.indices[index])
    names = getattr(data, "samples", None) or getattr(data, "imgs", None)
    if isinstance(names, list) and index < len(names):
        return str(names[index][0] if isinstance(names[index], (tuple, list)) else names[index])
    try:
        return str(data.filename(index, absolute=True))
    except Exception:  # a reader without files, or another kind of data set
        return f"item {index}"


def collate(items: Any) -> Batch:
    if isinstance(items, Batch):
        return items
    images, targets, counts, complaints = zip(*items, strict=True)
    try:
        together = default_collate(list(images))
    except (TypeError, RuntimeError) as error:
        kinds = sorted({str(tuple(i.shape)) if hasattr(i, "shape") else type(i).__name__ for i in images})
        raise RetrofitError(
            f"the images of a batch must be PIL images, or tensors of one shape, got {', '.join(kinds[:3])}"
        ) from error
    named = list(itertools.chain.from_iterable(complaints))
    return Batch(together, targets_together(targets), torch.tensor(counts), named)


class DatasetStream:
    """The batches of a map-style data set, epoch by epoch."""

    resumes_within = True  # an epoch can start in the middle, with the batches that it always has there

    def __init__(self, items: Items, order: Order, *, bad_images: str, workers: int, pin_memory: bool) -> None:
        self.name, self.data, self.order, self.bad_images = items.name, items.data, order, bad_images
        self.named: set[str] = set()
        self.loader = DataLoader(
            items,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            worker_init_fn=begin_worker,
        )

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self.order)

    def items(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Return the prepared images and the targets at these indices of the data."""
        return [self.loader.dataset[0, index, True][:2] for index in indices]

    def places(self, count: int) -> Tensor:
        """Return the indices in the data of the images of an evaluation's batches, one process after the other."""
        world = self.order.world
        places = torch.arange(count, device="cpu")
        return places if world == 1 else places.view(len(self), world, -1).transpose(0, 1).flatten()

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, starting with number ``start``."""
        self.order.epoch, self.order.start = epoch, start
        with torch.device("cpu"):  # and so in the loading processes, which can't use a GPU
            batches = iter(self.loader)
        try:
            while True:
                with told_plainly(), torch.device("cpu"):
                    batch = next(batches, None)
                if batch is None:
                    return
                if batch.complaints and self.bad_images == "error":
                    raise RetrofitError(
                        f"an image of {self.name} can't be read: {batch.complaints[0]}; "
                        'repair or remove it, or leave such images out: bad_images="skip"'
                    )
                news = [complaint for complaint in batch.complaints if complaint not in self.named]
                self.named.update(news)
                yield replace(batch, complaints=news)
        except Exception:  # and not where the caller has all that it wants of an epoch
            self.close()
            raise

    def close(self) -> None:
        """End the loading processes. Left to the garbage collector, this can take 5 s for each of them."""
        loading: Any = self.loader._iterator
        self.loader._iterator = None
        if loading is not None:
            loading._shutdown_workers()


class LoaderStream:
    """The batches of the caller's own DataLoader.

    Its generators are seeded for each epoch and batch, so that an epoch has the same order and augmentation if the run
    is resumed before it.
    """

    resumes_within = False

    def __init__(self, loader: DataLoader[Any], *, name: str, keys: Sequence[str], seed: int) -> None:
        self.loader, self.name, self.keys, self.seed, self.data = loader, name, keys, seed, loader.dataset
        try:
            self.total = len(loader)
        except TypeError as error:
            raise RetrofitError(
                f"{name} doesn't know its length; give a loader over a data set with __len__"
            ) from error
        if self.total == 0:
            raise RetrofitError(f"{name} gives 0 batches")

    def __len__(self) -> int:
        return self.total

    def close(self) -> None:
        """Leave the caller's loader as it is."""

    def items(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Return the images and targets at these positions of an evaluation."""
        pairs = (pair for batch in self.batches(0) for pair in zip(batch.images, batch.targets, strict=True))
        found = {at: pair for at, pair in enumerate(itertools.islice(pairs, max(indices) + 1)) if at in indices}
        return [found[index] for index in indices]

    def places(self, count: int) -> Tensor:
        return torch.arange(count, device="cpu")

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch; ``start`` is 0."""
        self.begin(epoch)
        fetch = iter(self.loader)
        for number in range(self.total):
            seed_all(self.seed, SAMPLE, epoch, number)
            with told_plainly():
                batch = next(fetch, END)
            if batch is END:
                raise RetrofitError(f"{self.name} promised {self.total} batches and gave {number}")
            images, targets = pair_of(batch, self.keys, self.name)
            check_batch(images, targets, self.name)
            yield Batch(images, targets, torch.ones(len(targets), dtype=torch.bool), [])

    def begin(self, epoch: int) -> None:
        """Make the loader's shuffling depend on the epoch only."""
        seed_all(self.seed, EPOCH, epoch)
        sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
        for part in (self.loader, sampler, self.loader.dataset):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(derive(self.seed, ORDER, epoch))  # type: ignore[union-attr]
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]


def check_batch(images: Any, targets: Any, name: str) -> None:
    """Raise an error if these are not a batch, because of a loader without a batch size or a custom ``collate_fn``."""
    both = (images, targets)
    if all(isinstance(part, Tensor) and part.dim() for part in both) and len(images) == len(targets):
        return
    got = " and ".join(f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in both)
    raise RetrofitError(f"{name} must give batches, tensors of N images and of N targets, got {got}")


Stream = DatasetStream | LoaderStream
