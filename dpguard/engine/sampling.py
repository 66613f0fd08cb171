"""Poisson batches at a public rate, empty ones included."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from dpguard.engine import noise
from dpguard.errors import UserError


class PoissonSampler(Sampler[list[int]]):
    """Every example joins every batch by its own coin, with probability batch_size / N.

    The rate and the number of steps come from the public batch size and the public N, never from the
    length of a loader (Opacus issues #571, #819).

    Args:
        examples: N.
        batch_size: public batch size.
        generator: source of the coins; secret in a deployment.
    """

    def __init__(self, examples: int, batch_size: int, generator: noise.Source) -> None:
        self.examples = examples
        self.rate = batch_size / examples
        self.generator = generator

    def __len__(self) -> int:
        return max(1, round(1 / self.rate))

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            coins = noise.uniform(self.examples, self.generator) < self.rate
            yield coins.nonzero()[:, 0].tolist()


@dataclass(frozen=True)
class Part:
    """A physical part of a logical batch, as it is handed out.

    Attributes:
        first: it begins a logical batch.
        last: it ends one.
        rows: its examples; private.
        epoch: 1 in the first pass over the loader.
    """

    first: bool
    last: bool
    rows: int
    epoch: int


class PartSampler(Sampler[list[int]]):
    """Logical batches cut into physical parts of at most ``size`` examples; an empty batch is one empty part.

    Args:
        batches: any sampler of batches.
        size: largest number of examples of a part, or None to cut nothing.
    """

    def __init__(self, batches: Sampler[list[int]], size: int | None) -> None:
        self.batches = batches
        self.size = size
        self.epoch = 0
        self.parts: deque[Part] = deque()

    def __len__(self) -> int:
        """The number of LOGICAL batches."""
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        parts: deque[Part] = deque()
        self.parts, self.epoch = parts, self.epoch + 1
        for batch in self.batches:
            size = self.size or max(1, len(batch))
            starts = range(0, max(1, len(batch)), size)
            for start in starts:
                piece = list(batch[start : start + size])
                parts.append(Part(start == 0, start == starts[-1], len(piece), self.epoch))
                yield piece


class PartLoader(DataLoader[Any]):
    """A loader that says of every part it hands out which place it has in its logical batch."""

    on_part: Callable[[Part], None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: PartSampler = self.batch_sampler  # type: ignore[assignment]
        for value in super().__iter__():
            part = sampler.parts.popleft()
            if self.on_part is not None:
                self.on_part(part)
            yield value


def public_sizes(loader: DataLoader[Any]) -> tuple[int, int]:
    """(number of examples, batch size) of a caller's loader.

    Raises:
        UserError: no loader, one that is private already, one with a sampler of its own, without length, without
            examples, without a batch size, or with a batch size above N.
    """
    if not isinstance(loader, DataLoader):
        raise UserError(f"data_loader is a {type(loader).__name__}; expected a torch.utils.data.DataLoader")
    if isinstance(loader, PartLoader):
        raise UserError("the data loader is private already; expected the one that make_private was given")
    try:
        examples = len(loader.dataset)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(
            "the data loader's dataset has no length; expected one with a known number of examples"
        ) from None
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not size:
        raise UserError("the data loader has no batch size; expected DataLoader(..., batch_size=...)")
    if size > examples:
        raise UserError(f"batch size {size} is larger than the {examples} examples; expected at most {examples}")
    once = isinstance(loader.sampler, RandomSampler) and not loader.sampler.replacement
    if not (once or isinstance(loader.sampler, SequentialSampler)) or type(loader.batch_sampler) is not BatchSampler:
        raise UserError(
            f"the data loader has a sampler of its own ({type(loader.sampler).__name__}), which may draw an example "
            "twice; expected shuffle=True or False and no sampler"
        )
    return examples, int(size)


def poisson_loader(
    loader: DataLoader[Any], drawn_from: noise.Source, *, physical: int | None = None, poisson: bool = True
) -> PartLoader:
    """The same data in Poisson batches, in physical parts; an empty draw is a batch of zero rows.

    Args:
        loader: the caller's.
        drawn_from: source of the coins; secret in a deployment.
        physical: largest part, None = whole batches.
        poisson: False keeps the caller's own batches.

    Raises:
        UserError: see `public_sizes`; or ``physical`` below 1.
    """
    examples, size = public_sizes(loader)
    if physical is not None and (isinstance(physical, bool) or physical != int(physical) or physical < 1):
        raise UserError(f"max_physical_batch_size is {physical!r}; expected a whole number of at least 1")
    own: Any = loader.batch_sampler
    return PartLoader(
        loader.dataset,
        batch_sampler=PartSampler(PoissonSampler(examples, size, drawn_from) if poisson else own, physical),
        collate_fn=_empty_aware(loader.collate_fn, loader.dataset),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def _empty_aware(collate: Callable[[list[Any]], Any], dataset: Any) -> Callable[[list[Any]], Any]:
    def collated(items: list[Any]) -> Any:
        # the shape of a batch is learnt from a real example, of which no row is kept
        return collate(items) if items else no_rows(collate([dataset[0]]))

    return collated


def no_rows(batch: Any) -> Any:
    """A batch of the same kind with zero rows."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: no_rows(getattr(batch, f.name)) for f in fields(batch)})
    if isinstance(batch, Mapping):
        return {key: no_rows(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(no_rows(value) for value in batch)
    return batch
