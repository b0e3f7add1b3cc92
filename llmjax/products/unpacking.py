"""Packed integers as numbers of 16 bits, within a kernel for an NVIDIA card.

A card converts one integer where it adds four: here an integer is the last bits of 1024 and more in float16, of 128 and
more in bfloat16, of which that and what means zero are taken away, exactly.  Two share a register all along, which
Triton does not see in formulas: it is given PTX.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt

from llmjax.quant.qtensor import QTensor, integers

# Of each dtype PTX's name for two, and the number whose last bit is one.
_KINDS: dict[Any, tuple[str, int]] = {
    jnp.dtype(jnp.float16): ("f16x2", 1024),
    jnp.dtype(jnp.bfloat16): ("bf16x2", 128),
}


def in_16_bits(q: QTensor, dtype: Any, *, interpret: bool = False) -> list[jax.Array]:
    """``n - zero``, in columns as ``integers`` has them.

    Args:
      q: of 4 or 8 bits; its values are some of a weight's.
      dtype: ``float16`` or ``bfloat16``, which have all such integers.
      interpret: as plain formulas.
    """
    if interpret:
        return [n.astype(dtype) for n in integers(q)]
    dtype = jnp.dtype(dtype)
    if q.bits == 4:
        halves = ("and.b32 a, $2, 0x0F0F0F0F;", "shr.u32 a, $2, 4; and.b32 a, a, 0x0F0F0F0F;")
        return [_assembled(half + _numbers(q.zero, dtype), q.values, dtype) for half in halves]
    if dtype == jnp.float16:
        return [_assembled("xor.b32 a, $2, 0x80808080;" + _numbers(128, dtype), q.values, dtype)]
    return [_assembled(_SIGNED, q.values, dtype)]


def _assembled(lines: str, values: jax.Array, dtype: Any) -> jax.Array:
    """Of bytes b3 b2 b1 b0 in ``$2`` the numbers of b1 b0 in ``$0``, those of b3 b2 in ``$1``."""
    (found,) = plt.elementwise_inline_asm(
        f"{{ .reg .b32 a, b, one; {lines} }}",
        args=[values],
        constraints="=&r,=&r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(values.shape, dtype)],
    )
    return found


def _numbers(zero: int, dtype: Any) -> str:
    """Those of the bytes in ``a``, without what means zero.  Times one, for of bfloat16 the cards before the H100 have
    no other sum."""
    kind, base = _KINDS[dtype]
    parts = (("$0", "0x5150"), ("$1", "0x5352"))
    spread = "".join(f"prmt.b32 {to}, a, {_twice(base, dtype)}, {which};" for to, which in parts)
    numbers = f"mov.b32 one, {_twice(1, dtype)}; mov.b32 b, {_twice(-(base + zero), dtype)};"
    return spread + numbers + "".join(f"fma.rn.{kind} {to}, {to}, one, b;" for to, _ in parts)


def _twice(value: int, dtype: Any) -> str:
    """A number's bits in both halves of a register."""
    bits = int(np.asarray(value, dtype).view(np.uint16))
    return f"0x{bits:04X}{bits:04X}"


# Signed bytes as bfloat16, which has seven bits behind its first: they are added to 128, of which 128 is taken away, or
# 256 where the sign is set, whose bit is that of the exponent in which the two differ.
_SIGNED = "mov.b32 one, 0x3F803F80;" + "".join(
    f"prmt.b32 a, $2, 0, {which}; lop3.b32 {to}, a, 0x007F007F, 0x43004300, 0xEA;"
    f"lop3.b32 b, a, 0x00800080, 0xC300C300, 0xEA; fma.rn.bf16x2 {to}, {to}, one, b;"
    for to, which in (("$0", "0x4140"), ("$1", "0x4342"))
)
