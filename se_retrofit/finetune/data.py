"""Batches that come in the same order with the same augmentation, whether a run was interrupted or not."""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate

from ..errors import RetrofitError
from .randomness import EPOCH, ORDER, SAMPLE, derive, seed_all
from .targets import class_numbers, image_weights, targets_together
from .workers import begin_worker, told_plainly

__all__ = ["Batch", "Stream", "stream"]

# What reading a broken image or a vanished file raises. Anything else is a bug in the data set, and passes as it is.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MOST_REPLACEMENTS = 10
END = object()


class Batch(NamedTuple):
    """Images, their classes (numbers, or a vector for each image), and which of them count: a filler in the last batch, or in
    place of an unreadable image, does not. ``complaints`` name the images that could not be read."""

    images: Tensor
    targets: Tensor
    counts: Tensor
    complaints: list[str]


# An item as it is loaded: image, target, whether it counts, complaints
Item = tuple[Any, Any, bool, list[str]]


class Stream(Protocol):
    """The batches of this process, epoch by epoch.

    Attributes:
        resumes_within: whether an epoch can begin in the middle, with the batches that it has there in any case.
    """

    resumes_within: bool

    def __len__(self) -> int:
        """Batches an epoch."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""


def stream(
    data: Any,
    *,
    name: str,
    train: bool,
    batch_size: int,
    transform: Callable[[Any], Any] | None,
    bad_images: str = "error",
    balanced: bool = False,
    seed: int = 0,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Stream:
    """Batches from a Dataset or a DataLoader.

    A Dataset is shuffled, split over the processes and loaded here; items that are PIL images go through ``transform``.
    A DataLoader is taken as it is. What an item holds after image and class is passed over.

    Raises:
        RetrofitError: there is no image in it, it doesn't know its length, or it is iterable and there are several
            processes.
        TypeError: it is neither a Dataset nor a DataLoader.
    """
    if balanced and train and isinstance(data, (DataLoader, IterableDataset)):
        raise RetrofitError(
            f'balance="sampling" needs a Dataset with indices as {name}, got {type(data).__name__}; give the Dataset, '
            "or a DataLoader with a WeightedRandomSampler"
        )
    if isinstance(data, DataLoader):
        return LoaderStream(data, name=name, train=train, seed=seed, rank=rank, world=world)
    if isinstance(data, (str, bytes)) or not (hasattr(data, "__getitem__") or isinstance(data, IterableDataset)):
        raise TypeError(
            f"{name} must be a Dataset of (image, class) pairs or a DataLoader, got {type(data).__name__}"
            + ("; se_retrofit.finetune.load_data finds data by name" if isinstance(data, str) else "")
        )
    workers = default_workers(data, world) if workers is None else workers
    if isinstance(data, IterableDataset):
        if world > 1:
            raise RetrofitError(
                f"{name} is iterable, and several processes can't share it evenly; give a data set with indices"
            )
        given = Transformed(data, transform, name=name)
        workers = min(workers, 1)  # each of several would give all items, unless the data set divides them by itself
        loader: DataLoader[Any] = DataLoader(
            given, batch_size, num_workers=workers, pin_memory=pin_memory, drop_last=train, worker_init_fn=begin_worker
        )
        return LoaderStream(loader, name=name, train=train, seed=seed, rank=rank, world=world)
    order = Order(
        data, batch_size, name=name, train=train, seed=seed, rank=rank, world=world,
        weights=image_weights(data) if balanced and train else None,
    )  # fmt: skip
    items = Items(data, transform, seed=seed, name=name)
    return DatasetStream(items, order, bad_images=bad_images, workers=workers, pin_memory=pin_memory)


def default_workers(data: Any, world: int) -> int:
    """None for tensors in memory; else the cores, shared by the processes of this machine, at most 8."""
    if isinstance(data, TensorDataset):
        return 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return max(1, min(8, (os.cpu_count() or 1) // here))


# Datasets


class Order(Sampler[list[tuple[int, int, bool]]]):
    """Which items make up the batches of this process, as (epoch, index, does it count).

    The batches of all processes together are those of one process with a batch that many times larger.
    """

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
        if train and whole == 0:  # fewer images than one batch: they make one smaller batch
            batch_size, whole = max(length // world, 1), 1
        self.batch_size = batch_size
        self.count = whole if train else -(-length // (batch_size * world))
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int, bool]]]:
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
            # With several processes all must do the same number of equal steps: the last batches are filled up.
            yield [(self.epoch, order[place % self.length], place < self.length) for place in places]


class Items(Dataset[Item]):
    """The caller's data set, with its randomness seeded item by item, and unreadable images replaced and named."""

    def __init__(self, data: Any, transform: Callable[[Any], Any] | None, *, seed: int, name: str) -> None:
        self.data, self.transform, self.seed, self.name = data, transform, seed, name
        if hasattr(data, "_max_retries"):
            data._max_retries = 1  # timm's ImageDataset would pass over unreadable images by itself

    def __getitem__(self, key: tuple[int, int, bool]) -> Item:
        epoch, index, counts = key
        complaints: list[str] = []
        for attempt in range(MOST_REPLACEMENTS):
            at = (index + attempt) % len(self.data)
            seed_all(self.seed, SAMPLE, epoch, at)
            try:
                image, target = prepared(self.data[at], self.transform, self.name)
            except RetrofitError:  # which is a ValueError, and has nothing to do with the image
                raise
            except UNREADABLE as error:
                complaints.append(f"{name_of(self.data, at)}: {type(error).__name__}: {error}")
            except RuntimeError as error:
                if not hasattr(self.data, "_max_retries"):
                    raise
                complaints.append(f"{name_of(self.data, at)}: {error}")
            else:
                return image, target, counts and not complaints, complaints
        raise RetrofitError(f"{MOST_REPLACEMENTS} images of {self.name} in a row can't be read; first {complaints[0]}")

    def __getitems__(self, keys: list[tuple[int, int, bool]]) -> Any:
        """A batch; of tensors in memory, where nothing is random or unreadable, in one piece."""
        tensors, indices = in_memory(self.data, [index for _, index, _ in keys])
        if len(tensors) < 2 or tensors[1].dim() not in (1, 2):
            return [self[key] for key in keys]
        images, targets = (tensor[indices] for tensor in tensors[:2])
        return Batch(images, class_numbers(targets), torch.tensor([counts for _, _, counts in keys]), [])


