"""Poisson batches at a public rate, empty ones included."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
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
        epoch: of the pass that it belongs to: 1 in the first over the loader.
    """

    first: bool
    last: bool
    rows: int
    epoch: int


class PartSampler(Sampler[list[int]]):
    """Logical batches cut into physical parts of at most ``size`` examples; an empty batch is one empty part.

    Args:
        batches: any sampler of batches.
        size: largest number of examples of a part, or None to cut nothing for memory's sake.
        lengths: tokens of each example; with them the parts of a batch are cut along its lengths (`alike`), because
            its sum does not depend on their order and padding costs as much as text.
    """

    def __init__(self, batches: Sampler[list[int]], size: int | None, lengths: Sequence[int] | None = None) -> None:
        self.batches = batches
        self.size = size
        self.lengths = lengths
        self.epoch = 0
        self.parts: deque[Part] = deque()

    def __len__(self) -> int:
        """The number of LOGICAL batches."""
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        parts: deque[Part] = deque()
        self.parts, self.epoch = parts, self.epoch + 1
        epoch = self.epoch  # another pass may begin inside this one
        for batch in self.batches:
            pieces = self._cut(list(batch))
            for index, piece in enumerate(pieces):
                parts.append(Part(index == 0, index == len(pieces) - 1, len(piece), epoch))
                yield piece

    def _cut(self, batch: list[int]) -> list[list[int]]:
        size = self.size or max(1, len(batch))
        if self.lengths is None or not batch:
            return [batch[start : start + size] for start in range(0, max(1, len(batch)), size)]
        batch.sort(key=lambda index: self.lengths[index])  # type: ignore[index]
        ends = alike([self.lengths[index] for index in batch], size)
        return [batch[start:end] for start, end in zip([0, *ends], ends, strict=False)]


A_PART = 64
"""What a further pass costs, in tokens (MiniLM, one CPU thread: 65 without a clip, 22 with one)."""


def alike(lengths: Sequence[int], size: int, each: int = A_PART) -> list[int]:
    """Where to cut texts that are sorted by length so that the fewest tokens are computed.

    A part costs its number of texts times the length of its longest, and ``each`` on top.

    Args:
        lengths: in ascending order.
        size: most texts of a part.
        each: what a part costs beside its tokens.

    Returns:
        The ends of the parts, the last one ``len(lengths)``.

    >>> alike([4, 5, 5, 40, 41], size=64, each=10)
    [3, 5]
    >>> alike([4, 5, 5, 6, 6], size=2, each=10)
    [1, 3, 5]
    """
    best, start = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        longest = lengths[end - 1]
        cost, since = min((best[s] + (end - s) * longest + each, s) for s in range(max(0, end - size), end))
        best.append(cost)
        start.append(since)
    ends = [len(lengths)]
    while start[ends[0]] > 0:
        ends.insert(0, start[ends[0]])
    return ends


class PartLoader(DataLoader[Any]):
    """A loader that says of every part it hands out which place it has in its logical batch."""

    on_part: Callable[[Part], None] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: PartSampler = self.batch_sampler  # type: ignore[assignment]
        parts: deque[Part] | None = None
        for value in super().__iter__():
            parts = sampler.parts if parts is None else parts  # of this pass, also when another one begins inside it
            if self.persistent_workers and parts is not sampler.parts:
                raise UserError(
                    "another pass over the loader began inside this one, and persistent workers serve only the newest; "
                    "expected one pass at a time, or persistent_workers=False"
                )
            part = parts.popleft()
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
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)  # the loader's own is a default beside another
    # more samples than examples are several passes, and one batch may span two
    once = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples <= examples
    if not (once or isinstance(sampler, SequentialSampler)) or type(loader.batch_sampler) is not BatchSampler:
        raise UserError(
            f"the data loader has a sampler of its own ({type(sampler).__name__}), which may draw an example "
            "twice; expected shuffle=True or False and no sampler"
        )
    return examples, int(size)


KEPT = (
    "num_workers", "pin_memory", "pin_memory_device", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers",
)  # fmt: skip
"""What the private loader takes over of the caller's; not ``in_order``, because parts are told apart by their order."""


def poisson_loader(
    loader: DataLoader[Any],
    drawn_from: noise.Source,
    *,
    physical: int | None = None,
    poisson: bool = True,
    lengths: Sequence[int] | None = None,
) -> PartLoader:
    """The same data in Poisson batches, in physical parts; an empty draw is a batch of zero rows.

    Args:
        loader: the caller's.
        drawn_from: source of the coins; secret in a deployment.
        physical: largest part, None = whole batches.
        poisson: False keeps the caller's own batches.
        lengths: tokens of each example, see `PartSampler`.

    Raises:
        UserError: see `public_sizes`; or ``physical`` below 1; or not one length an example.
    """
    examples, size = public_sizes(loader)
    if physical is not None and (isinstance(physical, bool) or not isinstance(physical, int) or physical < 1):
        raise UserError(f"max_physical_batch_size is {physical!r}; expected a whole number of at least 1")
    if lengths is not None and (not isinstance(lengths, Sequence) or len(lengths) != examples):
        given = f"{len(lengths)} entries" if isinstance(lengths, Sequence) else f"no entries ({lengths!r})"
        raise UserError(f"lengths has {given}; expected one for each of the {examples} examples")
    own: Any = loader.batch_sampler
    batches = PoissonSampler(examples, size, drawn_from) if poisson else own
    return PartLoader(
        loader.dataset,
        batch_sampler=PartSampler(batches, physical, lengths),
        collate_fn=_EmptyAware(loader.collate_fn, loader.dataset),
        **{name: getattr(loader, name) for name in KEPT},
    )


@dataclass(frozen=True)
class _EmptyAware:
    """A caller's collate function that also makes empty batches; no closure, because spawned workers pickle it."""

    collate: Callable[[list[Any]], Any]
    dataset: Any

    def __call__(self, items: list[Any]) -> Any:
        # the shape of a batch is learnt from a real example, of which no row is kept
        return self.collate(items) if items else no_rows(self.collate([self.dataset[0]]))


def no_rows(batch: Any) -> Any:
    """A batch of the same kind with zero rows."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: no_rows(getattr(batch, f.name)) for f in fields(batch)})
    if isinstance(batch, MutableMapping):  # a tokenizer's stays one, with all that it can do beside
        empty = copy.copy(batch)
        for key, value in batch.items():
            empty[key] = no_rows(value)
        if getattr(empty, "_encodings", None):
            empty._encodings = []  # type: ignore[attr-defined]  # a tokenizer's batch keeps its texts' tokens beside the tensors
        return empty
    if isinstance(batch, Mapping):
        return {key: no_rows(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named one takes its values one by one
        return type(batch)(*(no_rows(value) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(no_rows(value) for value in batch)
    return batch
