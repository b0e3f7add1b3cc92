"""Numerics profiles: how everything is computed, by name.

``dtype`` says how unquantized weights are stored; a profile says what is done with them and wins where the two seem to
clash. The profiles are the ones a result may name; each records itself in every output.

================  ==================================================================================================
``reference``     float32 activations and products at the highest matmul precision; the formulas of the papers.
``hf``            what transformers computes in the checkpoint's dtype, its roundings included: the embedding's, as it
                  is stored.  Where config.json says another, transformers 5 takes that one: give it as ``dtype``.
``fast``          bfloat16 products where weights are stored so, float32 elsewhere; sums in the order that is quickest;
                  never quantizes activations.
``dynamic_int8``  as ``fast``, but activations are rounded to 8 bits, row by row, where they meet a quantized weight.
``mediapipe_gpu`` as ``reference``, with the formulas of MediaPipe's gpu runtime; agrees with its logits to 2e-5.
``mediapipe_cpu`` as ``dynamic_int8``, with the formulas of MediaPipe's open cpu runtime: emulated from its source, not
                  validated against the runtime.
``litert``        of op graphs alone (``.tflite``, ``.task``, ``.litertlm``): what LiteRT's interpreter computes with
                  its default delegate, activations rounded where the graph has it so; agrees with its logits to 5e-5.
================  ==================================================================================================

What the formulas of MediaPipe's two are: ``llmjax.checkpoint.mediapipe_config.emulated``.

Where none is named, ``llmjax.load`` and ``llmjax trace`` take ``reference``; what generates (``LLM`` of a path,
``LlmInference`` and the command line's other verbs) takes ``fast``; ``LLM`` of a loaded model keeps the model's.

Quantized weights mean their dequantized values in all of them; ``llmjax.products.digits`` defines the products.
"""

import dataclasses

import jax.numpy as jnp

from llmjax.errors import ConfigError

REFERENCE, FAST = "reference", "fast"


# What a GPU's compiler decides by a race between kernels, or leaves to the order in which threads come, would give a
# job that goes on other bits than it had.
GPU_OPTIONS: dict[str, bool | int] = {"xla_gpu_deterministic_ops": True}
# Without a race XLA takes the first tiles there are for products that it compiles itself: 16 by 8 of a result, as seen
# for an H100, so that each operand is read a hundred times over; of float32 in full precision it knows none from JAX
# 0.11 on, and does not compile without a card to try the library on.  cuBLAS knows its tiles; what must be converted
# for it is so in memory first, one weight at a time.  The second keeps weights that meet the same x from being copied
# into one.
GPU_LIBRARY: dict[str, bool | int] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
# Of a step's many small kernels those that do not wait for each other run side by side, where XLA would have one after
# the other: queries, keys and values, and what is written to the cache.  That is 4 % of Gemma 2B's step on an H200, 8 %
# of one of 64 rows, for up to twice the temporaries.  The bits are the same.
GPU_STEP: dict[str, bool | int | str] = {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"}


@dataclasses.dataclass(frozen=True)
class Numerics:
    """A profile, resolved for one model.  Hashable: it is static in every compiled program.

    Attributes:
      name: the profile's name.
      activations: dtype of the residual stream, of norms' outputs and of everything elementwise.
      products: dtype both operands of a product have; the sum is always float32, then rounded to ``activations``.
        ``None`` keeps each weight's own dtype.
      digits: 1 rounds activations to 8 bits where they meet a quantized weight (dynamic int8); 3 allows exact integer
        products (``llmjax.products.digits``); None has float32 products alone.
      round_alibi: build ALiBi from bfloat16 slopes and positions, as transformers' Falcon does even in a float32 model.
      reassociates: the compiler may add up floats in any order it likes, the same one every time.  Only then does it
        use the CPU's vectors for sums; it costs no accuracy (``tests/unit/test_numerics.py``).
    """

    name: str
    activations: jnp.dtype
    products: jnp.dtype
    digits: int | None = None
    round_alibi: bool = False
    reassociates: bool = False

    @property
    def label(self) -> str:
        """The name as a result records it."""
        return f"{self.name} (not validated against the runtime)" if self.name == "mediapipe_cpu" else self.name

    def compiler_options(self, platform: str, *, step: bool = False) -> dict[str, bool | int | str]:
        """For ``jax.jit``, where a platform's device computes (``llmjax.device.platform_of``); ``step`` for a program
        of steps.

        XLA may leave out a rounding to bfloat16 between two operations; ``hf`` is made of such roundings.  Of what
        "fast math" lets LLVM do, only ``reassociates`` is wanted: NaN, infinity, division and functions keep their
        meaning.
        """
        options: dict[str, bool | int | str] = {"xla_allow_excess_precision": False} if self.name == "hf" else {}
        if platform == "cpu" and self.reassociates:
            options |= {f"xla_cpu_fast_math_honor_{what}": True for what in ("nans", "infs", "division", "functions")}
            # Sums of four bits are short of arithmetic: half as fast again in whole registers of AVX-512.
            options |= {"xla_cpu_enable_fast_math": True, "xla_cpu_prefer_vector_width": 512}
        if platform == "gpu":
            options |= GPU_OPTIONS | GPU_LIBRARY
        if platform == "gpu" and step:
            options |= GPU_STEP
        return options


PROFILES: tuple[str, ...] = ("reference", "hf", "fast", "dynamic_int8", "mediapipe_gpu", "mediapipe_cpu")


def resolve(name: str, stored: jnp.dtype) -> Numerics:
    """Returns profile ``name`` for a model whose weights are stored as ``stored``.

    ``fast`` multiplies in bfloat16 only when the weights are bfloat16: in float16 a large activation (Phi-2 has them)
    becomes inf, and a wrong number is worse than a slow one.

    Raises:
      ConfigError: unknown profile.
    """
    float32 = jnp.dtype(jnp.float32)
    stored = jnp.dtype(stored)
    if name in ("reference", "mediapipe_gpu"):
        return Numerics(name, activations=float32, products=float32)
    if name == "hf":
        return Numerics(name, activations=stored, products=stored, round_alibi=True)
    if name in ("fast", "dynamic_int8"):
        bf16 = jnp.dtype(jnp.bfloat16)
        products = bf16 if stored == bf16 else float32
        digits = 3 if name == "fast" else 1
        return Numerics(name, activations=float32, products=products, digits=digits, reassociates=True)
    if name == "mediapipe_cpu":
        return Numerics(name, activations=float32, products=float32, digits=1)
    if name == "litert":
        raise ConfigError("numerics: litert is about op graphs (.tflite, .task, .litertlm), and this is none")
    raise ConfigError(f"numerics: unknown profile {name!r}; expected one of {', '.join(PROFILES)}")
