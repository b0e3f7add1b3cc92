"""What TFLite's operators are told besides their tensors, by the field numbers of the schema.

Schema: https://github.com/google-ai-edge/LiteRT (``tflite/converter/schema/schema.fbs``).
"""

from typing import Any

from converters.readers.litert.flatbuffer import Table, map_of_numbers

_NUMBER = tuple[int, str, float]
_ACTIVATION: dict[str, _NUMBER] = {"activation": (0, "b", 0)}
_REDUCER: dict[str, _NUMBER] = {"keep_dims": (0, "?", 0)}
# By operator: what a field is called here, and its number, type and default.
FIELDS: dict[str, dict[str, _NUMBER]] = {
    **dict.fromkeys(("ADD", "SUB", "MUL", "DIV"), _ACTIVATION),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD", "REDUCE_ANY", "REDUCE_ALL"), _REDUCER),
    "BATCH_MATMUL": {"adj_x": (0, "?", 0), "adj_y": (1, "?", 0)},
    "CONCATENATION": {"axis": (0, "i", 0), "activation": (1, "b", 0)},
    "CUMSUM": {"exclusive": (0, "?", 0), "reverse": (1, "?", 0)},
    "DEPTHWISE_CONV_2D": {
        "padding": (0, "b", 0),
        "stride_w": (1, "i", 0),
        "stride_h": (2, "i", 0),
        "activation": (4, "b", 0),
        "dilation_w": (5, "i", 1),
        "dilation_h": (6, "i", 1),
    },
    "FULLY_CONNECTED": {"activation": (0, "b", 0), "weights_format": (1, "b", 0), "keep_num_dims": (2, "?", 0)},
    "GATHER": {"axis": (0, "i", 0), "batch_dims": (1, "i", 0)},
    "GELU": {"approximate": (0, "?", 0)},
    "LEAKY_RELU": {"alpha": (0, "f", 0)},
    "PACK": {"count": (0, "i", 0), "axis": (1, "i", 0)},
    "SOFTMAX": {"beta": (0, "f", 0)},
    "SPLIT": {"count": (0, "i", 0)},
    "STRIDED_SLICE": {
        **{
            name: (number, "i", 0)
            for number, name in enumerate(
                ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
            )
        },
        "offset": (5, "?", 0),
    },
    "UNPACK": {"count": (0, "i", 0), "axis": (1, "i", 0)},
}
COMPOSITE, HADAMARD = "STABLEHLO_COMPOSITE", "CUSTOM:aeq.hadamard_rotation"


def read(operator: Table, name: str) -> dict[str, Any]:
    """Of an ``Operator``: its options by name; a composite's ``name``, ``body``, the number of a subgraph, and
    ``floats`` by name; a rotation's ``size``."""
    if name == COMPOSITE:
        options = operator.table(12)
        if options is None:
            raise ValueError("a composite without a body")
        numbers = map_of_numbers(options.array(2, "u1").tobytes())
        floats = {key: value for key, value in numbers.items() if isinstance(value, float)}
        return {"name": options.text(0), "body": options.number(1, "i"), "floats": floats}
    if name == HADAMARD:
        return {"size": map_of_numbers(operator.array(5, "u1").tobytes()).get("hadamard_size", 0)}
    fields, options = FIELDS.get(name, {}), operator.table(4)
    return {
        key: default if options is None else options.number(number, code, default)
        for key, (number, code, default) in fields.items()
    }
