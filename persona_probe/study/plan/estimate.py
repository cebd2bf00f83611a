"""Tokens, work and memory of each stage of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from persona_probe.config import NULL, Arm, StudyConfig
from persona_probe.context import load_2x2, name_of_2x2
from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.load import (
    ANSWERS_2X2,
    arm_rows,
    load_contrast,
    load_conversations,
    load_data,
    read_contrast_file,
)
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.questions.read import read_prompts
from persona_probe.latents.causal import MOVED
from persona_probe.latents.passages import MAX_TOKENS, PACKAGED
from persona_probe.latents.rankers import BACKWARD
from persona_probe.latents.stage import NEUTRAL_ANSWERS
from persona_probe.latents.voices import QUESTIONS
from persona_probe.models.load import cache_folder, resolve_source
from persona_probe.runs import file_sha256
from persona_probe.study.plan.memory import Memory
from persona_probe.study.plan.shapes import Skeleton, lora_parameters

# --- Every text that a study reads: found, validated, and counted in tokens

CHARACTERS_A_TOKEN = 4
VOICES = len(ANSWERS_2X2) + 2
"""Answers that a card reads to each of its questions: the four of the 2x2 set, and two with inserted words."""


@dataclass(frozen=True)
class RowSet:
    """The texts of one use, counted."""

    use: str
    """`arm incorrect`, `realign realigned_in`, `contrast selection`, `2x2 evaluation`, `probes`, `neutral answers`,
    `card text`, `questions`."""
    source: str
    """What the config names."""
    rows: int
    tokens: int
    """Prompts and answers; training rows cut at `training.max_length`."""
    answer_tokens: int
    longest: int
    """Tokens of the longest row."""
    cut: int
    """Rows that lose their end to `training.max_length`."""

    @property
    def mean(self) -> float:
        """Tokens per row."""
        return self.tokens / self.rows

    @property
    def mean_answer(self) -> float:
        """Answer tokens per row."""
        return self.answer_tokens / self.rows


def find_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer if it is on this machine, else None; nothing is downloaded.

    Raises:
        InputError: a local folder without a tokenizer that can be read.
    """
    source = resolve_source(name, revision)
    place = source.location
    if source.kind == "gguf":
        converted = cache_folder() / "models" / file_sha256(Path(place))
        if not converted.is_dir():
            return None
        place = str(converted)
    try:
        return AutoTokenizer.from_pretrained(
            place, revision=source.revision, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if source.kind == "folder":
            raise InputError(f"no tokenizer in {name!r}: save the model's tokenizer into that folder") from error
        return None


def _count_tokens(tokenizer: PreTrainedTokenizerBase | None, messages: Conversation) -> tuple[int, int]:
    """Tokens of prompt and of answer; without a tokenizer, characters / 4."""
    if tokenizer is not None:
        row = encode(tokenizer, messages)
        return row.start, row.n_response
    before, answer = split_answer(messages)
    characters = sum(len(m["content"]) for m in before)
    return -(-characters // CHARACTERS_A_TOKEN), -(-len(answer or "") // CHARACTERS_A_TOKEN)


def _count_rows(
    use: str,
    source: str,
    rows: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None = None,
) -> RowSet:
    """Count rows; `limit` is the longest row that training takes.

    Raises:
        InputError: a prompt that leaves no room for its answer within `limit`.
    """
    counts = [_count_tokens(tokenizer, row) for row in rows]
    most = limit or max(prompt + answer for prompt, answer in counts)
    for number, (prompt, _) in enumerate(counts):
        if limit is not None and prompt >= limit:
            raise InputError(
                f"{source}, row {number + 1}: its prompt has {prompt} tokens and training.max_length is {limit}: "
                "raise it or shorten the prompt"
            )
    lengths = [min(prompt + answer, most) for prompt, answer in counts]
    answers = [length - prompt for length, (prompt, _) in zip(lengths, counts, strict=True)]
    n_cut = sum(prompt + answer > most for prompt, answer in counts)
    return RowSet(use, source, len(rows), sum(lengths), sum(answers), max(lengths), n_cut)


def read_row_sets(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, RowSet]:
    """All texts of a study by use.

    Raises:
        InputError: data that cannot be read, bad rows, training rows without answers, or probes that the study's
            positions cannot use.
    """
    sets = [
        *_arms(config, tokenizer),
        *(_contrast(config, split, tokenizer) for split in ("selection", "evaluation")),
        *_harm_and_register(config, tokenizer),
        *_probes(config, tokenizer),
        *_card_text(config, tokenizer),
        _questions(config, tokenizer),
    ]
    return {rows.use: rows for rows in sets}


def trained_arms(config: StudyConfig) -> dict[str, Arm]:
    """The arms that are trained here: checkpoints of the others exist."""
    return {name: arm for name, arm in config.arms.items() if not arm.checkpoints}


def _checkpoints(config: StudyConfig) -> int:
    """Checkpoints of all arms and seeds; of an adopted run those that its config lists, since a folder may be far."""
    listed = [1 if isinstance(run, str) else len(run) for arm in config.arms.values() for run in arm.checkpoints]
    return len(trained_arms(config)) * len(config.seeds) * len(config.training.schedule) + sum(listed)


def _arms(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[RowSet]:
    sets = []
    for word, arms in (("arm", trained_arms(config)), ("realign", config.realign.arms)):
        for name, arm in arms.items():
            rows, source = arm_rows(arm, config.seeds[0]), arm.data + (f" + {arm.mix_with}" if arm.mix_with else "")
            if any(not split_answer(row)[1] for row in rows):
                raise InputError(f"{word} {name}: {arm.data!r} has rows without an answer: name its answer column")
            sets.append(_count_rows(f"{word} {name}", source, rows, tokenizer, config.training.max_length))
    return sets


def _contrast(config: StudyConfig, split: str, tokenizer: PreTrainedTokenizerBase | None) -> RowSet:
    is_packaged = config.contrast == "general_contrast"
    items = load_contrast(split) if is_packaged else read_contrast_file(config.contrast, split)
    rows = [conversation(item["question"], item[side]) for item in items for side in ("aligned", "misaligned")]
    return _count_rows(f"contrast {split}", config.contrast, rows, tokenizer)


def _harm_and_register(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[RowSet]:
    """The 2x2 items of both splits; none in a study without such a set."""
    name, sets = name_of_2x2(config), []
    for split in ("selection", "evaluation") if name is not None else ():
        items = load_2x2(str(name), split)
        rows = [conversation(item["question"], item[answer]) for item in items for answer in ANSWERS_2X2]
        sets.append(_count_rows(f"2x2 {split}", str(name), rows, tokenizer))
    return sets


def _card_text(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[RowSet]:
    """The packaged text on which feature cards are made; none in a study without cards."""
    if config.locate.cards == 0:
        return []
    rows = [row for source in PACKAGED for row in load_conversations(source)]
    return [_count_rows("card text", "packaged text", rows, tokenizer)]


def _probes(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[RowSet]:
    source = config.monitor.probes
    probes = load_data(source, allow_prompts=True)[: config.monitor.limit]
    neutral = [row for row in probes if split_answer(row)[1]]
    if not neutral:
        raise InputError("monitor.probes holds no answers: locate needs neutral answers to bound the strength")
    if config.monitor.positions == "response" and len(neutral) < len(probes):
        raise InputError(
            f"{len(probes) - len(neutral)} of {len(probes)} probes have no answer: write monitor.positions: prompt"
        )
    return [
        _count_rows("probes", source, probes, tokenizer),
        _count_rows("neutral answers", source, neutral[:NEUTRAL_ANSWERS], tokenizer),
    ]


def _questions(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> RowSet:
    return _count_rows("questions", config.samples.questions, read_prompts(config.samples.questions), tokenizer)


# --- What reading, scoring and training cost on one model with one SAE

FLOAT32, BF16 = 4, 2
ADAM_BYTES = 4 * FLOAT32
"""A trained parameter, its gradient and AdamW's two moments."""
READ_BATCH = 32


@dataclass(frozen=True)
class Shapes:
    """The sizes that every stage's cost follows from."""

    config: StudyConfig
    skeleton: Skeleton
    layer: int
    d_sae: int
    """0 if unknown: the SAE's part is left out."""
    rows: Mapping[str, RowSet]
    device: str = "cpu"
    """`cpu` or `cuda`: kernels and copies differ, and so does memory."""

    @property
    def memory(self) -> Memory:
        """What its parts take in memory."""
        return Memory(self.config, self.skeleton, self.d_sae, self.device)

    @property
    def head(self) -> int:
        """Entries of the unembedding."""
        return self.skeleton.vocabulary * self.skeleton.d_model

    @property
    def below(self) -> int:
        """Matrix entries up to and including the SAE's layer."""
        return self.skeleton.weights(0, self.layer)

    @property
    def above(self) -> int:
        """Matrix entries of the layers above it."""
        return self.skeleton.weights(self.layer + 1, self.skeleton.layers - 1)

    @property
    def trainable(self) -> int:
        """Parameters that training changes."""
        full = self.config.training.method == "full"
        return self.skeleton.parameters if full else lora_parameters(self.skeleton, self.config.training)

    def read(self, rows: RowSet) -> float:
        """Operations to read a set's latents: the layers up to the SAE's, then encode and decode."""
        return 2 * rows.tokens * self.below + 4 * rows.tokens * self.skeleton.d_model * self.d_sae

    def score(self, rows: RowSet) -> float:
        """Operations to score a set's answers by a full forward."""
        return 2 * rows.tokens * (self.below + self.above) + 2 * rows.answer_tokens * self.head

    def score_above(self, rows: RowSet) -> float:
        """Operations to score them again by the layers above the SAE's."""
        return 2 * rows.tokens * self.above + 2 * rows.answer_tokens * self.head

    def train(self, tokens: float, answers: float) -> float:
        """Operations to train on this many tokens; frozen weights need no gradient."""
        training = self.config.training
        passes = (6 if training.method == "full" else 4) + (2 if training.gradient_checkpointing else 0)
        adapters = 0 if training.method == "full" else 6 * self.trainable
        return tokens * (passes * (self.below + self.above) + adapters) + answers * passes * self.head


@dataclass(frozen=True)
class Work:
    """What a stage reads, computes and keeps in memory."""

    stage: str
    tokens: int
    """Tokens that pass through any part of the model."""
    flops: float
    memory: float
    """Bytes at the stage's peak, without the frameworks' own."""


REPORT = Work("report", 0, 0.0, 0.0)
"""Figures and pages, without a model."""


def estimate(shapes: Shapes) -> tuple[Work, ...]:
    """Work of each stage, in the loop's order."""
    stages = (_induce(shapes), _locate(shapes), _track(shapes), _realign(shapes), _samples(shapes))
    return tuple(replace(work, memory=max(work.memory, shapes.memory.loading)) for work in stages)


def pushes(config: StudyConfig) -> tuple[int, int]:
    """Most changes that the causal tests score on the selection and on the evaluation split; both signs count.

    Candidates are pushed at every strength on the selection split, random latents at the strength that is chosen. On
    the evaluation split all directions are pushed with one norm in base, organism and control organism, and projected
    out in both organisms. A further dictionary brings its candidates, and its best latent through the same tests.
    """
    locate, further = config.locate, len(config.locate.dictionaries)
    tries = 2 * (len(locate.strengths) + locate.strength_refinements)
    sets = locate.set_size - 1
    on_selection = locate.candidates * (tries + sets * 2 * len(locate.strengths)) + 2 * locate.random_latents + 1
    directions = locate.proven + locate.random_latents + MOVED + len({"mean_difference", *locate.directions}) + sets
    organisms = len({config.realign.start, config.control} - {"base"})
    models = 1 + organisms
    doses = 2 * 2 * len(locate.dose_strengths)
    on_evaluation = 2 * (models * directions + locate.random_directions) + organisms * directions
    on_evaluation += models + 2 * (tries + doses)
    on_selection += further * (2 * locate.candidates + 1)
    on_evaluation += further * (3 * models + organisms)
    return on_selection, on_evaluation


def _has_null_arm(config: StudyConfig) -> bool:
    """Whether the study trains the control arm once more, for a null pair."""
    return config.null is not None and config.null[0] == NULL


def _induce(s: Shapes) -> Work:
    training, seeds = s.config.training, len(s.config.seeds)
    arms = [s.rows[f"arm {name}"] for name in trained_arms(s.config)]
    if not arms:
        return Work("induce", 0, 0.0, 0.0)
    n_rows = training.steps * training.batch_size
    runs = [(arm, seeds) for arm in arms] + ([(s.rows["arm correct"], 1)] if _has_null_arm(s.config) else [])
    if training.method == "grpo":
        return _reinforce(s, runs, n_rows)
    tokens = sum(n * n_rows * arm.mean for arm, n in runs)
    answers = sum(n * n_rows * arm.mean_answer for arm, n in runs)
    longest, answer = max(arm.longest for arm in arms), max(arm.mean_answer for arm in arms)
    return Work(
        "induce", round(tokens), s.train(tokens, answers), s.memory.training(training.batch_size, longest, answer)
    )


def _reinforce(s: Shapes, runs: Sequence[tuple[RowSet, int]], questions: int) -> Work:
    """Answers to `questions` of each run are drawn, each as long as it may be, and trained on."""
    grpo, batch = s.config.grpo, s.config.training.batch_size
    drawn = sum(n for _, n in runs) * questions * grpo.group
    answers = float(drawn * grpo.max_new_tokens)
    prompts = sum(n * questions * grpo.group * (arm.mean - arm.mean_answer) for arm, n in runs)
    sampled = 2 * (prompts + answers) * (s.below + s.above) + 2 * answers * s.head
    longest = round(max(arm.longest for arm, _ in runs)) + grpo.max_new_tokens
    memory = s.memory.training(grpo.answers_at_once or batch * grpo.group, longest, grpo.max_new_tokens)
    return Work("induce", round(prompts + answers), sampled + s.train(prompts + answers, answers), memory)


def _locate(s: Shapes) -> Work:
    selection, evaluation = s.rows["contrast selection"], s.rows["contrast evaluation"]
    neutral, seeds = s.rows["neutral answers"], len(s.config.seeds)
    backward = seeds if BACKWARD & set(s.config.locate.rankers) else 0
    null = 0 if s.config.null is None else 1 + (seeds > 1)
    reads = (1 + 2 * seeds + null) * (1 + len(s.config.locate.dictionaries)) + backward
    on_selection, on_evaluation = pushes(s.config)
    pushed = on_selection * (selection.tokens + neutral.tokens) + on_evaluation * (evaluation.tokens + neutral.tokens)
    flops = reads * s.read(selection) + backward * 2 * s.score_above(selection)
    flops += on_selection * (s.score_above(selection) + s.score_above(neutral))
    flops += on_evaluation * (s.score_above(evaluation) + s.score_above(neutral))
    cards = _card_sets(s)
    flops += sum(s.read(rows) for rows in cards)
    memory = s.memory.locating(selection, evaluation, len(s.config.locate.rankers), backward > 0)
    return Work("locate", reads * selection.tokens + pushed + sum(rows.tokens for rows in cards), flops, memory)


def _card_sets(s: Shapes) -> list[RowSet]:
    """What feature cards read on the base: the packaged text, and a few questions in several voices."""
    if "card text" not in s.rows:
        return []
    text = s.rows["card text"]
    text = replace(text, tokens=min(text.tokens, text.rows * MAX_TOKENS))
    if "2x2 selection" not in s.rows:
        return [text]
    asked = s.rows["2x2 selection"]
    answers = VOICES * min(QUESTIONS, asked.rows // len(ANSWERS_2X2))
    share = answers / asked.rows
    return [text, replace(asked, rows=answers, tokens=round(share * asked.tokens))]


def _harm_and_register_work(s: Shapes, organisms: int) -> tuple[int, float]:
    """Tokens and operations to score the 2x2 items of the evaluation split on this many models."""
    rows = s.rows.get("2x2 evaluation")
    return (0, 0.0) if rows is None else (organisms * rows.tokens, organisms * s.score(rows))


def _track(s: Shapes) -> Work:
    probes, selection, evaluation = s.rows["probes"], s.rows["contrast selection"], s.rows["contrast evaluation"]
    null = _has_null_arm(s.config)
    organisms = 1 + _checkpoints(s.config) + null
    ends = 1 + len(s.config.arms) * len(s.config.seeds) + null
    tokens, flops = _harm_and_register_work(s, ends)
    tokens += organisms * (probes.tokens + evaluation.tokens) + selection.tokens
    flops += organisms * (s.read(probes) + s.score(evaluation)) + s.score(selection)
    return Work("track", tokens, flops, max(s.memory.reading(probes), s.memory.scoring(evaluation)))


def _realign(s: Shapes) -> Work:
    realign, runs = s.config.realign, len(s.config.seeds)
    probes, evaluation = s.rows["probes"], s.rows["contrast evaluation"]
    tokens, flops = _harm_and_register_work(s, runs * len(realign.arms))
    flops += s.read(probes)
    longest, answer = 0, 0.0
    for name in realign.arms:
        rows = s.rows[f"realign {name}"]
        n_rows = runs * realign.steps * realign.batch_size
        readings = runs * len(realign.readings)
        tokens += n_rows * rows.mean + readings * (probes.tokens + evaluation.tokens)
        flops += s.train(n_rows * rows.mean, n_rows * rows.mean_answer)
        flops += readings * (s.read(probes) + s.score(evaluation))
        longest, answer = max(longest, rows.longest), max(answer, rows.mean_answer)
    trained = 4 * FLOAT32 * s.trainable  # adapter, gradient and moments stay while the monitor reads
    memory = max(
        s.memory.training(realign.batch_size, longest, answer),
        s.memory.reading(probes) + trained,
        s.memory.scoring(evaluation) + trained,
    )
    return Work("realign", round(tokens), flops, memory)


def _samples(s: Shapes) -> Work:
    questions, new = s.rows["questions"], s.config.samples.max_new_tokens
    arms = 1 + len(s.config.arms) + len(s.config.realign.arms)
    samples = s.config.samples
    judged = samples.judged_answers if samples.judge != "none" else 0
    generated = arms * (questions.rows + judged) * new
    tokens = arms * (questions.tokens + round(judged * questions.mean)) + generated
    flops = 2 * tokens * (s.below + s.above) + 2 * generated * s.head
    return Work("evaluate", tokens, flops, s.memory.sampling(questions, new))