def in_memory(data: Any, indices: list[int]) -> tuple[tuple[Tensor, ...], list[int]]:
    """The tensors behind a TensorDataset or a Subset of one, and where in them the items are; else no tensors."""
    if type(data) is torch.utils.data.Subset:
        return in_memory(data.dataset, [data.indices[index] for index in indices])
    return (data.tensors if type(data) is TensorDataset else ()), indices


class Transformed(IterableDataset[Any]):
    """An iterable data set whose PIL images go through the transform."""

    def __init__(self, data: Any, transform: Callable[[Any], Any] | None, *, name: str) -> None:
        self.data, self.transform, self.name = data, transform, name

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            yield prepared(item, self.transform, self.name)


def prepared(item: Any, transform: Callable[[Any], Any] | None, name: str) -> tuple[Any, Any]:
    """Image and class of an item; a PIL image goes through the transform."""
    image, target = pair_of(item, name)
    return (transform(image) if transform is not None and isinstance(image, Image.Image) else image), target


def pair_of(item: Any, name: str) -> tuple[Any, Any]:
    """Image and class of an item of a data set, or images and classes of a batch of a loader."""
    if isinstance(item, (tuple, list)) and len(item) >= 2:
        return item[0], item[1]
    got = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    raise RetrofitError(f"{name} must give (image, class) pairs, got {got}")


