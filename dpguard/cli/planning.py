"""What a study will run on this machine: its model and texts, its policies resolved, its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpguard.cli.naming import in_study
from dpguard.errors import UserError
from dpguard.study.calibration import Kept, calibrated
from dpguard.study.corpora import corpus_of
from dpguard.study.grid import NEEDS
from dpguard.study.record import Cell
from dpguard.study.spec import Study

if TYPE_CHECKING:
    from dpguard.policy.layers import Slot


@dataclass(frozen=True)
class Planned:
    """A study made ready to run on this machine.

    Attributes:
        study: with the noise that its target epsilons take.
        cells: everything to run, in order.
        context: plain data for the workers.
        epsilons: policy label -> epsilon after the whole training.
        refused: policy label -> why the federation cannot run it; known with the epsilons.
    """

    study: Study
    cells: list[Cell]
    context: dict[str, Any]
    epsilons: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ground:
    """Model and texts of a study, read once.

    Attributes:
        corpus: the texts.
        data: what `inputs.texts` was asked for.
        slots: the model's parameters.
        classes: of its head.
        model_id, data_id: what identifies them in a cell.
        unread: share of the texts' tokens that the tokenizer does not know (`texts.unread`), if leakage is asked for.
    """

    corpus: Any
    data: dict[str, Any]
    slots: Sequence[Slot]
    model_id: dict[str, Any]
    data_id: dict[str, Any]
    classes: int
    unread: float = 0.0


def plan_study(study: Study, folder: Path, *, epsilons: bool = False) -> Planned:
    """Load model and texts, resolve every policy, and list the cells: every mistake shows here.

    Raises:
        UserError: anything in the study, the data or the model that cannot be meant, with its place.
    """
    ground = read_ground(study)
    return plan_on(ground, study.on(ground.slots), folder, epsilons=epsilons)


def read_ground(study: Study) -> Ground:
    """Load model and texts.

    Raises:
        UserError: what cannot be read, with its place in the study.
    """
    data = {**study.data.model_dump(), "beside": str(Path(study.document.path).parent), "owner": study.owner_column}
    with study.locating("data"), in_study(study):
        corpus = corpus_of({"data": data})
    # torch comes with these: the texts are read, and their mistakes told, before
    from dpguard.inputs import models, texts
    from dpguard.inputs.family import slots

    with study.locating("model"):
        loaded = models.load(study.model, labels=corpus.classes, seed=0)
        texts.check_labels((*corpus.train, *corpus.test), loaded.classes)
    texts.check_lengths((*corpus.train, *corpus.test), loaded.tokenizer, loaded.max_tokens)
    _check_candidates(study, len(set(corpus.public)))
    model_id = {"name": study.model_name, "hash": loaded.fingerprint, "reading": loaded.reading}
    data_id = {
        "name": study.data_name, "hash": corpus.fingerprint, "train": len(corpus.train), "test": len(corpus.test),
    }  # fmt: skip
    unread = texts.unread(corpus.train, loaded.tokenizer) if study.leakage else 0.0
    return Ground(corpus, data, slots(loaded.module), model_id, data_id, loaded.classes, unread)


def plan_on(ground: Ground, study: Study, folder: Path, *, epsilons: bool = False) -> Planned:
    """As `plan_study`, with model and texts in hand, and the study on that model (`Study.on`).

    Raises:
        UserError: as `plan_study`.
    """
    from dpguard.study import guarantee_leg

    study = calibrated(study, ground.slots, ground.data_id, _kept(folder, 0 if epsilons else study.cache.gigabytes))
    plans = study.plans(ground.slots)
    cells = study.cells(ground.model_id, ground.data_id, _panel(study))
    _check_splits(study, cells, ground.corpus)
    needed = {c.settings[NEEDS] for c in cells if NEEDS in c.settings}
    context = {
        "model": study.model,
        "data": ground.data,
        "folder": str(folder),
        "keep_weights": sorted(needed),
        "keep_rounds": list(study.federation.observe) if study.federation else [],
        "engine": _engine(study),
        "cache_gigabytes": study.cache.gigabytes,
        "plans": {label: plan.hash for label, plan in plans.items()},
        "trained": {c.id: asdict(c) for c in cells if c.id in needed},
    }
    if not epsilons:
        return Planned(study, cells, context, {})
    promised = {
        c.policy: guarantee_leg.epsilon(c, plans[c.policy], ground.corpus) for c in cells if c.leg == "guarantee"
    }
    found = {label: epsilon for label, (epsilon, _) in promised.items()}
    return Planned(study, cells, context, found, {label: why for label, (_, why) in promised.items() if why})


def _panel(study: Study) -> dict[str, Any] | None:
    """Who attacks, with the hash of its sources; an unknown preset shows now, not in every cell."""
    from dpguard.attacks.panel import attack, in_order, panel_hash

    if study.leakage is None:
        return None
    name, asked = study.leakage.panel, study.leakage.attacks
    with study.locating("leakage", "panel"):
        digest = panel_hash(name)
    with study.locating("leakage", "attacks"):
        for one in asked or ():
            attack(one)
    return {"name": name, "hash": digest, "attacks": in_order(name, asked)}


def _check_splits(study: Study, cells: Sequence[Cell], corpus: Any) -> None:
    """A split that the texts do not allow is the study's mistake, or that of a policy with a federation of its own."""
    from dpguard.study.guarantee_leg import check_split

    own = {named.label: named for named in study.policies if named.federation}
    with study.locating("federation"):
        check_split([cell for cell in cells if cell.policy not in own], corpus)
    for label, named in own.items():
        with named.document.locating(*named.loc, "federation"):
            check_split([cell for cell in cells if cell.policy == label], corpus)


def _check_candidates(study: Study, public: int) -> None:
    """A closed world takes as many public texts as it has candidates."""
    if study.leakage and study.leakage.threat.candidates > public:
        with study.locating("leakage", "threat", "candidates"):
            raise UserError(
                f"leakage.threat.candidates: {study.leakage.threat.candidates} is more than the {public} public texts, "
                f"expected at most {public}"
            )


def _kept(folder: Path, gigabytes: float) -> Kept:
    """Calibrated tables kept beside the records, so that resuming takes no time; a dry run has no room for any."""
    from dpguard.study.cache import Cache
    from dpguard.study.provenance import versions

    cache = Cache(folder, gigabytes)
    return lambda key, make: cache.plain({"what": "table", **key, "versions": versions()}, make)


def _engine(study: Study) -> str:
    """Who runs a federation's rounds; an extra that is missing shows before anything runs."""
    from dpguard.federation import superlink

    engine = study.federation.engine if study.federation else "embedded"
    if engine == "flower" and not superlink.installed():
        with study.locating("federation", "engine"):
            raise UserError("Flower is not installed; expected pip install 'dpguard[flower]', or engine: embedded")
    return engine
