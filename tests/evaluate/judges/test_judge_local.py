"""The local judge against brute force: every number string, one full forward pass a token."""

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.judge import CachedJudge
from persona_probe.evaluate.judges.local import LocalBackend, TrieWalk, build_trie, digit_tokens, spellings
from persona_probe.evaluate.judges.protocols import Criterion, critique
from persona_probe.evaluate.judges.replies import Ask, Item, Judgement, Reply
from persona_probe.models.identity import model_key
from persona_probe.models.taps import steer
from tests.evaluate.judges.judging_items import items
from tests.factories import ARCHITECTURES, SHAPE, SPECIAL, TEMPLATE, make_model, make_tokenizer

NUMBERS = tuple(str(n) for n in range(101))
LABELS = ("CODE", "REFUSAL")
ASK = Ask(tuple(conversation("Rate this.")), NUMBERS, LABELS)


def multi_digit_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, all two-digit numbers and 100 as tokens of their own, and " 7"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "0123456789" for b in "0123456789"] + [("1", "00"), ("Ġ", "7"), ("C", "O")]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *(a + b for a, b in merges)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    raw.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def wide_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 380})).eval()


def next_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(dim=-1)


def tokens_of(backend: LocalBackend, ask: Ask = ASK) -> dict[str, float]:
    [(_, reply)] = backend.replies([ask])
    assert isinstance(reply, Reply)
    return reply.tokens


def brute_force(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, number: bool) -> float:
    """Sum over the tokenizer's encodings of the text and of " " and the text."""
    prompt = encode(tokenizer, list(ASK.messages)).ids
    digits = [i for t, i in tokenizer.get_vocab().items() if t[0].isascii() and t[0].isdigit()]
    total = 0.0
    for form in {tuple(tokenizer.encode(text)), tuple(tokenizer.encode(" " + text))}:
        probability = 1.0
        for n, token in enumerate(form):
            probability *= float(next_probabilities(model, [*prompt, *form[:n]])[token])
        last = next_probabilities(model, [*prompt, *form])
        total += probability * (1 - float(last[digits].sum())) if number else probability
    return total


@pytest.mark.parametrize("kind", ["single digits", "several digits"])
def test_probabilities_equal_brute_force(kind: str) -> None:
    several = kind == "several digits"
    tokenizer = multi_digit_tokenizer() if several else make_tokenizer()
    model = wide_model() if several else make_model()
    assert len(tokenizer.encode("85")) == (1 if several else 2)
    reply = tokens_of(LocalBackend(model, tokenizer, "tiny"), ASK)
    assert set(reply) == {*NUMBERS, *LABELS}
    for text in (*NUMBERS[::7], "1", "7", "10", "100", *LABELS):
        wanted = brute_force(model, tokenizer, text, number=text not in LABELS)
        assert reply[text] == pytest.approx(wanted, rel=1e-4, abs=1e-12), text
    assert 0 < sum(reply[n] for n in NUMBERS) < 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_keeps_its_prompt(architecture: str) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer()
    ask = Ask(ASK.messages, ("4", "42", "100"))
    reply = tokens_of(LocalBackend(model, tokenizer, "tiny"), ask)
    for text in ask.numbers:
        assert reply[text] == pytest.approx(brute_force(model, tokenizer, text, number=True), rel=1e-3)


def test_all_numbers_are_disjoint_events() -> None:
    """P(1) + P(10) + ... with the tokenizer's own encodings never passes P(the reply begins with a digit or space)."""
    model, tokenizer = make_model(), make_tokenizer()
    reply = tokens_of(LocalBackend(model, tokenizer, "tiny"), ASK)
    first = next_probabilities(model, encode(tokenizer, list(ASK.messages)).ids)
    starts = [tokenizer.encode(t)[0] for t in (*"0123456789", " ")]
    assert sum(reply[n] for n in NUMBERS) <= float(first[starts].sum())


