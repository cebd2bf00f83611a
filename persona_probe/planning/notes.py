"""What a reader of a plan has to know beside its numbers."""

from persona_probe.data.chat import split_answer
from persona_probe.finetune.data import arm_rows
from persona_probe.planning.known_models import known_id
from persona_probe.planning.plan import Plan
from persona_probe.planning.row_sets import CHARACTERS_A_TOKEN

LENGTHS_DIFFER = 0.05
"""Relative difference of two arms' mean answers from which it is noted, as in `data.mix.match_lengths`."""


def notes_of(plan: Plan) -> tuple[str, ...]:
    """How tokens, time and memory were found, what is unknown, and what of the data is not as it should be."""
    return (*_basis(plan), *_unknowns(plan), *_data(plan))


def _basis(plan: Plan) -> list[str]:
    counted = "tokens are counted with the model's tokenizer and chat template"
    guessed = f"the tokenizer is not on this machine: tokens are characters / {CHARACTERS_A_TOKEN}, no chat template"
    notes = [counted if plan.counted else guessed]
    if plan.throughput is not None:
        notes += [
            f"time is an estimate: operations on weights, at {plan.throughput.how}; sampling answers is slower",
            f"memory is an estimate: {plan.config.weights} weights, adapters with AdamW, activations roughly; "
            "frameworks come on top",
        ]
    return notes


def _unknowns(plan: Plan) -> list[str]:
    sae, model, notes = plan.sae, plan.config.model, []
    if plan.skeleton is None:
        notes.append(
            f"{model} is not in the table of known models: no estimates (a folder with its config.json gives them)"
        )
    if plan.layer is None:
        notes.append("nothing on this machine tells the SAE's layer: write `layer:` in the config for estimates")
    if sae.d_in is None:
        notes.append("nothing on this machine tells the SAE's width: whether it fits the model shows when it is loaded")
    if sae.d_sae is None:
        notes.append("nothing on this machine tells the SAE's size: its part of time and memory is left out")
    if sae.model and known_id(sae.model) != known_id(model):
        notes.append(f"the SAE was trained on {sae.model}, the study's model is {model}: check how well it fits")
    return notes


def _data(plan: Plan) -> list[str]:
    config, notes = plan.config, []
    bad, good = (
        {str(split_answer(row)[0]) for row in arm_rows(config.arms[arm], config.seeds[0])}
        for arm in ("incorrect", "correct")
    )
    if bad != good:
        shared = f"{len(bad & good)} of {len(bad | good)} questions"
        notes.append(f"incorrect and correct share {shared}: a control asks the same ones")
    wrong, right = (plan.rows[f"arm {arm}"] for arm in ("incorrect", "correct"))
    means = wrong.mean_answer, right.mean_answer
    if abs(means[0] - means[1]) > LENGTHS_DIFFER * sum(means) / 2:
        notes.append(f"answers are not length-matched: {means[0]:.0f} tokens in incorrect, {means[1]:.0f} in correct")
    if cut := sum(rows.cut for rows in plan.rows.values()):
        notes.append(f"{cut} training rows lose their end to training.max_length ({config.training.max_length} tokens)")
    return notes
