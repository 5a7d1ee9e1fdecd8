"""What a saved image says about itself: generation parameters and the mark that it was generated.

=========  =====================================  ================================
format     parameters (see `infotext`)            mark: an XMP packet
=========  =====================================  ================================
PNG        tEXt or iTXt chunk "parameters"        iTXt chunk "XML:com.adobe.xmp"
JPEG       EXIF UserComment, UTF-16               APP1 segment
WebP       EXIF UserComment, UTF-16               "XMP " chunk
=========  =====================================  ================================

The mark is IPTC's digital source type (Iptc4xmpExt:DigitalSourceType), the machine-readable mark that Art. 50 of the
EU's AI Act asks for, and xmp:CreatorTool. Nothing holds a time, so the same image gives the same file. Limit:
metadata is lost where a file is re-encoded or stripped; this is no watermark.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pocketdiffusion._version import __version__
from pocketdiffusion.errors import InvalidRequest
from pocketdiffusion.image.infotext import Parameters, parse
from pocketdiffusion.image.opening import opened_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DIGITAL_SOURCES", "Metadata", "Parameters", "parse", "read"]

DIGITAL_SOURCES = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
"""IPTC NewsCodes: made by a model alone; made by a model from a given picture."""

_NEWSCODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
<xmp:CreatorTool>{tool}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""
_SOURCE_IN_XMP = re.compile(r"""\bDigitalSourceType(?:\s*=\s*["']([^"'<>]{1,200})["']|\s*>\s*([^<]{1,200}?)\s*<)""")
_NO_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")

_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_EXIF_LONG, _EXIF_UNDEFINED = 4, 7
_EXIF_MARKER = b"Exif\0\0"
_UTF16_COMMENT, _ASCII_COMMENT = b"UNICODE\0", b"ASCII\0\0\0"
_JPEG_SEGMENT_BYTES = 65533


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What `image.save` writes into a file. Without `parameters` only the mark is left."""

    parameters: Parameters | None
    digital_source: str = DIGITAL_SOURCES[0]
    """One of `DIGITAL_SOURCES`."""
    tool: str = f"pocketdiffusion {__version__}"

    def __post_init__(self) -> None:
        if self.digital_source not in DIGITAL_SOURCES:
            raise InvalidRequest(
                "metadata",
                f"digital source type {self.digital_source!r} is unknown; choose one of: {', '.join(DIGITAL_SOURCES)}",
            )

    def pillow_options(self, format_name: str) -> dict[str, Any]:
        """Keyword arguments of Pillow's Image.save for "PNG", "JPEG" or "WEBP".

        Raises InvalidRequest for text that JPEG can't hold.
        """
        text = None if self.parameters is None else self.parameters.text()
        packet = _xmp(self)
        if format_name == "PNG":
            from PIL.PngImagePlugin import PngInfo

            chunks = PngInfo()
            if text is not None:
                chunks.add_text("parameters", text)
            chunks.add_itxt("XML:com.adobe.xmp", packet)
            return {"pnginfo": chunks}
        options: dict[str, Any] = {"xmp": packet.encode()}
        if text is not None:
            options["exif"] = _exif(text)
            if format_name == "JPEG" and len(options["exif"]) > _JPEG_SEGMENT_BYTES:
                raise InvalidRequest(
                    "metadata",
                    f"the parameters take {len(options['exif'])} bytes and JPEG holds {_JPEG_SEGMENT_BYTES}; "
                    "save as PNG or WebP, or leave the prompt out of the file",
                )
        return options


def read(path: str | Path | BinaryIO) -> tuple[Parameters | None, str | None]:
    """The generation parameters and digital source type of a PNG, JPEG or WebP file, None for what it does not hold.

    IPTC's types come without their address ("trainedAlgorithmicMedia"). Raises InvalidRequest if the file is no such
    image.
    """
    with opened_image(path) as picture:
        text = picture.info.get("parameters")
        if not isinstance(text, str):
            text = _user_comment(picture)
        packet = picture.info.get("xmp", b"")
    source = _digital_source(packet.encode() if isinstance(packet, str) else packet)
    return (None if text is None else parse(text)), source


def _xmp(metadata: Metadata) -> str:
    tool = escape(_NO_XML.sub("\ufffd", metadata.tool), quote=False)
    return _XMP.format(tool=tool, source=_NEWSCODES + metadata.digital_source)


def _digital_source(packet: bytes) -> str | None:
    # A pattern instead of an XML parser: nothing in a stranger's file gets expanded or fetched.
    found = _SOURCE_IN_XMP.search(packet.decode("utf-8", "replace"))
    if found is None:
        return None
    return unescape(found[1] or found[2]).removeprefix(_NEWSCODES)


def _exif(text: str) -> bytes:
    """An EXIF block that holds nothing but UserComment: TIFF 6.0, big-endian, as its UTF-16 is."""
    comment = _UTF16_COMMENT + text.encode("utf-16-be")
    directory = ">HHHIII"  # one entry: count, tag, type, length, value or offset; no next directory
    first = struct.calcsize(">2sHI")
    second = first + struct.calcsize(directory)
    data = second + struct.calcsize(directory)
    return b"".join(
        (
            _EXIF_MARKER,
            struct.pack(">2sHI", b"MM", 42, first),
            struct.pack(directory, 1, _EXIF_IFD, _EXIF_LONG, 1, second, 0),
            struct.pack(directory, 1, _USER_COMMENT, _EXIF_UNDEFINED, len(comment), data, 0),
            comment,
        )
    )


def _user_comment(picture: Image) -> str | None:
    comment = picture.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if not isinstance(comment, bytes):
        return None
    code, body = comment[:8], comment[8:]
    if code == _UTF16_COMMENT:
        # EXIF leaves the byte order open. Most text here is Latin, so zeros stand in the high bytes.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    return body.decode("ascii", "replace") if code == _ASCII_COMMENT else None
