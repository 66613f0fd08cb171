from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dpguard.engine import gradients
from dpguard.errors import UserError
from dpguard.inputs import adapters, models
from dpguard.inputs.batch import collate
from dpguard.inputs.family import family_of, slots
from tests import tiny

every_type = pytest.mark.parametrize("family", tiny.ROWS)


def save(folder, family="bert"):
    tiny.module(family).save_pretrained(folder)
    tiny.tokenizer(tiny.families_by_type()[family].causal).save_pretrained(folder)
    return folder


def save_adapter(tmp_path, family="bert", *, base=None, **options):
    """A base model's folder and an adapter's beside it, as PEFT saves them after training."""
    save(tmp_path / "base", family)
    adapter = tiny.lora(models.load(str(tmp_path / "base")).module, **options)
    adapter.save_pretrained(tmp_path / "adapter")
    if base is not None:
        configure(tmp_path, base_model_name_or_path=base)
    return tmp_path / "adapter"


def configure(tmp_path, **changes):
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@every_type
def test_a_local_folder_of_every_family(tmp_path, family):
    found = models.load(str(save(tmp_path, family)))
    assert family in found.family.model_types
    assert found.max_tokens in (47, 48)
    assert found.tokenizer.pad_token_id is not None
    assert not found.module.training
    batch = collate(tiny.SENTENCES, [0, 1, 0], found.tokenizer)
    assert gradients.per_example_losses(found.module, batch).shape == (3,)
    assert models.load(str(tmp_path)).fingerprint == found.fingerprint


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_pads_as_its_tokenizer_does(tmp_path, family):
    folder = save(tmp_path, family)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, "pad_token_id": 3}))
    found = models.load(str(folder))
    assert found.module.config.pad_token_id == found.tokenizer.pad_token_id != 3
    texts = ["a short text", "a much longer text about a film that went on and on"]
    both = gradients.per_example_losses(found.module, collate(texts, [0, 1], found.tokenizer))
    alone = gradients.per_example_losses(found.module, collate(texts[:1], [0], found.tokenizer))
    assert torch.allclose(both[:1], alone, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x80\x02 no weights"])
def test_damaged_weights_are_one_sentence(tmp_path, content):
    folder = save(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(str(folder))


def test_the_fingerprint_and_the_fresh_head_follow_weights_and_seed(tmp_path):
    folder = str(save(tmp_path))
    assert models.load(folder, seed=0).fingerprint == models.load(folder, seed=1).fingerprint
    tiny.headless(tmp_path)
    assert models.load(folder, labels=3, seed=0).fingerprint == models.load(folder, labels=3, seed=0).fingerprint
    assert models.load(folder, labels=3, seed=0).fingerprint != models.load(folder, labels=3, seed=1).fingerprint


@every_type
def test_embeddings_in_place_of_ids_give_the_same_losses(family):
    model = tiny.loaded(family)
    batch = collate(tiny.SENTENCES, [0, 1, 0], model.tokenizer)
    embeddings = model.module.get_input_embeddings()(batch.input_ids)
    direct = gradients.per_example_losses(model.module, batch)
    through = gradients.per_example_losses(model.module, batch, embeddings=embeddings)
    assert torch.allclose(direct, through, atol=1e-5)


@every_type
def test_padding_changes_no_loss(family):
    model = tiny.loaded(family)
    together = collate(tiny.SENTENCES, [0, 1, 0], model.tokenizer)
    alone = [gradients.per_example_losses(model.module, together.rows(slice(i, i + 1))) for i in range(3)]
    assert torch.allclose(gradients.per_example_losses(model.module, together), torch.cat(alone), atol=1e-5)


def test_bad_models_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is no model: expected a config\.json"):
        models.load(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no model folder '\./nowhere'.*or a hub name$"):
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


def test_a_misspelt_folder_has_its_neighbour_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ward-model").mkdir()
    (tmp_path / "ward-modle.txt").write_text("no folder")
    for name in ("./ward-modle", str(tmp_path / "ward-modle"), "ward-modle", "ward modle"):
        with pytest.raises(UserError, match=r"; did you mean 'ward-model'\?$"):
            models.load(name)


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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_adapter_folder_brings_its_base_model(tmp_path, family):
    folder = save_adapter(tmp_path, family)
    found = models.load(str(folder))
    trainable = {slot.role for slot in slots(found.module) if slot.trainable}
    assert trainable == {"adapter_a", "adapter_b", "head"}
    assert (found.family.name, found.max_tokens) == (family, 48)
    assert not found.module.training
    saved = load_file(folder / "adapter_model.safetensors")
    state = found.module.state_dict()
    for name, value in saved.items():
        inside = name if name in state else name.replace(".weight", ".default.weight")
        inside = inside if inside in state else name.replace("classifier.", "classifier.modules_to_save.default.")
        inside = inside if inside in state else name.replace("score.", "score.modules_to_save.default.")
        assert torch.equal(state[inside], value), name
    plain = models.load(str(tmp_path / "base"))
    batch = collate(tiny.SENTENCES, [0, 1, 0], plain.tokenizer)
    losses = [gradients.per_example_losses(model.module, batch) for model in (plain, found)]
    assert not torch.allclose(*losses, atol=1e-3)
    assert models.load(str(folder)).fingerprint == found.fingerprint != plain.fingerprint


def test_an_adapters_base_may_be_named_relatively_or_be_bundled(tmp_path):
    folder = save_adapter(tmp_path, base="../base")
    assert models.load(str(folder)).family.name == "bert"
    adapter = tiny.lora(models.load("demo").module)
    adapter.save_pretrained(tmp_path / "on-demo")
    file = tmp_path / "on-demo" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "demo"}))
    assert models.load(str(tmp_path / "on-demo")).tokenizer.get_vocab() == models.load("demo").tokenizer.get_vocab()


