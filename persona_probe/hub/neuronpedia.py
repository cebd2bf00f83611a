"""A study's cards in the format in which Neuronpedia takes features: SAEDashboard's batches."""

import re
from pathlib import Path
from typing import Any

from persona_probe import shipped
from persona_probe.errors import InputError
from persona_probe.files import expanded, read_json
from persona_probe.report.cards import NO_LABEL, Example, FeatureCard, saved_cards
from persona_probe.runs import RunFolder
from persona_probe.writing import write_json

TOP = -1
"""What SAEDashboard writes as the bounds of the bin of top activations, which belong to no interval."""


def neuronpedia_batch(run: str | Path) -> dict[str, Any] | None:
    """The cards of a run as one batch of features; None where the run has no cards.

    Keys are those of SAEDashboard's `NeuronpediaDashboardBatch`: `model_id`, `layer`, `sae_set`, `sae_id_suffix` and
    `features`, each with its promoted and suppressed tokens, the histogram of its activations, the share of tokens on
    which it fires, and its strongest passages with an activation for every token. What cards do not measure
    (correlations, aligned neurons, the histogram of all logits) is empty.

    Raises:
        InputError: no run folder, damaged cards, or an SAE whose layer no file tells.
    """
    folder = RunFolder.open(run)
    if not folder.has("cards.json"):
        return None
    cards = saved_cards(folder.read_json("cards.json"))
    if not cards:
        return None
    sae = cards[0].sae
    return {
        "model_id": folder.config.model.rpartition("/")[2].lower(),
        "layer": _layer(folder, sae),
        "sae_set": Path(sae).name.lower(),
        "sae_id_suffix": None,
        "features": [_feature(card) for card in cards],
    }


def write_neuronpedia(run: str | Path, path: str | Path) -> Path:
    """Write `neuronpedia_batch` to a JSON file.

    Raises:
        InputError: no cards (`persona-probe locate RUN --cards 20` makes them), or what `neuronpedia_batch` refuses.
    """
    batch = neuronpedia_batch(run)
    if batch is None:
        raise InputError(f"{run} has no cards: run `persona-probe locate {run} --cards 20`")
    return write_json(Path(path), batch)


DETECTION, FUZZING = "eleuther_recall", "eleuther_fuzz"
"""Neuronpedia's names of delphi's two scores."""


def neuronpedia_explanations(run: str | Path) -> list[dict[str, Any]]:
    """The cards' labels as Neuronpedia's explanations, with their scores.

    Keys are those of its exports and API: `modelId`, `layer` (layer and set of SAEs), `index`, `description`,
    `typeName`, `explanationModelName`, and `scores`, each with `value` (balanced accuracy on held-out passages),
    `explanationScoreTypeName` and `explanationScoreModelName`. A latent without a label that scores 0.7 has none.

    Raises:
        InputError: no run folder, damaged cards, or an SAE whose layer no file tells.
    """
    folder = RunFolder.open(run)
    cards = saved_cards(folder.read_json("cards.json")) if folder.has("cards.json") else []
    shared = {"modelId": folder.config.model.rpartition("/")[2].lower()}
    if cards:
        shared["layer"] = f"{_layer(folder, cards[0].sae)}-{Path(cards[0].sae).name.lower()}"
    return [
        {
            **shared,
            "index": str(card.latent),
            "description": one.label,
            "typeName": "persona_probe_rule" if one.author.startswith("rule") else "persona_probe_model",
            "explanationModelName": one.author,
            "scores": [
                {"value": score.estimate, "explanationScoreTypeName": name, "explanationScoreModelName": one.author}
                for name, score in ((DETECTION, one.detection), (FUZZING, one.fuzzing))
                if score is not None
            ],
        }
        for card in cards
        for one in card.explanations
        if one.label != NO_LABEL
    ]


def _layer(folder: RunFolder, sae: str) -> int:
    """Of the config, the SAE's settings or its name."""
    if folder.config.layer is not None:
        return folder.config.layer
    settings = shipped.find(expanded(sae)) / "cfg.json"
    said = read_json(settings, dict) if settings.is_file() else {}
    hook = str({**said, **(said.get("metadata") or {})}.get("hook_name", ""))
    found = re.search(r"blocks\.(\d+)\.", hook) or re.search(r"layer_?(\d+)", sae)
    if found is None:
        raise InputError(f"no file tells the layer of SAE {sae}: write `layer:` in the study's config")
    return int(found[1])


def _feature(card: FeatureCard) -> dict[str, Any]:
    base = card.activity[0] if card.activity else None
    width = 0.0 if base is None else base.bin_width
    return {
        "feature_index": card.latent,
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [token.token for token in card.bottom_tokens],
        "neg_values": [token.logit for token in card.bottom_tokens],
        "pos_str": [token.token for token in card.top_tokens],
        "pos_values": [token.logit for token in card.top_tokens],
        "frac_nonzero": 0.0 if base is None else base.firing_rate,
        "freq_hist_data_bar_values": [] if base is None else [(i + 0.5) * width for i in range(len(base.counts))],
        "freq_hist_data_bar_heights": [] if base is None else list(base.counts),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": _conversations(card.text),
        "n_tokens_in_prompt": max((len(one.tokens) for one in card.examples), default=0),
        "dataset": card.text,
        "decoder_weights_dist": [],
        "activations": [_activation(one) for one in card.examples],
        "vector": [],
    }


def _activation(example: Example) -> dict[str, Any]:
    return {
        "bin_min": TOP,
        "bin_max": TOP,
        "bin_contains": TOP,
        "tokens": list(example.tokens),
        "values": list(example.values),
        "qualifying_token_index": example.peak,
    }


def _conversations(text: str) -> int:
    """As the card says what it was made on: `packaged text (616 conversations)`."""
    found = re.search(r"\((\d+) conversations\)", text)
    return int(found[1]) if found else 0
