"""What happens once before a monitored run: checks, probes tokenised, the base found, and the start that says so."""

import hashlib
import logging
import math
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model, decoder_layer, hidden_size
from persona_probe.monitor.anchor import BASE_KEY, Anchor, fingerprint, recorded
from persona_probe.monitor.events import Start
from persona_probe.monitor.features import FeatureSet, flatten
from persona_probe.monitor.ranks import is_partitioned
from persona_probe.monitor.reading import FeatureReader
from persona_probe.monitor.setup import Setup
from persona_probe.provenance import versions
from persona_probe.saes.load import check_fit

log = logging.getLogger(__name__)


def feature_set(setup: Setup, inner: nn.Module) -> FeatureSet:
    """The features, checked against the model (below all wrappers).

    Raises:
        InputError: an SAE, layer or direction that does not fit it.
    """
    if setup.probing and is_partitioned(inner):
        raise InputError("probes cannot be run on a model that ZeRO-3 holds in parts: take mode='passive', or FSDP")
    if setup.sae is not None:
        check_fit(setup.sae, inner, setup.layer)
    decoder_layer(inner, setup.layer)
    return FeatureSet(setup.sae, setup.features, hidden_size(inner))


def probe_reader(setup: Setup, features: FeatureSet, tokenizer: PreTrainedTokenizerBase | None) -> FeatureReader:
    """The reader of the probes.

    Raises:
        InputError: no tokenizer.
    """
    if tokenizer is None:
        raise InputError("FeatureMonitor needs a tokenizer: pass tokenizer= (the trainer has none)")
    groups = list(batches(tokenizer, setup.probes, batch_size=32))
    return FeatureReader(setup.sae, features, groups, setup.layer, setup.positions, setup.bf16)


def earlier_anchor(setup: Setup, inner: nn.Module, step: int) -> Anchor | None:
    """The base that the event file holds, for a run of full weights that is resumed: its own weights are no base.

    With an adapter the base is read again, adapters off, so nothing is taken from the file.
    """
    if step == 0 or isinstance(inner, PeftModel):
        return None
    found = None if setup.path is None else recorded(setup.path)
    if found is not None and found[1] == base_fingerprint(setup):
        return found[0]
    log.warning(
        "training goes on from step %d and no base was recorded for these features and probes: "
        "readings are anchored to the model as it is now; pass base=, or the path= of the first run",
        step,
    )
    return None


def base_fingerprint(setup: Setup) -> str:
    """Tells whether two runs' bases were read alike."""
    features = {name: _content(f) for name, f in flatten(setup.features).items()}
    probes = {"probes": setup.probes, "positions": setup.positions} if setup.probing else {}
    return fingerprint({"features": features, "layer": setup.layer, "probing": setup.probing, **probes})


def _content(feature: int | Tensor) -> object:
    if isinstance(feature, int):
        return feature
    return hashlib.sha256(feature.detach().float().cpu().numpy().tobytes()).hexdigest()


def start_event(setup: Setup, features: FeatureSet, anchor: Anchor, inner: nn.Module) -> Start:
    """What readers of the event file need to know."""
    config = causal_model(inner).config
    metadata: dict[str, Any] = {
        "base": anchor.record(),
        "fingerprint": base_fingerprint(setup),
        "mode": setup.mode,
        "positions": setup.positions if setup.probing else setup.passive_positions,
        "model": str(config.name_or_path or type(causal_model(inner)).__name__),
        "sae": None if setup.sae is None else str(setup.sae.cfg.metadata.hook_name or setup.sae.cfg.architecture()),
        "versions": versions(),
    }
    if math.isfinite(anchor.explained_variance):
        metadata[BASE_KEY] = anchor.explained_variance
    return Start(
        features=dict(zip(features.names, features.latents, strict=True)),
        layer=setup.layer,
        n_probes=len(setup.probes),
        bands=anchor.bands(setup.band_sd),
        metadata=metadata,
    )
