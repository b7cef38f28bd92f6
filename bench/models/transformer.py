"""The encoder block of transformers, as exporters write it. Source: Vaswani et al. 2017, Attention Is All You Need."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.models.network import Network

Weights = Callable[[str, tuple[int, ...]], str]
"""Tensor for a name and a shape: random ones, or those of a trained model. Matrices are (inputs, outputs)."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Blocks of self-attention over `width` numbers a token."""

    net: Network
    weights: Weights
    width: int
    heads: int
    hidden: int
    epsilon: float

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """x · W + b."""
        product = self.net.node("MatMul", x, self.weights(f"{name}.weight", (inputs, outputs)))
        return self.net.node("Add", product, self.weights(f"{name}.bias", (outputs,)))

    def normal(self, x: str, name: str) -> str:
        """Layer normalisation."""
        scale, bias = self.weights(f"{name}.weight", (self.width,)), self.weights(f"{name}.bias", (self.width,))
        return self.net.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.epsilon)

    def attention(self, x: str, names: tuple[str, str, str, str], mask: str = "") -> str:
        """Args: names: of the query's, key's, value's and output's weights. mask: added to the scores."""
        net, each = self.net, self.width // self.heads
        split = net.numbers(0, 0, self.heads, each)

        def head(name: str, order: list[int]) -> str:
            values = net.node("Reshape", self.linear(x, name, self.width, self.width), split)
            return net.node("Transpose", values, perm=order)

        query, key, value = head(names[0], [0, 2, 1, 3]), head(names[1], [0, 2, 3, 1]), head(names[2], [0, 2, 1, 3])
        scores = net.node("Div", net.node("MatMul", query, key), net.constant(np.float32(each**0.5)))
        if mask:
            scores = net.node("Add", scores, mask)
        mixed = net.node("MatMul", net.node("Softmax", scores, axis=-1), value)
        mixed = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), net.numbers(0, 0, self.width))
        return self.linear(mixed, names[3], self.width, self.width)

    def feed_forward(self, x: str, first: str, second: str) -> str:
        """Two layers with GELU between them. Source: Hendrycks and Gimpel 2016, the exact form."""
        net, x = self.net, self.linear(x, first, self.width, self.hidden)
        error = net.node("Erf", net.node("Div", x, net.constant(np.float32(2**0.5))))
        gate = net.node("Mul", x, net.node("Add", error, net.constant(np.float32(1))))
        return self.linear(net.node("Mul", gate, net.constant(np.float32(0.5))), second, self.hidden, self.width)
