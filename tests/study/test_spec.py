from __future__ import annotations

import math
import subprocess
import sys

import pytest

from dpguard.documents import Document
from dpguard.errors import UserError
from dpguard.policy.layers import Slot
from dpguard.study.spec import Study

SLOTS = [
    Slot("embeddings.word", (8, 4), "token_embedding"),
    Slot("layer.0.query", (4, 4), "query", 0),
    Slot("layer.1.query", (4, 4), "query", 1),
    Slot("classifier", (2, 4), "head"),
]

HEAD = "name: s\nmodel: demo\ndata: demo\n"


def refused(text):
    with pytest.raises(UserError) as caught:
        Study.read(Document.parse(text, "study.yaml"))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.startswith("study.yaml:")
    return sentence.removeprefix("study.yaml:")


# Everything of a study file that cannot be meant: the text after the head, and the sentence.
BAD = {
    "misspelt key": (
        "policies: {none: }\nleakge: {}\n",
        "5:1: leakge: unknown key; did you mean 'leakage'?",
    ),
    "misspelt setting": (
        "policies: {none: }\nleakage: {target: 3}\n",
        "5:11: leakage.target: unknown key; did you mean 'targets'?",
    ),
    "misspelt policy": ("policies: {dp-sdg: }\nutility: {}\n", "4:12: unknown policy 'dp-sdg'; did you mean 'dp-sgd'?"),
    "misspelt policy by name": (
        "policies: {mine: last-blok}\nutility: {}\n",
        "4:18: unknown policy 'last-blok'; did you mean 'last-block'?",
    ),
    "misspelt column": (
        "policies:\n  head: {rows: [{layers: head, shar: true}]}\nutility: {}\n",
        "5:38: unknown column 'shar'; did you mean 'share'?",
    ),
    "misspelt layers": (
        "policies:\n  head: {rows: [{layres: head, share: true}]}\nutility: {}\n",
        "5:26: unknown column 'layres'; did you mean 'layers'?",
    ),
    "misspelt rows": (
        "policies:\n  head: {row: []}\nutility: {}\n",
        "5:15: unknown key 'row'; did you mean 'rows'?",
    ),
    "duplicate key": (
        "policies: {none: }\nutility: {epochs: 1, epochs: 2}\n",
        "5:22: key 'epochs' appears twice, first in line 5",
    ),
    "sweep variable that no row uses": (
        "policies:\n  a: {sweep: {nois: [1, 2]}, rows: [{layers: all, clip: 1, noise: $noise}]}\nutility: {}\n",
        "5:21: sweep variable 'nois' is used by no row; expected '$nois' in a row; did you mean 'noise'?",
    ),
    "unknown metric": (
        "policies: {none: }\nleakage: {metric: rougel}\n",
        "5:19: leakage.metric: unknown value 'rougel'; did you mean 'rougeL'?",
    ),
    "unknown attack": (
        "policies: {none: }\nleakage: {attacks: [piror]}\n",
        "5:20: leakage.attacks: unknown attack 'piror'; did you mean 'prior'?",
    ),
    "unknown moment": (
        "policies: {none: }\nleakage: {at: stat}\n",
        "5:15: leakage.at: unknown value 'stat'; did you mean 'start'?",
    ),
    "unknown knowledge": (
        "policies: {none: }\nleakage: {threat: {know: [lables]}}\n",
        "5:27: leakage.threat.know.0: unknown value 'lables'; did you mean 'labels'?",
    ),
    "unknown key of the threat": (
        "policies: {none: }\nleakage: {threat: {local_step: 3}}\n",
        "5:20: leakage.threat.local_step: unknown key; did you mean 'local_steps'?",
    ),
    "boolean as number": (
        "policies: {none: }\nleakage: {targets: no}\n",
        "5:20: leakage.targets: 'no' is read as False by YAML, expected a whole number above 0",
    ),
    "fraction as count": (
        "policies: {none: }\nleakage: {targets: 2.5}\n",
        "5:20: leakage.targets: found 2.5, expected a whole number above 0",
    ),
    "negative number": (
        "policies: {none: }\nutility: {learning_rate: -1e-3}\n",
        "5:26: utility.learning_rate: found -0.001, expected a number above 0, or public",
    ),
    "a rate left out": (
        "policies: {none: }\nutility: {learning_rate: }\n",
        "5:11: utility.learning_rate: found nothing, expected a number above 0, or public",
    ),
    "a list of rates": (
        "policies: {none: }\nutility: {learning_rate: [1]}\n",
        "5:26: utility.learning_rate: found a list, expected a number above 0, or public",
    ),
    "no finite number": (
        "policies: {none: }\nutility: {epochs: .inf}\n",
        "5:19: utility.epochs: found inf, expected a number above 0",
    ),
    "same seed twice": (
        "policies: {none: }\nutility: {seeds: [1, 1]}\n",
        "5:18: utility.seeds: a value appears twice in [1, 1], expected distinct values",
    ),
    "no seeds": (
        "policies: {none: }\nutility: {seeds: []}\n",
        "5:18: utility.seeds: found an empty list, expected distinct whole numbers from 0 on, such as [0, 1, 2]",
    ),
    "empty section": (
        "policies: {none: }\nleakage:\nutility: {}\n",
        "5:1: leakage: found nothing, expected a mapping such as {targets: 20}, or no leakage key at all",
    ),
    "delta of one": (
        "policies: {none: }\nutility: {}\nprivacy: {delta: 1}\n",
        "6:18: privacy.delta: found 1, expected a number above 0 and below 1",
    ),
    "cap out of range": (
        "policies: {none: }\nleakage: {}\nrecommend: {max_leakage: 20}\n",
        "6:26: recommend.max_leakage: found 20, expected a number from 0 to 1",
    ),
    "cap without its leg": (
        "policies: {none: }\nleakage: {}\nrecommend: {min_utility: .8}\n",
        "6:26: recommend.min_utility: nothing measures it, expected a 'utility' section",
    ),
    "end without training": (
        "policies: {none: }\nleakage: {at: [start, end]}\n",
        "5:15: leakage.at: 'end' attacks the weights that the utility leg ends with, expected a 'utility' section",
    ),
    "nothing measured": (
        "policies: {none: }\n",
        "1:1: the study measures nothing, expected a 'leakage' or a 'utility' section",
    ),
    "no policies": (
        "policies: {}\nutility: {}\n",
        "4:11: policies: found an empty mapping, expected a mapping of names to policies",
    ),
    "policies as a list": (
        "policies: [none]\nutility: {}\n",
        "4:11: policies: found a list, expected a mapping of names to policies",
    ),
    "policy that is a number": (
        "policies: {a: 5}\nutility: {}\n",
        "4:15: policy 'a' is 5, expected {rows: [...]}, a ready-made policy's name or a policy file",
    ),
    "a defended control": (
        "policies: {none: {rows: [{layers: all, clip: 1}]}}\nutility: {}\n",
        "4:18: 'none' is the undefended control of every study, expected another name for this",
    ),
    "one table twice": (
        "policies: {a: last-block, last-block: }\nutility: {}\n",
        "4:27: policies 'a' and 'last-block' are the same table, expected each one once",
    ),
    "federation": (
        "policies: {none: }\nutility: {}\nfederation: {clients: 20}\n",
        "6:1: federation.per_round: missing, expected a whole number above 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_one_sentence(name):
    text, sentence = BAD[name]
    assert refused(HEAD + text) == sentence


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("keep: 1.5", ["5:37", "keep", "1.5", "at most 1"]),
        ("clip: no", ["5:37", "False", "YAML", "expected a number above 0"]),
        ("clip: [1]", ["5:37", "clip", "expected a number above 0"]),
    ],
)
def test_a_bad_value_in_a_policy_has_its_place(value, words):
    sentence = refused(f"{HEAD}policies:\n  mine: {{rows: [{{layers: all, {value}}}]}}\nutility: {{}}\n")
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("name", ["../up", "a b", "", "é"])
def test_a_name_must_be_able_to_name_a_folder(name):
    sentence = refused(f"name: '{name}'\nmodel: demo\ndata: demo\npolicies: {{none: }}\nutility: {{}}\n")
    assert sentence.startswith(f"1:7: name: found {name!r}, expected letters, digits")


