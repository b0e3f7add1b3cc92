"""Flatbuffer tables by field number, as the reader has them: what is alike is stored once.

Schema: https://github.com/google-ai-edge/LiteRT (``tflite/converter/schema/schema.fbs``).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flatbuffers
import numpy as np

# Codes of struct, as the reader's tables have them, and ``@``, what was made before.
_SLOTS = {"b": "Int8", "B": "Uint8", "?": "Bool", "i": "Int32", "I": "Uint32", "Q": "Uint64", "f": "Float32"}
Field = tuple[str, Any]


class Tables:
    """One flatbuffer; what its methods return goes into fields ``@``."""

    def __init__(self) -> None:
        self._builder = flatbuffers.Builder(1 << 16)
        self._made: dict[Any, int] = {}

    def text(self, text: str) -> Field:
        """A string."""
        return self._once(text, lambda: self._builder.CreateString(text))

    def array(self, array: np.ndarray, owner: str | None = None) -> Field:
        """A vector of numbers; ``owner``'s is its own, whoever has the same ones."""
        key = (array.dtype.str, owner or array.tobytes())
        return self._once(key, lambda: self._builder.CreateNumpyVector(np.ascontiguousarray(array)))

    def table(self, fields: Mapping[int, Field]) -> Field:
        """A table; a field of 0 is left out, that being the default of all that are written here."""
        kept = {number: (code, value) for number, (code, value) in fields.items() if value}

        def make() -> int:
            self._builder.StartObject(max(kept, default=-1) + 1)
            for number, (code, value) in kept.items():
                if code == "@":
                    self._builder.PrependUOffsetTRelativeSlot(number, value, 0)
                else:
                    getattr(self._builder, f"Prepend{_SLOTS[code]}Slot")(number, value, 0)
            return self._builder.EndObject()

        return self._once(tuple(kept.items()), make)

    def several(self, fields: Iterable[Field]) -> Field:
        """A vector of tables."""
        offsets = [value for _, value in fields]
        self._builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self._builder.PrependUOffsetTRelative(offset)
        return "@", self._builder.EndVector()

    def finish(self, root: Field, identifier: bytes | None = None) -> bytes:
        """All of it."""
        self._builder.Finish(root[1], identifier)
        return bytes(self._builder.Output())

    def _once(self, key: Any, make: Any) -> Field:
        if key not in self._made:
            self._made[key] = make()
        return "@", self._made[key]
