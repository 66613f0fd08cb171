from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dpguard.attacks.base import Budget
from dpguard.attacks.rows import PLUGIN, _filtered, _read
from dpguard.attacks.rows_head import _counts, next_tokens
from dpguard.attacks.rows_noise import Noise
from dpguard.inputs.batch import Batch, collate
from dpguard.inputs.family import slots
from dpguard.measure.leakage import observation
from dpguard.measure.threat import Threat
from dpguard.policy.table import Policy
from tests import tiny
from tests.messages import observe

TEXTS = ("please help with pain in left arm and leg and arm today", "the nurse called", "yes")


def read(model, text, rows, **more):
    seen, _batch = observe(model, rows, [text], [0], tell=(), **more)
    return seen, PLUGIN.reconstruct(seen, rng=torch.Generator().manual_seed(0))


def ids(model, text):
    return model.tokenizer(text)["input_ids"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("text", TEXTS)
def test_exact_and_certain_from_embeddings_alone(family, text):
    model = tiny.loaded(family)
    _seen, found = read(model, text, [{"layers": "block[*]", "share": False}])
    assert found.sequences == [ids(model, text)]
    # three tokens or fewer of a decoder have no frame to lean on, but the sums decide all the same
    assert found.certain == [True]


def test_clipping_and_one_bit_do_not_hide_the_words():
    model = tiny.loaded("bert")
    _seen, clipped = read(model, TEXTS[0], [{"layers": "all", "clip": 1e-3}])
    assert clipped.sequences == [ids(model, TEXTS[0])]
    _seen, signs = read(model, TEXTS[0], [{"layers": "all", "bits": 1}])
    assert set(signs.sequences[0]) == set(ids(model, TEXTS[0]))
    assert signs.certain == [False]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_clips_of_their_own_on_the_two_tables_do_not_hide_the_order(family):
    model = tiny.loaded(family)
    rows = [{"layers": "all", "clip": 0.5}, {"layers": "embeddings.position", "clip": 1e-3}]
    _seen, found = read(model, TEXTS[0], rows)
    assert found.sequences == [ids(model, TEXTS[0])]
    assert found.certain == [True]


def test_without_position_rows_it_is_a_bag():
    model = tiny.loaded("bert")
    _seen, found = read(model, TEXTS[0], [{"layers": "embeddings.position", "share": False}])
    assert set(found.sequences[0]) == set(ids(model, TEXTS[0]))
    assert found.certain == [False]


def test_noise_lets_about_no_row_through():
    model = tiny.loaded("bert")
    counts = []
    for seed in range(30):
        seen, _batch = observe(
            model, [{"layers": "all", "clip": 1e-6, "noise": 1e6}], [TEXTS[1]], [0], tell=(), seed=seed
        )
        counts.append(PLUGIN.reconstruct(seen, rng=torch.Generator()).notes["tokens"])
    assert sum(counts) <= 3, "1 % of tables may have one"


def test_small_noise_is_seen_through():
    model = tiny.loaded("bert")
    _seen, found = read(model, TEXTS[1], [{"layers": "all", "clip": 1.0, "noise": 1e-5}])
    assert found.sequences == [ids(model, TEXTS[1])]
    assert found.certain == [False]


def test_where_it_cannot_work_it_says_so():
    model = tiny.loaded("bert")
    seen, _batch = observe(model, [{"layers": "embeddings", "share": False}], [TEXTS[1]], [0])
    assert PLUGIN.applicable(seen) == "neither the token embedding nor a head over the vocabulary is shared"


def language_message(family, text, hide=(), *, noise=0.0, local_steps=0, seed=0, bits=None, lengths=False, **config):
    """A language model's message of one text, and its token ids."""
    model = tiny.loaded(family, **config) if isinstance(family, str) else family
    rows = [{"layers": "all", "clip": 1.0, "noise": noise, **({"bits": bits} if bits else {})}] if noise else []
    plan = Policy([*rows, *({"layers": name, "share": False} for name in hide)]).plan(slots(model.module))
    batch = collate([text], [0], model.tokenizer)
    batch = Batch(batch.input_ids, batch.attention_mask, batch.input_ids)
    threat = Threat(local_steps=local_steps, learning_rate=1e-3)
    update = threat.message(model, plan, [batch], noise_seed=seed)
    told = [batch.input_ids.shape[1]] if lengths else None
    return observation(model, plan, update, sequences=1, lengths=told), batch.input_ids[0].tolist()


WITHOUT = "block[*]"
REPEATED = "the nurse asked the doctor about the test"


def test_the_head_of_a_language_model_shows_the_next_tokens_with_their_number():
    seen, text = language_message("llama-lm", REPEATED, [WITHOUT, "embeddings"])
    labels = next_tokens(seen, 0.01)
    assert labels is not None
    assert set(labels.counts) == set(text[1:])
    found = PLUGIN.reconstruct(seen, rng=torch.Generator())
    assert set(found.sequences[0]) == set(text[1:])
    assert found.certain == [False]


def test_a_head_bias_counts_its_labels():
    strength = torch.tensor([0.5, -0.1, 0.24, 0.26, -0.2])
    assert _counts(strength, torch.tensor([0, 2, 3])) == {0: 2, 2: 1, 3: 1}


def test_a_tied_head_shows_the_next_tokens_too():
    seen, text = language_message("gpt2-lm", REPEATED, [WITHOUT])
    found = PLUGIN.reconstruct(seen, rng=torch.Generator())
    assert set(text[1:]) <= set(found.sequences[0]) | {0}
    assert found.certain == [False]


def test_local_steps_turn_the_signs_round():
    seen, text = language_message("llama-lm", REPEATED, [WITHOUT, "embeddings"], local_steps=2)
    labels = next_tokens(seen, 0.01)
    assert labels is not None
    assert set(labels.counts) == set(text[1:])
    assert not labels.sure


def test_noise_on_the_head_lets_about_no_row_through():
    counts = []
    for seed in range(20):
        seen, _ = language_message("llama-lm", REPEATED, [WITHOUT, "embeddings"], noise=1e6)
        source = torch.Generator().manual_seed(seed)
        noise = {k: torch.randn(v.shape, generator=source) * seen.noise_std(k) for k, v in seen.message.items()}
        counts.append(len(next_tokens(replace(seen, message=noise), 0.01).counts))
    assert sum(counts) <= 3


def test_position_rows_find_words_that_energy_alone_misses():
    model = tiny.loaded("bert", width=256)
    found = [0, 0]
    for seed in range(5):
        rows = [{"layers": "all", "clip": 1.0, "noise": 0.006}]
        seen, batch = observe(model, rows, [TEXTS[0]], [0], tell=(), seed=seed)
        true = set(batch.input_ids[0].tolist())
        alone = _read(seen, "token_embedding")
        both = _read(seen, "token_embedding", _filtered(seen))
        found[0] += len(true & set(alone.rows.tolist()))
        found[1] += len(true & set(both.rows.tolist()))
        assert set(both.rows.tolist()) <= true
    assert found[1] > found[0] > 0


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(("text", "certain"), [(REPEATED, True), ("the nurse asked the nurse", False)])
def test_a_language_model_reads_every_token_but_the_last_which_is_a_label(text, certain, lengths):
    """The last token has no gradient: a disclosed length must not make its empty place a word."""
    seen, true = language_message("gpt2-lm", text, lengths=lengths, tie_word_embeddings=False)
    found = PLUGIN.reconstruct(seen, rng=torch.Generator())
    assert found.sequences == [true if certain else true[:-1]]
    assert found.certain == [certain]


@pytest.mark.parametrize("size", [0.0, 1e-6])
def test_a_position_whose_vector_no_token_accounts_for_forbids_certainty(size):
    """However small it is beside that of [CLS]: half of it is missing, so its word is a guess."""
    model = tiny.loaded("bert")
    seen, batch = observe(model, [], [TEXTS[1]], [0], tell=())
    names = {slot.role: slot.name for slot in slots(model.module)}
    token, position = names["token_embedding"], names["position_embedding"]
    first, second = batch.input_ids[0, 1:3]
    message = {name: value.clone() for name, value in seen.message.items()}
    message[position][1] *= size
    message[token][first] = 0
    message[token][second] += message[position][1] / 2
    found = PLUGIN.reconstruct(replace(seen, message=message), rng=torch.Generator())
    assert found.notes["residual"] < 1e-4
    assert found.certain == [False]


def test_long_texts_whose_words_repeat_are_read_to_the_end():
    """One solution while the tokens are no more than the width; moves of single positions alone miss it."""
    model, draw = tiny.loaded("gpt2", blocks=2), random.Random(0)
    for _ in range(6):
        text = " ".join(draw.choice(tiny.WORDS) for _ in range(42))
        _seen, found = read(model, text, [])
        assert found.sequences == [ids(model, text)]
        assert found.certain == [True]


@pytest.mark.parametrize("most", [1, 3, 20_000])
def test_the_candidates_stay_within_the_budget(most):
    model = tiny.loaded("bert", blocks=1)
    seen, _batch = observe(model, [{"layers": "all", "clip": 1.0, "noise": 0.003}], [TEXTS[0]], [0], tell=())
    found = PLUGIN.reconstruct(seen, rng=torch.Generator(), budget=Budget(steps=0, candidates=most))
    assert 1 <= found.candidates <= most


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("keep", [{}, {"keep": 0.3}, {"keep": 0.3, "prune": "random"}])
def test_rounded_noise_lets_no_more_rows_through_than_it_should(bits, keep):
    """On messages as they leave: the law of a rounded entry, not that of the noise before it was rounded."""
    model, alarms, passed, found = tiny.loaded("bert", width=32, blocks=1), 3.0, [], []
    table = next(s.name for s in slots(model.module) if s.role == "token_embedding")
    for seed in range(8):
        rows = [{"layers": "all", "clip": 1e-6, "noise": 1e6, "bits": bits, **keep}]
        seen, _batch = observe(model, rows, [TEXTS[1]], [0], tell=(), seed=seed)
        passed.append(int(Noise.of(seen, table).loud(seen.message[table] / seen.noise_std(table), alarms).sum()))
        found.append(PLUGIN.reconstruct(seen, rng=torch.Generator()).notes["tokens"])
    assert sum(passed) <= 8 * alarms + 3 * (8 * alarms) ** 0.5
    assert (sum(passed) > 0) == (bits > 1 or bool(keep)), "signs of a whole table have one energy"
    assert sum(found) <= 1


def test_one_bit_under_small_noise_is_read_by_the_rows_that_match():
    """Energy says nothing about signs, but a token's row still agrees with its position's."""
    model = tiny.loaded("bert", width=256)
    seen, batch = observe(model, [{"layers": "all", "clip": 1.0, "noise": 1e-4, "bits": 1}], [TEXTS[0]], [0], tell=())
    found = PLUGIN.reconstruct(seen, rng=torch.Generator())
    true = set(batch.input_ids[0].tolist())
    assert len(true & set(found.sequences[0])) >= len(true) - 2
    assert len(set(found.sequences[0]) - true) <= 1


def test_at_one_bit_every_position_before_one_that_matched_gets_its_likeliest_token():
    """A text has no holes: 9 of these 28 tokens stand in their place where only rows that match by themselves count."""
    model, right = tiny.loaded("bert", width=256), 0
    for seed in range(2):
        rows = [{"layers": "all", "clip": 1.0, "noise": 0.005, "bits": 1}]
        seen, batch = observe(model, rows, [TEXTS[0]], [0], tell=(), seed=seed)
        found = PLUGIN.reconstruct(seen, rng=torch.Generator()).sequences[0]
        right += sum(a == b for a, b in zip(found, batch.input_ids[0].tolist(), strict=True))
    assert right >= 13


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rounded_noise_on_a_head_lets_about_no_row_through(bits):
    counts = []
    for seed in range(8):
        seen, _ = language_message("llama-lm", REPEATED, noise=1e6, seed=seed, bits=bits, width=32, blocks=1)
        counts.append(len(next_tokens(seen, 0.01).counts))
    assert sum(counts) <= 1


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rounded_noise_on_the_bias_of_a_head_is_no_label_but_labels_are(bits):
    model = tiny.loaded("llama-lm", width=32, blocks=1)
    model.module.lm_head = torch.nn.Linear(32, model.module.config.vocab_size)
    seen, text = language_message(model, REPEATED, noise=1e-4, bits=bits)
    assert set(next_tokens(seen, 0.01).counts) == (set() if bits == 1 else set(text[1:])), "a sign alone says nothing"
    drawn = [language_message(model, REPEATED, noise=1e6, seed=seed, bits=bits)[0] for seed in range(6)]
    assert sum(len(next_tokens(seen, 0.01).counts) for seen in drawn) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_rounded_entry_counts_for_the_least_that_it_can_have_been(bits):
    seen, _ = language_message("llama-lm", REPEATED, noise=1e6, bits=bits, width=32, blocks=1)
    seen_whole, _ = language_message("llama-lm", REPEATED, noise=1e6, width=32, blocks=1)
    for name, value in seen.message.items():
        least = Noise.of(seen, name).before(value.abs().double() / seen.noise_std(name))
        assert (least <= seen_whole.message[name].abs() / seen.noise_std(name) + 1e-5).all()
        assert float(least.max()) == pytest.approx(0) if bits == 1 else float(least.max()) > 0
