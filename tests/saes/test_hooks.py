"""One table of hook names: what each means, what `layer=` may settle, and what is refused in one line."""

from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.models.places import Place
from persona_probe.saes.hooks import hook_place, placed_saes, read_place, sae_layer, write_place
from persona_probe.saes.load import check_fit, check_placed, load_sae
from persona_probe.saes.read import encode
from tests.factories import D_MODEL, D_SAE, LAYER, make_model, make_sae, talks


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.3.hook_attn_out", Place(3, "attn_out")),
        ("blocks.3.ln1_post.hook_out", Place(3, "attn_out")),
        ("blocks.3.attn.hook_out", Place(3, "attn_module")),
        ("blocks.3.attn.hook_z", Place(3, "attn_z")),
        ("blocks.3.attn.o.hook_in", Place(3, "attn_z")),
        ("blocks.3.hook_mlp_out", Place(3, "mlp_out")),
        ("blocks.3.ln2_post.hook_out", Place(3, "mlp_out")),
        ("blocks.3.mlp.hook_out", Place(3, "mlp_module")),
        ("blocks.3.mlp.hook_in", Place(3, "mlp_in")),
        ("blocks.3.ln1.hook_normalized", Place(3, "ln1_normalized")),
        ("blocks.3.ln2.hook_normalized", Place(3, "ln2_normalized")),
        ("blocks.3.hook_resid_pre", Place(2)),
        ("model.layers.3.self_attn.o_proj.input", Place(3, "self_attn.o_proj.input")),
        ("transformer.h.3.attn.c_proj.input", Place(3, "attn.c_proj.input")),
        ("model.language_model.layers.3.mlp", Place(3, "mlp.output")),
    ],
)
def test_a_name_means_one_place(hook: str, place: Place) -> None:
    assert hook_place(hook) == place
    assert read_place(make_sae("topk", hook=hook)) == place
    if not place.is_residual:
        with pytest.raises(InputError, match="not a residual stream"):
            sae_layer(make_sae("topk", hook=hook))


@pytest.mark.parametrize(
    ("hook", "what"),
    [
        ("blocks.1.hook_resid_mid", "the middle of a layer"),
        ("blocks.1.ln2.hook_in", "the middle of a layer"),
        ("hook_embed", "the embeddings"),
        ("blocks.0.hook_resid_pre", "the embeddings"),
        ("blocks.1.hook_mlp_in", r"the MLP's input \(the name does not say on which side of its norm\)"),
        ("blocks.1.attn.hook_in", "the attention's input"),
        ("blocks.1.attn.hook_q", "the attention"),
    ],
)
@pytest.mark.parametrize("layer", [None, 1])
def test_places_that_are_not_read_are_refused_whatever_the_layer(hook: str, what: str, layer: int | None) -> None:
    sae = make_sae("topk", hook=hook)
    for call in (read_place, sae_layer):
        with pytest.raises(InputError, match=f"this SAE reads {what}") as caught:
            call(sae, layer)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("hook", ["blocks.1.ln1.hook_normalized", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"])
def test_a_layer_makes_no_residual_stream_of_another_place(hook: str) -> None:
    sae, model = make_sae("topk", hook=hook), make_model()
    with pytest.raises(InputError, match=r"this SAE reads .*, not a residual stream"):
        sae_layer(sae, 1)
    with pytest.raises(InputError, match=r"this SAE reads .*, not a residual stream"):
        check_fit(sae, model, 1)
    with pytest.raises(InputError, match="would mean the residual stream after layer 1: leave the layer out"):
        read_place(sae, 1)
    with pytest.raises(InputError, match="leave the layer out"):
        pp.FeatureMonitor(sae, {"a": 1}, talks(3), layer=1)
    assert pp.FeatureMonitor(sae, {"a": 1}, talks(3)).settings.layer == hook_place(hook)


def test_a_layer_settles_what_the_metadata_leaves_open() -> None:
    assert read_place(make_sae("topk", hook="unheard.of"), 2) == Place(2)
    assert read_place(make_sae("topk", hook="blocks.4.hook_resid_post", hf_hook_name="model.layers.5"), 2) == Place(2)


def test_two_names_of_one_place_agree_and_the_exact_one_counts() -> None:
    exact = "model.layers.1.pre_feedforward_layernorm.output"
    sae = make_sae("topk", hook="blocks.1.hook_mlp_in", hf_hook_name=exact)
    assert read_place(sae) == Place(1, "pre_feedforward_layernorm.output")
    with pytest.raises(InputError, match=r"two layers .*: correct its cfg\.json"):
        read_place(make_sae("topk", hook="blocks.1.hook_mlp_out", hf_hook_name="model.layers.2.mlp"))


def test_one_head_and_another_width_are_refused() -> None:
    with pytest.raises(InputError, match=r"attention head 3 alone \(hook_head_index\)"):
        read_place(make_sae("topk", hook="blocks.1.attn.hook_z", hook_head_index=3))
    with pytest.raises(InputError, match=r"attention head 0 alone"):
        check_fit(make_sae("topk", hook_head_index=0), make_model(), LAYER)
    narrow = sae_lens.StandardSAE(
        sae_lens.StandardSAEConfig(
            d_in=D_MODEL // 2, d_sae=D_SAE, metadata=SAEMetadata(hook_name="blocks.1.hook_mlp_out", model_name="tiny")
        )
    )
    with pytest.raises(InputError, match=f"reads width {D_MODEL // 2} but what the MLP adds .* has {D_MODEL}"):
        check_placed(placed_saes(narrow)[0], make_model())


def make_transcoder(**metadata: Any) -> Any:
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_out": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    settings["metadata"] = SAEMetadata(hook_name="blocks.1.mlp.hook_in", model_name="tiny", **metadata)
    return sae_lens.Transcoder(sae_lens.TranscoderConfig(**settings))


def test_a_transcoder_has_two_places() -> None:
    sae = make_transcoder(hook_name_out="blocks.1.hook_mlp_out")
    assert (read_place(sae), write_place(sae)) == (Place(1, "mlp_in"), Place(1, "mlp_out"))
    check_placed(placed_saes(sae)[0], make_model())
    with pytest.raises(InputError, match="names no output"):
        write_place(make_transcoder())
    residual = make_transcoder(hook_name_out="blocks.1.hook_mlp_out")
    residual.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    with pytest.raises(InputError, match="reads one place and writes another"):
        sae_layer(residual)


def test_hook_z_saes_take_the_heads_joined(tmp_path: Any) -> None:
    sae = make_sae("standard", hook="blocks.1.attn.hook_z")
    sae.cfg.reshape_activations = "hook_z"
    sae.save_model(tmp_path)
    loaded, x = load_sae(tmp_path), torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    wanted = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    assert torch.allclose(encode(loaded, x), wanted, atol=1e-5)
    assert loaded.decode(encode(loaded, x)).shape == x.shape


def test_an_error_term_changes_no_reading() -> None:
    plain, sae = make_sae("topk"), make_sae("topk")
    sae._use_error_term = True
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encode(sae, x), encode(plain, x))


def test_several_saes_get_distinct_names() -> None:
    one, two, three = make_sae("topk"), make_sae("standard"), make_sae("topk", hook="blocks.2.hook_mlp_out")
    assert [p.name for p in placed_saes([one, two, three])] == ["L1", "L1-2", "L2.mlp_out"]
    assert [p.name for p in placed_saes({"a": one, "b": two})] == ["a", "b"]
    with pytest.raises(InputError, match="one layer= cannot hold for several SAEs"):
        placed_saes([one, two], layer=1)
    with pytest.raises(InputError, match="no SAE given"):
        placed_saes([])
