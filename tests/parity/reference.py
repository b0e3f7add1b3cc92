"""What transformers computes for a checkpoint directory.  Needs the parity extra."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.models.falcon import modeling_falcon

from llmjax.models.registry import architectures


def state_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors transformers saves."""
    model = transformers.AutoModelForCausalLM.from_config(_config(config))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
            return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}


def _config(config: dict) -> transformers.PretrainedConfig:
    # A copy: transformers writes into the nested objects of a config.
    rest = {k: copy.deepcopy(v) for k, v in config.items() if k != "model_type"}
    return transformers.AutoConfig.for_model(config["model_type"], **rest)


def load(folder: Path, model_type: str, dtype: str = "float32") -> transformers.PreTrainedModel:
    """Under the attention implementation that computes this architecture right."""
    attention = architectures()[model_type].reference_attention
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return model.eval()


@contextlib.contextmanager
def float32_alibi() -> Iterator[None]:
    """transformers builds ALiBi in bfloat16 even in a float32 model; inside, it is exact."""

    def build(mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
        exact = torch.Tensor.bfloat16
        with mock.patch.object(torch.Tensor, "bfloat16", lambda self: self.float()):
            result = original(mask, num_heads, torch.float32)
        assert torch.Tensor.bfloat16 is exact
        return result.to(dtype)

    original = modeling_falcon.build_alibi_tensor
    with mock.patch.object(modeling_falcon, "build_alibi_tensor", build):
        yield


@contextlib.contextmanager
def as_it_is() -> Iterator[None]:
    """transformers unchanged."""
    yield


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """float32 ``[T, V]``."""
    return model(torch.tensor([ids])).logits[0].float().numpy()


@torch.no_grad()
def hidden(model: transformers.PreTrainedModel, ids: list[int]) -> list[np.ndarray]:
    """What goes into each layer and what comes out of the last, before the final norm."""
    decoder = model.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    seen: list[np.ndarray] = []

    def keep(x: torch.Tensor | tuple) -> None:
        seen.append((x[0] if isinstance(x, tuple) else x)[0].float().numpy())

    hooks = [layers[0].register_forward_pre_hook(lambda _, args: keep(args[0]))]
    hooks += [layer.register_forward_hook(lambda _, __, out: keep(out)) for layer in layers]
    model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def greedy(model: transformers.PreTrainedModel, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """``count`` greedy tokens by full recomputation, and at each the margin of the best over the second."""
    tokens, margins = [], []
    for _ in range(count):
        best = torch.topk(model(torch.tensor([[*ids, *tokens]])).logits[0, -1].float(), 2)
        margins.append(float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens, margins
