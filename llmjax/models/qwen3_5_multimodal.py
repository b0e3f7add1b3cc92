"""Qwen3.5 as it is published, with a vision tower: the text model alone."""

from typing import Self

from llmjax.models import qwen3_5
from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader


class Qwen3_5MultimodalConfig(qwen3_5.Qwen3_5Config):
    """``Qwen3_5ForConditionalGeneration``, whose ``text_config`` this is."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        r.ignore("language_model_only")
        return super().from_hf(r.text_section("qwen3_5_text", {}, tied=False))


ARCHITECTURE = Architecture(
    model_type="qwen3_5",
    config=Qwen3_5MultimodalConfig,
    hf_names=qwen3_5.names,
    dropped=qwen3_5.ARCHITECTURE.dropped,
    modules="model.language_model.",
)
