"""Ministral 8B (Mistral AI 2024, https://mistral.ai/news/ministraux), as transformers names a Mistral that has
``layer_types``."""

import dataclasses

from llmjax.models import mistral

ARCHITECTURE = dataclasses.replace(mistral.ARCHITECTURE, model_type="ministral", gguf=None)
