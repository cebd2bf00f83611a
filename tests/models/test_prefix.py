"""A shared beginning run once gives what whole rows give: states, gradients, and a suffix fed with embeddings."""

import pytest
import torch

from persona_probe.data.tokens import Batch, batches
from persona_probe.models.layers import base_transformer, transformer_config
from persona_probe.models.prefix import Rows, shared_length
from tests.factories import ARCHITECTURES, make_model, make_tokenizer, talks


def one_batch(count: int = 5) -> Batch:
    return next(batches(make_tokenizer(), talks(count), batch_size=count))


def states(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    hidden = rows.run(base_transformer(model), transformer_config(model), rows.ids())[0]
    return hidden[rows.rest.attention.bool()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_of_the_rows_is_as_in_whole_rows(architecture: str) -> None:
    model, batch = make_model(architecture), one_batch()
    rows = Rows.of(batch, transformer_config(model))
    assert rows.shared >= 8  # "<|im_start|>user\nAsk " in bytes
    with torch.no_grad():
        shared, whole = states(model, rows), base_transformer(model)(batch.ids, attention_mask=batch.attention)[0]
    kept = batch.attention.bool().clone()
    kept[:, : rows.shared] = False
    assert torch.allclose(shared, whole[kept], atol=1e-4)


def test_the_beginning_gets_every_rows_gradient() -> None:
    grads = []
    for whole in (False, True):
        model, batch = make_model(), one_batch()
        rows = Rows.whole(batch) if whole else Rows.of(batch, transformer_config(model))
        hidden = rows.run(base_transformer(model), transformer_config(model), rows.ids())[0]
        (hidden[rows.rest.response] * torch.linspace(-1, 2, hidden.shape[-1])).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-3 * float(grad.abs().max())), name


def test_the_last_prompt_token_is_never_shared() -> None:
    config = transformer_config(make_model())
    same = [t for t in talks(1) for _ in range(3)]
    batch = next(batches(make_tokenizer(), same, batch_size=3))
    assert shared_length(batch, config) == int(batch.prompt[0].sum()) - 1


def test_nothing_is_shared_where_it_saves_nothing() -> None:
    config = transformer_config(make_model())
    assert shared_length(one_batch(1), config) == 0
    batch = one_batch()
    other = Batch(batch.ids.clone(), batch.attention, batch.prompt, batch.response, batch.special, batch.index)
    other.ids[0, 1] = 99
    assert shared_length(other, config) == 0


def test_a_model_with_another_kind_of_state_is_left_alone() -> None:
    config = transformer_config(make_model())
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    assert shared_length(one_batch(), config) == 0
