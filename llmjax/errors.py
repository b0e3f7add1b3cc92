"""Every error llmjax raises for a user's mistake or a bad file.

A message names the file, the thing, what was expected, what was found and the likely fix.  The command line prints the
message alone and exits with 2 (bad input) or 1 (the work failed); a traceback means a bug in llmjax.
"""


def shown(value: object) -> str:
    """A value in a message: its beginning, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, lists nested too deeply
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


class LlmjaxError(Exception):
    """Base class: catch this to catch everything llmjax reports on purpose."""


class CheckpointError(LlmjaxError):
    """A model file is missing, damaged, or holds something llmjax does not read."""


class ConfigError(LlmjaxError):
    """A model configuration asks for something llmjax does not do, or contradicts its tensors."""


class TokenizerError(LlmjaxError):
    """Tokenizer or chat-template files are missing, damaged, or of an unknown kind."""


class LoraError(LlmjaxError):
    """A LoRA adapter is damaged or does not fit the model."""


class RequestError(LlmjaxError):
    """A prompt or a sampling parameter is invalid."""


class TooLongError(RequestError):
    """A prompt does not fit the model's context."""


class OutputError(LlmjaxError):
    """Results could not be written, or not all of them."""


class NoRoomError(RequestError):
    """A prompt and its answer do not fit the memory that may be used."""


class ResumeError(LlmjaxError):
    """A batch job cannot go on from what its output holds."""


class TrainingError(LlmjaxError):
    """Training cannot go on: a loss or a gradient is not finite, or there is nothing to learn from."""
