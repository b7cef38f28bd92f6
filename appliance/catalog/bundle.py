"""The bundle format: what lies on disk, read strictly, before anything of it is loaded.

    <bundle>/config.yaml             Clarifai's own keys, and an `onnx:` section that says how to feed the graph
    <bundle>/<version>/model.onnx    one folder a version (external data inside it), labels, tokenizer.json, …

A folder without `config.yaml` (Triton's layout), a bare `model.onnx` in a folder and a bare `.onnx` file are bundles
too: `importer.py` then says what they are. Nothing outside the bundle is ever read.
"""

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.catalog.methods import MethodSection, place_of
from appliance.catalog.sections import EmbeddingOutput, ImageInput, InsidePath, Part, ScoresOutput, TextInput
from appliance.core.config import DEVICE_PATTERN, Name, said
from appliance.core.errors import BundleInvalid
from appliance.core.files import printable
from appliance.core.types import NAME_PATTERN, Concept, ModelKey

CONFIG_FILE = "config.yaml"
CHECKSUM_FILE = "SHA256SUMS"
_CHECKSUM_LINE = re.compile(r"(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
LABEL_FILES = ("labels.txt", "classes.txt", "class_names.txt", "synset.txt", "coco.names")
CLARIFAI_KEYS = frozenset(
    {
        "model",
        "concepts",
        "inference_compute_info",
        "compute",
        "build_info",
        "checkpoints",
        "num_threads",
        "secrets",
        "toolkit",
        "streaming_video_consumer",
    }
)
"""Top-level keys of Clarifai's own config.yaml (PROTOCOL 4.6); we read the first three and let the others be."""

REPLACED = ".replaced-"
"""Beginning of a hidden folder's name: a version that `models add --replace` has set aside; see changes.py."""

MAX_CONFIG_BYTES = 2**20
MAX_TEXT_BYTES = 16 * 2**20
"""Largest text file that is read of a bundle; a tokenizer.json or a list of labels is a tenth of it at most."""
MAX_ALIASES = 20
"""YAML aliases in one config.yaml: each level of them may multiply what comes out ("billion laughs")."""

_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_LABEL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\ud800-\udfff]")
"""What no text may hold, as no reply, page or terminal could show it: lone surrogates, and control characters except
tabs and ends of lines; a name or a concept is one line."""


class Batching(Part):
    """Overrides of what would be measured; `threads` of what the engine is configured to use for one run."""

    max_rows: Annotated[int, Field(ge=1, le=1024)] | None = None
    parallel: Annotated[int, Field(ge=1, le=256)] | None = None
    threads: Annotated[int, Field(ge=1, le=256)] | None = None


class OnnxSection(Part):
    """The `onnx:` section of config.yaml."""

    file: InsidePath = "model.onnx"
    device: Annotated[str, Field(pattern=DEVICE_PATTERN)] | None = None
    precision: Literal["fp32", "fp16"] = "fp32"
    tf32: bool = False
    cuda_graphs: bool | None = None
    plan: Literal["wrapped", "raw"] = "wrapped"
    image: ImageInput | None = None
    text: TextInput | None = None
    scores: ScoresOutput | None = None
    embedding: EmbeddingOutput | None = None
    methods: tuple[MethodSection, ...] = ()
    batching: Batching = Batching()

    @model_validator(mode="after")
    def _check(self) -> "OnnxSection":
        if self.image and self.text:
            raise ValueError("image and text cannot both be given")
        if self.scores and self.embedding:
            raise ValueError("scores and embedding cannot both be given")
        if (self.scores or self.embedding) and not (self.image or self.text):
            raise ValueError("scores or embedding need an image or text input beside them")
        if self.embedding and self.embedding.pooling != "none" and not self.text:
            raise ValueError("pooling is for text models")
        if self.embedding and self.embedding.pooling != "none" and self.plan == "raw":
            raise ValueError('pooling is done in the graph: plan must be "wrapped"')
        names = [method.name for method in self.methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"methods: {', '.join(twice)} is declared twice")
        return self


