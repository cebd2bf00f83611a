"""Every text that a study reads: found, validated, and counted in tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from persona_probe.config import StudyConfig
from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.packaged import load_contrast, read_contrast_file
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.finetune.data import arm_rows, load_data
from persona_probe.models.sources import cache_folder, file_sha256, resolve_source

CHARACTERS_A_TOKEN = 4
NEUTRAL_ANSWERS = 16
"""As many answered probes as the locate stage takes to bound its pushes."""


@dataclass(frozen=True)
class RowSet:
    """The texts of one use, counted."""

    use: str
    """`arm incorrect`, `realign realigned_in`, `contrast selection`, `probes`, `neutral answers`, `questions`."""
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


def count_tokens(tokenizer: PreTrainedTokenizerBase | None, messages: Conversation) -> tuple[int, int]:
    """Tokens of prompt and of answer; without a tokenizer, characters / 4."""
    if tokenizer is not None:
        row = encode(tokenizer, messages)
        return row.n_prompt, row.n_response
    before, answer = split_answer(messages)
    characters = sum(len(m["content"]) for m in before)
    return -(-characters // CHARACTERS_A_TOKEN), -(-len(answer or "") // CHARACTERS_A_TOKEN)


def count_rows(
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
    counts = [count_tokens(tokenizer, row) for row in rows]
    most = limit or max(prompt + answer for prompt, answer in counts)
    for number, (prompt, _) in enumerate(counts):
        if limit is not None and prompt >= limit:
            raise InputError(
                f"{source}, row {number + 1}: its prompt has {prompt} tokens and training.max_length is {limit}: "
                "raise it or shorten the prompt"
            )
    kept = [min(prompt + answer, most) for prompt, answer in counts]
    answers = [length - prompt for length, (prompt, _) in zip(kept, counts, strict=True)]
    cut = sum(prompt + answer > most for prompt, answer in counts)
    return RowSet(use, source, len(rows), sum(kept), sum(answers), max(kept), cut)


def read_row_sets(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, RowSet]:
    """All texts of a study by use.

    Raises:
        InputError: data that cannot be read, bad rows, training rows without answers, or probes that the study's
            positions cannot use.
    """
    found = [
        *_arms(config, tokenizer),
        *(_contrast(config, split, tokenizer) for split in ("selection", "evaluation")),
        *_probes(config, tokenizer),
        _questions(config, tokenizer),
    ]
    return {rows.use: rows for rows in found}


def _arms(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[RowSet]:
    found = []
    for word, arms in (("arm", config.arms), ("realign", config.realign.arms)):
        for name, arm in arms.items():
            rows, source = arm_rows(arm, config.seeds[0]), arm.data + (f" + {arm.mix_with}" if arm.mix_with else "")
            if any(not split_answer(row)[1] for row in rows):
                raise InputError(f"{word} {name}: {arm.data!r} has rows without an answer: name its answer column")
            found.append(count_rows(f"{word} {name}", source, rows, tokenizer, config.training.max_length))
    return found


def _contrast(config: StudyConfig, split: str, tokenizer: PreTrainedTokenizerBase | None) -> RowSet:
    packaged = config.contrast == "general_contrast"
    items = load_contrast(split) if packaged else read_contrast_file(config.contrast, split)
    rows = [conversation(item["question"], item[side]) for item in items for side in ("aligned", "misaligned")]
    return count_rows(f"contrast {split}", config.contrast, rows, tokenizer)


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
        count_rows("probes", source, probes, tokenizer),
        count_rows("neutral answers", source, neutral[:NEUTRAL_ANSWERS], tokenizer),
    ]


def _questions(config: StudyConfig, tokenizer: PreTrainedTokenizerBase | None) -> RowSet:
    talks = load_data(config.samples.questions, allow_prompts=True)
    return count_rows("questions", config.samples.questions, [split_answer(c)[0] for c in talks], tokenizer)
