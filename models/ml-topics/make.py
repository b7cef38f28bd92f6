"""Make the ml-topics bundle: train a tokenizer and a small text classifier, export them, measure, write the config.

Run it with torch 2.13.0 (CPU), scikit-learn 1.9.1 (its docstrings are the data), tokenizers 0.23.3, onnx, onnxruntime
and PyYAML installed; it takes about a minute:

    python models/ml-topics/make.py
    python models/ml-topics/make.py --cross-validate    # makes nothing: tries the recipe within the training objects

The same versions on the same kind of processor give the same bytes. The network and its training were chosen by that
cross-validation, not on the held-out texts, and the last epoch is what ships.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, one order

import data
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

BUNDLE = Path(__file__).parent
MODEL = BUNDLE / "1" / "model.onnx"
TOKENIZER = BUNDLE / "1" / "tokenizer.json"

SEED = 20
EPOCHS = 40
BATCH = 64
VOCABULARY = 4000
MAX_TOKENS = 128
PAD = 0
FOLDS = 5
WIDTH, HIDDEN = 64, 128
DETAIL_WEIGHT = 0.25
"""How much a detail counts against a description in training: there are three times as many, and they say less."""


class TopicNet(nn.Module):
    """Logits (batch, areas) for `input_ids` and `attention_mask`, int64 (batch, sequence).

    A weighted mean of token embeddings, each token's weight learned, then two layers. Tokens the mask leaves out
    weigh exactly nothing, so padding changes no answer; nor does word order.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.weight = nn.Embedding(vocabulary, 1)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.zeros_(self.weight.weight)
        self.layers = nn.Sequential(
            nn.Dropout(0.4), nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Dropout(0.4), nn.Linear(HIDDEN, len(data.LABELS))
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits; a row without any token gets those of its padding, finite all the same."""
        scores = self.weight(input_ids).squeeze(2).masked_fill(attention_mask == 0, -1e9)  # e^-1e9 is 0 in float32
        mean = (self.embedding(input_ids) * scores.softmax(1).unsqueeze(2)).sum(1)
        return self.layers(mean * 4)  # the mean of many small vectors is smaller still


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a lower-casing WordPiece tokenizer fitted to the texts; it pads and cuts nothing by itself."""
    tokenizer = _tokenizer({"[PAD]": PAD, "[UNK]": 1})
    words = [tokenizer.normalizer.normalize_str(text) for text in texts]
    letters = sorted({letter for word in words for letter in word if not letter.isspace()})
    # The trainer numbers the word-inner letters as its hash table yields them, another way each time, and breaks ties
    # by these numbers. Fixed in advance as special tokens they give one vocabulary; the tokenizer made of it has none.
    fixed = ["[PAD]", "[UNK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=fixed, min_frequency=2, show_progress=False),
    )
    return _tokenizer(tokenizer.get_vocab())


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def tokens(tokenizer: Tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return (ids, mask) for the texts, int64 (texts, longest), at most MAX_TOKENS long."""
    encoded = [encoding.ids[:MAX_TOKENS] for encoding in tokenizer.encode_batch(texts)]
    ids = torch.full((len(texts), max(map(len, encoded))), PAD)
    mask = torch.zeros_like(ids)
    for row, numbers in enumerate(encoded):
        ids[row, : len(numbers)] = torch.tensor(numbers)
        mask[row, : len(numbers)] = 1
    return ids, mask


def train(tokenizer: Tokenizer, training: list[data.Passage]) -> TopicNet:
    """Return the network fitted to the training passages, in evaluation mode.

    Each time a passage is seen, a random part of its words, half on average, is hidden: no single word may decide.
    """
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums in one order, whatever the number of cores
    ids, mask = tokens(tokenizer, [passage.text for passage in training])
    targets = torch.tensor([data.LABELS.index(passage.label) for passage in training])
    importance = torch.tensor([1.0 if passage.part == "description" else DETAIL_WEIGHT for passage in training])
    rarity = torch.bincount(targets).float().rsqrt()
    network = TopicNet(tokenizer.get_vocab_size())
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = EPOCHS * -(-len(training) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(training)).split(BATCH):
            seen = torch.rand(len(rows), ids.shape[1]) > torch.rand(len(rows), 1)
            seen[:, 0] = True
            logits = network(ids[rows], mask[rows] * seen)
            losses = F.cross_entropy(
                logits, targets[rows], weight=rarity / rarity.mean(), label_smoothing=0.1, reduction="none"
            )
            optimizer.zero_grad()
            (losses * importance[rows]).mean().backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def export(network: TopicNet) -> None:
    """Write the network as ONNX with free batch and sequence axes, and check the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # dynamo=False: the exporter whose bytes repeat
        torch.onnx.export(
            network,
            (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)),
            MODEL,
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={
                "input_ids": {0: "batch", 1: "sequence"},
                "attention_mask": {0: "batch", 1: "sequence"},
                "logits": {0: "batch"},
            },
        )
    onnx.checker.check_model(str(MODEL), full_check=True)


def measure(tokenizer: Tokenizer, held_out: list[data.Passage]) -> list[bool]:
    """Return for each held-out passage whether the written model names its area."""
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    ids, mask = tokens(tokenizer, [passage.text for passage in held_out])
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return _right(logits.argmax(1), held_out)


def cross_validate(training: list[data.Passage]) -> list[bool]:
    """Return for each description the folds hold out whether a model made without its object names its area."""
    right = []
    for others, held_out in data.folds(training, FOLDS):
        tokenizer = train_tokenizer([passage.text for passage in others])
        network = train(tokenizer, others)
        with torch.no_grad():
            logits = network(*tokens(tokenizer, [passage.text for passage in held_out]))
        right += _right(logits.argmax(1).numpy(), held_out)
    return right


def _right(best: NDArray[np.int64], held_out: list[data.Passage]) -> list[bool]:
    return [data.LABELS[index] == passage.label for index, passage in zip(best, held_out, strict=True)]


def write_config(accuracy: float, count: int) -> None:
    """Write config.yaml; the concepts stand in the order of the outputs."""
    config = {
        "model": {
            "id": "ml-topics",
            "user_id": "appliance",
            "app_id": "main",
            "model_type_id": "text-classifier",
            "name": "Machine-learning topics",
            "description": "Names the area of machine learning a few English sentences are about. "
            f"Accuracy {accuracy:.1%} on {count} held-out passages of scikit-learn's documentation.",
        },
        "concepts": [{"id": label, "name": name} for label, (name, _) in data.AREAS.items()],
        "inference_compute_info": {"cpu_limit": "1", "cpu_memory": "256Mi", "num_accelerators": 0},
        "onnx": {
            "file": "model.onnx",
            "text": {
                "tokenizer": "tokenizer.json",
                "max_tokens": MAX_TOKENS,
                "inputs": {"ids": "input_ids", "mask": "attention_mask"},
            },
            "scores": {"output": "logits", "activation": "softmax"},
        },
    }
    text = "# Written by make.py; the keys are explained in models/README.md.\n"
    text += yaml.safe_dump({"model": config.pop("model")}, sort_keys=False, width=120)
    text += yaml.safe_dump(config, sort_keys=False, width=120, default_flow_style=None)
    (BUNDLE / "config.yaml").write_text(text, encoding="utf-8")


def main() -> None:
    """Make the whole bundle and print what it is worth."""
    training, held_out = data.split(data.passages())
    if sys.argv[1:] == ["--cross-validate"]:
        right = cross_validate(training)
        print(f"accuracy over {FOLDS} folds of the training objects: {np.mean(right):.4f} of {len(right)} passages")
        return
    data.write_held_out(held_out)
    MODEL.parent.mkdir(exist_ok=True)
    tokenizer = train_tokenizer([passage.text for passage in training])
    tokenizer.save(str(TOKENIZER))
    export(train(tokenizer, training))
    right = measure(tokenizer, held_out)
    write_config(float(np.mean(right)), len(held_out))
    for label in data.LABELS:
        hits = [hit for hit, passage in zip(right, held_out, strict=True) if passage.label == label]
        seen = sum(passage.label == label for passage in training)
        print(f"{label}: {sum(hits)} of {len(hits)} held-out passages right, {seen} trained on")
    print(f"held-out accuracy: {np.mean(right):.4f} of {len(right)} passages")
    print(f"{MODEL.stat().st_size} + {TOKENIZER.stat().st_size} bytes")


if __name__ == "__main__":
    main()