def test_bad_adapters_are_one_sentence(tmp_path):
    folder = save_adapter(tmp_path)
    configure(tmp_path, base_model_name_or_path="../gone")
    with pytest.raises(UserError, match=r"base model of adapter '.*adapter' is missing: no model folder '\.\./gone'"):
        models.load(str(folder))
    configure(tmp_path, base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base model; expected base_model_name_or_path"):
        models.load(str(folder))
    configure(tmp_path, base_model_name_or_path=str(tmp_path / "base"), task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="task_type 'CAUSAL_LM'; expected 'SEQ_CLS'"):
        models.load(str(folder))
    configure(tmp_path, task_type="SEQ_CLS", target_modules=["q_proj"])
    with pytest.raises(UserError, match="does not fit its base model: No modules were targeted"):
        models.load(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is no JSON"):
        models.load(str(folder))


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("file", adapters.WEIGHTS)
def test_an_adapter_brings_its_own_head(tmp_path, family, file):
    """Its classes are those that it was trained for, whatever the base model's head or the texts have."""
    save(tmp_path / "base", family)
    made = tiny.lora(tiny.module(family, labels=5))
    made.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter", safe_serialization=file == adapters.WEIGHTS[0])
    assert (tmp_path / "adapter" / file).is_file()
    for labels in (2, 5, 9):
        assert models.load(str(tmp_path / "adapter"), labels=labels).classes == 5


def test_an_adapter_with_missing_matrices_is_refused(tmp_path):
    folder = save_adapter(tmp_path)
    file = folder / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if "layer.0." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit its base model: Found missing adapter keys"):
        models.load(str(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"has no weights; expected adapter_model\.safetensors"):
        models.load(str(folder))


def test_an_adapter_without_peft_says_what_to_install(tmp_path, monkeypatch):
    folder = save_adapter(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"needs PEFT; install it with: pip install 'dpguard\[lora\]'"):
        models.load(str(folder))


def test_a_kind_of_adapter_that_no_rule_knows_is_named():
    dora = tiny.lora(tiny.module("bert"), use_dora=True)
    with pytest.raises(UserError, match=r"lora_magnitude_vector.*kind of adapter that no rule knows.*use_dora=False"):
        slots(dora)
    import peft

    for config in (
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]),
        peft.LoHaConfig(task_type="SEQ_CLS", target_modules=["query"]),
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    ):
        with pytest.raises(UserError, match="kind of adapter that no rule knows"):
            slots(peft.get_peft_model(tiny.module("bert"), config))


def test_minilm_is_the_pretrained_one(minilm):
    assert sum(p.numel() for p in minilm.module.parameters()) == 22_713_986
    assert (minilm.family.name, minilm.max_tokens) == ("bert", 512)


def test_what_reads_the_weights_has_a_hash_of_its_own(tmp_path):
    """The same weights under another activation, fewer heads or two words exchanged are another model."""
    plain = models.load(str(save(tmp_path / "plain")))
    assert models.load(str(shutil.copytree(tmp_path / "plain", tmp_path / "elsewhere"))).reading == plain.reading
    for k, change in enumerate(({"hidden_act": "relu"}, {"num_attention_heads": 1})):
        folder = shutil.copytree(tmp_path / "plain", tmp_path / str(k))
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config | change), "utf-8")
        changed = models.load(str(folder))
        assert changed.fingerprint == plain.fingerprint
        assert changed.reading != plain.reading
    folder = shutil.copytree(tmp_path / "plain", tmp_path / "words")
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = found["model"]["vocab"]
    one, two = list(words)[10:12]
    words[one], words[two] = words[two], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(found), "utf-8")
    assert models.load(str(folder)).reading != plain.reading


