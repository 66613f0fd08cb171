"""What a federation's server sees of a victim: the messages of one client in a round, or their mean, at given weights.

A victim's texts are in every local step of its message, as if they were all that it has: the worst case for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dpguard.engine import noise
from dpguard.engine.client import Client
from dpguard.engine.local import LocalState, LocalTraining
from dpguard.engine.update import Update
from dpguard.errors import UserError
from dpguard.federation import personal, views
from dpguard.federation.server import mean_update
from dpguard.federation.settings import Settings
from dpguard.federation.turn import local_training
from dpguard.inputs.batch import Batch
from dpguard.inputs.models import LoadedModel
from dpguard.measure.leakage import Score
from dpguard.measure.metrics import rouge
from dpguard.measure.threat import Threat
from dpguard.policy.guarantee import Guarantee
from dpguard.policy.table import Plan


@dataclass(frozen=True)
class FederatedThreat(Threat):
    """The threat model of a federation: what is disclosed is the study's, the message is the federation's.

    Attributes:
        settings: the federation.
        states: what the clients of the message have at home, one each, which no server has; brought up to date by
            `message`. Empty: they took part in no round yet.
        round_: of the message; the public seed of random pruning masks.
    """

    settings: Settings = Settings(clients=1, per_round=1, rounds=1)  # noqa: RUF009 (frozen)
    states: tuple[LocalState, ...] = field(default=(), repr=False)
    round_: int = 1

    @staticmethod
    def within(
        known: Threat, settings: Settings, *, states: Sequence[LocalState] = (), round_: int = 1
    ) -> FederatedThreat:
        """A study's threat model inside a federation.

        Raises:
            UserError: local steps, a learning rate or clients of its own: the federation has them.
        """
        plain = Threat()
        for name in ("local_steps", "learning_rate", "clients"):
            if getattr(known, name) != getattr(plain, name):
                raise UserError(
                    f"{name}: a study with a federation takes it from there, expected none here", loc=(name,)
                )
        return FederatedThreat(
            know=known.know,
            mode=known.mode,
            local_steps=0 if settings.kind == "gradient" else settings.local_steps,
            learning_rate=settings.learning_rate,
            clients=settings.summed,
            settings=settings,
            states=tuple(states),
            round_=round_,
        )

    def linear(self) -> FederatedThreat:
        """Plain SGD for Adam; see `Threat.linear`."""
        if self.settings.optimizer == "sgd":
            return self
        return replace(self, settings=replace(self.settings, optimizer="sgd", keep_state=False))

    def message(
        self,
        model: LoadedModel,
        plan: Plan,
        batches: Sequence[Batch],
        *,
        noise_seed: int | None,
        texts: bool = True,
    ) -> Update:
        """What the server receives when every batch is one client's; see `Threat.message`.

        ``plan`` is the clients' own (`views.message_plan`), so the attacker knows their shares of the noise too. The
        divisor is the number of texts, and the step size is as much smaller as the federation's divisor is larger:
        the change of the weights is to the entry the one that a client with just these texts would send. A gradient
        differs from that client's by the public factor between the two divisors.
        """
        sent = []
        for number, batch in enumerate(batches):
            seed = None if noise_seed is None else noise_seed + 7_919 * number
            divisor = self._divisor(plan, len(batch))
            client = Client(
                model.module, plan, seed=seed, batch_size=divisor, mode=self.mode, mask_seed=self.round_,
                dropout_seed=(seed or 0) + 1, training=self._training(divisor),
            )  # fmt: skip
            client.state = self.states[number] if self.states else LocalState()
            drawn = batch if texts else batch.rows(slice(0, 0))
            if self.settings.kind == "gradient":
                sent.append(personal.gradient(client, drawn, noise.source(seed)))
            else:
                sent.append(client.observe([drawn] * self.settings.local_steps))
        return mean_update(sent)

    def _divisor(self, plan: Plan, texts: int) -> int:
        """The number of texts where a divisor only sets a scale, the federation's where it changes the message.

        It does under Adam, with moments of earlier messages, and where a whole gradient is clipped or gets noise of an
        absolute size.
        """
        settings = self.settings
        absolute = plan.unit == "update" or any(plan[name].noise_std for name in plan.shared)
        fixed = absolute if settings.kind == "gradient" else settings.optimizer == "adam" or settings.keep_state
        return settings.batch_size if fixed else texts

    def _training(self, divisor: int) -> LocalTraining:
        plain = local_training(self.settings)
        return replace(plain, learning_rate=plain.learning_rate * divisor / self.settings.batch_size)


def several(found: Sequence[Sequence[Score]]) -> list[Score]:
    """One answer a text and attack from what was recovered at several rounds of the same record.

    What an attack is certain of stands; else the rounds vote: the guess that agrees best (mean ROUGE-L) with the
    other rounds' guesses, the earliest on a tie. The truth plays no part in the choice.

    Args:
        found: for every round the scores of all texts and attacks.
    """
    by_place: dict[tuple[int, str], list[Score]] = {}
    for scores in found:
        for score in scores:
            by_place.setdefault((score.target, score.attack), []).append(score)
    out = []
    for same in by_place.values():
        sure = [score for score in same if score.certain]
        out.append(sure[0] if sure else same[_vote([score.guess for score in same])])
    return out


def _vote(guesses: Sequence[str]) -> int:
    def agreement(index: int) -> float:
        others = [guess for number, guess in enumerate(guesses) if number != index]
        return sum(rouge(guesses[index], other)["rougeL"] for other in others)

    return max(range(len(guesses)), key=lambda index: (agreement(index), -index))


def record_bound(found: Guarantee, plan: Plan, settings: Settings, messages: int, kappas: Sequence[float]) -> str:
    """What the guarantee says of a server that sees so many messages of one and the same record, in words.

    Args:
        found: the federation's guarantee.
        plan: the policy resolved against the model.
        settings: the federation.
        messages: how many messages hold the record, in every one of their steps.
        kappas: chances of success without the messages.
    """
    steps = messages * views.messages_a_round(plan, settings)
    first = f"{messages} message{'s' if messages > 1 else ''} of the same record"
    if not found.formal:
        return f"{first}: no bound, because there is no formal guarantee."
    each = ", ".join(f"{found.bound(kappa, steps):.3g} where it is {kappa:g} without them" for kappa in kappas)
    return f"{first}, {steps} noised steps in all: the chance of recovering it is at most {each}."
