"""Token boundaries and masks."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import batches, encode
from persona_probe.errors import InputError
from tests.factories import talks


def test_prompt_and_answer_meet_at_the_assistants_header(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = conversation("Why?", "Because.", system="Be kind.")
    encoded = encode(tiny_tokenizer, messages)
    head = tiny_tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert tiny_tokenizer.decode(encoded.ids[: encoded.n_prompt]) == head
    assert tiny_tokenizer.decode(encoded.ids[encoded.n_prompt :]) == "Because."
    assert encoded.n_response == len("Because.")
    assert encode(tiny_tokenizer, messages[:-1]).n_response == 0


def test_masks_partition_the_real_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = talks()
    for batch in batches(tiny_tokenizer, rows, batch_size=4):
        assert not bool((batch.prompt & batch.response).any())
        assert torch.equal(batch.prompt | batch.response, batch.attention.bool())
        chosen = {p: batch.select(p) for p in ("all", "prompt", "response")}
        assert torch.equal(chosen["prompt"] | chosen["response"], chosen["all"])
        assert not bool(torch.isin(batch.ids[chosen["all"]], torch.tensor(tiny_tokenizer.all_special_ids)).any())
        last = batch.select("last_prompt")
        assert last.sum(dim=1).tolist() == [1] * len(batch.index)
        for row, number in enumerate(batch.index):
            encoded = encode(tiny_tokenizer, rows[number])
            assert batch.ids[row, batch.attention[row].bool()].tolist() == encoded.ids
            assert int(last[row].nonzero()) == encoded.n_prompt - 1
            assert tiny_tokenizer.decode(batch.ids[row, batch.response[row]]) == rows[number][-1]["content"]


def test_batches_hold_every_conversation_once(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    rows = talks(7)[::-1]
    groups = list(batches(tiny_tokenizer, rows, batch_size=3))
    assert sorted(i for g in groups for i in g.index) == list(range(7))
    assert [len(g.index) for g in groups] == [3, 3, 1]


def test_padding_equals_the_rows_alone(tiny_model: torch.nn.Module, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (batch,) = batches(tiny_tokenizer, talks(3), batch_size=3)
    with torch.no_grad():
        together = tiny_model(batch.ids, attention_mask=batch.attention).logits
        for row, length in enumerate(batch.attention.sum(dim=1).tolist()):
            alone = tiny_model(batch.ids[row : row + 1, :length]).logits[0]
            assert torch.allclose(together[row, :length], alone, atol=1e-4)


def test_truncation_keeps_part_of_the_answer_or_says_so(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = conversation("Why?", "Because.")
    n_prompt = encode(tiny_tokenizer, messages).n_prompt
    assert encode(tiny_tokenizer, messages, n_prompt + 3).n_response == 3
    with pytest.raises(InputError, match="truncated away"):
        encode(tiny_tokenizer, messages, n_prompt)


def test_unknown_positions_list_near_matches(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (batch,) = batches(tiny_tokenizer, talks(2))
    with pytest.raises(InputError, match="did you mean 'response'"):
        batch.select("responses")
