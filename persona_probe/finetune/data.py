"""The rows of an arm, from a packaged set, a file, or a mixture of two."""

from pathlib import Path

from persona_probe.config import Arm
from persona_probe.data.chat import Conversation, split_answer
from persona_probe.data.mix import mix
from persona_probe.data.packaged import SETS, load_conversations
from persona_probe.data.readers import read_conversations
from persona_probe.errors import InputError, near_matches


def load_data(spec: str, allow_prompts: bool = False) -> list[Conversation]:
    """Conversations of a packaged set (`set` or `set:column`) or of a file or `datasets` folder.

    Raises:
        InputError: neither a packaged set nor an existing path, or bad rows.
    """
    if spec.partition(":")[0] in SETS:
        return load_conversations(spec)
    path = Path(spec).expanduser()
    if not path.exists():
        raise InputError(f"no data at {spec!r}: give a file, or a packaged set ({near_matches(spec, SETS)})")
    return read_conversations(path, allow_prompts=allow_prompts)


def arm_rows(arm: Arm, seed: int) -> list[Conversation]:
    """The training rows of an arm; mixtures are drawn with the arm's seed."""
    bad = load_data(arm.data)
    if arm.mix_with is None:
        return bad
    return mix(bad, load_data(arm.mix_with), arm.bad_fraction, seed=seed)


def check_paired(incorrect: list[Conversation], control: list[Conversation]) -> None:
    """Refuse a control arm that asks other questions: its difference to the incorrect arm would not be the answers'.

    Raises:
        InputError: fewer than half of the incorrect arm's prompts are the control's too.
    """
    asked, answered = ({_prompt(c) for c in rows} for rows in (incorrect, control))
    common = len(asked & answered)
    if 2 * common < len(asked):
        raise InputError(
            f"arms 'incorrect' and 'correct' ask different questions ({common} of {len(asked)} in common): give the "
            "control the same questions with good answers, or set paired_arms: false"
        )


def _prompt(messages: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((m["role"], m["content"]) for m in split_answer(messages)[0])
