"""What a run is about to do and for about how long, in a few lines before it starts."""

from collections.abc import Collection
from textwrap import wrap

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.latents.rankers import check_rankers
from persona_probe.study.plan.estimate import pushes, trained_arms
from persona_probe.study.plan.plan import Plan, dry_run, duration


def outlook(config: StudyConfig, device: str | None, finished: Collection[str], place: str) -> list[str]:
    """The stages with what each does and about how long it takes, one line each.

    Args:
        device: None takes the config's.
        finished: stages that the run folder holds, which are not made again.
        place: the file that is written at the end.

    Returns:
        Lines of text. Where the model's or the SAE's numbers are not known here they have no times.
    """
    check_rankers(config.locate.rankers)
    try:
        plan = dry_run(config, device=device)
    except InputError:  # the run's own checks say it, where it matters to the run
        plan = None
    words = _words(config)
    times = {} if plan is None else {work.stage: plan.stage_seconds(work) for work in plan.stages}
    table = [line for stage, what in words.items() for line in _lines(stage, _time(stage, times, finished), what)]
    left = sum(seconds for stage, seconds in times.items() if stage not in finished)
    lines = [f"study {config.name} on {config.model}:", *table]
    if plan is not None and times:
        lines.append(f"about {duration(left)} in all, {_machine(plan)}; other work adds to it.")
    return [*lines, f"Ctrl-C stops it, and the same command continues. It ends with {place}"]


WIDTH = 80
"""Columns of the narrowest terminal that the lines are made for."""


def _lines(stage: str, time: str, what: str) -> list[str]:
    """A stage in one line, or in several where it has much to say."""
    begin = f"{stage:<9}{time:>9}  "
    return wrap(what, WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))


def _time(stage: str, times: dict[str, float], finished: Collection[str]) -> str:
    if stage in finished:
        return "done"
    return duration(times[stage]) if stage in times else "unknown"


def _machine(plan: Plan) -> str:
    import torch

    if plan.device == "cpu":
        threads = torch.get_num_threads()
        return f"with {threads} thread{'s' if threads > 1 else ''} of this processor"
    return "on this GPU"


def _words(config: StudyConfig) -> dict[str, str]:
    """A stage to what it does."""
    trained, seeds, locate = trained_arms(config), len(config.seeds), config.locate
    on_selection, on_evaluation = pushes(config)
    arms = [*config.arms, *(["a null pair's run"] if config.null_pair and trained else [])]
    organisms = f"{len(config.arms)} arms x {seeds} seed{'s' if seeds > 1 else ''}"
    induce = f"train {', '.join(arms)}: {config.training.steps} steps each" if trained else "adopt checkpoints"
    samples = f"answers of {1 + len(config.arms) + len(config.realign.arms)} models"
    judged = f", and have {config.samples.judged_answers} of each judged" if config.samples.judge != "none" else ""
    corrections = ", ".join(config.realign.arms)
    return {
        "induce": induce,
        "locate": f"rank latents; {locate.candidates} candidates next to {locate.random_latents} random latents, "
        f"up to {on_selection + on_evaluation} pushes and removals",
        "track": f"read the latent and the contrast index at each checkpoint of {organisms}",
        "realign": f"correct {config.realign.start}: {corrections}" if corrections else "nothing to correct",
        "evaluate": f"sample {samples}{judged}",
        "report": "draw figures, write the report",
    }
