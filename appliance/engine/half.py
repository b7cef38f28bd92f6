"""`precision: fp16`: matrix products and convolutions of a float32 graph in half precision, the rest as it was.

The rule is that of automatic mixed precision (Micikevicius et al. 2018, "Mixed Precision Training"): products are
where time goes, and they add up in float32 on tensor cores; what comes straight behind them (biases, activations,
pooling, changes of shape) follows in half; sums, norms, softmax and powers stay in float32, where half's largest
number, 65504, would be met. Only casts are put in: weights stay in the bundle as they are, and onnxruntime rounds them
once, when it folds the casts of constants at load.
"""

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from appliance.catalog.graph import every_node
from appliance.core.errors import BundleInvalid

TOLERANCE = 0.01
"""Probabilities differ from float32's by less than this in our tests; half has 11 bits of mantissa."""

_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FOLLOW = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Neg", "Where", "BatchNormalization"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Gelu"),
        *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
        *("Concat", "Split", "Slice", "Gather", "Pad", "Expand", "Identity", "Dropout"),
        *("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"),
    }
)
"""Follow when all that they compute with is in half already, or constant."""

_SUFFIX = "_appliance_half"


def halve(model: ModelProto) -> int:
    """Put the casts in; inputs and outputs of the graph keep their types. How many nodes compute in half now.

    Raises: BundleInvalid: the types of the graph's values cannot be told.
    """
    return _Halving(model).work()


class _Halving:
    """One graph on its way. Names of values keep their meaning: `x` is float32, `x_appliance_half` is x in half."""

    def __init__(self, model: ModelProto) -> None:
        self._graph = model.graph
        try:
            inferred = onnx.shape_inference.infer_shapes(model).graph
        except Exception as error:  # onnx's own InferenceError, ValueError for graphs over 2 GiB
            raise BundleInvalid(f"onnx.precision: fp16 needs the types of the graph's values: {error}") from error
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        self._types = {value.name: value.type.tensor_type.elem_type for value in values}
        self._types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self._nodes: list[NodeProto] = []
        self._born: set[str] = set()
        """Values that are computed in half."""
        self._cast: set[tuple[str, int]] = set()

    def work(self) -> int:
        """See `halve`."""
        count = 0
        for node in list(self._graph.node):
            if node.op_type == "Constant":
                self._constants.update(node.output)
            if self._computes_in_half(node):
                self._halve(node)
                count += 1
            else:
                self._leave(node)
        for value in self._graph.output:
            self._as_float(value.name)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        # What is said of values that are not there any more would be taken for a contradiction.
        said = [value for value in self._graph.value_info if value.name not in self._born]
        del self._graph.value_info[:]
        self._graph.value_info.extend(said)
        return count

    def _computes_in_half(self, node: NodeProto) -> bool:
        if node.domain not in ("", "ai.onnx") or not all(
            self._types.get(name) for name in (*node.input, *node.output) if name
        ):
            return False  # a type that is not known may be one that has no half
        floats = [name for name in node.input if self._types.get(name) == TensorProto.FLOAT]
        computed = [name for name in floats if name not in self._constants]
        if node.op_type in _PRODUCTS:
            return bool(floats)
        return node.op_type in _FOLLOW and bool(computed) and all(name in self._born for name in computed)

    def _halve(self, node: NodeProto) -> None:
        inputs = [self._as_half(name) for name in node.input]
        for position, name in enumerate(inputs):
            node.input[position] = name
        for position, name in enumerate(node.output):
            if self._types.get(name) == TensorProto.FLOAT:
                self._born.add(name)
                node.output[position] = name + _SUFFIX
        self._nodes.append(node)

    def _leave(self, node: NodeProto) -> None:
        for inner in every_node([node]):  # the bodies of If and Loop use our values too
            for name in inner.input:
                self._as_float(name)
        self._nodes.append(node)

    def _as_half(self, name: str) -> str:
        if self._types.get(name) != TensorProto.FLOAT:
            return name
        if name not in self._born:
            self._add_cast(name, name + _SUFFIX, TensorProto.FLOAT16)
        return name + _SUFFIX

    def _as_float(self, name: str) -> None:
        if name in self._born:
            self._add_cast(name + _SUFFIX, name, TensorProto.FLOAT)

    def _add_cast(self, source: str, target: str, kind: int) -> None:
        if (target, kind) not in self._cast:
            self._cast.add((target, kind))
            self._nodes.append(helper.make_node("Cast", [source], [target], to=kind))
