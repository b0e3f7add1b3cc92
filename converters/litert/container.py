"""Writes the ``.litertlm`` container: see ``converters.readers.mediapipe.package`` for how it looks.

The same sections give the same bytes, wherever and whenever: there is neither a time nor a random name in the header,
and nothing is compressed but vocabularies, by zlib without a time.
"""

import dataclasses
import shutil
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO

import flatbuffers

from converters.readers.mediapipe.package import BLOCK, HEADER, HEADER_END, MAGIC, SECTIONS, STRING
from llmjax.errors import CheckpointError

_VERSION = (1, 7, 0)
_NUMBERS = {name: number for number, (name, _) in enumerate(SECTIONS)}
# Of zlib: what its own default is, said here so that it stays so.
_LEVEL = 6


@dataclasses.dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
      kind: by the names of ``package.SECTIONS``.
      content: its bytes, or a file that holds them.
      notes: keys and values about it.
    """

    kind: str
    content: bytes | Path
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def packed_json(data: bytes) -> bytes:
    """The content of a section ``HF_Tokenizer_Zlib``: its size, then itself, compressed."""
    return len(data).to_bytes(8, "little") + zlib.compress(data, _LEVEL)


def size_of(sections: Sequence[Section]) -> int:
    """Bytes of the file that ``write`` makes."""
    return _places(sections)[-1][1]


def write(file: IO[bytes], sections: Sequence[Section], notes: Mapping[str, str]) -> None:
    """Writes a container to an empty file.

    Args:
      file: seekable.
      sections: in their order; at least one.
      notes: keys and values about the whole file.

    Raises:
      CheckpointError: the notes do not fit into the header.
      OSError: the file cannot be written.
    """
    places = _places(sections)
    header = _header(sections, places, notes)
    if HEADER + len(header) > BLOCK:
        raise CheckpointError(f"the header takes {HEADER + len(header)} bytes, expected at most {BLOCK}: shorter notes")
    file.write(MAGIC + b"".join(number.to_bytes(4, "little") for number in _VERSION))
    file.write(bytes(HEADER_END - file.tell()) + (HEADER + len(header)).to_bytes(8, "little") + header)
    for section, (start, _) in zip(sections, places, strict=True):
        file.write(bytes(start - file.tell()))
        content = section.content
        with BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)


def _places(sections: Sequence[Section]) -> list[tuple[int, int]]:
    """Where each section begins and ends."""
    found, end = [], BLOCK
    for section in sections:
        start = -(-end // BLOCK) * BLOCK
        end = start + section.nbytes
        found.append((start, end))
    return found


def _header(sections: Sequence[Section], places: Sequence[tuple[int, int]], notes: Mapping[str, str]) -> bytes:
    """The flatbuffer ``LiteRTLMMetaData``: fields by their slots in the schema."""
    builder = flatbuffers.Builder(1024)
    objects = []
    for section, (start, end) in zip(sections, places, strict=True):
        items = _pairs(builder, section.notes)
        builder.StartObject(4)
        builder.PrependUOffsetTRelativeSlot(0, items, 0)
        builder.PrependUint64Slot(1, start, 0)
        builder.PrependUint64Slot(2, end, 0)
        builder.PrependUint8Slot(3, _NUMBERS[section.kind], 0)
        objects.append(builder.EndObject())
    entries = _pairs(builder, notes)
    lists = [_in_table(builder, entries), _in_table(builder, _vector(builder, objects))]
    builder.StartObject(2)
    for slot, table in enumerate(lists):
        builder.PrependUOffsetTRelativeSlot(slot, table, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def _pairs(builder: flatbuffers.Builder, notes: Mapping[str, str]) -> int:
    """A vector of ``KeyValuePair``."""
    pairs = []
    for key, value in notes.items():
        name, text = builder.CreateString(key), _in_table(builder, builder.CreateString(value))
        builder.StartObject(3)
        builder.PrependUOffsetTRelativeSlot(0, name, 0)
        builder.PrependUint8Slot(1, STRING, 0)
        builder.PrependUOffsetTRelativeSlot(2, text, 0)
        pairs.append(builder.EndObject())
    return _vector(builder, pairs)


def _vector(builder: flatbuffers.Builder, tables: Sequence[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()


def _in_table(builder: flatbuffers.Builder, offset: int) -> int:
    """A table whose only field is this."""
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, offset, 0)
    return builder.EndObject()
