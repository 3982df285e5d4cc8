"""What a written picture says of itself: that a model made it, in the XMP field that viewers and platforms read.

The field is IPTC's digital source type, which C2PA manifests use too (`c2pa.actions`). It is not signed and can be
removed: it tells honest readers, and proves nothing.
"""

from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

_SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE, EDITED = _SOURCE + "trainedAlgorithmicMedia", _SOURCE + "compositeWithTrainedAlgorithmicMedia"
_PNG_KEY = "XML:com.adobe.xmp"


def xmp(*, edited: bool, tool: str) -> str:
    """An XMP packet. edited: whether parts come from images that were given. tool: who made it."""
    source = EDITED if edited else MADE
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/">'
        f"<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>"
        f"<xmp:CreatorTool>{escape(tool)}</xmp:CreatorTool>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def save_with_provenance(image: Image.Image, path: Path, *, edited: bool, tool: str) -> None:
    """Writes PNG, JPEG or WebP, by the suffix, with the packet in it."""
    packet = xmp(edited=edited, tool=tool)
    options: dict[str, Any] = {"xmp": packet.encode()}
    if path.suffix.lower() == ".png":
        information = PngInfo()
        information.add_itxt(_PNG_KEY, packet)
        options = {"pnginfo": information}
    image.save(path, **options)
