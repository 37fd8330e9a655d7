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
from .targets import class_numbers, image_weights, is_weight, targets_together, weights_together
from .workers import AfterOurs, begin_worker, told_plainly

__all__ = ["Batch", "Stream", "stream"]

# What reading a broken image or a vanished file raises. Anything else is a bug in the data set, and passes as it is.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
MOST_REPLACEMENTS = 10


class Batch(NamedTuple):
    """Images, their classes (numbers, or a vector for each image), and which of them count (a filler in the last batch, or in place of an unreadable image,
    does not); ``complaints`` name the images that could not be read, ``weights`` are those of the images in the loss."""

    images: Tensor
    targets: Tensor
    counts: Tensor
    complaints: list[str]
    weights: Tensor | None = None


# An item as it is loaded: image, target, weight or None, whether it counts, complaints
Item = tuple[Any, Any, Any, bool, list[str]]


class Stream(Protocol):
    """The batches of this process, epoch by epoch."""

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
    weighted: bool = False,
    seed: int = 0,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Stream:
    """Batches from a Dataset or a DataLoader.

    A Dataset is shuffled, split over the processes and loaded here; items that are PIL images go through ``transform``.
    A DataLoader is taken as it is. With ``weighted`` the third entry of an item is its weight; otherwise what comes after
    the second is passed over, unless it looks like a weight that training would forget.

    Raises:
        RetrofitError: there is no image in it, it doesn't know its length, or it is iterable and there are several
            processes.
        TypeError: it is neither a Dataset nor a DataLoader.
    """
    if balanced and train and isinstance(data, (DataLoader, IterableDataset)):
        raise RetrofitError(
            f'sampling="balanced" needs a Dataset with indices as {name}, got {type(data).__name__}; give the Dataset, '
            'or a DataLoader with a WeightedRandomSampler and sampling="shuffle"'
        )
    if isinstance(data, DataLoader):
        if train and data.persistent_workers:
            raise RetrofitError(
                f"{name} is a DataLoader with persistent_workers=True, whose workers keep random states from epoch to "
                "epoch, so that a resumed run would see other images; give it persistent_workers=False, or give the "
                "Dataset itself"
            )
        return LoaderStream(data, name=name, train=train, weighted=weighted, seed=seed, rank=rank, world=world)
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
        items = Transformed(data, transform, name=name, train=train, weighted=weighted)
        workers = min(workers, 1)  # each of several would give all items, unless the data set divides them by itself
        loader: DataLoader[Any] = DataLoader(
            items, batch_size, num_workers=workers, pin_memory=pin_memory, drop_last=train, worker_init_fn=begin_worker
        )
        return LoaderStream(loader, name=name, train=train, weighted=weighted, seed=seed, rank=rank, world=world)
    return DatasetStream(
        data, name=name, train=train, batch_size=batch_size, transform=transform, bad_images=bad_images,
        weights=image_weights(data) if balanced and train else None, weighted=weighted, seed=seed, workers=workers, rank=rank, world=world, pin_memory=pin_memory,
    )  # fmt: skip


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
        self, length: int, batch_size: int, *, train: bool, seed: int, rank: int, world: int,
        weights: Tensor | None = None,
    ) -> None:  # fmt: skip
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

    def __init__(
        self, data: Any, transform: Callable[[Any], Any] | None, *, seed: int, name: str, train: bool, weighted: bool
    ) -> None:
        self.data, self.transform, self.seed = data, transform, seed
        self.name, self.train, self.weighted = name, train, weighted
        if hasattr(data, "_max_retries"):
            data._max_retries = 1  # timm's ImageDataset would pass over unreadable images by itself

    def __getitem__(self, key: tuple[int, int, bool]) -> Item:
        epoch, index, counts = key
        complaints: list[str] = []
        for attempt in range(MOST_REPLACEMENTS):
            at = (index + attempt) % len(self.data)
            seed_all(self.seed, SAMPLE, epoch, at)
            try:
                image, target, weight = self.read(at)
            except RetrofitError:  # which is a ValueError, and has nothing to do with the image
                raise
            except UNREADABLE as error:
                complaints.append(f"{name_of(self.data, at)}: {type(error).__name__}: {error}")
            except RuntimeError as error:
                if not hasattr(self.data, "_max_retries"):
                    raise
                complaints.append(f"{name_of(self.data, at)}: {error}")
            else:
                return image, target, weight, counts and not complaints, complaints
        raise RetrofitError(f"{MOST_REPLACEMENTS} images of {self.name} in a row can't be read; first {complaints[0]}")

    def __getitems__(self, keys: list[tuple[int, int, bool]]) -> Any:
        """A batch; of tensors in memory, where nothing is random or unreadable, in one piece."""
        tensors, indices = in_memory(self.data, [index for _, index, _ in keys])
        if len(tensors) < 2 + self.weighted or tensors[1].dim() not in (1, 2):
            return [self[key] for key in keys]
        if self.train and not self.weighted and len(tensors) > 2 and is_weight(tensors[2], 1):
            raise forgotten_weight(self.name)
        images, targets, *more = (tensor[indices] for tensor in tensors[: 2 + self.weighted])
        return Batch(
            images,
            class_numbers(targets),
            torch.tensor([counts for _, _, counts in keys]),
            [],
            weights_together(more[0]) if more else None,
        )

    def read(self, index: int) -> tuple[Any, Any, Any]:
        item = self.data[index]
        image, target, weight = entries(item, self.name, self.weighted, 0 if self.train else None)
        if self.transform is not None and isinstance(image, Image.Image):
            image = self.transform(image)
        return image, target, weight


