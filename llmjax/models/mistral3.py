"""Ministral 3 and Mistral Small 3.1 as they are published, with a vision tower: the text model alone."""

import dataclasses

from llmjax.models.architecture import Architecture
from llmjax.models.hf_config import Reader
from llmjax.models.llama import HF_NAMES, LlamaConfig
from llmjax.models.ministral3 import Ministral3Config
from llmjax.models.mistral import MistralConfig

_TEXT_MODELS: dict[str, type[LlamaConfig]] = {"mistral": MistralConfig, "ministral3": Ministral3Config}


class Mistral3Config(LlamaConfig):
    """``Mistral3ForConditionalGeneration``: what its ``text_config`` is, of one of two models."""

    @classmethod
    def from_hf(cls, r: Reader) -> LlamaConfig:  # type: ignore[override]  # none of its own is ever made
        """See ``DecoderConfig.from_hf``."""
        r.ignore("vision_config", "vision_feature_layer", "spatial_merge_size", "image_token_id", "image_token_index")
        r.ignore("multimodal_projector_bias", "projector_hidden_act")
        tied = None if r.get("tie_word_embeddings") is None else r.flag("tie_word_embeddings", False)
        text = r.section("text_config", {})
        text.expect("layer_types", (None,))  # transformers heeds them in a text model of its own alone
        config = _TEXT_MODELS[text.expect("model_type", tuple(_TEXT_MODELS), "mistral")].from_hf(text)
        # The outer object's word on the head wins, as in transformers; without one the text model's counts.
        return config if tied is None else dataclasses.replace(config, tie_word_embeddings=tied)


ARCHITECTURE = Architecture(
    model_type="mistral3",
    config=Mistral3Config,
    hf_names=lambda config: HF_NAMES,
    modules="model.language_model.",
    dropped=(r"(vision_tower|multi_modal_projector)\..*",),
)
