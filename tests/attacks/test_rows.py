from __future__ import annotations

import pytest
import torch

from dpguard.attacks.rows import PLUGIN
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
    assert PLUGIN.applicable(seen) == "the token embedding is not shared"
