#!/usr/bin/env python3
"""What LiteRT computes for int8 and int4 weights with float activations, as NumPy formulas, checked on the runtime.

    pip install ai-edge-litert flatbuffers        # into the environment of llmjax
    python scripts/litert_int8.py [MODEL]

Builds graphs of one FULLY_CONNECTED operation, runs them with and without the XNNPACK delegate (LiteRT's default) and
prints the largest distance to the formulas below in ulp.  With MODEL (``smollm2``, or any Llama that llmjax loads) it
also says what both rules do to the inputs of the first layer's projections.

This is ``dynamic_wi8_afp32`` of LiteRT's tools.  Of the operations in their language models it touches only two:
FULLY_CONNECTED, and EMBEDDING_LOOKUP, which returns ``q * scale`` exactly.  BATCH_MATMUL of two activations, softmax
and norms stay float32; so does everything under ``weight_only_wi8_afp32``, whose weights pass a DEQUANTIZE first.
Which XNNPACK kernel runs depends on the processor; the formulas were found on one with AVX2 and no VNNI.

A whole model is another matter: a difference in the last bit of a norm rounds some activation the other way, and after
a few layers that has grown to the size of the rounding itself.  Two programs with the very same products, one with its
norms and attention in float32 and one in float64, differ on SmolLM2-135M by 0.17 in the mean log-probability of a
token, as much as either differs from float activations or from LiteRT.  Compare operations to the bit, whole models by
their distributions.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

F32 = np.float32
SIZES = ((1, 64, 32), (2, 576, 192), (3, 576, 1535), (7, 1536, 576), (64, 576, 576))  # rows, inputs, outputs


def quantize_rows_xnnpack(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 ``[B, in]`` as ``q * step``: q int32 ``[B, in]``, the int8 value less its zero point; step ``[B, 1]``.

    Asymmetric: 255 steps from the least value to the greatest, zero always among them.  Every operation rounds to
    float32, and both roundings to integers go to the even neighbour.
    """
    low = np.minimum(x.min(1, keepdims=True), F32(0))
    high = np.maximum(x.max(1, keepdims=True), F32(0))
    with np.errstate(divide="ignore"):
        per_unit = np.where(low == high, F32(1), F32(255) / (high - low))
    low, high = low * per_unit, high * per_unit
    # The end that is left with the smaller error when the zero point is rounded.
    zero = np.where((F32(-128) + low) + (F32(127) + high) > 0, F32(-128) - low, F32(127) - high)
    zero = np.rint(np.clip(zero, F32(-128), F32(127))).astype(np.int32)
    q = np.clip(np.rint(x * per_unit).astype(np.int32) + zero, -128, 127) - zero
    step = F32(1) / per_unit
    return q, np.where(step < np.finfo(F32).tiny, F32(0), step)  # XNNPACK runs with subnormal numbers off


def fully_connected_xnnpack(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """XNNPACK's product: ``fma(float(sum q*w) * step, scale, bias)``, the integer sum exact.

    Args:
      x: float32 ``[B, in]``.
      weight: int8 ``[out, in]``, of 8 or of 4 bits.
      scale: float32 ``[out]``.
      bias: float32 ``[out]``.

    Returns:
      float32 ``[B, out]``.
    """
    q, step = quantize_rows_xnnpack(x)
    y = exact_product(q, weight).astype(F32) * step
    # float64 holds the product of two float32 whole, so this is an fma but for a second rounding once in 2**29.
    return (y.astype(np.float64) * scale + (0 if bias is None else bias)).astype(F32)


def quantize_rows_symmetric(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float32 ``[B, in]`` as ``q * step``, with ``step = max|x| / 127``: TFLite's own kernel without a delegate.

    llmjax's ``dynamic_int8`` takes the same integers; its step, ``max|x| * (1/127)``, differs in the last bit.
    """
    peak = np.abs(x).max(1, keepdims=True)
    peak = np.where(peak == 0, F32(127), peak)
    return np.clip(np.rint(x * (F32(127) / peak)), -127, 127).astype(np.int32), peak / F32(127)


def fully_connected_builtin(
    x: np.ndarray, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None
) -> np.ndarray:
    """TFLite's own int8 product: ``float(sum q*w) * (step * scale) + bias``.  Arguments as for XNNPACK's."""
    q, step = quantize_rows_symmetric(x)
    return exact_product(q, weight).astype(F32) * (step * scale) + (F32(0) if bias is None else bias)


def exact_product(q: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``q @ weight.T``; float64 holds the integer sums exactly and is faster than NumPy's integers."""
    return q.astype(np.float64) @ weight.T.astype(np.float64)


def quantize_weight(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric, one scale an output row: what ai-edge-quantizer stores, bit for bit."""
    scale = np.abs(weight).max(1) / F32(2 ** (bits - 1) - 1)
    scale = np.where(scale == 0, F32(1), scale)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


def graph(weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, bits: int, rows: int) -> bytes:
    """A .tflite of one FULLY_CONNECTED: float32 ``[rows, in]`` to ``[rows, out]``."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def buffer(data: bytes | None = None) -> schema.BufferT:
        return schema.BufferT(data=None if data is None else np.frombuffer(data, np.uint8))

    def tensor(name: str, shape: list[int], kind: str, buffer: int = 0, **more: object) -> schema.TensorT:
        return schema.TensorT(name=name, shape=shape, type=getattr(schema.TensorType, kind), buffer=buffer, **more)

    packed = weight.reshape(-1)
    if bits == 4:
        packed = packed[::2] & 15 | packed[1::2] << 4
    quantization = schema.QuantizationParametersT(scale=scale.tolist(), zeroPoint=[0] * len(scale))
    tensors = [
        tensor("x", [rows, weight.shape[1]], "FLOAT32"),
        tensor("weight", list(weight.shape), f"INT{bits}", 1, quantization=quantization),
        tensor("y", [rows, len(weight)], "FLOAT32"),
    ]
    buffers = [buffer(), buffer(packed.tobytes())]
    if bias is not None:
        tensors.append(tensor("bias", [len(bias)], "FLOAT32", 2))
        buffers.append(buffer(bias.tobytes()))
    code = schema.BuiltinOperator.FULLY_CONNECTED
    operator = schema.OperatorT(
        inputs=[0, 1, -1 if bias is None else 3],
        outputs=[2],
        builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
        builtinOptions=schema.FullyConnectedOptionsT(),
    )
    model = schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=12)],
        subgraphs=[schema.SubGraphT(tensors=tensors, inputs=[0], outputs=[2], operators=[operator])],
        buffers=buffers,
    )
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def run(model: bytes, x: np.ndarray, *, xnnpack: bool) -> np.ndarray:
    """What the runtime returns for ``x``."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=resolver, num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).copy()


def ulp_distance(a: np.ndarray, b: np.ndarray) -> int:
    """The largest number of float32 values between two arrays' elements; 0 and -0 are one."""
    a, b = (np.where(i < 0, -(i & 0x7FFFFFFF), i) for i in (v.view(np.int32).astype(np.int64) for v in (a, b)))
    return int(np.abs(a - b).max())


