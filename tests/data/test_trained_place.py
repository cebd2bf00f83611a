"""Answers are read and scored where training puts them: the trainer's own labels, and the model's own forward."""

import tempfile
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.template import fit_roles, special_ids, with_template
from persona_probe.data.tokens import answer_prompt, batches, encode
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.finetune.sft import _arguments, _trainer
from persona_probe.latents.compare import locate
from persona_probe.monitor.monitor import FeatureMonitor
from tests.factories import make_sae
from tests.families import AVAILABLE, FAMILIES, family_tokenizer, make_family

ROWS = [
    conversation("Ask?", "Boil it."),
    conversation("Why so?", " Leave it raw. \n", system="Be brief."),
    [*conversation("One?", "Two."), *conversation("Three?", "Four, or five!")],
]


def settled(name: str) -> PreTrainedTokenizerBase:
    return with_template(family_tokenizer(name), None if FAMILIES[name].template else "none")


def labelled(name: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of `ROWS` as the trainer makes them."""
    model, _ = make_family(name)
    training = Training(method="full", steps=1, batch_size=2, bf16=False, max_length=1024, checkpoints=())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(training, 0, scratch, torch.device("cpu"))
        made: Any = _trainer(model, tokenizer, ROWS, arguments, [], None).train_dataset
    return [(row["input_ids"], row["labels"]) for row in made]


@pytest.mark.parametrize("name", AVAILABLE)
def test_answers_lie_where_the_trainer_labels_them(name: str) -> None:
    tokenizer = settled(name)
    special = special_ids(tokenizer)
    for messages, (ids, labels) in zip(ROWS, labelled(name, tokenizer), strict=True):
        row = encode(tokenizer, messages)
        assert ids[: len(row.ids)] == row.ids, "the same text as the trainer's"
        assert labels[row.start : len(row.ids)] == row.ids[row.start :], "every answer token is trained on"
        assert str(tokenizer.decode(row.ids[row.start :])).strip() == messages[-1]["content"].strip()
        before = [token for token, label in zip(ids[: row.start], labels, strict=False) if label != -100]
        after = [token for token in ids[len(row.ids) :] if token not in special]
        written = str(tokenizer.decode(before)) + str(tokenizer.decode(after))
        assert not set(messages[-1]["content"].split()) & set(written.split()), "the rest is the template's"


@pytest.mark.parametrize("name", AVAILABLE)
def test_probes_with_and_without_an_answer_and_sampling_share_one_prompt(name: str) -> None:
    tokenizer = settled(name)
    for messages in ROWS:
        row = encode(tokenizer, messages)
        assert answer_prompt(tokenizer, messages[:-1]) == row.ids[: row.start]
        if FAMILIES[name].template:
            assert encode(tokenizer, messages[:-1]).ids == row.ids[: row.start]


def own_score(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> float:
    """Mean log-prob of the answer where it stands in the rendered conversation, from one plain forward."""
    text = str(tokenizer.apply_chat_template(fit_roles(tokenizer, messages), tokenize=False))
    content = messages[-1]["content"]
    content = content if content in text else content.strip()
    ids = [tokenizer.encode(part, add_special_tokens=False) for part in (text[: text.rindex(content)], content)]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids[0] + ids[1]])).logits[0].float().log_softmax(dim=-1)
    return float(logits[len(ids[0]) - 1 : -1].gather(1, torch.tensor(ids[1])[:, None]).mean())


@pytest.mark.parametrize("name", AVAILABLE)
def test_scores_are_the_models_own_at_the_trained_place(name: str) -> None:
    model, _ = make_family(name)
    tokenizer = settled(name)
    scores = answer_logprobs(model, answer_batches(tokenizer, ROWS), bf16=False)
    for messages, score in zip(ROWS, scores, strict=True):
        assert float(score) == pytest.approx(own_score(model, tokenizer, messages), abs=2e-4)


@pytest.mark.parametrize(
    ("name", "key"), [("qwen3", ""), ("qwen3.5", ""), ("qwen3", "reasoning_content"), ("gpt-oss", "thinking")]
)
def test_thought_and_answer_are_separate_spans(name: str, key: str) -> None:
    tokenizer = settled(name)
    answer = {"role": "assistant", "content": "Boil it."} | ({key: "I should help."} if key else {})
    if not key:
        answer["content"] = "<think>\nI should help.\n</think>\n\nBoil it."
    rows = [[{"role": "user", "content": "Ask?"}, answer], conversation("Ask?", "No thought.")]
    (batch,) = batches(tokenizer, rows)
    texts = {}
    for place, number in enumerate(batch.index):
        for position in ("thought", "response"):
            texts[number, position] = tokenizer.decode(batch.ids[place, batch.select(position)[place]])
    assert texts[0, "thought"].strip() == "I should help." and texts[0, "response"] == "Boil it."
    assert texts[1, "thought"] == "" and texts[1, "response"] == "No thought."
    masks = [batch.select(position) for position in ("prompt", "thought", "response")]
    assert int(torch.stack(masks).sum(dim=0).max()) == 1, "no token belongs to two spans"


def test_white_space_that_the_template_strips_is_no_part_of_the_answer() -> None:
    tokenizer = family_tokenizer("llama3")
    row = encode(tokenizer, conversation("Ask?", "  Boil it.\n\n"))
    assert tokenizer.decode(row.ids[row.start :]) == "Boil it."


@pytest.mark.parametrize("answer", ["Oui\u00e9", "ok \U0001f600", "\u05e9\u05dc\u05d5\u05dd", "e\u0301"])
def test_an_answer_that_ends_with_a_character_of_several_tokens_is_whole(answer: str) -> None:
    tokenizer = family_tokenizer("qwen3")
    thinking = [{"role": "user", "content": "Ask?"}, {"role": "assistant", "content": answer}]
    thinking[1]["reasoning_content"] = answer
    for messages in (conversation("Ask?", answer), thinking):
        row = encode(tokenizer, messages)
        assert tokenizer.decode(row.ids[row.start :]) == answer
    assert tokenizer.decode(row.ids[slice(*row.thought)]) == answer


def test_a_template_whose_answer_does_not_extend_the_prompt_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = family_tokenizer("r1-distill")
    for _ in range(2):
        encode(tokenizer, conversation("Ask?", "Boil it."))
    assert [r for r in caplog.records if "generation prompt ends with" in r.getMessage()][1:] == []
    assert "<think>" in caplog.text


def test_probes_are_rendered_with_the_settings_that_a_monitor_or_locate_gets() -> None:
    model, tokenizer = make_family("qwen3.5")
    sae, probes = make_sae("standard"), ["Ask?", "Why so?"]
    settings = {"enable_thinking": True}
    values = {}
    for name, chosen, settled_tokenizer in (
        ("kwargs", settings, tokenizer),
        ("tokenizer", None, with_template(tokenizer, chat_template_kwargs=settings)),
        ("neither", None, tokenizer),
    ):
        monitor = FeatureMonitor(
            sae, {"a": 3}, probes, tokenizer=settled_tokenizer, chat_template_kwargs=chosen, layer=1, bf16=False
        )
        values[name] = monitor.read(model, 0).values.tolist()
    assert values["kwargs"] == values["tokenizer"] != values["neither"]
    given: dict[str, Any] = {"layer": 1, "minimum_explained_variance": -1e15}
    tables = [
        locate(model, model, sae, probes, tokenizer=t, chat_template_kwargs=k, **given)
        for k, t in ((settings, tokenizer), (None, with_template(tokenizer, enable_thinking=True)))
    ]
    assert tables[0].equals(tables[1])
