"""How much a DICOM header holds, counted before pydicom makes an object of each part of it.

A megabyte can name a hundred thousand empty items, each of which costs pydicom 14 us and a kilobyte, every time that
the file is opened. The walk here passes over values and is linear in the number of elements.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

MOST_PARTS = 500_000
"""Elements, and five times the items of sequences, of a header: 1.5 s of pydicom's time."""

MOST_NESTED = 64
"""Sequences in sequences."""

_ITEM_PARTS, _BYTES_A_PART = 5, 4  # what an item, and a long list of values, cost in comparison with an element
_SHORT = 1024  # bytes of a value that costs no more than its element
_PREAMBLE, _MARK = 128, b"DICM"
# Of files without preamble: the group's length or the first element of the meta information, or of the identification.
_FIRST_GROUPS = (b"\x02\x00", b"\x08\x00")
_FIRST_ELEMENTS = (b"\x00\x00", b"\x01\x00", b"\x02\x00", b"\x05\x00", b"\x08\x00", b"\x10\x00", b"\x16\x00")
_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
_SYNTAX, _BIG_ENDIAN = 0x00020010, b"1.2.840.10008.1.2.2"
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_BULK = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"UT", b"LT", b"ST", b"UR"})  # one value, however long
_PERHAPS_SEQUENCE = frozenset({b"SQ", b"UN", b""})  # b"": implicit


class TooMuch(ValueError):
    """A header of more parts, or deeper, than any image's."""


def check_extent(stream: BinaryIO) -> None:
    """Walk through a DICOM file up to its pixels; a file that is none, or ends early, passes.

    Raises:
        TooMuch: more than ``MOST_PARTS``, or nested deeper than ``MOST_NESTED``.
    """
    start = start_of(stream)
    if start is not None:
        _Walk(stream, start).file()


def start_of(stream: BinaryIO) -> int | None:
    """Where the first element of a DICOM file is, 0 in one without preamble; None in anything else."""
    stream.seek(0)
    head = stream.read(_PREAMBLE + 4)
    if head[_PREAMBLE:] == _MARK:
        return _PREAMBLE + 4
    return 0 if head[:2] in _FIRST_GROUPS and head[2:4] in _FIRST_ELEMENTS else None


class _End(Exception):
    """The stream has ended."""


class _Walk:
    def __init__(self, stream: BinaryIO, start: int) -> None:
        self._stream, self._left = stream, MOST_PARTS
        self._order = "<"
        self._go(start)

    def file(self) -> None:
        try:
            self._meta()
            self._elements(None, 0)
        except _End:
            return

    def _spend(self, parts: int) -> None:
        self._left -= parts
        if self._left < 0:
            raise TooMuch(f"more than {MOST_PARTS} elements")

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._at += len(data)
        if len(data) < size:
            raise _End
        return data

    def _peek(self, size: int) -> bytes:
        data = self._read(size)
        self._go(self._at - size)
        return data

    def _go(self, place: int) -> None:
        self._stream.seek(place)
        self._at = place

    def _meta(self) -> None:
        """Group 2, explicit and little-endian; its transfer syntax says how the rest is written."""
        order = "<"
        while self._peek(2) == b"\x02\x00":
            tag, vr, length = self._head(explicit=True)
            self._spend(1)
            if tag == _SYNTAX and length <= _SHORT:
                order = ">" if self._read(length).rstrip(b"\0 ") == _BIG_ENDIAN else "<"
            elif length == _UNDEFINED:
                self._undefined(vr, 1)
            else:
                self._go(self._at + length)
        self._order = order

    def _head(self, *, explicit: bool) -> tuple[int, bytes, int]:
        """Tag, VR and length of the next element; VR b"" where none is written."""
        head = self._read(8)
        group, element, length = struct.unpack(f"{self._order}HHI", head)
        vr = head[4:6]
        if not explicit or group == 0xFFFE or not (vr.isalpha() and vr.isupper()):
            return group << 16 | element, b"", length
        if vr in _LONG:
            return group << 16 | element, vr, struct.unpack(f"{self._order}I", self._read(4))[0]
        return group << 16 | element, vr, struct.unpack(f"{self._order}H", head[6:])[0]

    def _elements(self, end: int | None, depth: int) -> None:
        """A dataset, up to a place in the file or, without one, to its end mark, the pixels or the file's end."""
        if depth > MOST_NESTED:
            raise TooMuch(f"more than {MOST_NESTED} sequences in each other")
        explicit = None
        while end is None or self._at < end:
            if explicit is None:
                vr = self._peek(8)[4:6]
                explicit = vr.isalpha() and vr.isupper()
            tag, vr, length = self._head(explicit=explicit)
            if tag == _ITEM_END or (depth == 0 and tag in _PIXELS):
                return
            self._spend(1)
            if length == _UNDEFINED:
                self._undefined(vr, depth + 1)
            elif end is not None and self._at + length > end:  # not as it says: as many elements as it has room for
                self._spend((end - self._at) // 8)
                self._go(end)
            else:
                self._value(tag, vr, length, depth + 1)

    def _value(self, tag: int, vr: bytes, length: int, depth: int) -> None:
        end = self._at + length
        if vr in _PERHAPS_SEQUENCE and length >= 8 and self._tag(self._peek(8)) == _ITEM:
            self._items(end, depth)
        elif length > _SHORT and self._listed(tag, vr):
            self._spend(length // _BYTES_A_PART)
        self._go(end)

    @staticmethod
    def _listed(tag: int, vr: bytes) -> bool:
        """Whether a value may be a list, of which pydicom makes an object each."""
        if vr in _PERHAPS_SEQUENCE:
            from pydicom.datadict import dictionary_VR

            try:
                vr = dictionary_VR(tag).encode()
            except KeyError:  # private: bytes to pydicom
                return False
        return vr not in _BULK

    def _undefined(self, vr: bytes, depth: int) -> None:
        if vr in _PERHAPS_SEQUENCE and self._tag(self._peek(8)) in (_ITEM, _SEQUENCE_END):
            self._items(None, depth)
            return
        mark = struct.pack(f"{self._order}HH", _SEQUENCE_END >> 16, _SEQUENCE_END & 0xFFFF)
        before = b""
        while (found := (data := before + self._stream.read(1 << 16)).find(mark)) < 0:
            if len(data) == len(before):
                raise _End
            self._at += len(data) - len(before)
            before = data[-3:]
        self._go(self._at - len(before) + found + 8)

    def _items(self, end: int | None, depth: int) -> None:
        while end is None or self._at < end:
            head = self._read(8)
            tag, length = self._tag(head), struct.unpack(f"{self._order}I", head[4:])[0]
            if tag != _ITEM:
                return
            self._spend(_ITEM_PARTS)
            if length == _UNDEFINED:
                self._elements(None, depth)
            else:
                inner = self._at + length
                self._elements(inner, depth)
                self._go(inner)

    def _tag(self, head: bytes) -> int:
        group, element = struct.unpack(f"{self._order}HH", head[:4])
        return int(group) << 16 | int(element)
