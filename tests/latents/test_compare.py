"""Locate for one's own models: objects, PEFT models and folders give the same table; bad input says what to give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import persona_probe as pp
from persona_probe.data.chat import Conversation, conversation
from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layer
from persona_probe.saes.read import encode
from tests.factories import LAYER, copied_state, hook_count, make_model, make_sae, make_tokenizer, same_state

TALKS = [conversation(f"Ask {n}?", side * (n + 2)) for n in range(4) for side in ("good. ", "bad! ")]
FLAGS = [False, True] * 4
OPEN: dict[str, Any] = {"minimum_explained_variance": -100.0}  # a random SAE explains nothing


def adapted(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_model(), config).eval()  # pyright: ignore[reportArgumentType, reportReturnType]


def located(base: Any, tuned: Any, talks: list[Conversation] = TALKS, **options: Any) -> Any:
    return pp.locate(base, tuned, make_sae("standard"), talks, tokenizer=make_tokenizer(), **OPEN, **options)


def test_a_planted_shift_is_first() -> None:
    base, tuned, sae = make_model(), make_model(), make_sae("standard")
    decoder_layer(tuned, LAYER).register_forward_hook(
        lambda _m, _i, out: (out[0] if isinstance(out, tuple) else out) + 6 * sae.W_dec[11].detach()
    )
    table = located(base, tuned)
    assert table["latent"].iloc[0] == 11 and table["q_value"].iloc[0] < 0.05
    assert table.set_index("latent")["cosine_rank"][11] == 1


def test_a_null_model_stands_beside_the_rise_and_its_absence_is_said(caplog: pytest.LogCaptureFixture) -> None:
    base, tuned, control, null = (make_model(seed=n) for n in range(4))
    table = located(base, tuned, control=control, null=null)
    other = located(base, null, control=control).set_index("latent")
    assert np.allclose(table.set_index("latent")["null_rise"].sort_index(), other["rise"].sort_index())
    assert not any("seed noise was not measured" in warning for warning in table.attrs["warnings"])
    assert any("seed noise was not measured" in w for w in other.attrs["warnings"]) and "not measured" in caplog.text
    assert {"explained_change", "explained_by_latents", "carried", "disagreement"} <= set(table.attrs)
    with pytest.raises(InputError, match="pass control= too"):
        located(base, tuned, null=null)
    with pytest.raises(InputError, match="the control itself"):
        located(base, tuned, control=control, null=control)


def test_the_order_is_the_callers() -> None:
    base, tuned = make_model(), adapted(1)
    by_cosine, by_rise = located(base, tuned), located(base, tuned, order="rise")
    alive = by_cosine[by_cosine["alive"]]
    assert alive["cosine"].is_monotonic_decreasing and by_cosine["alive"].is_monotonic_decreasing
    assert by_rise["rise"].is_monotonic_decreasing
    with pytest.raises(InputError, match="unknown ranker 'rize'"):
        located(base, tuned, order="rize")


def test_a_peft_model_against_itself_compares_with_its_base() -> None:
    tuned = adapted(1)
    own, apart = located(tuned, tuned), located(make_model(), tuned)
    assert np.allclose(own["rise"], apart["rise"], atol=1e-5)
    assert own["rise"].abs().max() > 0.01
    assert located(make_model(), make_model())["rise"].abs().max() == 0


def test_folders_give_what_objects_give(tmp_path: Path) -> None:
    base, tuned, control = make_model(), adapted(1), adapted(2)
    for name, model in (("tuned", tuned), ("control", control)):
        model.save_pretrained(str(tmp_path / name))
    state = copied_state(base)
    wanted = located(base, tuned, control=control)
    found = located(base, tmp_path / "tuned", control=str(tmp_path / "control"))
    assert np.allclose(found["rise"], wanted["rise"], atol=1e-5)
    assert same_state(copied_state(base), state) and hook_count(base) == 0
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    sae = make_sae("standard")
    whole = pp.locate(str(tmp_path / "base"), tmp_path / "tuned", sae, TALKS, **OPEN)
    assert np.allclose(whole["rise"], located(base, tuned)["rise"], atol=1e-5)


def test_rankers_that_need_flags_get_them() -> None:
    base, tuned = make_model(), adapted(1)
    rankers = ["rise", "rise_prompt", "attribution", "slope", "discrimination"]
    table = located(base, tuned, rankers=rankers, misaligned=FLAGS)
    assert {f"{r}_rank" for r in rankers[1:]} <= set(table.columns)
    assert table["slope"].abs().max() > 0
    with pytest.raises(InputError, match="pass misaligned="):
        located(base, tuned, rankers=["slope"])
    with pytest.raises(InputError, match="unknown ranker 'slop'"):
        located(base, tuned, rankers=["slop"])


def test_prompts_are_read_as_prompts() -> None:
    base, tuned, sae = make_model(), adapted(1), make_sae("standard")
    table = pp.locate(base, tuned, sae, ["Ask 1?", "Ask 2?"], tokenizer=make_tokenizer(), **OPEN)
    assert table["rise"].abs().max() > 0
    assert encode(sae, torch.zeros(1, sae.cfg.d_in)).shape == (1, len(table))


def test_bad_input_says_what_to_give(tmp_path: Path) -> None:
    base, sae = make_model(), make_sae("standard")
    with pytest.raises(InputError, match="the SAE explains"):
        pp.locate(base, base, sae, TALKS, tokenizer=make_tokenizer())
    with pytest.raises(InputError, match="pass tokenizer="):
        pp.locate(base, base, sae, TALKS)
    with pytest.raises(InputError):
        located(base, tmp_path)
    with pytest.raises(InputError):
        located(base, base, [])
