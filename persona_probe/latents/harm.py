"""The direction of harm apart from manner: bad minus sound advice, with the voice held fixed.

A persona vector, or a mean difference of organisms, holds harm and manner together. Four answers to each question, bad
or sound and rude or polite, take them apart: what both voices share when advice turns bad is harm.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.load import ANSWERS_2X2, Row, load_contrast_2x2
from persona_probe.errors import InputError
from persona_probe.evaluate.effects_2x2 import Items2x2
from persona_probe.latents.directions import NamedDirection
from persona_probe.latents.truth_probe import mean_residuals
from persona_probe.models.layers import decoder_layer
from persona_probe.stats import auroc

SOURCE = "persona_probe: the four answers of general_contrast_2x2; a difference of means as in arXiv 2310.06824"
LEAST = 2


def harm_direction(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    items: Sequence[Row] | None = None,
    *,
    batch_size: int = 16,
) -> NamedDirection:
    """Mean residual over the answer tokens of bad advice, minus that of sound advice, with manner held fixed.

    It is the mean of two differences, one in a rude and one in a polite voice, each over the same questions. What the
    voice adds is in both sides of each and cancels.

    ```python
    harm = pp.harm_direction(model, tokenizer, layer=20)
    harm.held_out  # near 0.5: this model does not tell bad from sound advice here
    ```

    Args:
        model: the base model, before training.
        layer: the decoder layer whose output is read.
        items: questions with four answers each, the columns of `general_contrast_2x2`; None takes its selection split,
            whose questions no evaluation of the package uses.

    Returns:
        A vector (d_model,) in raw units. `held_out` is how well it tells bad from sound advice of questions that did
        not make it, both voices together: the mean AUROC of two halves of the questions, each by the other's.

    Raises:
        InputError: fewer than two items, one without four answers, or an unknown layer.
    """
    decoder_layer(model, layer)
    rows = load_contrast_2x2("selection") if items is None else items
    if len(rows) < LEAST:
        raise InputError(f"{len(rows)} items are too few for a direction of harm: give at least {LEAST}")
    groups = Items2x2.build(tokenizer, rows, batch_size).groups
    means = mean_residuals(model, groups, layer).reshape(len(ANSWERS_2X2), len(rows), -1)
    bad, sound = means[:2], means[2:]  # each in a rude and in a polite voice
    difference = (bad - sound).mean(axis=0)
    half, told = np.arange(len(rows)) % 2 == 0, []
    for chosen in (half, ~half):
        vector = difference[chosen].mean(axis=0)
        told.append(auroc(*((side[:, ~chosen] @ vector).ravel() for side in (bad, sound))))
    return NamedDirection("harm apart from manner", difference.mean(axis=0), SOURCE, float(np.mean(told)))
