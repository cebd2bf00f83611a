"""The latents' cards in Neuronpedia's upload format, and W&B artifacts."""

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.hub.neuronpedia import neuronpedia_batch, neuronpedia_explanations, write_neuronpedia
from persona_probe.hub.wandb_artifact import log_artifact
from persona_probe.report.cards import Activity, saved_cards
from tests.monitor.test_sinks_curves import offline, records

__all__ = ["offline"]  # a fixture

DEMO = Path(__file__).parents[2] / "records" / "demo"
KEYS = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "decoder_weights_dist", "activations", "vector"),
}
"""Of a feature in SAEDashboard's batches, written down from its source."""


def test_a_batch_has_the_cards_numbers_under_neuronpedias_keys() -> None:
    batch = neuronpedia_batch(DEMO)
    assert batch is not None
    cards = {card.latent: card for card in saved_cards(json.loads((DEMO / "cards.json").read_text("utf-8")))}
    assert (batch["model_id"], batch["layer"], batch["sae_set"], batch["sae_id_suffix"]) == (
        "smollm2-135m-instruct",
        20,
        "layer20-topk32-4608",
        None,
    )
    assert [feature["feature_index"] for feature in batch["features"]] == list(cards)
    for feature in batch["features"]:
        card = cards[feature["feature_index"]]
        assert feature.keys() == KEYS
        assert dict(zip(feature["pos_str"], feature["pos_values"], strict=True)) == {
            token.token: token.logit for token in card.top_tokens
        }
        assert feature["neg_values"] == [token.logit for token in card.bottom_tokens] and max(feature["neg_values"]) < 0
        assert feature["frac_nonzero"] == card.activity[0].firing_rate
        assert feature["n_prompts_total"] == 616
        for given, example in zip(feature["activations"], card.examples, strict=True):
            assert len(given["tokens"]) == len(given["values"])
            assert given["values"][given["qualifying_token_index"]] == max(given["values"]) == example.maximum
        _same_histogram(feature, card.activity[0])


def test_labels_become_explanations_with_delphis_two_scores(tmp_path: Path) -> None:
    cards = json.loads((DEMO / "cards.json").read_text("utf-8"))[:2]
    score = {"estimate": 0.9, "ci_low": 0.8, "ci_high": 1.0, "n": 80}
    label = {"text": 'the token after "?"', "author": "rule", "detection": score, "fuzzing": score, "reason": ""}
    cards[0]["explanations"] = [label, {**label, "author": "http:model"}]
    cards[1]["explanations"] = [{**label, "reason": "under 0.7"}]
    (tmp_path / "manifest.json").write_bytes((DEMO / "manifest.json").read_bytes())
    (tmp_path / "cards.json").write_text(json.dumps(cards), "utf-8")
    rows = neuronpedia_explanations(tmp_path)
    assert [(row["index"], row["explanationModelName"]) for row in rows] == [
        (str(cards[0]["latent"]), "rule"),
        (str(cards[0]["latent"]), "http:model"),
    ]
    assert rows[0]["layer"] == "20-layer20-topk32-4608" and rows[0]["description"] == 'the token after "?"'
    assert {one["explanationScoreTypeName"]: one["value"] for one in rows[0]["scores"]} == {
        "eleuther_recall": 0.9,
        "eleuther_fuzz": 0.9,
    }


def _same_histogram(feature: dict[str, Any], activity: Activity) -> None:
    """Its bars have the base model's active tokens, each bar's middle at its place."""
    assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(activity.firing_rate * activity.tokens, abs=0.5)
    middles = feature["freq_hist_data_bar_values"]
    assert middles[0] == activity.bin_width / 2 and middles == sorted(middles)


def test_a_file_is_written_and_a_run_without_cards_says_so(tmp_path: Path) -> None:
    path = write_neuronpedia(DEMO, tmp_path / "batch-0.json")
    assert json.loads(path.read_text("utf-8")) == neuronpedia_batch(DEMO)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_bytes((DEMO / "manifest.json").read_bytes())
    assert neuronpedia_batch(tmp_path / "run") is None
    with pytest.raises(InputError, match="has no cards: run `persona-probe locate"):
        write_neuronpedia(tmp_path / "run", tmp_path / "again.json")


def test_an_artifact_is_logged_offline(offline: Path) -> None:
    assert log_artifact(DEMO, ["records", "neuronpedia"], project="shared") == "demo"
    _as_logged(offline)


def test_an_artifact_joins_the_run_that_is_active(offline: Path) -> None:
    import wandb

    with wandb.init(project="mine") as active:
        log_artifact(DEMO, ["records", "neuronpedia"])
        assert wandb.run is active  # it is the caller's, and stays open
    _as_logged(offline)


def _as_logged(folder: Path) -> None:
    import wandb

    wandb.teardown()  # waits for the service, which writes the file
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    (logged,) = artifacts_of(path)
    assert (logged.name, logged.type) == ("demo", "persona-probe-run")
    places = {entry.path for entry in logged.manifest.contents}
    assert {"README.md", "manifest.json", "latents.parquet", "neuronpedia/batch-0.json"} <= places
    assert not any(place.startswith("sae/") for place in places)


def artifacts_of(path: Path) -> list[Any]:
    """The artifacts that an offline run's file holds."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for data in records(path):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore
        record.ParseFromString(data)
        found += [one for one in (record.artifact, record.request.log_artifact.artifact) if one.name]
    return found
