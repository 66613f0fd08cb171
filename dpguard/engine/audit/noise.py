"""Checks N and E: the noise has the claimed law, on every coordinate and whatever the batch holds.

On one batch the clipped sum is a constant, so the residuals of the noised tensors about their mean over seeds
are noise alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from dpguard.engine.audit import batches
from dpguard.engine.audit.report import Row, counted, judged, not_applicable
from dpguard.engine.audit.subject import Mechanism, NoiseClass, Subject, noise_classes, only, shrunk
from dpguard.policy.table import Plan

ALPHA = 1e-6
"""Chance of a false alarm of one row, shared among its tests."""
CLASS_DRAWS = 18_000
"""Draws for the tensors of one group with one claim: 5 % off is seen with power .999."""
TENSOR_DRAWS = 3_200
"""Draws for every single tensor: 10 % off is seen with power .999."""
LARGEST = 64 * 64
SEEDS = 36
LEAST_VARIANCE = 0.1
COMPARED = 64
"""Coordinates of two tensors that are correlated with each other."""


@dataclass
class Draws:
    """Sums over whitened residuals (noise / claimed std) of one tensor or of several.

    Attributes:
        count: degrees of freedom.
        squares: sum of squares.
        fourths: sum of fourth powers.
        values: number of residuals behind them.
    """

    count: int = 0
    squares: float = 0.0
    fourths: float = 0.0
    values: int = 0

    def plus(self, other: Draws) -> Draws:
        """Both together."""
        return Draws(
            self.count + other.count,
            self.squares + other.squares,
            self.fourths + other.fourths,
            self.values + other.values,
        )

    @property
    def ratio(self) -> float:
        """Estimated standard deviation / claim."""
        return math.sqrt(self.squares / self.count) if self.count else math.nan

    @property
    def kurtosis(self) -> float:
        """3 for a Gaussian, 1.8 for a uniform law."""
        return self.fourths * self.values / self.squares**2 if self.squares else math.nan

    @property
    def surprise(self) -> float:
        """Distance of the sum of squares from its expectation, in standard errors."""
        return abs(self.squares - self.count) / math.sqrt(2 * self.count) if math.isfinite(self.squares) else math.inf

    def fits(self, alpha: float) -> bool:
        """Chi-square test of the claimed variance, two-sided at level ``alpha``."""
        low, high = stats.chi2.ppf(alpha / 2, self.count), stats.chi2.isf(alpha / 2, self.count)
        return bool(low <= self.squares <= high)


@dataclass(frozen=True)
class Measured:
    """What the noise of a mechanism looks like on one batch.

    Attributes:
        classes: the claims.
        tensors: name -> its draws.
        least: name -> smallest variance of a coordinate / claim.
        residuals: (seeds, coordinates) whitened residuals of the shrunk tensors side by side.
        sizes: coordinates of each tensor, in the order of ``tensors``.
        silent: tensors that claim no noise and differ between seeds all the same.
    """

    classes: tuple[NoiseClass, ...]
    tensors: dict[str, Draws]
    least: dict[str, float]
    residuals: Tensor
    sizes: list[int]
    silent: tuple[str, ...]

    def pooled(self, found: NoiseClass) -> Draws:
        """The draws of all tensors with one claim."""
        total = Draws()
        for name in found.names:
            total = total.plus(self.tensors[name])
        return total


def measure(subject: Subject) -> Measured:
    """Draw noise until every claim and every tensor has enough of it; small tensors over more seeds."""
    plan = shrunk(subject.plan, LARGEST)
    classes = tuple(noise_classes(plan, subject.batch_size))
    std = {name: found.std for found in classes for name in found.names}
    send = subject.mechanism(plan)
    batch = batches.make(plan, "normal", 2, subject.seed)
    silent = _silent(send, plan, batch, std, subject.seed)
    if not std:
        return Measured((), {}, {}, torch.zeros(0, 0), [], silent)
    seeds = [subject.seed + number for number in range(SEEDS)]
    residuals = _residuals(send, batch, std, seeds)
    sizes = [plan[name].slot.size for name in std]
    tensors, least = {}, {}
    for name, part in zip(std, torch.split(residuals, sizes, dim=1), strict=True):
        per_coordinate = part.square().sum(0)
        tensors[name] = _draws(part)
        least[name] = float(per_coordinate.min()) / (SEEDS - 1)
    measured = Measured(classes, tensors, least, residuals, sizes, silent)
    _top_up(subject, plan, measured, std)
    return measured


def _silent(
    send: Mechanism, plan: Plan, batch: batches.PerExample, std: dict[str, float], seed: int
) -> tuple[str, ...]:
    quiet = [name for name in plan.trained if name not in std]
    if not quiet:
        return ()
    first, second = send(batch, seed).noised, send(batch, seed + 1).noised
    return tuple(name for name in quiet if not first[name].equal(second[name]))


def _residuals(send: Mechanism, batch: batches.PerExample, std: dict[str, float], seeds: Sequence[int]) -> Tensor:
    """(seeds, coordinates) float32: noised tensors minus their mean over the seeds, by their claimed std."""
    rows = []
    for seed in seeds:
        noised = send(batch, seed).noised
        rows.append(torch.cat([noised[name].flatten() for name in std]))
    stacked = torch.stack(rows)
    sizes = [noised[name].numel() for name in std]
    scale = torch.cat([torch.full((n,), 1 / s, dtype=stacked.dtype) for n, s in zip(sizes, std.values(), strict=True)])
    return (stacked - stacked.mean(0)).mul_(scale).float()


def _draws(residuals: Tensor) -> Draws:
    squares = residuals.square()
    return Draws(
        (residuals.shape[0] - 1) * residuals.shape[1],
        float(squares.sum(dtype=torch.float64)),
        float(squares.square().sum(dtype=torch.float64)),
        residuals.numel(),
    )


def _top_up(subject: Subject, plan: Plan, measured: Measured, std: dict[str, float]) -> None:
    """More seeds for the tensors that lack draws, on a plan of those tensors alone."""
    calls = _calls(plan, measured)
    done, number = 0, subject.seed + SEEDS
    for wanted in sorted(set(calls.values())):
        names = [name for name, count in calls.items() if count >= wanted]
        some = only(plan, names)
        here = {name: std[name] for name in some.trained}
        batch = batches.make(some, "normal", 1, subject.seed)
        seeds = range(number, number + wanted - done + 1)  # one is lost to the mean
        residuals = _residuals(subject.mechanism(some), batch, here, seeds)
        for name, part in zip(here, torch.split(residuals, [plan[n].slot.size for n in here], dim=1), strict=True):
            measured.tensors[name] = measured.tensors[name].plus(_draws(part))
        done, number = wanted, number + len(seeds)


def _calls(plan: Plan, measured: Measured) -> dict[str, int]:
    """Tensor -> how many more messages it takes to have enough draws."""
    out = {}
    for found in measured.classes:
        together = sum(plan[name].slot.size for name in found.names)
        lacking = CLASS_DRAWS - measured.pooled(found).count
        for name in found.names:
            own = (TENSOR_DRAWS - measured.tensors[name].count) / plan[name].slot.size
            calls = math.ceil(max(own, lacking / together))
            if calls > 0:
                out[name] = calls
    return out


def check(subject: Subject, measured: Measured) -> list[Row]:
    """The rows of check N."""
    out = []
    if len(measured.tensors) < len(subject.plan.trained):
        quiet = len(subject.plan.trained) - len(measured.tensors)
        found = f"noise on {measured.silent[0]}" if measured.silent else f"no noise on {counted(quiet, 'tensor')}"
        out.append(judged("N", "tensors that claim no noise", found, "no noise", not measured.silent))
    if not measured.tensors:
        return [*out, not_applicable("N", "noise law", "the policy adds no noise")]
    return [*out, *_variance(measured), *_shape(measured), _between(measured), _rounds(measured), *_whole(subject)]


def _variance(measured: Measured) -> list[Row]:
    groups = [(found.label, measured.pooled(found)) for found in measured.classes]
    tensors = list(measured.tensors.items())
    least_name, least = min(measured.least.items(), key=lambda item: item[1])
    return [
        spread("N", f"noise std of {counted(len(groups), 'group')}", groups),
        spread("N", f"noise std of {counted(len(tensors), 'tensor')}", tensors),
        judged(
            "N",
            f"least noisy of {sum(measured.sizes):,} coordinates",
            f"variance {least:.2f} x claim ({least_name})",
            f"> {LEAST_VARIANCE} x claim",
            least > LEAST_VARIANCE,
        ),
    ]


def spread(check: str, what: str, found: Sequence[tuple[str, Draws]]) -> Row:
    """One row for many chi-square tests that share `ALPHA`, under the letter of a check."""
    alpha = ALPHA / len(found)
    wrong = [(label, draws) for label, draws in found if not draws.fits(alpha)]
    label, off = max(wrong or found, key=lambda item: item[1].surprise)
    figure = f"{off.ratio:.4f} x claim at worst ({label}, {off.count:,} draws)"
    return judged(check, what, figure, "1 x claim", not wrong)


def _shape(measured: Measured) -> list[Row]:
    """Kurtosis of every group; its standard error is sqrt(24 / draws)."""
    found = [(label.label, measured.pooled(label)) for label in measured.classes]
    off = {label: abs(draws.kurtosis - 3) / math.sqrt(24 / draws.count) for label, draws in found}
    label = max(off, key=lambda key: off[key])
    worst = dict(found)[label].kurtosis
    # 8 standard errors: the estimator's own tail is heavier than a Gaussian's
    return [judged("N", "kurtosis of each group", f"{worst:.3f} at worst ({label})", "3", off[label] <= 8)]


def _between(measured: Measured) -> Row:
    """Correlation of every pair of tensors over their first coordinates, by the exact law of r."""
    what = f"noise of any two of {len(measured.tensors)} tensors"
    names, parts = list(measured.tensors), list(torch.split(measured.residuals, measured.sizes, dim=1))
    pairs = len(names) * (len(names) - 1) // 2
    if not pairs:
        return not_applicable("N", what, "one tensor alone has noise")
    least, figure = math.inf, ""
    lengths = [min(COMPARED, size) for size in measured.sizes]
    for length in sorted(set(lengths)):
        index = [i for i, n in enumerate(lengths) if n >= length]
        if len(index) < 2:
            continue
        rows = torch.stack([parts[i][:, :length].flatten() for i in index]).double()
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        r = (rows @ rows.T).abs().fill_diagonal_(0.0)
        # pairs of longer tensors are compared over more coordinates
        longer = torch.tensor([lengths[i] > length for i in index])
        r[longer[:, None] & longer[None, :]] = 0.0
        top = int(r.argmax())
        p = chance(float(r.flatten()[top]), (SEEDS - 1) * length)
        if p < least:
            pair = ", ".join(names[index[i]] for i in sorted(divmod(top, len(index))))
            least, figure = p, f"correlation {float(r.flatten()[top]):.3f}, p = {p:.2g} ({pair})"
    return judged("N", what, figure, f"0 (p >= {ALPHA / pairs:.1g})", least >= ALPHA / pairs)


def chance(r: float, freedom: int) -> float:
    """Probability of a correlation of at least ``r`` between zero-mean Gaussian vectors in so many dimensions.

    >>> chance(1.0, 40) < 1e-100, round(chance(0.0, 40), 3)
    (True, 1.0)
    """
    if freedom < 2:
        return 1.0
    t = abs(r) * math.sqrt((freedom - 1) / max(1 - r * r, 1e-300))
    return float(2 * stats.t.sf(t, freedom - 1))


def _rounds(measured: Measured) -> Row:
    """Correlation of the noise of any two rounds, over all tensors at once."""
    even, odd = measured.residuals[0::2].double(), measured.residuals[1::2].double()
    differences = even - odd
    rows = differences / differences.norm(dim=1, keepdim=True).clamp(min=1e-30)
    r = float((rows @ rows.T).abs().fill_diagonal_(0.0).max())
    pairs = len(rows) * (len(rows) - 1) // 2
    p = chance(r, rows.shape[1])
    figure, claim = f"correlation {r:.4f}, p = {p:.2g}", f"0 (p >= {ALPHA / pairs:.1g})"
    return judged("N", f"noise of any two of {SEEDS} rounds", figure, claim, p >= ALPHA / pairs)


def _whole(subject: Subject) -> list[Row]:
    """One draw of the whole model on an empty batch: real shapes, global variance, no value twice."""
    plan = subject.plan
    classes = noise_classes(plan, subject.batch_size)
    empty = {name: torch.zeros((0, *plan[name].slot.shape), dtype=torch.float64) for name in plan.trained}
    noised = subject.mechanism(plan)(empty, subject.seed).noised
    wrong = [n for n in plan.trained if n not in noised or tuple(noised[n].shape) != plan[n].slot.shape]
    total = sum(plan[n].slot.size for n in plan.trained)
    what = f"one draw of the whole model ({total:,} coordinates)"
    if wrong:
        return [judged("N", what, f"{wrong[0]} has another shape", "every tensor in its shape", False)]
    found, sample = [], []
    for each in classes:
        draws = Draws()
        for name in each.names:
            z = noised[name].flatten() / each.std
            draws = draws.plus(Draws(z.numel(), float(z.square().sum(dtype=torch.float64)), 0.0, z.numel()))
            sample.append(z[:LARGEST])
        found.append((each.label, draws))
    values = torch.cat(sample).sort().values
    # a double-precision draw never gives one value twice; a few coincidences are forgiven
    twice = int((values.diff().abs() <= 1e-14 * values[1:].abs()).sum())
    return [
        spread("N", what, found),
        judged("N", "values that occur twice in it", f"{twice} of {len(values):,}", "<= 4", twice <= 4),
    ]


OTHER = (("the empty batch", "normal", 0), ("tiny gradients", "x 1e-3", 2), ("huge gradients", "x 1e4", 2))
OTHER_SEEDS = 24
OTHER_LARGEST = 256


def check_other(subject: Subject) -> list[Row]:
    """The rows of check E: batches of other content, the empty one among them, obey the same law."""
    plan = shrunk(subject.plan, OTHER_LARGEST)
    classes = noise_classes(plan, subject.batch_size)
    std = {name: found.std for found in classes for name in found.names}
    send, out = subject.mechanism(plan), []
    for number, (what, kind, rows) in enumerate(OTHER, start=1):
        batch = batches.make(plan, kind, rows, subject.seed)
        if not std:
            noised = send(batch, subject.seed).noised
            finite = all(bool(value.isfinite().all()) for value in noised.values())
            size = max((float(v.abs().max()) for v in noised.values() if v.numel()), default=0.0)
            holds = finite and (rows > 0 or size == 0)
            out.append(judged("E", what, f"largest entry {size:.3g}", "finite" if rows else "0", holds))
            continue
        residuals = _residuals(send, batch, std, [subject.seed + 1000 * number + n for n in range(OTHER_SEEDS)])
        parts = dict(zip(std, torch.split(residuals, [plan[n].slot.size for n in std], dim=1), strict=True))
        pooled = []
        for found in classes:
            draws = Draws()
            for name in found.names:
                draws = draws.plus(_draws(parts[name]))
            pooled.append((found.label, draws))
        out.append(spread("E", f"{what}: noise std of {counted(len(pooled), 'group')}", pooled))
    return out