def check_batch(images: Any, targets: Any, name: str) -> None:
    """Raise where these are no batch: of a loader without a batch size, or of the caller's own collating."""
    both = (images, targets)
    if all(isinstance(part, Tensor) and part.dim() for part in both) and len(images) == len(targets):
        return
    got = " and ".join(f"shape {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in both)
    raise RetrofitError(f"{name} must give batches, tensors of N images and of N targets, got {got}")


def name_of(data: Any, index: int) -> str:
    """The file of an item, where the data set tells it."""
    if isinstance(data, torch.utils.data.Subset):
        return name_of(data.dataset, data.indices[index])
    for names in (getattr(data, "samples", None), getattr(data, "imgs", None)):
        if isinstance(names, list) and index < len(names):
            return str(names[index][0] if isinstance(names[index], (tuple, list)) else names[index])
    try:
        return str(data.filename(index, absolute=True))
    except Exception:  # a reader that has no files, or another kind of data set
        return f"item {index}"


def collate(items: Batch | list[Item]) -> Batch:
    if isinstance(items, Batch):
        return items
    images, targets, counts, complaints = zip(*items, strict=True)
    return Batch(
        images_together(images),
        targets_together(targets),
        torch.tensor(counts),
        list(itertools.chain.from_iterable(complaints)),
    )


def images_together(images: Sequence[Any]) -> Any:
    try:
        return default_collate(list(images))
    except (TypeError, RuntimeError) as error:
        kinds = sorted({str(tuple(i.shape)) if hasattr(i, "shape") else type(i).__name__ for i in images})
        raise RetrofitError(
            f"the images of a batch must be PIL images, or tensors of one shape, got {', '.join(kinds[:3])}"
        ) from error


class DatasetStream:
    """The batches of a map-style data set."""

    resumes_within = True

    def __init__(self, items: Items, order: Order, *, bad_images: str, workers: int, pin_memory: bool) -> None:
        self.name, self.order, self.bad_images = items.name, order, bad_images
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
        return len(self.order)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.start = epoch, start
        batches = iter(self.loader)
        while True:
            with told_plainly():
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
            yield batch._replace(complaints=news)


# DataLoaders


class LoaderStream:
    """The batches of the caller's own DataLoader.

    Its generators are seeded for each epoch and batch, so that an epoch has the same order and augmentation in a run that is
    resumed before it. With several processes each loads all and takes its share: batches ``rank``, ``rank + world``,
    and so on.
    """

    resumes_within = False

    def __init__(self, loader: DataLoader[Any], *, name: str, train: bool, seed: int, rank: int, world: int) -> None:
        self.loader, self.name, self.train = loader, name, train
        self.seed, self.rank, self.world = seed, rank, world
        try:
            self.total = len(loader)
        except TypeError as error:
            raise RetrofitError(
                f"{name} doesn't know its length; give a loader over a data set with __len__"
            ) from error
        if len(self) == 0:
            raise RetrofitError(f"{name} gives {self.total} batches, fewer than there are processes ({world})")

    def __len__(self) -> int:
        return self.total // self.world if self.train else -(-self.total // self.world)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch; ``start`` is 0."""
        fetched = self.fetched(epoch)
        for turn in range(len(self)):
            before = turn * self.world
            shares = list(itertools.islice(fetched, self.world))
            if len(shares) < min(self.world, self.total - before):
                raise RetrofitError(f"{self.name} promised {self.total} batches and gave {before + len(shares)}")
            # Where the last turn does not reach this process, it takes a batch that doesn't count
            images, targets = pair_of(shares[min(self.rank, len(shares) - 1)], self.name)
            check_batch(images, targets, self.name)
            yield Batch(images, targets, torch.full((len(targets),), self.rank < len(shares)), [])

    def fetched(self, epoch: int) -> Iterator[Any]:
        """What the loader gives in an epoch."""
        self.begin(epoch)
        fetch = iter(self.loader)
        for number in itertools.count():
            seed_all(self.seed, SAMPLE, epoch, number)
            with told_plainly():
                batch = next(fetch, END)
            if batch is END:
                return
            yield batch

    def begin(self, epoch: int) -> None:
        """Have the loader's shuffling depend on the epoch alone."""
        seed_all(self.seed, EPOCH, epoch)
        sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
        for part in (self.loader, sampler, self.loader.dataset):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(derive(self.seed, ORDER, epoch))  # type: ignore[union-attr]
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]