class ModelSection(BaseModel):
    """The `model:` section; Clarifai's key names. Keys we do not use are let be.

    `inference_compute_info` stands beside the section in the file, and is put in here for the importer.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: Name
    user_id: Name | None = None
    app_id: Name | None = None
    model_type_id: str | None = None
    name: str = ""
    description: str = ""
    inference_compute_info: dict[str, Any] = {}


class _ConceptEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    id: Annotated[str, Field(min_length=1)]
    name: str = ""


class _BundleFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    model: ModelSection
    concepts: tuple[_ConceptEntry, ...] = ()
    inference_compute_info: dict[str, Any] = {}
    onnx: OnnxSection | None = None


TASK_OF_TYPE = {
    "visual-classifier": ("image", "scores"),
    "visual-embedder": ("image", "embedding"),
    "text-classifier": ("text", "scores"),
    "text-embedder": ("text", "embedding"),
}
"""Model types with a task of their own → the `onnx:` keys they need; every other type is served as raw tensors."""

RAW_TYPE = "tensor-to-tensor"
"""Our model type for graphs that are served as they are: arrays in, arrays out."""


@dataclass(frozen=True, slots=True)
class BundleConfig:
    """What a bundle says of itself, complete and checked.

    Attributes:
        sentence: how the importer understood a bundle without an `onnx:` section, else "".
    """

    key: ModelKey
    model_type_id: str
    name: str
    description: str
    concepts: tuple[Concept, ...]
    compute: dict[str, Any]
    onnx: OnnxSection
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class VersionFolder:
    """One version on disk.

    Attributes:
        id: the folder's name; "1" for a bare file.
        path: the folder that files of this version lie in.
        model_file: the ONNX file.
        bare: whether that file is all there is: a lone `.onnx` among others.
    """

    id: str
    path: Path
    model_file: Path
    bare: bool = False


def read_config(
    bundle: Path, user_id: str, app_id: str
) -> tuple[BundleConfig | None, ModelSection | None, tuple[Concept, ...]]:
    """Read `config.yaml` of a bundle.

    Args:    user_id, app_id: owner when the file names none.
    Returns: the complete config; or None, the model section and concepts, when the importer must look at the graph.
    Raises:  BundleInvalid: every problem of the file at once.
    """
    _check_name(bundle)
    if bundle.exists() and not (bundle.is_dir() or bundle.is_file()):
        raise BundleInvalid(f"{bundle} {_WHY_NO_FILE}")
    check_links(bundle)
    path = bundle / CONFIG_FILE
    if not path.is_file():
        return None, None, ()
    raw = read_yaml(path)
    unreadable = list(unshowable(raw))
    if unreadable:
        raise BundleInvalid(f"{path} has problems: {'; '.join(unreadable[:20])}.")
    unknown = sorted(str(key) for key in raw if key not in CLARIFAI_KEYS and key != "onnx")
    problems = [f"{key}: is not a key we know" for key in unknown]
    try:
        file = _BundleFile.model_validate(raw)
    except ValidationError as error:
        problems += [f"{_place(entry['loc'], raw)}: {said(entry)}" for entry in error.errors()]
        raise BundleInvalid(f"{path} has problems: {'; '.join(problems)}.") from error
    concepts = tuple(Concept(entry.id, entry.name or entry.id) for entry in file.concepts)
    if _NO_LABEL.search(file.model.name):
        problems.append(f"model.name: {_WHY_NO_LABEL}")
    problems += _concept_problems(concepts)
    problems += _duplicates(concepts)
    if file.onnx is not None:
        problems += _type_problems(file.model.model_type_id, file.onnx)
    if problems:
        raise BundleInvalid(f"{path} has problems: {'; '.join(problems)}.")
    if file.onnx is None:
        return None, file.model.model_copy(update={"inference_compute_info": file.inference_compute_info}), concepts
    model = file.model
    config = BundleConfig(
        key=ModelKey(model.user_id or user_id, model.app_id or app_id, model.id),
        model_type_id=model.model_type_id if model.model_type_id in TASK_OF_TYPE else RAW_TYPE,
        name=model.name or model.id,
        description=model.description,
        concepts=concepts,
        compute=file.inference_compute_info,
        onnx=file.onnx,
    )
    return config, model, concepts


def _place(loc: tuple[str | int, ...], raw: dict[str, Any]) -> str:
    return place_of(loc, raw) if loc[:2] == ("onnx", "methods") else ".".join(map(str, loc))


class _Loader(yaml.SafeLoader):
    """Plain data only, and a bounded number of aliases."""

    _aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"it has more than {MAX_ALIASES} aliases; write the values out")
        return super().compose_node(parent, index)


def read_yaml(
    path: Path, section: str = "`model:` section; see models/README.md", remedy: str = "put labels into a labels.txt"
) -> dict[str, Any]:
    """A small YAML file, plain data only.

    Args:    section: what it must have at least. remedy: what helps when it is too large.
    Raises:  BundleInvalid: it cannot be read, is too large, no YAML or no mapping.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BundleInvalid(f"{path} is over {MAX_CONFIG_BYTES} bytes; {remedy}.")
        raw = yaml.load(read_text(path, MAX_CONFIG_BYTES), _Loader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: a date like 2024-99-99. RecursionError: thousands of brackets.
        raise BundleInvalid(f"{path} is not YAML: {' '.join(str(error).split())}. Mend that line.") from error
    except OSError as error:
        raise BundleInvalid(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(raw, dict):
        raise BundleInvalid(f"{path} must be a mapping with a {section}.")
    return raw


_WHY_NO_TEXT = "holds a control character or half of a surrogate pair; take it out"
_WHY_NO_LABEL = "holds a line end, a control character or half of a surrogate pair; take it out"


def unshowable(raw: object) -> Iterator[str]:
    """A problem for every key or text of a YAML document that nothing could show, with the place of it."""
    seen: set[int] = set()  # an alias may lead to what was seen, even in a circle
    waiting: list[tuple[str, object]] = [("", raw)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            if _NO_TEXT.search(value):
                yield f"{place}: {_WHY_NO_TEXT}"
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
            for key, inner in reversed(pairs):
                inside = f"{place}.{printable(key)}".removeprefix(".")
                if isinstance(key, str) and _NO_TEXT.search(key):
                    yield f"{inside}: this key {_WHY_NO_TEXT}"
                waiting.append((inside, inner))


def _concept_problems(concepts: tuple[Concept, ...]) -> list[str]:
    return [
        f"concepts.{index}: {_WHY_NO_LABEL}"
        for index, concept in enumerate(concepts)
        if _NO_LABEL.search(concept.id) or _NO_LABEL.search(concept.name)
    ]


def check_labels(concepts: tuple[Concept, ...], path: Path, key: str) -> tuple[Concept, ...]:
    """The concepts that a file says there are. Raises: BundleInvalid: one of them could not be shown; names it."""
    for index, concept in enumerate(concepts):
        if _NO_LABEL.search(concept.name):
            raise BundleInvalid(f"{path}: {key}{index} {_WHY_NO_LABEL}.")
    return concepts


def _type_problems(model_type_id: str | None, onnx: OnnxSection) -> list[str]:
    needed = TASK_OF_TYPE.get(model_type_id or "")
    if needed is None:
        if onnx.scores or onnx.embedding or onnx.image or onnx.text:
            known = ", ".join(TASK_OF_TYPE)
            return [
                f"model.model_type_id: is {model_type_id!r}; an onnx section with image or text needs one of {known}"
            ]
        return []
    return [f"onnx.{key}: is needed by model type {model_type_id}" for key in needed if getattr(onnx, key) is None]


def _duplicates(concepts: tuple[Concept, ...]) -> list[str]:
    ids = [concept.id for concept in concepts]
    return [f"concepts: id {name!r} is listed twice" for name in sorted({i for i in ids if ids.count(i) > 1})]


def concepts_of(config: BundleConfig, version: VersionFolder) -> tuple[Concept, ...]:
    """The model's concepts in output order: from the config, else from a labels file, else none."""
    if config.concepts:
        return config.concepts
    for folder in () if version.bare else (version.path, version.path.parent):
        for name in LABEL_FILES:
            if (folder / name).is_file():
                text = read_text(folder / name)
                bad = _NO_TEXT.search(text)
                if bad:
                    line = text.count("\n", 0, bad.start()) + 1
                    raise BundleInvalid(f"{folder / name}: line {line} {_WHY_NO_TEXT}.")
                labels = (line.strip() for line in text.splitlines())
                return tuple(Concept(label, label) for label in labels if label)
    return ()


def graph_file(config: BundleConfig | None) -> str:
    """The name of the ONNX file in each version's folder; `model.onnx` where no config says otherwise."""
    return config.onnx.file if config else "model.onnx"


def find_versions(bundle: Path, file: str = "model.onnx") -> list[VersionFolder]:
    """The versions that lie in a bundle, in no particular order.

    Raises: BundleInvalid: there is none.
    """
    if bundle.is_file():
        return [VersionFolder("1", bundle.parent, bundle, bare=True)]
    found = []
    for folder in sorted(bundle.iterdir()):
        if not folder.is_dir() or not NAME_PATTERN.fullmatch(folder.name):
            continue
        for candidate in (file, f"checkpoints/{file}"):
            if (folder / candidate).is_file():
                found.append(VersionFolder(folder.name, folder, folder / candidate))
                break
    if not found and (bundle / file).is_file():
        found = [VersionFolder("1", bundle, bundle / file)]
    if not found:
        raise BundleInvalid(f"{bundle} holds no <version>/{file}; see models/README.md for the layout.")
    return found


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A text file of a bundle. Raises: BundleInvalid: see `read_bytes`; or it is not UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleInvalid(f"{printable(path)} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error


def read_bytes(path: Path, limit: int = MAX_TEXT_BYTES) -> bytes:
    """The bytes of a small file of a bundle; never waits for a pipe, nor for a device.

    Raises: BundleInvalid: it cannot be read, is no regular file, or has more than `limit` bytes.
    """
    shown = printable(path)
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BundleInvalid(f"{shown} {_WHY_NO_FILE}")
            content = file.read(limit + 1)
    except OSError as error:
        why = _WHY_NO_FILE if error.errno in (errno.ENXIO, errno.EISDIR) else f"cannot be read: {error.strerror}."
        raise BundleInvalid(f"{shown} {why}") from error
    if len(content) > limit:
        raise BundleInvalid(f"{shown} is over {limit} bytes; no bundle needs that.")
    return content


_WHY_NO_FILE = "is not a regular file; put the file itself there, or take it away."


def _check_name(bundle: Path) -> None:
    """Raises: BundleInvalid: a folder or file of that name cannot be a bundle."""
    name = bundle.stem if bundle.is_file() else bundle.name
    if not NAME_PATTERN.fullmatch(name):
        raise BundleInvalid(
            f"{printable(bundle)} cannot be a bundle's name; use letters, digits and . _ - inside, at most 64 of them."
        )


def check_links(bundle: Path) -> None:
    """See that what lies in a bundle can be named and read, and that no link leads out of it.

    Raises: BundleInvalid: names the first whose name is not printable UTF-8, that leads out, or that is no file.
    """
    if not bundle.is_dir():
        return
    root = bundle.resolve()
    for folder, folders, files in os.walk(bundle):
        for name in [*folders, *files]:
            path = Path(folder, name)
            if _NO_LABEL.search(name):
                raise BundleInvalid(f"{printable(path)}: the file's name is not printable UTF-8; rename it.")
            if path.is_symlink() and not _real(path).is_relative_to(root):
                raise BundleInvalid(
                    f"{path} leads out of the bundle {bundle}; everything a bundle needs must lie inside it."
                )
            if name in files and not _is_regular(path):
                raise BundleInvalid(f"{path} {_WHY_NO_FILE}")


def _is_regular(path: Path) -> bool:
    """Whether it is a regular file, or not there: a link to nowhere, removed meanwhile."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return path


def check_inside(bundle: Path, path: Path) -> Path:
    """`path` with links resolved. Raises: BundleInvalid: it leads out of the bundle, or there is no such file."""
    root = (bundle if bundle.is_dir() else bundle.parent).resolve()
    real = _real(path)
    if not real.is_relative_to(root):
        raise BundleInvalid(f"{path} leads out of the bundle {bundle}; everything a bundle needs must lie inside it.")
    if not real.is_file():
        why = _WHY_NO_FILE if real.exists() else "is missing; put it there or mend the config."
        raise BundleInvalid(f"{printable(path)} {why}")
    return real


def signature(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What a file tree looks like from outside: (relative path, size, mtime in ns, inode and rights) of every file.

    Two equal signatures some seconds apart mean that nobody is writing there. Rights are part of it so that a bundle
    that could not be read is tried again once they are mended.
    """
    if path.is_file():
        found = path.stat()
        return ((path.name, found.st_size, found.st_mtime_ns, _identity(found)),)
    entries = []
    for folder, folders, files in os.walk(path):
        # A version set aside while another takes its place is not part of the bundle any more.
        folders[:] = [name for name in folders if not name.startswith(REPLACED)]
        for name in files:
            file = Path(folder, name)
            try:
                found = file.stat()
            except OSError:
                continue  # a link to nowhere, or removed meanwhile: the next look tells
            entries.append((str(file.relative_to(path)), found.st_size, found.st_mtime_ns, _identity(found)))
    return tuple(sorted(entries))


def _identity(found: os.stat_result) -> int:
    return hash((found.st_ino, found.st_mode, found.st_uid, found.st_gid))


def checksums(version: VersionFolder) -> dict[str, str]:
    """SHA-256 of every file of a version by relative path; the checksum file itself is left out."""
    if version.bare:
        return {version.model_file.name: _sha256(version.model_file)}
    files = sorted(path for path in version.path.rglob("*") if path.is_file() and path.name != CHECKSUM_FILE)
    return {str(path.relative_to(version.path)): _sha256(path) for path in files}


def verify_checksums(version: VersionFolder) -> dict[str, str]:
    """Compute the checksums, and hold them against the version's SHA256SUMS when there is one.

    Raises: BundleInvalid: a file differs or is missing; names it.
    """
    actual = checksums(version)
    listing = version.path / CHECKSUM_FILE
    if version.bare or not listing.is_file():
        return actual
    for line in read_text(listing).splitlines():
        if not line.strip():
            continue
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise BundleInvalid(f"{listing} is not written by sha256sum: {line[:100]!r}; write it again.")
        name = match["name"].removeprefix("./")
        if actual.get(name) != match["digest"].lower():
            state = "differs from" if name in actual else "is missing, but listed in"
            raise BundleInvalid(f"{version.path / name} {state} {listing}; put the original back or add it again.")
    return actual


def write_checksums(version: VersionFolder) -> None:
    """Write the version's SHA256SUMS, in the format of `sha256sum`."""
    lines = [f"{digest}  {name}\n" for name, digest in checksums(version).items()]
    (version.path / CHECKSUM_FILE).write_text("".join(lines), encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_yaml(config: BundleConfig, before: Path | None = None) -> str:
    """The explicit `config.yaml` for this config, which an operator can freeze into the bundle.

    Args:    before: the file it takes the place of; keys of it that we do not read are kept.
    Raises:  BundleInvalid: that file cannot be read.
    """
    kept = read_yaml(before) if before and before.is_file() else {}
    content: dict[str, Any] = {
        "model": {
            "id": config.key.model_id,
            "user_id": config.key.user_id,
            "app_id": config.key.app_id,
            "model_type_id": config.model_type_id,
            "name": config.name,
        },
        "concepts": [{"id": concept.id, "name": concept.name} for concept in config.concepts],
        "onnx": config.onnx.model_dump(mode="json", exclude_none=True),
    }
    if config.description:
        content["model"]["description"] = config.description
    if not config.concepts:
        del content["concepts"]
    if config.compute:
        content["inference_compute_info"] = config.compute
    content = {**kept, **content, "model": {**kept.get("model", {}), **content["model"]}}
    header = f"# {config.sentence}\n" if config.sentence else ""
    return header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
