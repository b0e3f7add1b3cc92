"""Gemma 3n as it is published, with a vision and an audio tower: the text model alone."""

from typing import Self

from llmjax.models import gemma3n
from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader

TOWERS = (r"(vision_tower|audio_tower|embed_vision|embed_audio)\..*",)


class Gemma3nMultimodalConfig(gemma3n.Gemma3nConfig):
    """``Gemma3nForConditionalGeneration``, whose ``text_config`` this is."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "audio_config", "vision_soft_tokens_per_image", "audio_soft_tokens_per_image")
        r.ignore("image_token_id", "boi_token_id", "eoi_token_id", "audio_token_id", "boa_token_id", "eoa_token_id")
        defaults = {"vocab_size": 262400, "hidden_size": 2048, "num_hidden_layers": 35, "num_attention_heads": 8}
        return super().from_hf(r.text_section("gemma3n_text", defaults))


ARCHITECTURE = Architecture(
    model_type="gemma3n",
    config=Gemma3nMultimodalConfig,
    hf_names=lambda config: gemma3n.names(config, "model.language_model."),
    dropped=TOWERS,
    unused=Gemma3nMultimodalConfig.unused,
    needs_bos=True,
)
