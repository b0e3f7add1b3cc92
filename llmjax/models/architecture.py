"""What an architecture is; each one's file ends with its own."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from llmjax.models.config import DecoderConfig
from llmjax.models.names import Names, stem

# For ``dropped``: what older versions of transformers stored of their rotations, and a configuration says by itself.
ROTARY_BUFFERS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One entry of the registry.

    Attributes:
      model_type: Hugging Face's name.
      config: the config class.
      hf_names: the table of Hugging Face names for a config.
      gguf: ``general.architecture`` of its GGUF files, None where llama.cpp has none.
      dropped: regular expressions of source tensors (by their ``names.stem``) that are known and not needed.
      unused: more of them, for a config.
      reference_attention: the ``attn_implementation`` under which transformers computes this architecture right.
      modules: what transformers' names of modules begin with, before what ``names.stem`` leaves of them, where those of
        its files' tensors begin otherwise.
      needs_bos: trained so that a prompt without BOS gives garbage; such a prompt warns.
    """

    model_type: str
    config: type[DecoderConfig]
    hf_names: Callable[[Any], Names]
    gguf: str | None = None
    dropped: tuple[str, ...] = ()
    unused: Callable[[Any], tuple[str, ...]] = lambda config: ()
    reference_attention: str = "eager"
    modules: str | None = None
    needs_bos: bool = False

    def drops(self, name: str, config: DecoderConfig) -> bool:
        """Whether a source tensor that fills no parameter is one that models of this config are known to have."""
        return any(re.fullmatch(pattern, stem(name)) for pattern in (*self.dropped, *self.unused(config)))
