"""What a study's sections cannot mean together: each is a UserError with its place. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpguard.errors import UserError, did_you_mean
from dpguard.federation.settings import Settings
from dpguard.study.policies import Named
from dpguard.study.record import canonical
from dpguard.study.sections import CEILING, Federation, ThreatModel

if TYPE_CHECKING:
    from dpguard.study.spec import Study


def check(study: Study) -> None:
    """Refuse a study whose sections contradict each other.

    Raises:
        UserError: the first contradiction, with its place.
    """
    with study.document.locating():
        _legs(study)
        _federation(study)
        _training(study)
        _searches(study)


def _legs(study: Study) -> None:
    if study.leakage is None and study.utility is None:
        raise UserError("the study measures nothing, expected a 'leakage' or a 'utility' section")
    if study.leakage and "end" in study.leakage.at and study.utility is None:
        raise UserError(
            "leakage.at: 'end' attacks the weights that the utility leg ends with, expected a 'utility' section",
            loc=("leakage", "at"),
        )
    if study.leakage and "tuned" in study.leakage.at and (study.utility is None or study.federation is not None):
        raise UserError(
            "leakage.at: 'tuned' attacks the weights that the undefended control is trained to in one place, "
            "expected a 'utility' section and no federation",
            loc=("leakage", "at"),
        )
    _trained(study)
    _candidates(study)
    for cap, leg, given in (
        ("max_leakage", "leakage", study.leakage),
        ("min_utility", "utility", study.utility),
    ):
        if getattr(study.recommend, cap) is not None and given is None:
            raise UserError(f"recommend.{cap}: nothing measures it, expected a {leg!r} section", loc=("recommend", cap))


def _trained(study: Study) -> None:
    """``utility.policies`` names policies, and all whose trained weights are asked for."""
    if study.utility is None or study.utility.policies is None:
        return
    loc, given = ("utility", "policies"), study.utility.policies
    if study.federation is not None:
        raise UserError("utility.policies: a federation trains every policy, expected no such list", loc=loc)
    known = [named.name for named in study.policies]
    for name in given:
        if name not in known:
            raise UserError(f"utility.policies: unknown policy {name!r}{did_you_mean(name, known)}", loc=loc)
    at = study.leakage.at if study.leakage else ()
    needed = [*(known if "end" in at else ()), *([CEILING] if "tuned" in at else ())]
    for name in needed:
        if name not in given:
            raise UserError(
                f"utility.policies: leakage.at attacks weights that {name!r} is trained to, expected it there",
                loc=loc,
            )


def _candidates(study: Study) -> None:
    """A closed world is about one text in one client's message."""
    if study.leakage is None or not study.leakage.threat.candidates:
        return
    loc, threat = ("leakage", "threat", "candidates"), study.leakage.threat
    if threat.candidates == 1:
        raise UserError("leakage.threat.candidates: 1 leaves nothing to find, expected 2 or more", loc=loc)
    if study.leakage.batch_size > 1 or threat.clients > 1 or study.federation is not None:
        raise UserError(
            "leakage.threat.candidates: which of the candidates it was is asked of one text in one message, "
            "expected batch_size: 1, clients: 1 and no federation",
            loc=loc,
        )


def _training(study: Study) -> None:
    """What a policy sets of the training for itself can be meant, and makes it another policy."""
    same: dict[str, Named] = {}
    for named in study.policies:
        with named.document.locating(*named.loc):
            _own_training(study, named)
            if study.federation is not None or study.utility is None or named.open:
                continue
            found = study.utility_of(named)
            twin = same.setdefault(canonical([named.table, named.epsilon, found and found.model_dump()]), named)
            if twin is not named:
                raise UserError(
                    f"policies {twin.label!r} and {named.label!r} are the same table in the same training, "
                    "expected each one once"
                )


def _own_training(study: Study, named: Named) -> None:
    for key in ("utility", "epsilon"):
        if getattr(named, key) and study.federation is not None:
            raise UserError(
                f"{key}: the federation says how long and with which step is trained, expected "
                + ("federation settings of the policy" if key == "utility" else "noise in its rows"),
                loc=(key,),
            )
    if named.utility and not study.trains(named):
        raise UserError(
            f"policy {named.label!r} sets a training of its own, expected a 'utility' section of the study "
            "that trains it",
            loc=("utility",),
        )


def _searches(study: Study) -> None:
    """What a sweep looks for is measured by a leg of the study."""
    for named in study.policies:
        target = named.search.auto.target if named.search else ""
        measured = {"leakage": study.leakage, "utility": study.utility if study.trains(named) else None}
        if named.search and target in measured and measured[target] is None:
            with named.document.locating(*named.loc, "sweep", named.search.auto.variable, "auto"):
                raise UserError(
                    f"auto: nothing measures {target}, expected a {target!r} section of the study with this policy"
                )


def _federation(study: Study) -> None:
    """What a federation takes the place of is not set beside it, and what needs one has one."""
    if study.federation is None:
        _alone(study)
        return
    try:
        Settings.of(study.federation.model_dump())
    except UserError as error:
        raise UserError(f"federation.{error.sentence}", loc=("federation", *error.loc)) from None
    _twins(study)
    _rounds(study, study.federation)
    _replaced(study)


def _alone(study: Study) -> None:
    own = next((named for named in study.policies if named.federation), None)
    if own is not None:
        with own.document.locating(*own.loc, "federation"):
            raise UserError(
                f"policy {own.label!r} sets a federation of its own, expected a 'federation' section of the study"
            )
    if study.leakage is not None and "rounds" in study.leakage.at:
        raise UserError(
            "leakage.at: 'rounds' attacks the rounds of a federation, expected a 'federation' section",
            loc=("leakage", "at"),
        )


def _twins(study: Study) -> None:
    same: dict[str, Named] = {}
    for named in study.policies:
        found = study.federation_of(named)
        twin = same.setdefault(canonical([named.table, found and found.model_dump(mode="json")]), named)
        if twin is not named and not (twin.open or named.open):
            with named.document.locating(*named.loc):
                raise UserError(
                    f"policies {twin.label!r} and {named.label!r} are the same table in the same federation, "
                    "expected each one once"
                )


def _rounds(study: Study, federation: Federation) -> None:
    rounds = study.leakage is not None and "rounds" in study.leakage.at
    if rounds != bool(federation.observe):
        missing, where = ("observe: [1, 2]", "leakage") if rounds else ("leakage.at: rounds", "federation")
        key = "at" if rounds else "observe"
        raise UserError(
            f"{where}.{key}: the same record at several rounds needs both, expected {missing}", loc=(where, key)
        )


def _replaced(study: Study) -> None:
    """Settings of one place's training, and of a message of its own, which a federation has itstudy."""
    if study.utility is not None:
        for name in ("epochs", "batch_size", "learning_rate", "optimizer"):
            if name in study.utility.model_fields_set:
                other = "rounds" if name == "epochs" else name
                raise UserError(
                    f"utility.{name}: a federation has its own, expected federation.{other}", loc=("utility", name)
                )
    if study.leakage is not None:
        for name in ("local_steps", "learning_rate", "clients"):
            if getattr(study.leakage.threat, name) != getattr(ThreatModel(), name):
                raise UserError(
                    f"leakage.threat.{name}: the message is the federation's, expected none beside a federation",
                    loc=("leakage", "threat", name),
                )
