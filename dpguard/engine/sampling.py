"""Poisson batches at a public rate, empty ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler

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


def poisson_loader(loader: DataLoader[Any], generator: noise.Source) -> DataLoader[Any]:
    """The same data in Poisson batches; an empty draw is a batch of zero rows.

    Raises:
        UserError: a loader without length, without a batch size, or with a batch size above N.
    """
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
    return DataLoader(
        loader.dataset,
        batch_sampler=PoissonSampler(examples, int(size), generator),
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
