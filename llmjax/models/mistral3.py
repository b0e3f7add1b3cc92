"""Ministral 3 as it is published, with a vision tower: the text model alone."""

import dataclasses
from typing import Self

from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES
from llmjax.models.ministral3 import Ministral3Config


class Mistral3Config(Ministral3Config):
    """``Mistral3ForConditionalGeneration``, whose ``text_config`` this is."""

    @classmethod
    def from_hf(cls, r: Reader) -> Self:
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "vision_feature_layer", "spatial_merge_size", "image_token_id", "image_token_index")
        r.ignore("multimodal_projector_bias", "projector_hidden_act")
        tied = None if r.get("tie_word_embeddings") is None else r.flag("tie_word_embeddings", False)
        text = r.section("text_config", {})
        text.expect("model_type", ("ministral3",))
        config = super().from_hf(text)
        # The outer object's word on the head wins, as in transformers; without one the text model's counts.
        return config if tied is None else dataclasses.replace(config, tie_word_embeddings=tied)


ARCHITECTURE = Architecture(
    model_type="mistral3",
    config=Mistral3Config,
    hf_names=lambda config: HF_NAMES,
    dropped=(r"(vision_tower|multi_modal_projector)\..*",),
)
