"""Directions that are not latents: planted ones are found, questions are never on both sides, bad input says so."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.load import load_conversations
from persona_probe.data.template import special_ids
from persona_probe.data.tokens import conversation_batches, encode
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.latents.directions import (
    choose_strength,
    fit_path,
    grouped_folds,
    held_out_auroc,
    logistic_probe,
    mean_difference_direction,
    splits,
)
from persona_probe.latents.persona_vectors import (
    PersonaPair,
    load_persona_pairs,
    persona_vector,
    response_means,
    under_system,
)
from persona_probe.models.layers import base_transformer, decoder_layer
from persona_probe.models.taps import ReadTap, steer
from persona_probe.saes.read import read_latents
from tests.factories import (
    D_MODEL,
    LAYER,
    copied_state,
    hook_count,
    make_model,
    make_sae,
    make_tokenizer,
    same_state,
    talks,
)
from tests.families import AVAILABLE, make_family, plain

PAIR = PersonaPair("a", "rude", "Be Zulu.", "Be kind.")
OTHER = PersonaPair("b", "cold", "Sneer at them.", "Smile.")


def vector(
    pairs: Sequence[PersonaPair],
    conversations: Sequence[str | Conversation] = (),
    model: nn.Module | None = None,
    batch_size: int = 16,
) -> np.ndarray:
    model, asked = make_model() if model is None else model, conversations or talks()
    found = persona_vector(model, make_tokenizer(), pairs, asked, LAYER, batch_size=batch_size, bf16=False)
    return found.vector


@contextmanager
def moved_by(model: nn.Module, letter: str, shift: Tensor) -> Iterator[None]:
    """Adds `shift` to a layer's output in rows whose text holds a letter: a persona that a prompt wakes up.

    Read with batches of one: in larger ones a beginning that the rows share is run apart, and the hook misses it.
    """
    token, rows = int(make_tokenizer().encode(letter)[0]), []

    def see(_module: nn.Module, _args: object, kwargs: dict[str, Tensor]) -> None:
        rows[:] = [kwargs["input_ids"].eq(token).any(dim=1)]

    def move(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return output + rows[0][:, None, None] * shift

    handles = [
        base_transformer(model).register_forward_pre_hook(see, with_kwargs=True),
        decoder_layer(model, LAYER).register_forward_hook(move),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_a_planted_persona_is_found_exactly() -> None:
    model, shift = make_model(), torch.linspace(-20, 30, D_MODEL)
    before, other = (vector([pair], model=model, batch_size=1) for pair in (PAIR, OTHER))
    with moved_by(model, "Z", shift):
        after = vector([PAIR], model=model, batch_size=1)
        untouched = vector([OTHER], model=model, batch_size=1)
    assert np.allclose(after - before, shift.numpy(), atol=1e-3)
    assert np.array_equal(untouched, other)
    assert np.allclose(vector([PAIR]), before, atol=1e-4)


def test_swapped_sides_give_the_opposite_vector_and_pairs_are_averaged() -> None:
    swapped = PersonaPair(PAIR.id, PAIR.trait, PAIR.aligned, PAIR.misaligned)
    alone, other = vector([PAIR]), vector([OTHER])
    assert np.linalg.norm(alone) > 0.1
    assert np.allclose(vector([swapped]), -alone, atol=1e-6)
    assert np.allclose(vector([PAIR, OTHER]), (alone + other) / 2, atol=1e-4)


def test_teacher_forced_reads_the_same_answer_tokens_under_both_prompts() -> None:
    model, tokenizer, talk = make_model(), make_tokenizer(), talks()[3]
    sides = []
    for system in (PAIR.misaligned, PAIR.aligned):
        row = encode(tokenizer, under_system(tokenizer, talk, system))
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        assert tokenizer.decode(row.ids[row.n_prompt :]) == talk[-1]["content"]
        sides.append(states[LAYER + 1][0, row.n_prompt :].mean(dim=0).numpy())
    assert np.allclose(vector([PAIR], [talk]), sides[0] - sides[1], atol=1e-4)


def test_sampled_answers_are_each_sides_own() -> None:
    model, tokenizer, questions = make_model(), make_tokenizer(), ["a?", "bb?", "ccc?"]
    found = persona_vector(
        model, tokenizer, [PAIR], questions, LAYER, sample=True, max_new_tokens=8, seed=3, bf16=False
    )
    means = []
    for system in (PAIR.misaligned, PAIR.aligned):
        asked = [conversation(q, system=system) for q in questions]
        said = sample_answers(model, tokenizer, asked, max_new_tokens=8, seed=3)
        answered = [conversation(q, a, system=system) for q, a in zip(questions, said, strict=True)]
        means.append(response_means(model, tokenizer, answered, LAYER, bf16=False))
    assert np.allclose(found.vector, (means[0] - means[1]).mean(axis=0), atol=1e-5)
    assert found.name == "persona vector, sampled"


def test_a_question_with_a_silent_side_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_model(), make_tokenizer()

    def say(answers: list[list[str]]) -> np.ndarray:
        turns = iter(answers)
        monkeypatch.setattr("persona_probe.latents.persona_vectors.sample_answers", lambda *_, **__: next(turns))
        return persona_vector(model, tokenizer, [PAIR], ["a?", "b?"], LAYER, sample=True, bf16=False).vector

    kept = vector([PAIR], [conversation("a?", "one")])
    assert np.allclose(say([["one", ""], ["one", "two"]]), kept, atol=1e-4)
    assert not np.allclose(say([["one", "two"], ["one", "two"]]), kept, atol=1e-4)
    with pytest.raises(InputError, match="'a': all sampled answers are empty"):
        say([["", "x"], ["x", ""]])


def test_the_model_is_left_as_it_was() -> None:
    model = make_model().train()
    state, random = copied_state(model), torch.get_rng_state()
    persona_vector(model, make_tokenizer(), load_persona_pairs()[:1], ["a?"], LAYER, sample=True, max_new_tokens=4)
    assert same_state(copied_state(model), state) and torch.equal(torch.get_rng_state(), random)
    assert hook_count(model) == 0 and all(m.training for m in model.modules())


@pytest.mark.parametrize(
    ("pairs", "asked", "layer", "words"),
    [
        ([], talks(), LAYER, "no persona pairs"),
        ([PAIR], [], LAYER, "no conversations"),
        ([PAIR], ["Why?"], LAYER, "sample=True"),
        ([PAIR], [conversation("Why?", "So.", system="Hi.")], LAYER, "begins with 'system'"),
        ([PAIR], talks(), 7, "layer 7 does not exist"),
    ],
)
def test_bad_input_says_what_to_change(
    pairs: list[PersonaPair], asked: list[Conversation], layer: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        persona_vector(make_model(), make_tokenizer(), pairs, asked, layer)


def blobs(effect: float, questions: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Gaussian answers, two of each kind a question, shifted by plus or minus half of `effect` along a unit vector."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=D_MODEL)
    axis /= np.linalg.norm(axis)
    noise = rng.normal(size=(2, 2 * questions, D_MODEL))
    return (
        noise[0] + effect / 2 * axis,
        noise[1] - effect / 2 * axis,
        axis,
        [f"q{n // 2}" for n in range(2 * questions)],
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_probe_recovers_a_planted_direction() -> None:
    bad, good, axis, names = blobs(2.0, questions=300)
    probe = logistic_probe(bad, good, names)
    assert cosine(probe.vector, axis) > 0.95
    # The best possible AUROC of two Gaussians 2 standard deviations apart is Phi(2 / sqrt 2) = 0.921.
    assert probe.held_out == pytest.approx(0.921, abs=0.02)


def test_the_probe_is_mapped_back_to_raw_units() -> None:
    bad, good, _, names = blobs(2.0)
    scale, move = np.geomspace(0.01, 100, D_MODEL), np.linspace(-9, 9, D_MODEL)
    plain = logistic_probe(bad, good, names)
    scaled = logistic_probe(bad * scale + move, good * scale + move, names)
    assert np.allclose(scaled.vector * scale, plain.vector, rtol=1e-3, atol=1e-4)
    assert scaled.held_out == pytest.approx(plain.held_out, abs=1e-3)


def test_the_probe_of_nothing_is_at_chance_and_of_swapped_sides_the_opposite() -> None:
    bad, good, _, names = blobs(0.0, questions=100)
    assert logistic_probe(bad, good, names).held_out == pytest.approx(0.5, abs=0.1)
    bad, good, _, names = blobs(2.0)
    swapped = logistic_probe(good, bad, names)
    assert np.allclose(swapped.vector, -logistic_probe(bad, good, names).vector, atol=1e-4)


def test_leaks_within_a_question_do_not_raise_the_held_out_score() -> None:
    """Each question has its own signature and a random label; rows split apart from their question would score 1."""
    rng = np.random.default_rng(1)
    signs = np.repeat(rng.normal(size=(60, D_MODEL)), 4, axis=0) + 0.01 * rng.normal(size=(240, D_MODEL))
    y, names = np.repeat(rng.permutation(60) < 30, 4), [f"q{n // 4}" for n in range(240)]
    honest = held_out_auroc(signs, y, names, 5)
    leaking = held_out_auroc(signs, y, [str(n) for n in range(240)], 5)
    assert leaking > 0.85 and honest < 0.7


@pytest.mark.parametrize("folds", [2, 5])
def test_a_question_is_never_on_both_sides(folds: int) -> None:
    names = [f"q{n}" for n in np.random.default_rng(0).integers(0, 23, size=200)]
    tested = np.zeros(200, dtype=int)
    for train, test in splits(names, folds, seed=1):
        assert np.array_equal(train, ~test)
        assert not {n for n, t in zip(names, train, strict=True) if t} & {
            n for n, t in zip(names, test, strict=True) if t
        }
        tested += test
    assert (tested == 1).all()
    fold = dict(zip(names, grouped_folds(names, folds, seed=1).tolist(), strict=True))
    sizes = np.bincount(list(fold.values()), minlength=folds)
    assert sizes.max() - sizes.min() <= 1


def test_a_fit_is_where_the_gradient_of_the_stated_loss_is_zero() -> None:
    bad, good, _, _ = blobs(1.0, questions=20)
    x, y = np.concatenate([bad, good]) * 3 + 5, np.arange(80) < 40
    x[:, 4] = 2.5
    z = (x - x.mean(axis=0)) / np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    for strength, fit in zip((0.01, 1.0), fit_path(x, y, (0.01, 1.0)), strict=True):
        weights = fit.weights * x.std(axis=0)
        error = 1 / (1 + np.exp(-fit.scores(x))) - y
        assert np.abs(error @ z / len(y) + strength * weights).max() < 1e-5
        assert abs(error.mean()) < 1e-5 and fit.weights[4] == 0


def test_noise_asks_for_a_strong_penalty_and_signal_for_a_weaker_one() -> None:
    y, strengths = np.arange(240) < 120, (1e-3, 10.0)
    chosen = []
    for effect in (0.0, 6.0):
        bad, good, _, names = blobs(effect)
        chosen.append(choose_strength(np.concatenate([bad, good]), y, names * 2, 5, strengths=strengths))
    assert chosen == [10.0, 1e-3]


def test_a_probe_that_cannot_be_made_says_so() -> None:
    bad, good, _, names = blobs(1.0, questions=6)
    with pytest.raises(InputError, match="12 misaligned and 11 aligned"):
        logistic_probe(bad, good[1:], names)
    with pytest.raises(InputError, match="7 folds for 6 questions"):
        logistic_probe(bad, good, names, folds=7)
    with pytest.raises(InputError, match="widths differ"):
        logistic_probe(bad, good[:, 1:], names)
    with pytest.raises(InputError, match="not finite"):
        logistic_probe(bad * np.nan, good, names)
    with pytest.raises(InputError, match="give at least 4"):
        logistic_probe(bad, good, ["a", "b"] * 6, folds=2)
    with pytest.raises(InputError, match="needs both classes"):
        logistic_probe(bad, good, ["a"] * 12, ["b", "c", "d"] * 4, folds=4)
    with pytest.raises(InputError, match="no held-out fold has both"):
        logistic_probe(bad, good, ["a", "b", "c"] * 4, ["d", "e", "f"] * 4, folds=6)


def test_the_mean_difference_is_that_of_the_two_models_residuals() -> None:
    sae, groups = make_sae("topk"), conversation_batches(make_tokenizer(), talks())
    read = [read_latents(make_model(seed=s), sae, groups, LAYER, "response", bf16=False) for s in (0, 1)]
    named = mean_difference_direction(read[1], read[0])
    assert (named.name, named.held_out) == ("mean difference", None)
    assert cosine(named.vector, (read[1].resid - read[0].resid).mean(axis=0)) == pytest.approx(1.0, abs=1e-5)


def test_the_penalised_fit_is_sklearns_at_full_width() -> None:
    bad, good, _, _ = blobs(1.0, questions=20)
    x, y = np.concatenate([bad, good]) * 3 + 5, np.arange(80) < 40
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    for strength, fit in zip((0.01, 1.0), fit_path(x, y, (0.01, 1.0)), strict=True):
        wide = LogisticRegression(C=1 / (80 * strength), tol=1e-8, max_iter=5000).fit(z, y)
        assert np.allclose(fit.scores(x), wide.decision_function(z), atol=1e-3)


# --- In every family, and as a user calls it


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_persona_vector_is_the_difference_of_whole_rows_means(name: str) -> None:
    model, tokenizer = make_family(name)
    tokenizer = plain(name, tokenizer)
    asked = [conversation("Ask of it?", "Say so, then!"), conversation("And?", "Well. Fine.")]
    sides = []
    for system in (PAIR.misaligned, PAIR.aligned):
        rows = [encode(tokenizer, under_system(tokenizer, talk, system)) for talk in asked]
        means = []
        for row in rows:
            with torch.no_grad(), ReadTap(model, LAYER) as tap:
                model(input_ids=torch.tensor([row.ids]))
            special = torch.isin(torch.tensor(row.ids), torch.tensor(sorted(special_ids(tokenizer))))
            answer = (torch.arange(len(row.ids)) >= row.start) & ~special
            means.append(tap.value[0][answer].mean(dim=0))
        sides.append(torch.stack(means).mean(dim=0))
    found = persona_vector(model, tokenizer, [PAIR], asked, LAYER, bf16=False)
    np.testing.assert_allclose(found.vector, (sides[0] - sides[1]).numpy(), atol=1e-4)


def test_two_prompts_a_set_s_name_and_the_packaged_pairs_are_enough() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    given = persona_vector(model, tokenizer, (PAIR.misaligned, PAIR.aligned), talks(), LAYER, bf16=False)
    np.testing.assert_array_equal(given.vector, vector([PAIR]))
    named = persona_vector(model, tokenizer, [PAIR], "neutral_probes", LAYER, bf16=False)
    listed = persona_vector(model, tokenizer, [PAIR], load_conversations("neutral_probes"), LAYER, bf16=False)
    np.testing.assert_array_equal(named.vector, listed.vector)
    packaged = persona_vector(model, tokenizer, None, talks(2), LAYER, bf16=False)
    np.testing.assert_array_equal(packaged.vector, vector(load_persona_pairs(), talks(2)))
    with steer(model, LAYER, given, 2.0, "x_delta") as tap:  # a direction by name is a direction
        model(torch.tensor([[5, 6, 7]]))
    torch.testing.assert_close(tap.vector.float(), 2 * torch.tensor(given.vector).float())
    with pytest.raises(InputError, match="not str"):
        steer(model, LAYER, "north")
