"""The formats of image files that are read, the suffixes of their names, and what else looks like an image."""

import os
import re
import stat
from contextlib import suppress

from PIL import Image

# The registry is complete only now. Pillow's own first look at a file would fill it in several threads at once.
Image.init()

# Raster formats in which cameras and inspection systems keep photographs, recognized by content, whatever the name.
# Pillow has more: EPS and PDF would run another program, and pictures for screens and games hold no photographs.
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN
)
# Pillow's list lacks .jif, and its plugin for JPEG reads .mpo. A .pfm holds floating-point pixels, which are refused.
SUFFIXES = (frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS) | {".jif", ".mpo"}) - {
    ".pfm"
}

_RAW = ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .srw .x3f"
_OTHERS = (
    ".avif .avifs .bpg .btf .bw .czi .dcm .dcx .dds .dicom .djvu .dpx .emf .eps .exr .fit .fits .flif .fts .heic .heics"
    " .heif .heifs .hif .icb .icns .ico .jls .jxl .jxr .nd2 .pcx .pct .pfm .pict .psb .psd .qoi .ras .rgb .rgba"
    " .sgi .svg .svgz .tga .tf8 .vda .vst .wbmp .wdp .webp .wmf .xbm .xcf .xpm"
)
UNREAD_SUFFIXES = frozenset(f"{_RAW} {_OTHERS}".split()) - SUFFIXES
"""Suffixes of images that are not read."""

_HEAD = 16
# A bitmap without its file header begins with a small number, as many other files do.
RECOGNIZED = tuple(name for name in FORMATS if name != "DIB")
NO_IMAGES = f"holds no images ({', '.join(RECOGNIZED)})"
# Formats that Pillow does not know, or that are not read.
_UNREAD_HEADS = re.compile(
    rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1|avif|avis|crx )|\0\0\0\x0cJXL |\xff\x0a[^\0-\x1f]|v/1\x01"
    rb"|8BPS|DDS |qoif|BPG\xfb|FLIF|gimp xcf|AT&TFORM|ZISRAWFILE|\xff\xd8\xff\xf7|\x01\xda[\0\1][\1\2]\0|<svg[\s>]"
    rb"|#\?RADIANCE|SIMPLE  =|II\xbc\x01|FUJIFILM|IIRO|IIU\0|SDPX|XPDS",
    re.DOTALL,
)
_DICOM_AT, _DICOM = 128, b"DICM"


def suffix_of(name: str) -> str:
    """Returns the suffix of a file's name in lower case, with its dot, or an empty text."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - for names, of which there may be a million


def is_image_by_content(path: str) -> bool:
    """Returns whether a file begins as an image does; False if it is no file or cannot be read."""
    try:
        # Opening a pipe would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return False
        with open(path, "rb") as file:  # noqa: PTH123
            head = file.read(_DICOM_AT + len(_DICOM))
    except OSError:
        return False
    if _UNREAD_HEADS.match(head) or head[_DICOM_AT:] == _DICOM:
        return True
    if not any(_accepts(name, head[:_HEAD]) for name in RECOGNIZED):
        return False
    # Two letters make a BMP or a PPM for the first look; the second one reads the header.
    with suppress(Exception), Image.open(path, formats=FORMATS):
        return True
    return False


def _accepts(name: str, head: bytes) -> bool:
    accept = Image.OPEN[name][1]
    return accept is not None and bool(accept(head))
