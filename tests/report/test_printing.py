"""Figures as files for print: size, look, and where their numbers come from."""

import re
import struct
import zlib
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_probe.errors import InputError
from persona_probe.report.export import UNKNOWN, provenance, provenance_line, short_provenance
from persona_probe.report.figures import ALL_FIGURES, FIGURES
from persona_probe.report.metadata import PNG_SIGNATURE, tag
from persona_probe.report.printing import WIDTHS, for_print
from persona_probe.report.records import INDUCED_STYLES, MORE_COLOURS, REALIGN_STYLES, Records, load_records
from persona_probe.report.theme import (
    BEHAVIOUR,
    BLACK,
    CANDIDATE,
    DARK_INK,
    DIRECTION,
    FEATURE,
    GREY,
    HARM,
    PALETTE,
    REGISTER,
    TEMPLATES,
    plain,
)

STYLES = [*INDUCED_STYLES.values(), *REALIGN_STYLES.values()]
FACTS = {"run": "demo", "hash SAE": "a1<b2>"}
SEEN = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}
"""Machado, Oliveira and Fernandes 2009 (IEEE TVCG 15:1291): no cones of one kind, in linear RGB."""
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    share = TO_XYZ @ np.clip(rgb, 0, 1) / WHITE
    f = np.where(share > 216 / 24389, np.cbrt(share), (24389 / 27 * share + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    low, high = sorted((linear(one) @ TO_XYZ[1], linear(other) @ TO_XYZ[1]))
    return (high + 0.05) / (low + 0.05)


def test_white_is_white_in_lab() -> None:
    assert lab(linear("#ffffff")) == pytest.approx([100, 0, 0], abs=0.02)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("eye", SEEN)
def test_arms_are_told_apart_by_every_eye(eye: str) -> None:
    for one, other in combinations(STYLES, 2):
        apart = np.linalg.norm(lab(SEEN[eye] @ linear(one.colour)) - lab(SEEN[eye] @ linear(other.colour)))
        assert apart > 8, (one.label, other.label)  # 2.3 is just noticeable
        assert one.symbol != other.symbol


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_and_text_stand_out_from_the_page(theme: Any) -> None:
    layout: Any = TEMPLATES[theme].layout
    assert contrast(layout.font.color, layout.paper_bgcolor) >= 7
    assert min(contrast(style.colour, layout.paper_bgcolor) for style in STYLES) >= 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_with_a_meaning_stand_out_and_are_no_two_alike(theme: Any) -> None:
    layout: Any = TEMPLATES[theme].layout
    meanings = (FEATURE, DIRECTION, CANDIDATE, HARM, REGISTER)
    assert min(contrast(colour, layout.paper_bgcolor) for colour in (*meanings, *PALETTE)) >= 3
    arms = [style.colour for style in STYLES] + list(MORE_COLOURS)
    assert len({*arms, *meanings, *PALETTE, BEHAVIOUR}) == len(arms) + len(meanings) + len(PALETTE) + 1


def test_a_colour_has_one_meaning_in_all_figures_of_a_study() -> None:
    records = load_records(Path(__file__).parents[2] / "records" / "demo")
    labels = {style.colour: plain(style.label) for style in records.arms.styles.values() if style.colour != GREY}
    named = {
        FEATURE: ("persona", "feature", "latent 2144"),
        DIRECTION: ("mean",),
        HARM: ("harm",),
        REGISTER: ("register",),
    }
    for name in (
        "arms",
        "categories",
        "controls",
        "dose_response",
        "harm_register",
        "latents",
        "recovery",
        "trajectory",
    ):
        for trace in ALL_FIGURES[name].draw(records).data:
            colour = trace.line.color or trace.marker.color
            if not trace.name or not isinstance(colour, str):
                continue
            if colour in labels:
                assert trace.name.startswith((labels[colour], "seed ")), (name, trace.name)
            if colour in named:
                assert any(word in trace.name for word in named[colour]), (name, trace.name)


def test_on_a_dark_page_black_marks_are_light(records: Records) -> None:
    figure: Any = for_print(
        FIGURES["arms"].draw(records).add_scatter(x=[0], y=[0], line={"color": BLACK}), "page", "dark"
    )
    assert figure.data[-1].line.color == DARK_INK


def test_a_printed_figure_has_its_width_theme_and_footer(records: Records) -> None:
    figure: Any = for_print(FIGURES["arms"].draw(records), "page", "dark", footer="run made-up")
    assert figure.layout.width == WIDTHS["page"].pixels == 692  # 183 mm
    assert figure.layout.template.layout.paper_bgcolor == TEMPLATES["dark"].layout.paper_bgcolor  # pyright: ignore
    assert figure.layout.title.text == "run made-up" and figure.layout.title.y == 0
    with pytest.raises(InputError, match="unknown figure width 'colum': did you mean 'column'"):
        for_print(figure, "colum")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="unknown figure theme 'darkk': did you mean 'dark'"):
        for_print(figure, "page", "darkk")  # pyright: ignore[reportArgumentType]


def test_provenance_names_all_that_the_manifest_holds(records: Records) -> None:
    manifest = {
        "config": {"name": "demo", "model": "m", "sae": "s", "arms": {"incorrect": {"data": "bad"}}, "contrast": "c"},
        "config_hash": "0123456789abcdef",
        "git_revision": "f" * 40,
        "seeds": [0, 2],
        "versions": {"persona-probe": "0.1.0", "torch": "2.0", "numpy": "2"},
        "input_hashes": {"SAE/cfg.json": "abcdef0123456789"},
        "hashes": {"directions.safetensors": "99"},
    }
    facts = provenance(manifest)
    assert facts["data"] == "bad, c" and facts["seeds"] == "0, 2" and facts["versions"].endswith("numpy 2")
    assert facts["hash SAE/cfg.json"] == "abcdef0123456789" and facts["hash directions.safetensors"] == "99"
    line = provenance_line(manifest)
    for part in ("run demo", "config 0123456789ab;", "model m", "SAE s", "SAE/cfg.json abcdef01", "torch 2.0"):
        assert part in line
    assert short_provenance(manifest) == "persona-probe 0.1.0; run demo; config 01234567; revision ffffffff"
    assert provenance({})["model"] == UNKNOWN and short_provenance({}) == "persona-probe"


def test_an_svg_carries_title_description_and_facts() -> None:
    text = tag(b'<svg width="1"><g/></svg>', "svg", FACTS, "T & t", "caption").decode()
    assert text.startswith(
        '<svg width="1"><title>T &amp; t</title><desc>caption</desc><metadata>run: demo\nhash SAE: a1&lt;b2'
    )
    assert text.endswith("</metadata><g/></svg>")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_png_carries_them_in_whole_chunks() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    image = PNG_SIGNATURE + header + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    tagged, at, texts = tag(image, "png", FACTS, "T", "Wörter"), 8, {}
    while at < len(image) or at < len(tagged):
        (length,) = struct.unpack(">I", tagged[at : at + 4])
        body = tagged[at + 4 : at + 8 + length]
        assert struct.unpack(">I", tagged[at + 8 + length : at + 12 + length])[0] == zlib.crc32(body)
        if body.startswith(b"iTXt"):
            name, _, rest = body[4:].partition(b"\0")
            texts[name.decode()] = rest[4:].decode("utf-8")
        at += 12 + length
    assert at == len(tagged)
    assert texts["Description"] == "Wörter" and texts["Comment"] == "run: demo\nhash SAE: a1<b2>"


def test_a_pdf_gets_an_information_dictionary_that_its_table_finds() -> None:
    body = b"%PDF-1.4\n1 0 obj\n<</Type /Catalog>>\nendobj\n"
    image = (
        body + b"xref\n0 2\n0000000000 65535 f \n0000000009 00000 n \ntrailer\n<</Size 2\n/Root 1 0 R>>\nstartxref\n"
    )
    image += b"%d\n%%%%EOF\n" % len(body)
    tagged = tag(image, "pdf", FACTS, "T", "caption")
    assert tagged.startswith(image)
    table = int(re.findall(rb"startxref\n(\d+)", tagged)[-1])
    number, offset = re.match(rb"xref\n(\d+) 1\n(\d{10}) 00000 n \n", tagged[table:]).groups()  # pyright: ignore
    assert tagged[int(offset) :].startswith(b"%s 0 obj" % number) and number == b"2"
    assert b"/Size 3 /Root 1 0 R /Info 2 0 R /Prev %d" % len(body) in tagged[table:]
    written = bytes.fromhex(re.findall(rb"/Keywords <([0-9A-F]+)>", tagged)[0].decode())
    assert written.decode("utf-16") == "run: demo\nhash SAE: a1<b2>"
    assert tag(b"%PDF-1.7 without a classic trailer", "pdf", FACTS, "T", "c") == b"%PDF-1.7 without a classic trailer"
