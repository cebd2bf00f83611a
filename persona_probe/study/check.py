"""What a study needs, stage by stage, tested before it trains: nothing is refused after an hour."""

from persona_probe.config import NULL
from persona_probe.context import Context, sample_questions
from persona_probe.data.chat import conversation
from persona_probe.data.load import arm_rows, check_paired, load_data
from persona_probe.data.template import fit_roles, text_before_answer
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.requests import check_room
from persona_probe.finetune.grpo import Questions
from persona_probe.finetune.rewards import named_reward
from persona_probe.finetune.sft import check_rows, stripping, with_adapter
from persona_probe.latents.dictionaries import placed_dictionary
from persona_probe.latents.persona_vectors import load_persona_pairs, under_system
from persona_probe.latents.rankers import check_rankers
from persona_probe.latents.stage import neutral_answers, read_base
from persona_probe.models.load import load_tokenizer
from persona_probe.models.quantized import refuse_quantized
from persona_probe.realignment.spec import Correction
from persona_probe.study.evaluate import judged_evaluation


def check_study(ctx: Context) -> None:
    """Load everything that the stages of a study need, and test its settings on it.

    Raises:
        InputError: what a stage would refuse: rows, adapter settings, rankers, an SAE, probes, corrections, questions.
    """
    _check_rows(ctx)
    _check_training(ctx)
    _check_probes(ctx)
    for arm in ctx.config.realign.arms:
        Correction.of_arm(ctx.config, arm)
    _check_samples(ctx)
    _ = ctx.saes, ctx.selection, ctx.evaluation, ctx.rows_2x2("evaluation")
    _check_locate(ctx)  # last: it runs the base model


def _check_rows(ctx: Context) -> None:
    config, tokenizer = ctx.config, ctx.tokenizer
    arms = {**config.arms, **config.realign.arms}
    rows = {name: arm_rows(arm, config.seeds[0]) for name, arm in arms.items() if arm.data}
    for name, conversations in rows.items():
        try:
            check_rows(tokenizer, conversations, config.training.max_length)
            if arms[name].reward:
                Questions.of(conversations, named_reward(arms[name].reward))
            if arms[name].demonstrations:
                check_rows(tokenizer, load_data(arms[name].demonstrations), config.training.max_length)
        except InputError as error:
            raise InputError(f"arm {name!r}: {error}") from error
    if config.paired_arms and {"incorrect", "correct"} <= rows.keys():
        check_paired(rows["incorrect"], rows["correct"])


def _check_training(ctx: Context) -> None:
    """The adapter of training and corrections is put on the model and taken off again."""
    training, arms = ctx.config.training, ctx.config.arms
    if ctx.config.null is not None and ctx.config.null[0] == NULL:
        arms = {**arms, NULL: arms[ctx.config.control]}
    if all(arm.checkpoints for arm in arms.values()):
        return
    if training.method == "full":
        refuse_quantized(ctx.model, "training.method: full")
        return
    with stripping(with_adapter(ctx.model, training, ctx.config.seeds[0])):
        pass


def _check_locate(ctx: Context) -> None:
    config = ctx.config.locate
    check_rankers([*config.rankers, *config.choose_by])
    latents = int(ctx.sae.cfg.d_sae)
    if config.candidates + 2 > latents:
        raise InputError(
            f"locate.candidates ({config.candidates}) leaves no random ones of {latents} latents: lower it"
        )
    if "persona_vector" in config.directions:
        pair = load_persona_pairs()[0]
        for system in (pair.misaligned, pair.aligned):
            turns = under_system(ctx.tokenizer, conversation("A question.", "An answer."), system)
            conversation_batches(ctx.tokenizer, [turns])
    further = [placed_dictionary(ctx, name) for name in config.dictionaries]
    if not ctx.run.has("parts/rank.parquet"):
        read_base(ctx, ctx.saes)
        for placed in further:
            read_base(ctx, [placed])


def _check_probes(ctx: Context) -> None:
    neutral_answers(ctx)
    where = ctx.config.monitor.positions
    for batch in conversation_batches(ctx.tokenizer, ctx.probes):
        if not bool(batch.select(where).any(dim=1).all()):
            raise InputError(f"monitor.probes: a probe has no token at positions {where!r}: give probes with answers")


def _check_samples(ctx: Context) -> None:
    samples = ctx.config.samples
    for row in sample_questions(ctx):
        text = text_before_answer(ctx.tokenizer, fit_roles(ctx.tokenizer, conversation(row["question"])))
        ids = tuple(ctx.tokenizer.encode(text, add_special_tokens=False))
        check_room(ctx.model, ids, samples.max_new_tokens, row["id"])
    if judged_evaluation(ctx.config) is not None:
        from persona_probe.evaluate.offline.offline_judge import JudgeWeights, packaged_folder

        load_tokenizer(JudgeWeights.load(packaged_folder()).recipe.model)  # the judge's reader can be had
