"""Sweeps over the blocks of whatever model it is, and rows that only some models have."""

from __future__ import annotations

import pytest

from dpguard.errors import UserError
from dpguard.policy.layers import Slot
from dpguard.policy.table import Policy
from dpguard.study.search import searches

HEAD = "name: s\nmodel: m\ndata: d\nutility: {}\npolicies:\n"
PART = """\
  encoder: "block[*]"
  part:
    sweep: {block: BLOCKS, role: [attention.query, mlp]}
    rows: [{layers: all, train: false, share: false}, {layers: "block[$block].$role", train: true, share: true}]
"""


def slots(blocks: int, *outside: str) -> list[Slot]:
    inside = [Slot(f"{b}.{role}", (2, 2), role, b) for b in range(blocks) for role in ("query", "mlp_in")]
    return [Slot("e", (9, 2), "token_embedding"), *inside, *(Slot(role, (2, 2), role) for role in (*outside, "head"))]


def part(kit, blocks: str):
    return kit.study(HEAD + PART.replace("BLOCKS", blocks))


@pytest.mark.parametrize("count", [1, 6, 12])
def test_every_block_of_the_model_is_a_policy_as_if_it_were_listed(kit, count):
    found, listed = part(kit, '"block[*]"').on(slots(count)), part(kit, str(list(range(count))))
    assert [n.label for n in found.policies] == [n.label for n in listed.policies]
    assert found.cells(kit.model, kit.data) == listed.cells(kit.model, kit.data)
    assert found.plain() == listed.plain()
    assert found.on(slots(count)) is found


@pytest.mark.parametrize(("text", "blocks"), [("block[:-1]", [0, 1, 2]), ("block[50%:]", [2, 3]), ("block[-1]", [3])])
def test_some_of_the_blocks(kit, text, blocks):
    found = part(kit, f'"{text}"').on(slots(4))
    assert [n.values["block"] for n in found.policies if n.entry == "part"] == [b for b in blocks for _ in range(2)]


def test_without_a_model_nothing_can_be_run(kit):
    study = part(kit, '"block[*]"')
    assert [n.label for n in study.policies if n.open] == ["part block=* role=attention.query", "part block=* role=mlp"]
    with pytest.raises(ValueError, match="still waits for the model's blocks"):
        study.cells(kit.model, kit.data)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ("blocks", "'blocks' names no blocks; expected a list of values, or 'block[*]' for every block"),
        ('"block[*].mlp"', "'block[*].mlp' names no blocks; expected a list of values, or 'block[*]' for every block"),
        ('"block[a]"', "selector 'block[a]' has block index 'a'; expected 3, -1, *, 0:4, 2: or 0:50%"),
        ('"block[4:]"', "selector 'block[4:]' matches nothing in this model; it has blocks 0 to 3"),
    ],
)
def test_blocks_that_are_not_there(kit, blocks, said):
    with pytest.raises(UserError) as error:
        part(kit, blocks).on(slots(4))
    assert str(error.value) == f"study.yaml:8:20: sweep 'block': {said}"


def test_a_model_without_blocks(kit):
    with pytest.raises(UserError, match=r"'block\[\*\]' matches nothing in this model; it has roles head, token_"):
        part(kit, '"block[*]"').on(slots(0))


def test_a_blocks_number_stands_inside_a_selector(kit):
    with pytest.raises(UserError, match=r"'\$b' is a block's number; expected it inside a selector"):
        kit.study(HEAD + '  a: {sweep: {b: "block[*]"}, rows: [{layers: all, bits: $b}]}\n')


def test_the_same_block_twice_is_noticed_on_the_model(kit):
    text = '  a: {sweep: {b: "block[1:]"}, rows: [{layers: "block[$b]", keep: 0.1}]}\n'
    text += '  b: {rows: [{layers: "block[1]", keep: 0.1}]}\n'
    study = kit.study(HEAD + text)
    with pytest.raises(UserError, match="policies 'a b=1' and 'b' are the same table"):
        study.on(slots(2))


def test_a_value_is_looked_for_in_every_block(kit):
    text = '  a: {sweep: {b: "block[*]", n: {auto: {utility: 0.7}, between: [1, 4]}}, rows: [{layers: all, clip: 1, '
    study = kit.study(HEAD + text + 'noise: $n}, {layers: "block[$b]", keep: 0.1}]}\n').on(slots(3))
    assert [search.label for search in searches(study)] == ["a b=0", "a b=1", "a b=2"]
    assert searches(study)[2].named(2.0).table[1]["layers"] == "block[2]"


OPTIONAL = """\
  a:
    rows:
      - {layers: all, clip: 0.1}
      - {layers: [pooler, head], clip: 2.0, optional: OPTIONAL}
      - {layers: "block[6:]", clip: 1.0, per: block, optional: true}
"""


@pytest.mark.parametrize(
    ("model", "rows"),
    [
        (slots(6), [("all", 0.1), (["head"], 2.0)]),
        (slots(6, "pooler"), [("all", 0.1), (["pooler", "head"], 2.0)]),
        (slots(12), [("all", 0.1), (["head"], 2.0), ("block[6:]", 1.0)]),
    ],
)
def test_an_optional_row_has_those_layers_that_the_model_has(kit, model, rows):
    [_, named] = kit.study(HEAD + OPTIONAL.replace("OPTIONAL", "true")).on(model).policies
    assert [(row["layers"], row["clip"]) for row in named.table] == rows
    assert all("optional" not in row for row in named.table)
    assert named.plan(model)


@pytest.mark.parametrize(
    ("optional", "said"),
    [
        ("2", "study.yaml:9:55: optional is 2; expected true or false"),
        (
            "true}\n      - {layers: head, keep: 0.5",
            "study.yaml:10:9: row 3 is below an optional one; expected optional",
        ),
    ],
)
def test_an_optional_row_that_cannot_be_meant(kit, optional, said):
    with pytest.raises(UserError) as error:
        kit.study(HEAD + OPTIONAL.replace("OPTIONAL", optional))
    assert str(error.value).startswith(said)


def test_a_policy_alone_has_no_open_blocks(tmp_path):
    file = tmp_path / "policy.yaml"
    file.write_text("rows: [{layers: head, clip: 1, optional: true}]\n")
    with pytest.raises(UserError, match="depend on the model; expected them in a study"):
        Policy.load(file)
