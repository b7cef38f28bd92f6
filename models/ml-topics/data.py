"""The texts of the ml-topics bundle: passages of scikit-learn's own documentation, labelled by their area.

`passages` reads the docstrings of the public classes and functions inside the installed scikit-learn package (BSD
licence, see LICENSE.scikit-learn) without importing them; `split` holds whole objects out. `read_held_out` needs
neither: it reads the held-out texts as they were when the shipped model was made.
"""

import ast
import hashlib
import inspect
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_FILE = Path(__file__).parent / "held_out.jsonl"

AREAS = {
    "clustering": ("Clustering", ("cluster", "mixture")),
    "datasets": ("Data sets", ("datasets",)),
    "decomposition": (
        "Decomposition and manifold learning",
        ("decomposition", "cross_decomposition", "manifold", "random_projection"),
    ),
    "gaussian-processes": ("Gaussian processes", ("gaussian_process",)),
    "linear-models": ("Linear models", ("linear_model",)),
    "metrics": ("Metrics", ("metrics",)),
    "model-selection": ("Model selection", ("model_selection",)),
    "preprocessing": (
        "Preprocessing and features",
        ("preprocessing", "impute", "feature_extraction", "feature_selection"),
    ),
    "trees-ensembles": ("Trees and ensembles", ("tree", "ensemble")),
}
"""Concept id → (name, the modules of scikit-learn it stands for); the order is the order of the model's outputs."""

LABELS = tuple(AREAS)

MIN_WORDS, MAX_WORDS = 8, 60
"""A passage shorter than this says too little to have a topic; a longer one is cut after a sentence."""

HELD_OUT_SHARE = 0.25

MAX_OVERLAP = 0.5
"""A held-out passage that shares more than this part of its word triples with one training passage is dropped."""

_DETAILS = {"Parameters", "Attributes"}
_SKIPPED_SECTIONS = {"Examples", "References", "See Also", "Methods", "Warns", "Yields", "Raises", "Returns"}

_POINTERS = r"User Guide|sphx_glr|Glossary"
"""A sentence that only sends the reader elsewhere, at times with the area in the address."""


class Passage(NamedTuple):
    """A few sentences about one public object, e.g. `cluster.KMeans`, and the area it belongs to.

    `part` is "description" (what the object is, how it works) or "detail" (what its parameters and methods do).
    """

    label: str
    owner: str
    part: str
    text: str


def passages() -> list[Passage]:
    """Return every passage once, sorted; a text that two areas share belongs to neither and is left out."""
    found: dict[str, set[Passage]] = defaultdict(set)
    for label, (_, modules) in AREAS.items():
        for module in modules:
            for owner, method, docstring in _docstrings(_package_root() / module):
                descriptions, details = _texts(docstring)
                for text in descriptions:
                    found[text].add(Passage(label, owner, "detail" if method else "description", text))
                for text in details:
                    found[text].add(Passage(label, owner, "detail", text))
    return sorted(min(places) for places in found.values() if len({place.label for place in places}) == 1)


def split(everything: list[Passage]) -> tuple[list[Passage], list[Passage]]:
    """Return (training, held out): a quarter of each area's objects, chosen by a hash of their names, is held out."""
    held: set[str] = set()
    for names in _ranked(everything):
        held |= set(names[: round(len(names) * HELD_OUT_SHARE)])
    return _separated(everything, held)


def folds(training: list[Passage], count: int) -> Iterator[tuple[list[Passage], list[Passage]]]:
    """Yield (training, held out) `count` times, so that each object of each area is held out once."""
    for fold in range(count):
        yield _separated(training, {name for names in _ranked(training) for name in names[fold::count]})


def _ranked(everything: list[Passage]) -> list[list[str]]:
    """Return each area's objects in the order of a hash of their names: arbitrary, and always the same."""
    owners: dict[str, set[str]] = defaultdict(set)
    for passage in everything:
        owners[passage.label].add(passage.owner)
    return [sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()) for names in owners.values()]


def _separated(everything: list[Passage], held: set[str]) -> tuple[list[Passage], list[Passage]]:
    """Return (all of the other objects' passages, the held objects' descriptions).

    An object's passages are all on one side, so the model never saw a held-out class or function. Sister objects
    (`Lasso`, `LassoCV`) share paragraphs, though: whatever mostly repeats a training passage is dropped as well.
    Details are trained on, but not held out: what `copy` or `verbose` means is the same in every area.
    """
    training = [passage for passage in everything if passage.owner not in held]
    seen: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, passage in enumerate(training):
        for triple in _triples(passage.text):
            seen[triple].add(number)
    descriptions = [passage for passage in everything if passage.owner in held and passage.part == "description"]
    return training, [passage for passage in descriptions if _overlap(passage.text, seen) <= MAX_OVERLAP]


