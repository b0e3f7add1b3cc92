"""What is in a ``.task`` or ``.litertlm`` file: named parts, which are graphs, vocabularies and metadata.

``.task``
    a zip of stored entries (see ``converters.mediapipe.bundle``).
``.litertlm``
    ``LITERTLM``, the version as three numbers of 4 bytes, at byte 24 the header's end as a number of 8 bytes, from byte
    32 the header: a flatbuffer that gives each section's place and kind.  Sections begin at multiples of 16 KiB.
    Source: https://github.com/google-ai-edge/LiteRT-LM (``schema/core``).
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from converters.readers.litert.flatbuffer import Table
from converters.readers.mapped import MappedFile
from converters.readers.mediapipe import parameters
from llmjax.errors import CheckpointError, named

GRAPH, SENTENCEPIECE, HUGGINGFACE, FACTS, OTHER = "graph", "sentencepiece", "huggingface", "metadata", "other"
MODEL, TOKENIZER, METADATA = "TF_LITE_PREFILL_DECODE", "TOKENIZER_MODEL", "METADATA"
# Entries that later versions may add, by the bundler's option.
OPTIONAL = {
    "tflite_embedder": "TF_LITE_EMBEDDER",
    "tflite_per_layer_embedder": "TF_LITE_PER_LAYER_EMBEDDER",
    "tflite_vision_encoder": "TF_LITE_VISION_ENCODER",
    "tflite_vision_adapter": "TF_LITE_VISION_ADAPTER",
}
_TASK_KINDS = {MODEL: GRAPH, TOKENIZER: SENTENCEPIECE, METADATA: FACTS} | dict.fromkeys(OPTIONAL.values(), GRAPH)
# By the numbers of AnySectionDataType.
SECTIONS = (
    ("none", OTHER),
    ("GenericBinaryData", OTHER),
    ("Deprecated", OTHER),
    ("TFLiteModel", GRAPH),
    ("SP_Tokenizer", SENTENCEPIECE),
    ("LlmMetadataProto", FACTS),
    ("HF_Tokenizer_Zlib", HUGGINGFACE),
    ("TFLiteWeights", OTHER),
    ("EmbeddingMetadataProto", OTHER),
    ("ExecutorMetadataProto", OTHER),
    ("TtsMetadataProto", OTHER),
    ("AsrMetadataProto", OTHER),
)
# By the numbers of VData: the type of a value, as ``struct`` has it.
_VALUES, STRING = "?BbHhIif?", 9
_WIDE = {10: "Q", 11: "q", 12: "d"}
MAGIC, _MAJOR = b"LITERTLM", 1
HEADER_END, HEADER = 24, 32
BLOCK = 16 << 10
_MAX_PARTS = 256
# No vocabulary and no metadata is larger.
_MAX_SMALL = 128 << 20
_DAMAGED = "truncated or damaged file, download or convert it again"


@dataclass(frozen=True)
class Part:
    """One part of a file.

    Attributes:
      name: as the file has it: an entry's name, or a section's kind.
      kind: ``graph``, ``sentencepiece``, ``huggingface``, ``metadata`` or ``other``.
      start: its first byte in the file.
      nbytes: its size.
      notes: keys and values that the file has for it.
      checksum: its CRC-32, as the file has it; None in a ``.litertlm`` file, which has none.
    """

    name: str
    kind: str
    start: int
    nbytes: int
    notes: dict[str, Any] = field(default_factory=dict)
    checksum: int | None = None


def kind_of(path: Path) -> str | None:
    """``task`` or ``litertlm`` by what a file begins with, or else by its name; None for any other.

    A zip without the zeros before its first entry may as well be of PyTorch's: its name decides.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError:
        return None
    if head == MAGIC or path.suffix == ".litertlm":
        return "litertlm"
    return "task" if path.suffix == ".task" or head[:6] == b"\0\0\0\0PK" else None


