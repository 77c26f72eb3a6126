"""Symbols of relocatable object files, made local: binutils' objcopy can do it, zig's cannot."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from planish.errors import ToolchainError

_SYMTAB, _RELA, _REL, _GROUP, _INDICES = 2, 4, 9, 17, 18
_LOCAL, _UNDEFINED = 0, 0


@dataclass(frozen=True)
class _Class:
    """Layout of a word size's tables, little-endian (System V ABI, chapter 4)."""

    sections: int
    count: int
    section: np.dtype
    symbol: np.dtype
    relocation: np.dtype
    shift: int
    """Bits of a relocation's info below the symbol's number."""


def _record(text: str) -> np.dtype:
    return np.dtype([(field.split(":")[0], "<" + field.split(":")[1]) for field in text.split()])


_CLASSES = {
    1: _Class(
        0x20,
        0x30,
        _record("name:u4 type:u4 flags:u4 addr:u4 offset:u4 size:u4 link:u4 info:u4 align:u4 entsize:u4"),
        _record("name:u4 value:u4 size:u4 info:u1 other:u1 section:u2"),
        _record("offset:u4 info:u4"),
        8,
    ),
    2: _Class(
        0x28,
        0x3C,
        _record("name:u4 type:u4 flags:u8 addr:u8 offset:u8 size:u8 link:u4 info:u4 align:u8 entsize:u8"),
        _record("name:u4 info:u1 other:u1 section:u2 value:u8 size:u8"),
        _record("offset:u8 info:u8"),
        32,
    ),
}


def localised(code: bytes, exported: AbstractSet[str]) -> bytes:
    """An object file in which no other symbols than ``exported`` are visible, but for those that it lacks.

    Local symbols come first in the table, so that symbols change places, and relocations name the new ones.

    Args:
        code: ELF, relocatable, little-endian.
        exported: names that stay global.

    Raises:
        ToolchainError: it is no such file.
    """
    if code[:4] != b"\x7fELF" or code[4] not in _CLASSES or code[5] != 1 or code[16:18] != b"\1\0":
        raise ToolchainError("the linker's output is no relocatable little-endian ELF file")
    kind, data = _CLASSES[code[4]], np.frombuffer(bytearray(code), np.uint8)
    word = "<u8" if code[4] == 2 else "<u4"
    start = int(np.frombuffer(code, word, 1, kind.sections)[0])
    count = int(np.frombuffer(code, "<u2", 1, kind.count)[0])
    sections = data[start : start + count * kind.section.itemsize].view(kind.section)
    (table,) = np.flatnonzero(sections["type"] == _SYMTAB)
    if (sections["type"] == _INDICES).any():
        raise ToolchainError("the object file has more sections than symbols can name")

    def entries(section: np.void, record: np.dtype) -> np.ndarray:
        return data[int(section["offset"]) : int(section["offset"] + section["size"])].view(record)

    symbols = entries(sections[table], kind.symbol)
    names = entries(sections[sections["link"][table]], np.dtype(np.uint8)).tobytes()
    own = [names[n : names.index(b"\0", n)].decode() for n in symbols["name"].tolist()]
    hidden = [name not in exported for name in own] & (symbols["section"] != _UNDEFINED)
    symbols["info"] = np.where(hidden, symbols["info"] & 15, symbols["info"])  # binding: _LOCAL
    symbols["other"] = np.where(hidden, 0, symbols["other"])
    is_global = symbols["info"] >> 4 != _LOCAL
    order = np.argsort(is_global, kind="stable")
    symbols[:] = symbols[order]
    place = np.argsort(order)
    sections["info"][table] = (~is_global).sum()
    for section in sections[sections["link"] == table]:
        if section["type"] in (_REL, _RELA):
            extra = [("addend", word)] if section["type"] == _RELA else []
            infos = entries(section, np.dtype(kind.relocation.descr + extra))["info"]
            kept = infos & ((1 << kind.shift) - 1)
            infos[:] = place[infos >> kind.shift].astype(infos.dtype) << kind.shift | kept
    for section in sections[(sections["link"] == table) & (sections["type"] == _GROUP)]:
        section["info"] = place[section["info"]]
    return data.tobytes()
