"""Writes the ``.litertlm`` container: see ``converters.readers.mediapipe.package`` for how it looks.

The same sections give the same bytes, wherever and whenever: there is neither a time nor a random name in the header,
and nothing is compressed but vocabularies, by zlib without a time.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from converters.litert.tables import Field, Tables
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
      content: its bytes, or what writes them from where a file stands.
      notes: keys and values about it.
      size: of what is written so.
    """

    kind: str
    content: bytes | Callable[[IO[bytes]], None]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    size: int = 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return len(self.content) if isinstance(self.content, bytes) else self.size


def packed_json(data: bytes) -> bytes:
    """The content of a section ``HF_Tokenizer_Zlib``: its size, then itself, compressed."""
    return len(data).to_bytes(8, "little") + zlib.compress(data, _LEVEL)


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
        if isinstance(section.content, bytes):
            file.write(section.content)
        else:
            section.content(file)
            file.seek(start + section.nbytes)


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
    tables = Tables()
    objects = [
        tables.table(
            {0: _pairs(tables, section.notes), 1: ("Q", start), 2: ("Q", end), 3: ("B", _NUMBERS[section.kind])}
        )
        for section, (start, end) in zip(sections, places, strict=True)
    ]
    about, listed = tables.table({0: _pairs(tables, notes)}), tables.table({0: tables.several(objects)})
    return tables.finish(tables.table({0: about, 1: listed}))


def _pairs(tables: Tables, notes: Mapping[str, str]) -> Field:
    """A vector of ``KeyValuePair``."""
    return tables.several(
        [
            tables.table({0: tables.text(key), 1: ("B", STRING), 2: tables.table({0: tables.text(value)})})
            for key, value in notes.items()
        ]
    )