def read_held_out() -> list[Passage]:
    """Return the held-out passages the shipped model was measured on, whatever scikit-learn is installed."""
    return [Passage(**json.loads(line)) for line in HELD_OUT_FILE.read_text(encoding="utf-8").splitlines()]


def write_held_out(held_out: list[Passage]) -> None:
    """Store the held-out passages beside the model, one JSON object a line."""
    lines = [json.dumps(passage._asdict(), ensure_ascii=False) for passage in held_out]
    HELD_OUT_FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _package_root() -> Path:
    import sklearn  # only to find its files: reading the stored held-out texts needs no scikit-learn

    return Path(sklearn.__file__).parent


def _docstrings(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Yield (object, whether it is one of its methods, docstring) for each public class and function of a module.

    Public is what some `__all__` names, and what a file defines whose own path has no underscore.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(folder.rglob("*.py"))}
    exported = set().union(*map(_exported, trees.values()))
    for file, tree in trees.items():
        path = file.relative_to(folder).parts
        if "tests" in path:
            continue
        public_file = not any(part.startswith("_") for part in path)
        for node in tree.body:
            if not _is_public(node) or not (public_file or node.name in exported):
                continue
            methods = filter(_is_public, node.body) if isinstance(node, ast.ClassDef) else ()
            for documented in [node, *methods]:
                if docstring := ast.get_docstring(documented):
                    yield f"{folder.name}.{node.name}", documented is not node, docstring


def _is_public(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")


def _exported(tree: ast.Module) -> set[str]:
    """Return the names in a module's `__all__`."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            names |= {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return names


def _texts(docstring: str) -> tuple[list[str], list[str]]:
    """Return a numpydoc docstring's (descriptions, details): its prose, and what it says about each parameter."""
    prose: list[str] = []
    details: list[str] = []
    for section, body in _sections(docstring):
        if section in _DETAILS:
            for entry in _descriptions(body):
                details += _chunks(_paragraphs(entry))
        elif section not in _SKIPPED_SECTIONS:
            prose += _paragraphs(body)
    return list(_chunks(prose)), details


def _paragraphs(text: str) -> list[str]:
    """Return the paragraphs that are sentences, not code or tables."""
    plain = map(_plain, re.split(r"\n\s*\n", _without_directives(text)))
    return [paragraph for paragraph in plain if paragraph and not re.search(r">>>|====|\|", paragraph)]


def _sections(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, body); the part before the first heading is called Summary."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}[ ]*$", docstring, flags=re.MULTILINE)
    yield "Summary", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _descriptions(body: str) -> list[str]:
    """Return the indented descriptions under the `name : type` lines of a section."""
    return [inspect.cleandoc("\n" + entry) for entry in re.split(r"^\S.*$", body, flags=re.MULTILINE)]


def _without_directives(text: str) -> str:
    """Drop `.. note::` markers, and versionadded, versionchanged, math and code blocks with their content."""
    directive = r"^([ ]*)\.\. (?!note|warning)[^\n]*(\n(\1[ ]+[^\n]*|[ ]*(?=\n\1[ ])))*"
    text = re.sub(directive, "", text, flags=re.MULTILINE)
    return re.sub(r"^[ ]*\.\. (note|warning)::", "", text, flags=re.MULTILINE)


def _plain(text: str) -> str:
    """Return a paragraph as one line without reStructuredText's marks."""
    text = re.sub(r":[\w:]+:`~?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"``?|\*\*|\[\d+\]_|::", "", text)
    return " ".join(text.split())


def _chunks(paragraphs: list[str]) -> Iterator[str]:
    """Gather sentences into passages of at most MAX_WORDS words; a longer sentence is a passage of its own."""
    piece: list[str] = []
    for sentence in (part for text in paragraphs for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)):
        if re.search(_POINTERS, sentence):
            continue
        words = sentence.split()
        if piece and len(piece) + len(words) > MAX_WORDS:
            yield from _long_enough(piece)
            piece = []
        piece += words
    yield from _long_enough(piece)


def _long_enough(words: list[str]) -> Iterator[str]:
    if len(words) >= MIN_WORDS:
        yield " ".join(words)


def _triples(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def _overlap(text: str, seen: dict[tuple[str, ...], set[int]]) -> float:
    """Return the largest part of the text's word triples that any one training passage contains."""
    triples = _triples(text)
    shared: dict[int, int] = defaultdict(int)
    for triple in triples:
        for number in seen.get(triple, ()):
            shared[number] += 1
    return max(shared.values(), default=0) / max(1, len(triples))