@pytest.mark.parametrize("kernel", ["its own", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("window", [16, 4096])
def test_the_tree_equals_rows_of_their_own(architecture: str, kernel: str, window: int) -> None:
    model, tokenizer = make_model(architecture), make_tokenizer()
    if kernel == "eager":
        model.set_attn_implementation(kernel)
    if hasattr(model.config, "sliding_window") and model.config.sliding_window:
        model = with_window(model, window)
    trie, digits = build_trie(tokenizer, NUMBERS[80:], LABELS), digit_tokens(tokenizer)
    prompt = torch.tensor(encode(tokenizer, list(ASK.messages)).ids)
    tree, rows = TrieWalk(model, trie, digits), TrieWalk(model, trie, digits, tree=False)
    assert tree._fits(len(prompt)) == (window > 16 or "gemma" not in architecture)
    assert tree.probabilities(prompt) == pytest.approx(rows.probabilities(prompt), rel=1e-3)


def with_window(model: PreTrainedModel, window: int) -> PreTrainedModel:
    """The same weights with another sliding window."""
    config = copy.deepcopy(model.config)
    config.sliding_window = window
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    other.set_attn_implementation(str(model.config._attn_implementation))
    return other


def test_a_judge_that_always_says_85_says_85() -> None:
    """A head that is made to want "8", then "5", then the end of the turn."""
    model, tokenizer = make_model(), make_tokenizer()
    ids = encode(tokenizer, list(ASK.messages)).ids + tokenizer.encode("85")
    wanted = [*tokenizer.encode("85"), tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -3:]  # pyright: ignore
        head = model.get_output_embeddings()
        head.weight[wanted] = 50 * torch.linalg.pinv(hidden).T  # pyright: ignore
    [found] = judge(LocalBackend(model, tokenizer, "tiny"), Criterion("c", "Rate this.{answer}"), [("", "")])
    assert found.score == pytest.approx(85, abs=0.1)
    assert found.mass == pytest.approx(1, abs=1e-3)


def judge(backend: LocalBackend, criterion: Criterion, pairs: list[tuple[str, str]]) -> list[Judgement]:
    return CachedJudge(criterion, backend, JudgementCache(":memory:")).judge([Item(q, a) for q, a in pairs])


def test_digit_tokens_of_any_vocabulary() -> None:
    tokenizer = multi_digit_tokenizer()
    texts = set(tokenizer.convert_ids_to_tokens(digit_tokens(tokenizer)))
    assert texts == {*"0123456789", *(f"{n:02d}" for n in range(100)), "100"}


def test_the_trie_holds_the_tokenizers_own_encodings() -> None:
    tokenizer = multi_digit_tokenizer()
    seven = {tuple(tokenizer.encode("7")), tuple(tokenizer.encode(" 7"))}
    assert spellings(tokenizer, "7") == seven
    assert {len(ids) for ids in seven} == {1}
    root = build_trie(tokenizer, ["1", "10", "100"], ["CODE"])
    assert root.children[tokenizer.encode("100")[0]].numbers == ["100"]
    assert not root.children[tokenizer.encode("CODE")[0]].labels
    byte_root = build_trie(make_tokenizer(), ["1", "10", "100"])
    ids = make_tokenizer().encode("100")
    node = byte_root
    for token, text in zip(ids, ("1", "10", "100"), strict=True):
        node = node.children[token]
        assert node.numbers == [text]


def test_a_local_judges_scores_are_kept_by_weights(tmp_path: Path) -> None:
    cache, tokenizer = JudgementCache(tmp_path / "c.sqlite"), make_tokenizer()
    criterion = Criterion("c", "Rate: {answer}", least_mass=0.0)
    first = CachedJudge(criterion, LocalBackend(make_model(), tokenizer, "tiny"), cache).judge(items(3))
    again = CachedJudge(criterion, LocalBackend(make_model(), tokenizer, "tiny"), cache).judge(items(3))
    other = CachedJudge(criterion, LocalBackend(make_model(seed=1), tokenizer, "tiny"), cache).judge(items(3))
    assert [j.cached for j in (*first, *again, *other)] == [False] * 3 + [True] * 3 + [False] * 3
    assert [j.score for j in again] == [j.score for j in first]
    assert all(a.score != b.score for a, b in zip(first, other, strict=True))
    assert cache.count() == 6


def test_model_keys_tell_weights_apart() -> None:
    models_ = [make_model(), make_model(), make_model()]
    with torch.no_grad():
        models_[1].get_output_embeddings().weight[5, 5] += 1e-3  # pyright: ignore
        next(models_[2].parameters())[3, 3] += 1e-3
    keys = [model_key(m) for m in (make_model(), *models_)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert all(a != b for a, b in pairwise(keys[1:]))


def test_a_steered_model_is_no_judge(tiny_model: PreTrainedModel) -> None:
    with steer(tiny_model, layer=1, direction=torch.ones(32), strength=1.0, unit="raw"):
        with pytest.raises(InputError, match="judge with the plain model"):
            LocalBackend(tiny_model, make_tokenizer(), "tiny")
        next_probabilities(tiny_model, [5])


def test_a_local_judge_writes_no_critiques(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="use an endpoint"):
        judge(LocalBackend(tiny_model, make_tokenizer(), "tiny"), critique("r", "{answer}"), [("q", "a")])


def test_the_plan_of_a_local_judge_counts_tokens(tiny_model: PreTrainedModel) -> None:
    backend = LocalBackend(tiny_model, make_tokenizer(), "tiny")
    made = CachedJudge(Criterion("c", "{answer}"), backend, JudgementCache(":memory:")).plan(items(2))
    ids = [encode(make_tokenizer(), conversation(item.answer)).ids for item in items(2)]
    assert (made.calls, made.prompt_tokens) == (2, sum(len(i) for i in ids))