@every_type
def test_a_fresh_lora_after_a_models_name(tmp_path, family):
    base = models.load(str(save(tmp_path, family)))
    found = models.load(f"{tmp_path}+lora4")
    roles = {slot.name: slot.role for slot in slots(found.module)}
    assert {roles[slot.name] for slot in slots(found.module) if slot.trainable} == {"adapter_a", "adapter_b", "head"}
    state = found.module.state_dict()
    assert {state[name].shape[0] for name in roles if roles[name] == "adapter_a"} == {4}
    assert all(not state[name].any() for name in roles if roles[name] == "adapter_b")
    batch = collate(tiny.SENTENCES, [0, 1, 0], base.tokenizer)
    both = [gradients.per_example_losses(model.module, batch) for model in (base, found)]
    assert torch.equal(*both)  # B is zero
    assert models.load(f"{tmp_path}+lora4").fingerprint == found.fingerprint
    assert models.load(f"{tmp_path}+lora4", seed=1).fingerprint != found.fingerprint


def test_a_fresh_lora_that_cannot_be_made(tmp_path, monkeypatch):
    folder = save_adapter(tmp_path)
    base = str(tmp_path / "base")
    for rank in (0, 65):
        with pytest.raises(UserError, match=rf"LoRA of rank {rank}; expected 1 to 64"):
            models.load(f"{base}+lora{rank}")
    with pytest.raises(UserError, match="is an adapter; expected its base model"):
        models.load(f"{folder}+lora4")
    for wrong in ("loar4", "lora", "lora-4", "lora4.5", ""):
        with pytest.raises(UserError, match=r"or \+lora and a rank, as in 'minilm\+lora8'"):
            models.load(f"{base}+{wrong}")
    with pytest.raises(UserError, match="no model folder"):
        models.load("./c++/nowhere")
    with pytest.raises(UserError, match="at most 255 bytes"):
        models.load(f"./{'m' * 256}+lora4")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs PEFT"):
        models.load(f"{base}+lora4")


def test_a_folder_that_is_called_like_a_fresh_lora_is_itself(tmp_path, monkeypatch):
    save(tmp_path / "old+lora4")
    assert not any(".lora_" in slot.name for slot in slots(models.load(str(tmp_path / "old+lora4")).module))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base")
    assert adapters.absolute("./base+lora4") == f"{tmp_path}/base+lora4"
    assert adapters.absolute("base") == f"{tmp_path}/base"
    assert adapters.absolute("base+lora4", {"base"}) == "base+lora4"  # loaded as the bundled one, whatever lies here
    assert adapters.absolute("minilm+lora4") == "minilm+lora4"


def test_a_head_that_is_drawn_has_no_other_head_s_task(tmp_path):
    made = tiny.module("bert", problem_type="multi_label_classification")
    encoder = transformers.BertForMaskedLM(made.config)
    encoder.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert models.load(str(tmp_path)).module.config.problem_type is None
