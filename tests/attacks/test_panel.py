"""The panel: order, inheritance, skips with a reason, independent draws, and a hash that notices changes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpguard import registry
from dpguard.attacks import panel
from dpguard.attacks.base import Budget, Capability
from dpguard.attacks.observation import Reconstruction
from dpguard.errors import UserError
from tests import messages, tiny

PUBLIC = ("the patient asked for help", "please call her soon about the new card today", "the test is late")


class Fake:
    """An attack that says what it is told to say and draws one number."""

    cite = "a test"

    def __init__(self, name, certain=(False,), reason=""):
        self.name, self.certain, self.reason, self.calls = name, list(certain), reason, 0
        self.told = []
        self.presets = {"default": Budget(1, 1), "long": Budget(9, 9)}
        self.capability = Capability("anything", "nothing")

    def applicable(self, seen):
        return self.reason

    def reconstruct(self, seen, *, rng, budget=None, preset=""):
        self.calls += 1
        self.told.append(seen)
        return Reconstruction(
            [[7]] * len(self.certain), self.certain, notes={"drawn": float(torch.rand(1, generator=rng))}
        )


@pytest.fixture
def fakes(monkeypatch):
    """Replace the registry's modules: name -> attack."""
    known: dict[str, Fake] = {"prior": Fake("prior")}
    real = registry.load

    def load(package, name, kind):
        return SimpleNamespace(PLUGIN=known[name]) if name in known else real(package, name, kind)

    monkeypatch.setattr(registry, "load", load)
    return known


def _seen(texts=1):
    return messages.observe(tiny.loaded("bert"), [], tiny.SENTENCES[:texts], (1, 0, 1)[:texts], public=PUBLIC)[0]


def test_the_floor_runs_first_and_certainty_is_inherited(fakes) -> None:
    fakes |= {"a": Fake("a", [True]), "b": Fake("b")}
    outcomes = panel.run_panel(_seen(), ["a", "b:long", "prior"], seed=0)
    assert [o.attack for o in outcomes] == ["prior", "a", "b:long"]
    assert [o.inherited for o in outcomes] == [False, False, True]
    assert outcomes[2].reconstruction is outcomes[1].reconstruction
    assert (fakes["prior"].calls, fakes["a"].calls, fakes["b"].calls) == (1, 1, 0)
    assert outcomes[2].seconds == 0


@pytest.mark.parametrize("certain", [[True, False], [True], []])
def test_certainty_of_some_texts_stops_nothing(fakes, certain) -> None:
    fakes |= {"a": Fake("a", certain), "b": Fake("b", [False, False])}
    assert not panel.run_panel(_seen(2), ["a", "b"], seed=0)[2].inherited
    assert fakes["b"].calls == 1


def test_when_the_number_of_texts_is_unknown_nothing_is_complete(fakes) -> None:
    fakes |= {"a": Fake("a", [True]), "b": Fake("b")}
    seen = _seen()
    seen = replace(seen, disclosed=replace(seen.disclosed, sequences=None))
    assert not panel.run_panel(seen, ["a", "b"], seed=0)[2].inherited


def test_an_attack_that_cannot_run_is_skipped_with_its_reason(fakes) -> None:
    fakes |= {"a": Fake("a", reason="no linear weight is shared"), "b": Fake("b")}
    skipped = panel.run_panel(_seen(), ["a", "b"], seed=0)[1]
    assert skipped.reconstruction is None
    assert skipped.skipped == "no linear weight is shared"
    assert fakes["a"].calls == 0


def test_an_attack_that_cannot_run_inherits_nothing(fakes) -> None:
    """It would have a score on the messages that were easy for another, and none on the rest."""
    fakes |= {"a": Fake("a", [True]), "b": Fake("b", reason="reads one text at a time"), "c": Fake("c")}
    outcomes = panel.run_panel(_seen(), ["a", "b", "c"], seed=0)
    assert [(o.attack, o.inherited, o.skipped) for o in outcomes[1:]] == [
        ("a", False, ""), ("b", False, "reads one text at a time"), ("c", True, ""),
    ]  # fmt: skip


def test_a_published_attack_answers_for_itself_alone(fakes) -> None:
    """Beside a stronger attack it would show that one's answers as its own; and the panel is no stronger for it."""
    fakes |= {"a": Fake("a", [True]), "b": Fake("b", [True]), "c": Fake("c")}
    fakes["b"].capability = replace(fakes["b"].capability, published=("long",))
    outcomes = panel.run_panel(_seen(), ["a", "b:long", "c"], seed=0)
    assert [o.inherited for o in outcomes[1:]] == [False, False, True]
    assert outcomes[3].reconstruction is outcomes[1].reconstruction
    assert [len(told.earlier) for told in fakes["b"].told] == [0]
    first = panel.run_panel(_seen(), ["b:long", "c"], seed=0)
    assert [o.inherited for o in first[1:]] == [False, False]
    assert [name for name, _ in fakes["c"].told[-1].earlier] == ["prior"]


def test_the_published_presets_of_matching_are_named() -> None:
    assert {name: panel.attack(f"match:{name}").published for name in panel.attack("match").plugin.presets} == {
        "default": False, "demo": False, "partial": True, "lamp": True, "tag": True, "dlg": True,
    }  # fmt: skip