def in_memory(data: Any, indices: list[int]) -> tuple[tuple[Tensor, ...], list[int]]:
    """The tensors behind a TensorDataset or a Subset of one, and where in them the items are; else no tensors."""
    if type(data) is torch.utils.data.Subset:
        return in_memory(data.dataset, [data.indices[index] for index in indices])
    return (data.tensors if type(data) is TensorDataset else ()), indices


class Transformed(IterableDataset[Any]):
    """An iterable data set whose PIL images go through the transform."""

    def __init__(
        self, data: Any, transform: Callable[[Any], Any] | None, *, name: str, train: bool, weighted: bool
    ) -> None:
        self.data, self.transform, self.name, self.train, self.weighted = data, transform, name, train, weighted

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        for item in self.data:
            image, target, weight = entries(item, self.name, self.weighted, 0 if self.train else None)
            image = self.transform(image) if self.transform and isinstance(image, Image.Image) else image
            yield (image, target, weight) if self.weighted else (image, target)


def entries(item: Any, name: str, weighted: bool, dims: int | None) -> tuple[Any, Any, Any]:
    """Image, class and, where they are ``weighted``, weight of an item of a data set or a batch of a loader.

    With ``dims`` (0 for an item, 1 for a batch) weights that would be forgotten are refused.
    """
    if isinstance(item, (tuple, list)) and len(item) >= 2 + weighted:
        if dims is not None and not weighted and len(item) > 2 and is_weight(item[2], dims):
            raise forgotten_weight(name)
        return item[0], item[1], item[2] if weighted else None
    got = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    if weighted:
        raise RetrofitError(f"sample_weights=True: {name} must give (image, class, weight), got {got}")
    raise RetrofitError(f"{name} must give (image, class) pairs, got {got}")


def forgotten_weight(name: str) -> RetrofitError:
    return RetrofitError(
        f"{name} gives a fractional number after image and class: sample_weights=True takes it for the image's weight in the "
        "loss; if it is something else, give pairs"
    )


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
    images, targets, weights, counts, complaints = zip(*items, strict=True)
    return Batch(
        images_together(images),
        targets_together(targets),
        torch.tensor(counts),
        list(itertools.chain.from_iterable(complaints)),
        None if weights[0] is None else weights_together(weights),
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

    def __init__(
        self, data: Any, *, name: str, train: bool, batch_size: int, transform: Callable[[Any], Any] | None,
        bad_images: str, weights: Tensor | None, weighted: bool, seed: int, workers: int, rank: int, world: int, pin_memory: bool,
    ) -> None:  # fmt: skip
        try:
            length = len(data)
        except TypeError as error:
            raise RetrofitError(f"{name} doesn't know its length; give a data set with __len__") from error
        if length < (world if train else 1):
            raise RetrofitError(f"{name} holds {length} images, fewer than there are processes ({world})")
        self.name, self.bad_images = name, bad_images
        self.named: set[str] = set()
        self.order = Order(length, batch_size, train=train, seed=seed, rank=rank, world=world, weights=weights)
        self.loader = DataLoader(
            Items(data, transform, seed=seed, name=name, train=train, weighted=weighted),
            batch_sampler=self.order,
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

    Before each batch is fetched the generators are seeded, so that a resumed run, which fetches the batches that it has
    seen and drops them, sees the same order and augmentation. With several processes each loads all and takes its
    share: batches ``rank``, ``rank + world``, and so on.
    """

    def __init__(
        self, loader: DataLoader[Any], *, name: str, train: bool, weighted: bool, seed: int, rank: int, world: int
    ) -> None:
        self.loader, self.name, self.train, self.weighted = loader, name, train, weighted
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
        self.begin(epoch)
        fetch = self.start_workers()
        mine: Any = None
        for number in range(len(self) * self.world):
            seed_all(self.seed, SAMPLE, epoch, number)
            with told_plainly():
                item = next(fetch, None)
            if item is None and number < self.total:
                raise RetrofitError(f"{self.name} promised {self.total} batches and gave {number}")
            if number % self.world == self.rank or mine is None:
                # Where this process has no batch left it fills up with one that doesn't count.
                mine = (item, True) if item is not None else (mine[0], False)
            if number % self.world == self.world - 1 and number // self.world >= start:
                images, targets, weights = entries(mine[0], self.name, self.weighted, 1 if self.train else None)
                check_batch(images, targets, self.name)
                together = weights_together(weights) if self.weighted else None
                if together is not None and len(together) != len(targets):
                    raise RetrofitError(f"{self.name} gives {len(together)} weights for {len(targets)} images")
                yield Batch(images, targets, torch.full((len(targets),), mine[1]), [], together)

    def start_workers(self) -> Iterator[Any]:
        """``iter(loader)``, with loading processes that begin with ``begin_worker``. The loader is left as it was."""
        given = self.loader.worker_init_fn
        self.loader.worker_init_fn = AfterOurs(given)
        try:
            return iter(self.loader)
        finally:
            self.loader.worker_init_fn = given

    def begin(self, epoch: int) -> None:
        """Have the loader's shuffling depend on the epoch alone."""
        seed_all(self.seed, EPOCH, epoch)
        sampler = getattr(self.loader.batch_sampler, "sampler", self.loader.sampler)
        for part in (self.loader, sampler, self.loader.dataset):
            if isinstance(getattr(part, "generator", None), torch.Generator):
                part.generator.manual_seed(derive(self.seed, ORDER, epoch))  # type: ignore[union-attr]
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)  # type: ignore[union-attr]
