from __future__ import annotations

import pytest
import torch

from dpguard.engine import gradients
from dpguard.errors import UserError
from dpguard.inputs import models
from dpguard.inputs.batch import collate
from dpguard.inputs.family import family_of, slots
from tests import tiny


def save(folder, family="bert"):
    tiny.module(family).save_pretrained(folder)
    tiny.tokenizer(family == "gpt2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_local_folder_of_every_family(tmp_path, family):
    found = models.load(str(save(tmp_path, family)))
    assert found.family.name == family
    assert found.max_tokens in (47, 48)
    assert found.tokenizer.pad_token_id is not None
    assert not found.module.training
    batch = collate(tiny.SENTENCES, [0, 1, 0], found.tokenizer)
    assert gradients.per_example_losses(found.module, batch).shape == (3,)
    assert models.load(str(tmp_path)).fingerprint == found.fingerprint


def test_the_fingerprint_and_the_fresh_head_follow_weights_and_seed(tmp_path):
    folder = str(save(tmp_path))
    assert models.load(folder, labels=3, seed=0).fingerprint == models.load(folder, labels=3, seed=0).fingerprint
    assert models.load(folder, labels=3, seed=0).fingerprint != models.load(folder, labels=3, seed=1).fingerprint


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_in_place_of_ids_give_the_same_losses(family):
    model = tiny.loaded(family)
    batch = collate(tiny.SENTENCES, [0, 1, 0], model.tokenizer)
    embeddings = model.module.get_input_embeddings()(batch.input_ids)
    direct = gradients.per_example_losses(model.module, batch)
    through = gradients.per_example_losses(model.module, batch, embeddings=embeddings)
    assert torch.allclose(direct, through, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_changes_no_loss(family):
    model = tiny.loaded(family)
    together = collate(tiny.SENTENCES, [0, 1, 0], model.tokenizer)
    alone = [gradients.per_example_losses(model.module, together.rows(slice(i, i + 1))) for i in range(3)]
    assert torch.allclose(gradients.per_example_losses(model.module, together), torch.cat(alone), atol=1e-5)


def test_bad_models_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is no model: expected a config\.json"):
        models.load(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no model folder '\./nowhere'"):
        models.load("./nowhere")
    (tmp_path / "file.bin").write_text("x")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        models.load(str(tmp_path / "file.bin"))
    tiny.module("bert").save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"has no tokenizer; expected tokenizer\.json"):
        models.load(str(tmp_path / "bare"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no model hub can be reached"):
        models.load("some-company/some-model")


def test_an_unreachable_hub_is_told_at_once(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _s: pytest.fail("a retry"))
    assert not models.hub_reachable()
    with pytest.raises(UserError, match="no model hub can be reached"):
        models.load("some-model")


def test_a_parameter_of_no_known_role_is_named():
    model = tiny.module("bert")
    model.gadget = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"parameter 'gadget\.weight' has no known role in family 'bert'"):
        slots(model)


def test_a_family_that_nobody_knows():
    with pytest.raises(UserError, match="model type 'Linear' belongs to no known family"):
        family_of(torch.nn.Linear(2, 2))


def test_minilm_is_the_pretrained_one(minilm):
    assert sum(p.numel() for p in minilm.module.parameters()) == 22_713_986
    assert (minilm.family.name, minilm.max_tokens) == ("bert", 512)