def check_operations() -> int:
    """Prints the distance of runtime and formula for all sizes; returns the largest."""
    rng, worst = np.random.default_rng(0), 0
    print("largest distance in ulp\n bits  rows    in   out  bias  XNNPACK  built-in")
    for bits in (8, 4):
        for rows, inputs, outputs in SIZES:
            # Rows of different sizes and off centre, so that scale and zero point differ between rows.
            x = ((rng.normal(size=(rows, inputs)) + 0.3) * rng.lognormal(size=(rows, 1))).astype(F32)
            weight, scale = quantize_weight(rng.normal(size=(outputs, inputs)).astype(F32), bits)
            for bias in (None, rng.normal(size=outputs).astype(F32)):
                model = graph(weight, scale, bias, bits, rows)
                xnnpack = ulp_distance(run(model, x, xnnpack=True), fully_connected_xnnpack(x, weight, scale, bias))
                worst, text = max(worst, xnnpack), "-"
                if bits == 8:  # the built-in int4 kernel adds up in another order
                    builtin = fully_connected_builtin(x, weight, scale, bias)
                    found = ulp_distance(run(model, x, xnnpack=False), builtin)
                    worst, text = max(worst, found), str(found)
                has = "no" if bias is None else "yes"
                print(f"{bits:5}{rows:6}{inputs:6}{outputs:6}{has:>6}{xnnpack:9}{text:>10}")
    return worst


def compare_rules(name: str) -> None:
    """Prints what both rules change in the first layer's products."""
    import llmjax

    model = llmjax.load(name, dtype="float32")
    ids = model.tokenizer.encode(__doc__)[:256]
    taps = llmjax.trace(model, ids, "layers.0.*").activations
    layer = model.params["layers_0"]
    inputs = {
        "attn.q": taps["layers.0.attn_norm"],
        "attn.o": taps["layers.0.attn.out"].reshape(len(ids), -1),
        "mlp.gate": taps["layers.0.mlp_norm"],
        "mlp.down": taps["layers.0.mlp.act"] * taps["layers.0.mlp.up"],
    }
    print(f"\nlayer 0 of {name}, {len(ids)} tokens, int8 weights; root mean square, relative to the product")
    print(" projection  XNNPACK - exact  symmetric - exact  XNNPACK - symmetric")
    for path, x in inputs.items():
        block, projection = path.split(".")
        weight, scale = quantize_weight(np.asarray(layer[block][projection]["weight"]), 8)
        exact = exact_product(x, weight) * scale
        ours, theirs = fully_connected_builtin(x, weight, scale), fully_connected_xnnpack(x, weight, scale)
        size = np.sqrt((exact**2).mean())
        errors = [np.sqrt(((a - b) ** 2).mean()) / size for a, b in ((theirs, exact), (ours, exact), (theirs, ours))]
        print(f" {path:10}{errors[0]:17.2e}{errors[1]:19.2e}{errors[2]:21.2e}")


def main() -> int:
    """Returns 0 when the formulas hold to 1 ulp, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    args = parser.parse_args()
    if importlib.util.find_spec("ai_edge_litert") is None:
        parser.error("ai-edge-litert is not installed; see the top of this script")
    worst = check_operations()
    if args.model:
        compare_rules(args.model)
    return 0 if worst <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
