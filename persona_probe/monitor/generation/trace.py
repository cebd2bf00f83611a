"""What was read of one answer, token by token, and how it is shown: coloured text for notebooks and terminals."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from persona_probe.data.template import special_ids
from persona_probe.errors import unknown
from persona_probe.untrusted import terminal_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

HIGH, LOW = (196, 78, 0), (44, 110, 170)
"""Colours of a value at the top of the scale and, for projections, at its bottom: they differ in lightness too."""
RESET = "\x1b[0m"


@dataclass(frozen=True)
class AnswerAlarm:
    """A rule that fired in an answer."""

    rule: str
    feature: str
    token: int
    """Place of the token at which it fired, from 0; the answer's last one where it fired at the end."""
    value: float
    """The level, in the feature's units."""
    threshold: float
    did: tuple[str, ...] = ()
    """What the actions did, in their words."""

    def __str__(self) -> str:
        return f"{self.rule}: {self.feature!r} {self.value:.4g} at token {self.token}, threshold {self.threshold:.4g}"


@dataclass(frozen=True)
class Trace:
    """Features of an answer, a row a token; a notebook shows it as coloured text."""

    names: tuple[str, ...]
    """Of the features."""
    ids: tuple[int, ...]
    """The answer's token ids, without the one that ends it."""
    tokens: tuple[str, ...]
    """The text that each token adds."""
    special: tuple[bool, ...]
    """Whether a token is special: rules pass over it."""
    values: Float[np.ndarray, "tokens features"]
    """The feature where the model has run the token. NaN for a last token that was cut off before it ran."""
    prompt: Float[np.ndarray, " features"]
    """The features at the prompt's last token, from which the first token is chosen."""
    alarms: tuple[AnswerAlarm, ...] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By feature: the lowest threshold of its rules, for the scale of colours."""

    @property
    def watched(self) -> Float[np.ndarray, "tokens features"]:
        """The values that rules look at: NaN at special tokens."""
        return np.where(np.array(self.special, dtype=bool)[:, None], np.nan, self.values)

    def of(self, feature: str) -> Float[np.ndarray, " tokens"]:
        """One feature's values.

        Raises:
            InputError: it was not read.
        """
        if feature not in self.names:
            raise unknown("feature", feature, self.names)
        return self.values[:, self.names.index(feature)]

    def frame(self) -> pd.DataFrame:
        """A row for each token: its text, id, whether it is special, and a column for each feature."""
        columns = {"token": self.tokens, "id": self.ids, "special": self.special}
        return pd.DataFrame(columns).join(pd.DataFrame(self.values, columns=list(self.names)))

    def record(self) -> dict[str, Any]:
        """As plain JSON values; null where there is no reading."""
        return {
            "features": list(self.names),
            "tokens": list(self.tokens),
            "values": [[rounded(v) for v in row] for row in self.values.tolist()],
            "alarms": [alarm_record(alarm) for alarm in self.alarms],
        }

    def of_feature(self, feature: str) -> dict[str, list[Any]]:
        """The tokens and one feature's values, as plain JSON values; null where there is no reading."""
        return {"tokens": list(self.tokens), "values": [rounded(v) for v in self.of(feature).tolist()]}

    def text(self, feature: str | None = None, colour: bool = True) -> str:
        """The answer for a terminal, darker the higher the feature is; text that the model wrote cannot steer it.

        Args:
            feature: None takes the first.
            colour: False marks tokens with an alarm by `[!]` and leaves colours out.
        """
        name = self.names[0] if feature is None else feature
        return "".join(
            _terminal(token, share if colour else 0.0, alarmed, colour)
            for token, share, alarmed in zip(self.tokens, self._shares(name), self._alarmed(name), strict=True)
        )

    def html(self, feature: str | None = None) -> str:
        """The answer as HTML, a block for each feature; nothing that the model wrote becomes markup.

        Args:
            feature: None shows all.
        """
        return "".join(self._block(name) for name in (self.names if feature is None else [feature]))

    def figure(self) -> "go.Figure":
        """The features over the tokens, with thresholds and alarms; a token shows its text under the pointer."""
        import plotly.graph_objects as go

        from persona_probe.report.theme import FEATURE, PALETTE, TEMPLATE, VERMILLION, plain

        fig, places = go.Figure(layout={"template": TEMPLATE}), list(range(len(self.tokens)))
        colours = (FEATURE, *PALETTE)
        for number, name in enumerate(self.names):
            colour, values = colours[number % len(colours)], self.of(name)
            words = [plain(terminal_text(token)) for token in self.tokens]
            drawn = [v if math.isfinite(v) else None for v in values.tolist()]
            line: dict[str, Any] = {"color": colour, "width": 2}
            hover = "token %{x}: %{text}<br>%{y:.3g}"
            fig.add_scatter(x=places, y=drawn, name=plain(name), text=words, line=line, hovertemplate=hover)
            if name in self.thresholds:
                fig.add_hline(self.thresholds[name], line={"color": colour, "dash": "dot", "width": 1.2})
        at = [(a.token, float(self.of(a.feature)[a.token])) for a in self.alarms if a.token < len(self.tokens)]
        if at:
            marker: dict[str, Any] = {"symbol": "x", "size": 11, "color": VERMILLION}
            fig.add_scatter(x=[x for x, _ in at], y=[y for _, y in at], name="alarm", mode="markers", marker=marker)
        fig.update_xaxes(title="token of the answer")
        fig.update_yaxes(title="activation, or projection")
        return fig

    def __str__(self) -> str:
        return self.text(colour=False)

    def _repr_html_(self) -> str:
        return self.html()

    def _block(self, name: str) -> str:
        values, limit = self.of(name), self.thresholds.get(name)
        top = float(np.nanmax(values)) if np.isfinite(values).any() else math.nan
        head = f"{html.escape(terminal_text(name))}: highest {_number(top)}"
        head += "" if limit is None else f", threshold {_number(limit)}"
        alarms = [f"<div>{html.escape(terminal_text(str(a)))}</div>" for a in self.alarms if a.feature == name]
        spans = [
            _span(token, value, share, alarmed)
            for token, value, share, alarmed in zip(
                self.tokens, values.tolist(), self._shares(name), self._alarmed(name), strict=True
            )
        ]
        return (
            f'<div style="margin:.4em 0"><div style="color:#59636e;font-size:.85em">{head}</div>'
            f'<div style="white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6">{"".join(spans)}</div>'
            f'<div style="color:#b34700;font-size:.85em">{"".join(alarms)}</div></div>'
        )

    def _shares(self, name: str) -> list[float]:
        """Each value on a scale of -1 to 1: 1 is the threshold or, where the answer goes beyond it, its highest."""
        values = self.of(name)
        known = np.abs(values[np.isfinite(values)])
        scale = max(float(known.max(initial=0.0)), abs(self.thresholds.get(name, 0.0))) or 1.0
        return [0.0 if not math.isfinite(v) else v / scale for v in values.tolist()]

    def _alarmed(self, name: str) -> list[bool]:
        places = {alarm.token for alarm in self.alarms if alarm.feature == name}
        return [n in places for n in range(len(self.tokens))]


