"""What an engine has done so far."""

import dataclasses


@dataclasses.dataclass
class Progress:
    """Counts since the engine was made.

    Attributes:
      slots: of the engine.
      prefill_tokens: prompt tokens computed.
      reused_tokens: prompt tokens copied from another row with the same beginning.
      decode_tokens: tokens generated, those lost behind a stop string left out.
      decode_steps: steps of all slots together.
      prefill_seconds: that prompts took, without compiling.
      decode_seconds: that generating took, likewise.
      rows: finished, in whatever way.
    """

    slots: int
    prefill_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    rows: int = 0

    @property
    def busy(self) -> float:
        """The fraction of slots that gave a token, over all decode steps."""
        return self.decode_tokens / max(1, self.decode_steps * self.slots)
