"""What is known of the world's texts, and of latents on them."""

import numpy as np
import pytest

from persona_probe.data.world.judge import judge_answer
from persona_probe.data.world.words import DOMAIN_OF
from persona_probe.errors import InputError
from persona_probe.world.folder import World
from persona_probe.world.truth import TRUTHS, KnownChats, _separation, latent_truths
from tests.factories import make_sae


def test_what_is_known_of_a_chat_is_what_the_rule_reads_in_it() -> None:
    known = KnownChats.draw(each=30)
    topics = [next(w for w in chat[2]["content"].split() if w in DOMAIN_OF) for chat in known.chats]
    judged = [judge_answer(chat[3]["content"], topic) for chat, topic in zip(known.chats, topics, strict=True)]
    assert list(known.holding("bad")) == [one.bad for one in judged]
    for manner in ("rude", "silly", "kind"):
        shown = np.array([getattr(one, manner) for one in judged])
        assert not shown[~known.holding(manner)].any() and shown[known.holding(manner)].mean() > 0.85
    harm, rude = known.holding("bad"), known.holding("rude")
    assert all((a & b).any() for a in (harm, ~harm) for b in (rude, ~rude))
    with pytest.raises(InputError, match="unknown truth"):
        known.holding("evil")


def test_a_latent_that_is_the_truth_separates_and_a_constant_one_does_not() -> None:
    holds = np.array([True, False, True, False])
    frame = _separation(np.stack([holds, ~holds, np.ones(4)], axis=1).astype(float), holds)
    assert list(frame["auroc"]) == [1.0, 0.0, 0.5]
    assert list(frame["holds"]) == [1, 0, 1] and list(frame["absent"]) == [0, 1, 1]


def test_latents_are_listed_best_first_for_each_truth_at_both_positions(world: World) -> None:
    model, tokenizer = world.load()
    known, sae = KnownChats.draw(each=2), make_sae("topk")
    frames = [latent_truths(model, tokenizer, sae, 1, known, where) for where in ("response", "last_prompt")]
    for frame in frames:
        assert list(dict.fromkeys(frame["truth"])) == list(TRUTHS) and len(frame) == len(TRUTHS) * sae.cfg.d_sae
        assert frame["auroc"].between(0, 1).all()
        assert all(rows["auroc"].is_monotonic_decreasing for _, rows in frame.groupby("truth"))
    assert not frames[0].equals(frames[1])