def test_one_attacks_draws_do_not_move_anothers(fakes) -> None:
    fakes |= {"a": Fake("a"), "b": Fake("b")}

    def drawn(names, seed=0):
        return {o.attack: o.reconstruction.notes["drawn"] for o in panel.run_panel(_seen(), names, seed)}

    both, alone = drawn(["a", "b"]), drawn(["b"])
    assert both["b"] == alone["b"]
    assert both["a"] != both["b"]
    assert drawn(["b"], seed=1)["b"] != alone["b"]
    assert panel.attack("b").reconstruct(_seen()).notes["drawn"] == alone["b"]


def test_names_and_presets() -> None:
    bound = panel.attack("match:partial")
    assert (bound.name, bound.preset, bound.budget.steps) == ("match:partial", "partial", 2000)
    assert panel.attack("match").preset == "default"
    assert "2406.00999" in bound.cite
    with pytest.raises(UserError, match="did you mean 'match'"):
        panel.attack("mtach")
    with pytest.raises(UserError, match="did you mean 'partial'"):
        panel.attack("match:partal")


def test_a_misspelt_attack_stops_the_panel_before_any_runs(fakes) -> None:
    with pytest.raises(UserError, match="unknown attack"):
        panel.run_panel(_seen(), ["nosuch"], seed=0)
    assert fakes["prior"].calls == 0


def test_every_panel_names_attacks_that_exist() -> None:
    known = registry.names(panel.PACKAGE)
    for name, attacks in panel.PANELS.items():
        assert attacks[0] == panel.FLOOR, name
        assert {entry.partition(":")[0] for entry in attacks} <= set(known)


def test_a_study_s_attacks_keep_the_panel_s_order_whatever_their_presets() -> None:
    """What weighs the others' answers has to come after all of them."""
    asked = ["combined", "likelihood:quick", "match", "rows", "prior"]
    assert panel.in_order("panel-1", asked) == ["prior", "rows", "match", "likelihood:quick", "combined"]
    assert panel.in_order("demo", ["combined", "match", "match:tag"]) == ["match:demo", "match:tag", "combined"]
    assert panel.in_order("demo", ["combined", "likelihood"]) == ["likelihood", "combined"]
    assert panel.in_order("panel-1", None) == list(panel.PANELS["panel-1"])


def test_the_hash_changes_with_a_source_file_a_preset_or_the_order(monkeypatch, tmp_path) -> None:
    (tmp_path / "one.py").write_text("from dpguard.attacks import helper\nPLUGIN = 1\n")
    (tmp_path / "prior.py").write_text("PLUGIN = 2\n")
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    (tmp_path / "unrelated.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(registry, "names", lambda package: {n: tmp_path / f"{n}.py" for n in ("one", "prior")})
    monkeypatch.setitem(panel.PANELS, "mine", ("prior", "one"))

    def value():
        panel.source_files.cache_clear()
        return panel.panel_hash("mine")

    first = value()
    assert len(first) == 16
    assert value() == first
    (tmp_path / "unrelated.py").write_text("VALUE = 2\n")
    assert value() == first
    (tmp_path / "helper.py").write_text("VALUE = 2\n")
    second = value()
    (tmp_path / "one.py").write_text("from dpguard.attacks.helper import VALUE\nPLUGIN = 2\n")
    third = value()
    monkeypatch.setitem(panel.PANELS, "mine", ("prior", "one:long"))
    assert len({first, second, third, value()}) == 4
    panel.source_files.cache_clear()


def test_panel_1_is_the_panel_that_was_measured() -> None:
    """Records under one name must mean one attacker: a changed attack needs a new panel name. While panel-1 is in no
    release, a new pin here will do, beside new figures in benchmarks/README.md."""
    assert panel.panel_hash("panel-1") == "2cf5e4f5bcbb231c"


def test_the_sources_of_match_are_all_its_parts() -> None:
    files = {path.name for path in panel.source_files(registry.names(panel.PACKAGE)["match"])}
    assert files >= {"match.py", "objective.py", "replay.py", "reorder.py", "guesses.py", "language.py", "base.py"}
    assert "prior.py" not in files


def test_sources_do_not_depend_on_whether_a_disk_tells_case(monkeypatch, tmp_path) -> None:
    (tmp_path / "one.py").write_text("from dpguard.attacks.helper import Helper\nPLUGIN = 1\n")
    (tmp_path / "helper.py").write_text("Helper = 1\n")
    lower = {"one.py", "helper.py"}
    monkeypatch.setattr(Path, "is_file", lambda self, **_: self.name.lower() in lower)
    assert {path.name for path in panel.source_files(tmp_path / "one.py")} == lower


def test_an_unknown_panel_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'panel-1'"):
        panel.panel_hash("panel-11")


def test_listing_attacks_and_hashing_panels_imports_no_torch() -> None:
    code = (
        "import sys; from dpguard.attacks import panel; from dpguard import registry; "
        "print(sorted(registry.names(panel.PACKAGE)), panel.panel_hash('demo')); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'match', 'prior'" in done.stdout