def test_data_needs_a_path():
    sentence = refused("name: s\nmodel: demo\ndata: {text: t}\npolicies: {none: }\nutility: {}\n")
    assert sentence == "3:1: data.path: missing, expected 'demo', a file of texts or a hub name"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("layers: 'block[9]', share: false", ["5:26", "'block[9]' matches nothing"]),
        ("layers: all, noise: 1.0", ["5:38", "without a clip"]),
    ],
)
def test_what_does_not_fit_the_model_has_its_place(row, words):
    text = f"{HEAD}policies:\n  mine: {{rows: [{{{row}}}]}}\nutility: {{}}\n"
    study = Study.read(Document.parse(text, "study.yaml"))
    with pytest.raises(UserError) as caught:
        study.plans(SLOTS)
    assert str(caught.value).startswith(f"study.yaml:{words[0]}: ")
    assert all(word in str(caught.value) for word in words)


def test_plans_are_the_policies_resolved(kit):
    text = kit.text.replace("last-block:", "head-only:")
    plans = kit.study(text).plans(SLOTS)
    assert list(plans) == ["none", "dp-sgd noise=0.3", "dp-sgd noise=0.6", "head-only"]
    assert plans["head-only"].shared == ("classifier",)
    assert plans["dp-sgd noise=0.6"]["classifier"].noise == 0.6


def test_defaults_and_short_forms():
    study = Study.read(Document.parse(f"{HEAD}policies: {{dp-sgd: }}\nleakage: {{seeds: 3, at: start}}\n"))
    assert study.data.path == "demo"
    assert (study.data.text, study.data.label) == ("text", "label")
    assert study.leakage.seeds == (3,)
    assert study.leakage.at == ("start",)
    assert study.utility is None
    assert study.plain()["privacy"] == {"delta": 1e-5}
    assert math.isclose(study.privacy.delta, 1e-5)


