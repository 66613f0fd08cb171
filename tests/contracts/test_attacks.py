"""What every attack must keep, on every model family: one suite, run on each file that registers an attack."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dpguard import registry
from dpguard.attacks import panel
from dpguard.attacks.base import Budget
from dpguard.attacks.observation import Disclosed, Observation
from tests import messages, tiny

ATTACKS = sorted(registry.names(panel.PACKAGE))
SMALL = Budget(steps=4, candidates=60, restarts=2)
PUBLIC = ("the patient asked for help", "please call her soon about the new card today", "the test is late")
BLIND = {"prior"}
"""Attacks that never read the message."""

every_attack = pytest.mark.parametrize("name", ATTACKS)
every_family = pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama", "llama-lora"])


def _seen(family: str, texts: int = 1, **options):
    options.setdefault("public", PUBLIC)
    return messages.observe(tiny.loaded(family), [], tiny.SENTENCES[:texts], (1, 0, 1)[:texts], **options)[0]


def _run(name: str, seen: Observation, seed: int = 0, budget: Budget = SMALL):
    """A reconstruction, or a skip with the attack's own reason."""
    attack = panel.attack(name)
    reason = attack.applicable(seen)
    assert isinstance(reason, str)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return attack.reconstruct(seen, rng=torch.Generator().manual_seed(seed), budget=budget)


def _state(model):
    """Everything about a model that an attack could leave changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "wanted": {k: (p.requires_grad, p.grad is None) for k, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "rates": [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)],
        "hooks": [len(getattr(m, h)) for m in model.modules() for h in hooks],
    }


def _same(left, right) -> bool:
    weights = all(torch.equal(left["weights"][k], right["weights"][k]) for k in left["weights"])
    return weights and all(left[k] == right[k] for k in left if k != "weights")


@every_attack
def test_it_says_where_it_comes_from_and_what_it_may_spend(name: str) -> None:
    plugin = panel.attack(name).plugin
    assert plugin.name == name
    assert plugin.cite.strip()
    assert plugin.presets
    assert all(isinstance(budget, Budget) and budget.steps >= 0 for budget in plugin.presets.values())
    assert set(plugin.capability.published) <= set(plugin.presets)
    assert registry.summary(registry.names(panel.PACKAGE)[name])


@every_family
@every_attack
def test_same_seed_same_answer_and_token_ids_of_the_vocabulary(name: str, family: str) -> None:
    seen = _seen(family)
    first, second = _run(name, seen), _run(name, seen)
    assert first.sequences == second.sequences
    assert first.certain == second.certain
    assert (first.steps, first.candidates) == (second.steps, second.candidates)
    assert len(first.certain) == len(first.sequences) <= 1
    rows = seen.model.config.vocab_size
    assert all(isinstance(t, int) and 0 <= t < rows for ids in first.sequences for t in ids)


@every_family
@every_attack
def test_it_leaves_the_model_the_message_and_the_global_generator_alone(name: str, family: str) -> None:
    seen = _seen(family)
    for module in (seen.model, *list(seen.model.modules())[3:5]):
        module.train()  # a mixture of modes, which has to come back as it was
    before, message = _state(seen.model), {k: v.clone() for k, v in seen.message.items()}
    drawn = torch.random.get_rng_state()
    _run(name, seen)
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert _same(before, _state(seen.model))
    assert message.keys() == seen.message.keys()
    assert all(torch.equal(message[k], seen.message[k]) for k in message)


@every_attack
def test_neither_labels_nor_lengths_are_needed(name: str) -> None:
    found = _run(name, _seen("bert", tell=()))
    assert len(found.sequences) == len(found.certain) == 1


@every_attack
def test_a_batch_gives_at_most_one_guess_a_text(name: str) -> None:
    found = _run(name, _seen("bert", texts=3))
    assert len(found.sequences) == len(found.certain) <= 3


@every_family
@pytest.mark.parametrize("spoil", [messages.shuffled, messages.noise])
@every_attack
def test_it_is_never_certain_of_a_message_that_says_nothing(name: str, spoil, family: str) -> None:
    for seed in range(2):
        assert not any(_run(name, spoil(_seen(family), seed=seed), seed=seed).certain)


@every_attack
def test_a_message_of_nothing_is_refused_with_a_reason(name: str) -> None:
    if name in BLIND:
        pytest.skip(f"{name} never reads the message")
    reason = panel.attack(name).applicable(replace(_seen("bert"), message={}))
    assert len(reason.split()) >= 3


@every_attack
def test_its_sources_import_neither_the_judge_nor_the_client(name: str) -> None:
    allowed = {"dpguard.engine.wire", "dpguard.engine.gradients"}
    for path in panel.source_files(registry.names(panel.PACKAGE)[name]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "dpguard.engine":
                modules = [f"dpguard.engine.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            assert not any(m.startswith(("dpguard.measure", "opacus")) for m in modules), path
            assert all(m in allowed for m in modules if m.startswith("dpguard.engine")), path


def test_an_observation_has_no_room_for_the_truth() -> None:
    assert {f.name for f in fields(Observation)} == {"message", "model", "disclosed", "earlier"}
    known = {"tokenizer", "plan", "batch_size", "sequences", "kind", "mode", "public_texts", "labels", "lengths"}
    known |= {"candidates", "mask_seed", "local_steps", "learning_rate", "clients", "momentum"}
    assert {f.name for f in fields(Disclosed)} == known


@every_attack
def test_its_row_of_capabilities_decides_with_a_reason(name: str) -> None:
    attack = panel.attack(name)
    row = attack.plugin.capability
    assert row.reads.strip()
    assert row.cannot.strip()
    assert row.blind == (name in BLIND)
    seen = _seen("bert")
    told = seen.disclosed
    for changed, able in (
        (replace(told, kind="delta"), "delta" in row.kinds),
        (replace(told, kind="video"), row.blind),
        (replace(told, sequences=3), row.several),
        (replace(told, sequences=None, batch_size=2), row.several),
    ):
        assert able or attack.applicable(replace(seen, disclosed=changed))
    assert row.tokens or "predicts tokens" in attack.applicable(_seen("gpt2-lm"))


def test_the_documented_table_of_capabilities_is_the_one_that_decides() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attacks.md").read_text("utf-8")
    for name in ATTACKS:
        row = panel.attack(name).plugin.capability
        kinds = ", ".join("update" if kind == "delta" else kind for kind in row.kinds)
        several = "any number" if row.several else "one"
        assert f"| `{name}` | {row.reads} | {kinds} | {several} | {row.cannot} |" in page, name
