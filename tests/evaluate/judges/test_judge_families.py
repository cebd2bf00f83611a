"""A local judge of any family gives each string the probability that whole forward passes give it."""

from typing import Any

import pytest
import torch

from persona_probe.evaluate.judges.local import Node, TrieWalk, build_trie, digit_tokens
from persona_probe.models.layers import evaluating
from tests.families import AVAILABLE, make_family

NUMBERS, LABELS = ["1", "12", "123", "70"], ["yes"]


def by_whole_rows(model: Any, prompt: list[int], trie: Node, digits: list[int]) -> dict[str, float]:
    sums: dict[str, float] = {}

    def walk(node: Node, path: list[int], chance: float) -> None:
        with torch.no_grad():
            after = model(input_ids=torch.tensor([[*prompt, *path]])).logits[0, -1].softmax(-1)
        for number in node.numbers:
            sums[number] = sums.get(number, 0.0) + chance * (1 - float(after[digits].sum()))
        for label in node.labels:
            sums[label] = sums.get(label, 0.0) + chance
        for token, child in node.children.items():
            walk(child, [*path, token], chance * float(after[token]))

    walk(trie, [], 1.0)
    return sums


@pytest.mark.parametrize("name", AVAILABLE)
def test_a_judge_s_probabilities_are_those_of_whole_rows(name: str) -> None:
    model, tokenizer = make_family(name)
    trie, digits = build_trie(tokenizer, NUMBERS, LABELS), digit_tokens(tokenizer)
    prompt = tokenizer("Rate it, please:", add_special_tokens=False).input_ids
    with evaluating(model):
        found = TrieWalk(model, trie, digits).probabilities(torch.tensor(prompt))
    assert found == pytest.approx(by_whole_rows(model, prompt, trie, digits), rel=1e-3)