def _number(value: float) -> str:
    return "not read" if math.isnan(value) else f"{value:.3g}"


def rounded(value: float) -> float | None:
    """A value for JSON: five digits, null where it is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def alarm_record(alarm: AnswerAlarm) -> dict[str, Any]:
    """An alarm as plain JSON values."""
    return {
        "rule": alarm.rule,
        "feature": alarm.feature,
        "token": alarm.token,
        "value": rounded(alarm.value),
        "threshold": rounded(alarm.threshold),
        "actions": list(alarm.did),
    }


def _span(token: str, value: float, share: float, alarmed: bool) -> str:
    red, green, blue = HIGH if share > 0 else LOW
    line = ";outline:2px solid #b34700" if alarmed else ""
    title = "not read" if math.isnan(value) else f"{value:.4g}"
    text = html.escape(terminal_text(token))
    style = f"background:rgba({red},{green},{blue},{0.85 * abs(share):.2f}){line}"
    return f'<span title="{title}" style="{style}">{text}</span>'


def _terminal(token: str, share: float, alarmed: bool, colour: bool) -> str:
    text = terminal_text(token)
    mark = "[!]" if alarmed else ""
    if not colour or (abs(share) < 0.05 and not alarmed):
        return text + mark
    red, green, blue = (round(255 - (255 - c) * abs(share)) for c in (HIGH if share > 0 else LOW))
    code = f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m" + ("\x1b[4m" if alarmed else "")
    # A colour that runs over a line break would fill the rest of the line.
    return "\n".join(f"{code}{part}{RESET}" if part else "" for part in text.split("\n")) + mark


# --- The text of each token


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text; the bytes of a character come with the token that completes it."""
    spelled = Speller(tokenizer)
    texts = [spelled.add(token) for token in ids]
    if texts:
        texts[-1] += spelled.rest()
    return tuple(texts)


class Speller:
    """Token ids to text as they come, special tokens spelled out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._done = 0
        """Tokens before these are only context: they decide whether a word begins with a space."""
        self._shown = ""

    def add(self, token: int) -> str:
        """The text that it adds; empty where a character is not complete."""
        self._ids.append(token)
        text = self._text()
        # half a character reads as U+FFFD; a token that means it stays after three more
        if text.endswith("\ufffd") and len(self._ids) - self._done < 4:
            return ""
        return self._take(text)

    def rest(self) -> str:
        """What is left when the answer is over."""
        return self._take(self._text()) if len(self._ids) > self._done else ""

    def _text(self) -> str:
        return str(self.tokenizer.decode(self._ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _take(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        self._shown = self._text()
        return new


def make_trace(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    ids: Sequence[int],
    values: Sequence[Float[np.ndarray, " features"]],
    prompt: Float[np.ndarray, " features"],
) -> Trace:
    """A trace of token ids and what was read of them; tokens without a reading get NaN."""
    rows = np.full((len(ids), len(names)), np.nan, dtype=np.float32)
    if values:
        rows[: len(values)] = np.stack(values)[: len(ids)]
    marks = special_ids(tokenizer)
    special = tuple(token in marks for token in ids)
    return Trace(tuple(names), tuple(ids), token_texts(tokenizer, ids), special, rows, prompt)