def test_numbers_may_be_written_in_any_form():
    text = f"{HEAD}policies: {{none: }}\nutility: {{learning_rate: 1e-1, epochs: '2', batch_size: 1e2}}\n"
    utility = Study.read(Document.parse(text)).utility
    assert (utility.learning_rate, utility.epochs, utility.batch_size) == (0.1, 2.0, 100)


def test_the_controls_cannot_be_switched_off():
    study = Study.read(Document.parse(f"{HEAD}policies: {{dp-sgd: }}\nleakage: {{attacks: prior}}\n"))
    assert [named.label for named in study.policies] == ["none", "dp-sgd"]
    assert study.policies[0].table == []
    assert study.leakage.attacks == ("prior",)
    kept = Study.read(Document.parse(f"{HEAD}policies: {{dp-sgd: , none: }}\nutility: {{}}\n"))
    assert [named.label for named in kept.policies] == ["dp-sgd", "none"]


def test_policies_from_names_files_selectors_and_rows(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\nrows: [{layers: head, share: false}]\n")
    (tmp_path / "study.yaml").write_text(
        HEAD + "policies:\n  one: dp-sgd\n  two: mine.yaml\n  three: 'block[0].attention.query'\n"
        "  four: {rows: [{layers: all, bits: 8}]}\nutility: {}\n"
    )
    tables = {named.label: named.table for named in Study.load(tmp_path / "study.yaml").policies}
    assert tables["one"] == [{"layers": "all", "clip": 1.0, "noise": 0.8}]
    assert tables["two"] == [{"layers": "head", "share": False}]
    assert tables["three"][1]["layers"] == "block[0].attention.query"
    assert tables["four"] == [{"layers": "all", "bits": 8}]


def test_a_mistake_in_a_policy_file_is_placed_in_that_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: x\nrows:\n  - {layers: head, keep: 1.5}\n")
    (tmp_path / "study.yaml").write_text(HEAD + "policies:\n  two: mine.yaml\nutility: {}\n")
    with pytest.raises(UserError) as caught:
        Study.load(tmp_path / "study.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}:3:26: keep is 1.5")
    (tmp_path / "study.yaml").write_text(HEAD + "policies:\n  two: mien.yaml\nutility: {}\n")
    with pytest.raises(UserError, match=r"mien\.yaml: no such file"):
        Study.load(tmp_path / "study.yaml")


def test_files_are_found_beside_the_study_or_from_here(tmp_path):
    (tmp_path / "study.yaml").write_text(HEAD + "policies: {none: }\nutility: {}\n")
    (tmp_path / "train.jsonl").write_text("")
    study = Study.load(tmp_path / "study.yaml")
    assert study.locate("train.jsonl") == tmp_path / "train.jsonl"
    assert str(study.locate("elsewhere.jsonl")) == "elsewhere.jsonl"


def test_reading_and_planning_a_study_imports_no_numeric_library():
    code = (
        "import sys\n"
        "import dpguard.study.spec, dpguard.study.store, dpguard.study.runner\n"
        "heavy = {'torch', 'opacus', 'transformers', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ROWS = "rows: [{layers: all, clip: 1.0, noise: 1.0}]\n"
FEDERATION = "federation: {clients: 4, per_round: 2, rounds: 3}\n"


@pytest.mark.parametrize(
    ("policy", "rest", "sentence"),
    [
        (ROWS + "federation: {view: agregate}\n", FEDERATION, "p.yaml:2:20: federation.view: unknown value 'agregate'"),
        (ROWS + "federation: {view: aggregate, may_fail: 2}\n", FEDERATION, "p.yaml:2:41: federation.may_fail: 2 of 2"),
        (ROWS + "federation: {engine: flower}\n", FEDERATION, "p.yaml:2:22: federation.engine: one for all policies"),
        (ROWS + "federation: {view: aggregate}\n", "", "p.yaml:2:13: policy 'mine' sets a federation of its own"),
        (ROWS.replace("1.0}", "2}") + "epsilon: 3\n", FEDERATION, "p.yaml:2:10: epsilon: the federation says how long"),
        (ROWS + "utility: {epochs: 3}\n", "", "p.yaml:2:10: policy 'mine' sets a training of its own"),
        (ROWS + "utility: {epochs: 3}\n", "utility: {epochs: 3}\n", "p.yaml:1:1: policies 'inline' and 'mine' are"),
        (ROWS + "federation: {view: client}\n", FEDERATION, "p.yaml:1:1: policies 'inline' and 'mine' are"),
        ("sweep: {n: {auto: {utility: 0.7}, between: [2, 4]}}\nrows: [{layers: all, clip: 1.0, noise: $n}]\n", "",
         "p.yaml:1:19: auto: nothing measures utility"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_policys_own_file_has_its_place_there(tmp_path, policy, rest, sentence):
    (tmp_path / "p.yaml").write_text(policy)
    inline = "{rows: [{layers: all, clip: 1.0, noise: 1.0}]}"
    text = f"{HEAD}policies:\n  inline: {inline}\n  mine: p.yaml\nleakage: {{targets: 2}}\n{rest}"
    with pytest.raises(UserError) as caught:
        Study.read(Document.parse(text, str(tmp_path / "study.yaml")))
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(sentence)
