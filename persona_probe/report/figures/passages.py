"""Passages on which latents fire most, token by token, coloured by activation. The text is untrusted."""

import html
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import empty_figure, finish, plain

MISSING = "No passages yet: the locate stage has not made feature cards."
COLUMNS = ["latent", "label", "passage", "source", "position", "token", "value", "share", "line"]
LATENTS, PASSAGES = 3, 3
LINE, LINES = 62, 2
"""Characters in a line of a passage, and lines."""
ROW = 19
"""Pixels of a line."""
RAMP = ("#6E6E6E", "#7D6A55", "#99601F", "#B45309", "#C2410C")
"""Silent to strongest; every shade is legible on the light and on the dark page."""


def passages_data(records: Records) -> pd.DataFrame:
    """One row per token shown: `value` is the latent's activation, `share` that of the passage's maximum.

    The persona latent comes first, then the other cards in their order. A passage is cut around its maximum.
    """
    persona = select.persona_latent(records)
    cards = sorted(records.cards, key=lambda card: card["latent"] != persona)[:LATENTS]
    rows: list[dict[str, Any]] = []
    for card in cards:
        for place, example in enumerate(card["examples"][:PASSAGES], 1):
            head = {"latent": card["latent"], "label": card["label"], "passage": place, "source": example["source"]}
            rows += [{**head, **token} for token in _window(example)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _window(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens around the strongest, as many as fit, each with its line."""
    tokens, values = [_visible(t) for t in example["tokens"]], example["values"]
    peak = max(range(len(values)), key=values.__getitem__)
    first, last, room = peak, peak + 1, LINE * LINES - len(tokens[peak]) - LINE // 6
    while True:
        after = last < len(tokens) and len(tokens[last]) <= room
        # twice as much before the maximum as after it: a latent may answer to what it has read
        before = first > 0 and len(tokens[first - 1]) <= room and (peak - first <= 2 * (last - peak) or not after)
        if not before and not after:
            break
        first, last = (first - 1, last) if before else (first, last + 1)
        room -= len(tokens[first] if before else tokens[last - 1])
    rows, width = [], 0
    for at in range(first, last):
        width += len(tokens[at])
        share = max(0.0, values[at] / max(values[peak], 1e-9))
        line = min((width - 1) // LINE, LINES - 1)
        rows.append({"position": at, "token": tokens[at], "value": values[at], "share": share, "line": line})
    return rows


def _visible(token: object) -> str:
    """A token on one line: white space within it is shown, a long one is cut."""
    text = "".join("⏎" if c in "\n\r\u2028\u2029\u0085\x0b\x0c" else "⇥" if c == "\t" else c for c in str(token))
    return text if len(text) <= LINE // 2 else text[: LINE // 2 - 1] + "…"


@figure(
    name="passages",
    title="Passages on which latents fire most",
    paper="10 to 12",
    group="more",
    place=20,
    data=passages_data,
    missing=MISSING,
)
def passages(records: Records) -> go.Figure:
    """Headings are latents; under each its strongest passages, the persona latent first."""
    data = passages_data(records)
    if data.empty:
        return empty_figure(MISSING)
    texts = [(text, strong) for latent in data["latent"].unique() for text, strong in _lines(data, latent)]
    fig = go.Figure()
    fig.add_scatter(
        x=[0.0] * len(texts),
        y=[-float(i) for i in range(len(texts))],
        text=[f"<b>{text}</b>" if strong else text for text, strong in texts],
        mode="text",
        textposition="middle right",
        textfont={"size": 12},
        hoverinfo="skip",
        showlegend=False,
    )
    fig.update_xaxes(visible=False, range=[0, 1], title_text="tokens, coloured by activation")
    fig.update_yaxes(visible=False, range=[0.7 - len(texts), 0.7], title_text="passage")
    fig.update_layout(margin={"t": 12, "b": 12, "l": 12, "r": 12})
    return finish(fig, _caption(records, data), height=24 + ROW * len(texts))


def _lines(data: pd.DataFrame, latent: int) -> list[tuple[str, bool]]:
    """Text of each line, and whether it is a heading."""
    rows = select.where(data, latent=latent)
    heading = plain(rows["label"].iloc[0] or f"latent {latent}")
    lines = [(heading if str(latent) in heading else f"latent {latent}: {heading}", True)]
    for (_, _), tokens in select.groups(rows, "passage", "line"):
        lines.append(("".join(map(_coloured, tokens["token"], tokens["share"])), False))
    return lines


def _coloured(token: str, share: float) -> str:
    shade = RAMP[min(int(share * len(RAMP)), len(RAMP) - 1)]
    text = html.escape(token, quote=False)
    text = f"<b>{text}</b>" if share >= 0.5 else text
    return f'<span style="color:{shade}">{text}</span>'


def _caption(records: Records, data: pd.DataFrame) -> str:
    peaks = data.groupby("latent", sort=False)["value"].max()
    texts = {str(card.get("text")) for card in records.cards if card.get("text")}
    listing = ", ".join(f"{latent}: {peak:.3g}" for latent, peak in peaks.items())
    per = data.drop_duplicates(["latent", "passage"]).groupby("latent")["passage"].count().max()
    return (
        f"The n = {per} passages on which each of {len(peaks)} latents fires most, of "
        f"{plain('; '.join(sorted(texts)))}, read by the base model. Darker orange: stronger, relative to the "
        f"passage's maximum; bold: at least half of it. Largest activation shown, by latent: {listing}. The persona "
        "latent comes first; the others are controls to read it against. ⏎ is a line break. Passages show what a "
        "latent fires on, not what it does."
    )
