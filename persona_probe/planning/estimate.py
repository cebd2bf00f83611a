"""Tokens, work and memory of each stage of a study."""

from dataclasses import dataclass

from persona_probe.config import StudyConfig
from persona_probe.locate.ranking import BACKWARD
from persona_probe.planning.shapes import FLOAT32, Shapes


@dataclass(frozen=True)
class Work:
    """What a stage reads, computes and holds."""

    stage: str
    tokens: int
    """Tokens that pass through any part of the model."""
    flops: float
    memory: float
    """Bytes at the stage's peak, without the frameworks' own."""


def estimate(shapes: Shapes) -> tuple[Work, ...]:
    """Work of each stage, in the loop's order."""
    return (_induce(shapes), _locate(shapes), _track(shapes), _realign(shapes), _samples(shapes))


def pushes(config: StudyConfig) -> tuple[int, int]:
    """Most changes that the causal test scores on the selection and on the evaluation split; both signs count."""
    locate = config.locate
    tries = 2 * (len(locate.strengths) + locate.strength_refinements)
    sets = locate.set_size - 1
    chosen = locate.candidates * (tries + sets * 2 * len(locate.strengths))
    organism = locate.proven + locate.random_latents + len({"mean_difference", *locate.directions}) + sets
    base = organism + locate.random_directions
    doses = 2 * 2 * len(locate.dose_strengths)
    return chosen + 1, (base + organism) * tries + organism + 2 * (doses + 1)


def _induce(s: Shapes) -> Work:
    training, seeds = s.config.training, len(s.config.seeds)
    arms = [s.rows[f"arm {name}"] for name in s.config.arms]
    drawn = seeds * training.steps * training.batch_size
    tokens = sum(drawn * arm.mean for arm in arms)
    answers = sum(drawn * arm.mean_answer for arm in arms)
    longest, answer = max(arm.longest for arm in arms), max(arm.mean_answer for arm in arms)
    return Work(
        "induce", round(tokens), s.train(tokens, answers), s.training_memory(training.batch_size, longest, answer)
    )


def _locate(s: Shapes) -> Work:
    selection, evaluation = s.rows["contrast selection"], s.rows["contrast evaluation"]
    neutral, seeds = s.rows["neutral answers"], len(s.config.seeds)
    backward = seeds if BACKWARD & set(s.config.locate.rankers) else 0
    reads = 1 + 2 * seeds + backward
    on_selection, on_evaluation = pushes(s.config)
    pushed = on_selection * (selection.tokens + neutral.tokens) + on_evaluation * (evaluation.tokens + neutral.tokens)
    flops = reads * s.read(selection) + backward * 2 * s.score_above(selection)
    flops += on_selection * (s.score_above(selection) + s.score_above(neutral))
    flops += on_evaluation * (s.score_above(evaluation) + s.score_above(neutral))
    # mean and firing rate of every latent and conversation, of three models
    tables = 3 * 2 * FLOAT32 * selection.rows * s.d_sae
    return Work("locate", reads * selection.tokens + pushed, flops, s.reading_memory(selection) + tables)


def _track(s: Shapes) -> Work:
    probes, selection, evaluation = s.rows["probes"], s.rows["contrast selection"], s.rows["contrast evaluation"]
    organisms = 1 + len(s.config.arms) * len(s.config.seeds) * len(s.config.training.schedule)
    tokens = organisms * (probes.tokens + evaluation.tokens) + selection.tokens
    flops = organisms * (s.read(probes) + s.score(evaluation)) + s.score(selection)
    return Work("track", tokens, flops, s.reading_memory(probes))


def _realign(s: Shapes) -> Work:
    realign, runs = s.config.realign, len(s.config.seeds)
    probes, evaluation = s.rows["probes"], s.rows["contrast evaluation"]
    tokens, flops, longest, answer = 0.0, s.read(probes), 0, 0.0
    for name in realign.arms:
        rows = s.rows[f"realign {name}"]
        drawn = runs * realign.steps * realign.batch_size
        readings = runs * len(realign.readings)
        tokens += drawn * rows.mean + readings * (probes.tokens + evaluation.tokens)
        flops += s.train(drawn * rows.mean, drawn * rows.mean_answer)
        flops += readings * (s.read(probes) + s.score(evaluation))
        longest, answer = max(longest, rows.longest), max(answer, rows.mean_answer)
    memory = s.training_memory(realign.batch_size, longest, answer) + s.sae_bytes + s.encode_memory(probes)
    return Work("realign", round(tokens), flops, memory)


def _samples(s: Shapes) -> Work:
    questions, new = s.rows["questions"], s.config.samples.max_new_tokens
    arms = 1 + len(s.config.arms) + len(s.config.realign.arms)
    generated = arms * questions.rows * new
    tokens = arms * questions.tokens + generated
    flops = 2 * tokens * (s.below + s.above) + 2 * generated * s.head
    return Work("evaluate", tokens, flops, s.resident)
