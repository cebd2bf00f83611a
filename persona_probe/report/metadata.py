"""Write where a figure's numbers come from into its file: SVG, PNG and PDF each have a place for it."""

import html
import re
import struct
import zlib
from collections.abc import Mapping

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
IHDR_END = len(PNG_SIGNATURE) + 25
"""The header chunk always comes first and is 25 bytes long."""
SOFTWARE = "persona_probe"


def tag(image: bytes, kind: str, facts: Mapping[str, str], title: str, description: str) -> bytes:
    """An image (svg, png or pdf) with title, description and `facts` (one `name: text` line each) as metadata."""
    writers = {"svg": _tag_svg, "png": _tag_png, "pdf": _tag_pdf}
    text = "\n".join(f"{name}: {value}" for name, value in facts.items())
    return writers[kind](image, text, title, description)


def _tag_svg(image: bytes, text: str, title: str, description: str) -> bytes:
    """`<title>` and `<desc>` are for screen readers; `<metadata>` has the rest."""
    svg = image.decode("utf-8")
    parts = (("title", title), ("desc", description), ("metadata", text))
    inside = "".join(f"<{name}>{html.escape(value)}</{name}>" for name, value in parts)
    end = svg.index(">", svg.index("<svg")) + 1
    return (svg[:end] + inside + svg[end:]).encode("utf-8")


def _tag_png(image: bytes, text: str, title: str, description: str) -> bytes:
    """Chunks `iTXt` (PNG specification, 11.3.3.4) after the header."""
    entries = {"Title": title, "Description": description, "Comment": text, "Software": SOFTWARE}
    chunks = b"".join(_text_chunk(name, value) for name, value in entries.items())
    return image[:IHDR_END] + chunks + image[IHDR_END:]


def _text_chunk(name: str, value: str) -> bytes:
    # keyword, no compression, no language, no translated keyword, text
    body = b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + value.encode("utf-8")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _tag_pdf(image: bytes, text: str, title: str, description: str) -> bytes:
    """An incremental update (ISO 32000-1, 7.5.6) that replaces the document information dictionary.

    An image whose trailer is not of the classic kind comes back as it was.
    """
    trailers = re.findall(rb"trailer\s*<<(.*?)>>\s*startxref\s*(\d+)", image, re.DOTALL)
    size, root = (re.search(p, trailers[-1][0]) if trailers else None for p in (rb"/Size (\d+)", rb"/Root (\d+ \d+ R)"))
    if size is None or root is None:
        return image
    number, before = int(size.group(1)), trailers[-1][1]
    pairs = {"Title": title, "Subject": description, "Keywords": text, "Creator": SOFTWARE}
    entries = " ".join(f"/{name} <{_hex(value)}>" for name, value in pairs.items())
    image = image if image.endswith(b"\n") else image + b"\n"
    body = f"{number} 0 obj\n<< {entries} >>\nendobj\n".encode("ascii")
    table = f"xref\n{number} 1\n{len(image):010d} 00000 n \n".encode("ascii")
    trailer = b"trailer\n<< /Size %d /Root %s /Info %d 0 R /Prev %s >>\n" % (number + 1, root.group(1), number, before)
    return image + body + table + trailer + b"startxref\n%d\n%%%%EOF\n" % (len(image) + len(body))


def _hex(value: str) -> str:
    """A PDF text string in UTF-16, written in hexadecimal."""
    return (b"\xfe\xff" + value.encode("utf-16-be")).hex().upper()
