"""Gemma 3 4B, 12B and 27B as they are published, with a vision tower: the text model alone."""

from typing import Self

from llmjax.models import gemma3
from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader


class Gemma3MultimodalConfig(gemma3.Gemma3Config):
    """``Gemma3ForConditionalGeneration``, whose ``text_config`` this is."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
        r.ignore("boi_token_id", "eoi_token_id", "image_token_id")  # the same by other names
        text = r.text_section("gemma3_text", {"vocab_size": 262208, "num_attention_heads": 8})
        if text.get("final_logit_softcapping") is not None:
            text.problem(
                "final_logit_softcapping: transformers applies it to the text model, not beside a vision tower; take "
                "it out, or save the text model alone (model_type 'gemma3_text')"
            )
        return super().from_hf(text)


ARCHITECTURE = Architecture(
    model_type="gemma3",
    config=Gemma3MultimodalConfig,
    hf_names=lambda config: gemma3.names("language_model."),
    dropped=(r"vision_tower\..*", r"multi_modal_projector\..*"),
    modules="model.language_model.",
    needs_bos=True,
)