class Package:
    """A file's parts, memory-mapped.

    Attributes:
      path: of the file.
      format: ``task`` or ``litertlm``.
      version: of the format; empty for ``.task``.
      notes: keys and values about the whole file.
      parts: in the order of the file.
      stamp: the file as it is mapped.

    Args:
      path: of the file.

    Raises:
      CheckpointError: no such file, truncated, or with parts that lie outside of it or over each other.
    """

    def __init__(self, path: Path):
        self.path = path
        self.format = kind_of(path) or "task"
        self._file = MappedFile(path)
        self.stamp = self._file.stamp
        self.version, self.notes = "", dict[str, Any]()
        try:
            self.parts = list(self._entries() if self.format == "task" else self._sections())
        # What zipfile and the flatbuffers library raise where a number leads out of the file.
        except (
            zipfile.BadZipFile,
            struct.error,
            IndexError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            NotImplementedError,
            OSError,
        ) as error:
            self._fail(f"{_DAMAGED} ({' '.join(str(error).split()) or type(error).__name__})")
        self._check_places()
        for part in self.parts:
            if part.kind in (SENTENCEPIECE, FACTS):
                self.check(part)

    def _fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {problem}") from None

    def _check_places(self) -> None:
        end, before = 0, ""
        for part in sorted(self.parts, key=lambda p: (p.start, p.nbytes)):
            if part.start < end:
                self._fail(f"{_DAMAGED}: {named(before)} and {named(part.name)} overlap")
            end, before = part.start + part.nbytes, part.name
            if end > len(self._file):
                self._fail(f"{_DAMAGED}: {named(part.name)} ends at byte {end}, the file has {len(self._file)}")

    def _entries(self) -> Iterator[Part]:
        with zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(names) > _MAX_PARTS:
            self._fail(f"{_DAMAGED}: expected at most {_MAX_PARTS} entries, found {len(names)}")
        if twice := [name for name in names if names.count(name) > 1]:
            self._fail(f"{_DAMAGED}: two entries {named(twice[0])}")
        for entry in entries:
            name, at = named(entry.filename), entry.header_offset
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                self._fail(f"entry {name} is compressed or encrypted, expected it as it is: not a MediaPipe bundle")
            if entry.file_size != entry.compress_size or at < 0:
                self._fail(f"{_DAMAGED}: entry {name}: sizes {entry.file_size} and {entry.compress_size}")
            header = self._file.bytes[at : at + 30].tobytes()
            if header[:4] != b"PK\3\4" or len(header) < 30:
                self._fail(f"{_DAMAGED}: entry {name} has no header at byte {at}")
            name_bytes, extra_bytes = struct.unpack("<26xHH", header)
            start = at + len(header) + name_bytes + extra_bytes
            kind = _TASK_KINDS.get(entry.filename, OTHER)
            yield Part(name, kind, start, entry.file_size, checksum=entry.CRC)

    def _sections(self) -> Iterator[Part]:
        data = self._file.bytes.data
        if bytes(data[:8]) != MAGIC:
            self._fail(f"not a LiteRT-LM file: expected {MAGIC!r} at its beginning, found {bytes(data[:8])!r}")
        version = struct.unpack_from("<3I", data, 8)
        self.version = ".".join(map(str, version))
        if version[0] != _MAJOR:
            self._fail(f"LiteRT-LM files of version {self.version} are not supported, expected {_MAJOR}")
        (end,) = struct.unpack_from("<Q", data, HEADER_END)
        if not HEADER < end <= min(BLOCK, len(self._file)):
            self._fail(f"{_DAMAGED}: the header ends at byte {end}, expected at most {min(BLOCK, len(self._file))}")
        header = bytes(data[HEADER:end])
        root = Table.root(memoryview(header))
        if about := root.table(0):
            self.notes = dict(map(_note, about.tables(0, _MAX_PARTS)))
        listed = root.table(1)
        for section in listed.tables(0, _MAX_PARTS) if listed else ():
            number = section.number(3, "B")
            name, kind = SECTIONS[number] if number < len(SECTIONS) else (f"kind {number}", OTHER)
            start, stop = section.number(1, "Q"), section.number(2, "Q")
            if stop < start or start < end or start % BLOCK:
                self._fail(f"{_DAMAGED}: section {name}: bytes {start} to {stop}, expected a multiple of {BLOCK}")
            yield Part(name, kind, start, stop - start, dict(map(_note, section.tables(0, _MAX_PARTS))))

    def view(self, part: Part) -> memoryview:
        """A part's bytes as they lie in the file."""
        return self._file.bytes[part.start : part.start + part.nbytes].data

    def read(self, part: Part) -> bytes:
        """A small part's bytes.

        Raises:
          CheckpointError: it is not small, or not all there.
        """
        if part.nbytes > _MAX_SMALL or part.start + part.nbytes > len(self._file):
            self._fail(f"{_DAMAGED}: {part.name}: {part.nbytes} bytes from byte {part.start}")
        return self.view(part).tobytes()

    def check(self, part: Part) -> None:
        """Reads a part, which may be large, for its checksum.

        Raises:
          CheckpointError: it has another.
        """
        if part.checksum is not None and self._file.crc32(part.start, part.nbytes) != part.checksum:
            self._fail(f"{_DAMAGED}: entry {part.name} does not have the checksum the file gives for it")

    def metadata(self, part: Part) -> Any:
        """A part's ``LlmParameters`` or ``LlmMetadata``."""
        kind = parameters.LlmParameters if self.format == "task" else parameters.LlmMetadata
        return parameters.read(self.read(part), f"{self.path}: {part.name}", kind)

    def unpacked(self, part: Part) -> bytes:
        """A compressed part's content, which has its size before it.

        Raises:
          CheckpointError: it is damaged, or not small.
        """
        data = self.read(part)
        size = int.from_bytes(data[:8], "little")
        packed = zlib.decompressobj()
        try:
            found = packed.decompress(data[8:], min(size, _MAX_SMALL) + 1)
        except zlib.error as error:
            self._fail(f"{_DAMAGED}: {part.name}: {error}")
        if len(found) != size:
            self._fail(f"{_DAMAGED}: {part.name}: expected {size} bytes unpacked, found {len(found)} or more")
        if not packed.eof:
            self._fail(f"{_DAMAGED}: {part.name}: it ends before its checksum")
        return found


def _note(entry: Table) -> tuple[str, Any]:
    """A ``KeyValuePair``: its key, the type of its value, its value."""
    kind, value = entry.number(1, "B"), entry.table(2)
    key = named(entry.text(0))
    if value is None or not kind:
        return key, None
    if kind == STRING:
        return key, named(value.text(0))
    code = _VALUES[kind] if kind < len(_VALUES) else _WIDE.get(kind)
    return key, None if code is None else value.number(0, code)
