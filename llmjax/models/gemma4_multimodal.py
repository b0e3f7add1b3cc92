"""Gemma 4 as it is published, with a vision and, in the smaller ones, an audio tower: the text model alone."""

from typing import Self

from llmjax.models import gemma4
from llmjax.models.architecture import Architecture
from llmjax.models.gemma3n_multimodal import TOWERS
from llmjax.models.hf_config import Reader


class Gemma4MultimodalConfig(gemma4.Gemma4Config):
    """``Gemma4ForConditionalGeneration``, whose ``text_config`` this is."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "audio_config", "vision_soft_tokens_per_image", "audio_soft_tokens_per_image")
        r.ignore("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id")
        r.ignore("audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index")
        defaults = {
            "vocab_size": 262144,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 30,
            "num_attention_heads": 8,
        }
        return super().from_hf(r.text_section("gemma4_text", defaults))


ARCHITECTURE = Architecture(
    model_type="gemma4",
    config=Gemma4MultimodalConfig,
    hf_names=lambda config: gemma4.names(config, "model.language_model."),
    dropped=TOWERS,
    unused=Gemma4MultimodalConfig.unused,
    needs_bos=True,
)
