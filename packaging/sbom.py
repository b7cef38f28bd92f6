"""What the packages are made of, in CycloneDX's form, and the licenses of all of it.

Written by hand, as the tools for it look at an environment of packages: they know neither the sources that we compile
nor the libraries that wheels bring along. https://cyclonedx.org/docs/1.6/json/
"""

import email.parser
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sources

RUNTIME_LICENSES = {
    "bzip2": "bzip2-1.0.6",
    "expat": "MIT",
    "libffi": "MIT",
    "nghttp2": "MIT",
    "openssl": "Apache-2.0",
    "python3.13": "PSF-2.0",
    "sqlite3": "blessing",
    "xz-utils": "0BSD",
    "zlib": "Zlib",
}
"""SPDX's names; the texts are taken from the sources. What is missing here is a tool and not shipped."""

_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "LGPLv2+": "LGPL-2.1-or-later",
    "MIT License": "MIT",
}
"""SPDX's names of what packages call their licenses."""

_KNOWN_TEXTS = (
    ("Apache License", "Version 2.0", "Apache-2.0"),
    ("Permission is hereby granted, free of charge", "", "MIT"),
    ("Redistribution and use in source and binary forms", "Neither the name", "BSD-3-Clause"),
    ("Redistribution and use in source and binary forms", "", "BSD-2-Clause"),
)
"""Two phrases of a license's text and its SPDX name: for packages that ship the text and name nothing."""


@dataclass(frozen=True)
class Component:
    """One thing that is shipped."""

    kind: str
    """CycloneDX's type: library, machine-learning-model."""
    name: str
    version: str
    license: str
    """SPDX's expression where there is one, else the component's own words."""
    purl: str
    hashes: dict[str, str] = field(default_factory=dict)
    """Name of the file that it came in, and its SHA-256."""
    patches: tuple[str, ...] = ()
    """Debian's changes that were applied."""
    inside: tuple[tuple[str, str], ...] = ()
    """Libraries that it brings along: file names and SHA-256."""
    sboms: tuple[str, ...] = ()
    """SBOMs that it ships of what it was compiled from (PEP 770), by their place in the package."""
    license_files: tuple[Path, ...] = ()


def of_sources(patches: Path) -> list[Component]:
    """What the runtime was compiled from. Args: patches: a file a component, the names of its patches."""
    found: dict[str, list[sources.Source]] = {}
    for each in sources.read_lock():
        if each.component in RUNTIME_LICENSES:
            found.setdefault(each.component, []).append(each)
    missing = RUNTIME_LICENSES.keys() - found.keys()
    assert not missing, f"sources.lock lacks {missing}"
    components = []
    for name, files in sorted(found.items()):
        listed = patches / name
        applied = tuple(line.split()[0] for line in listed.read_text().splitlines()) if listed.exists() else ()
        version = files[0].version
        purl = f"pkg:deb/debian/{name}@{version.replace('+', '%2B')}?arch=source"
        hashes = {each.name: each.sha256 for each in files}
        components.append(Component("library", name, version, RUNTIME_LICENSES[name], purl, hashes, applied))
    return components


def of_packages(site: Path, wheels: Path, own_name: str) -> list[Component]:
    """What of the index is installed in a folder; our own package aside. Args: wheels: the files it came in."""
    came_in = {_normal(each.name.split("-")[0]): each for each in wheels.iterdir() if each.suffix == ".whl"}
    came_in |= {_normal(each.name.rsplit("-", 1)[0]): each for each in wheels.glob("*.tar.gz")}
    components = []
    for about in sorted(site.glob("*.dist-info")):
        metadata = email.parser.HeaderParser().parsestr((about / "METADATA").read_text(errors="replace"))
        name, version = metadata["Name"], metadata["Version"]
        if _normal(name) == own_name:
            continue
        file = came_in[_normal(name)]
        texts = tuple(sorted(_license_files(about, site / _normal(name).replace("-", "_"))))
        components.append(
            Component(
                "library",
                name,
                version,
                _license_of(metadata, texts),
                f"pkg:pypi/{_normal(name)}@{version}",
                {file.name: sources.sha256(file)},
                inside=tuple(_brought_along(site, name)),
                sboms=tuple(sorted(f"{about.name}/sboms/{each.name}" for each in about.glob("sboms/*"))),
                license_files=texts,
            )
        )
    return components


def of_models(folder: Path) -> list[Component]:
    """The shipped bundles."""
    components = []
    for graph in sorted(folder.glob("*/*/model.onnx")):
        bundle, version = graph.parent.parent, graph.parent.name
        components.append(
            Component(
                "machine-learning-model",
                bundle.name,
                version,
                "LicenseRef-inference-appliance",
                f"pkg:generic/{bundle.name}@{version}",
                {f"{version}/model.onnx": sources.sha256(graph)},
                license_files=tuple(sorted(bundle.glob("LICENSE*"))),
            )
        )
    return components


def collect_licenses(components: list[Component], folder: Path, apache: Path | None = None) -> None:
    """Copy license files into a folder a component, and list all components in THIRD-PARTY.txt.

    Args: apache: the text of Apache-2.0."""
    for component in components:
        files = component.license_files
        if apache and not files and component.license == "Apache-2.0" and component.purl.startswith("pkg:pypi/"):
            # Shipped without its text, which is the same for all.
            files = (apache,)
        for file in files:
            target = folder / component.name / file.name
            while target.exists():  # two of one name, in different folders of the package
                target = target.with_name(f"{target.name}.more")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{each.name:32} {each.version:28} {each.license}" for each in components]
    head = "What this package is made of. License texts are in folders beside this file.\n\n"
    (folder / "THIRD-PARTY.txt").write_text(head + "\n".join(rows) + "\n")
    for each in [folder, *folder.rglob("*")]:
        each.chmod(0o755 if each.is_dir() else 0o644)


def document(name: str, version: str, architecture: str, epoch: int, components: list[Component]) -> str:
    """The SBOM as JSON; the same for the same components. Args: epoch: seconds since 1970."""
    main = f"pkg:generic/{name}@{version}?arch={architecture}"
    body: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch)),
            "component": {"type": "application", "bom-ref": main, "name": name, "version": version, "purl": main},
        },
        "components": [_entry(each) for each in components],
        "dependencies": [{"ref": main, "dependsOn": sorted(each.purl for each in components)}],
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    body["serialNumber"] = f"urn:uuid:{uuid.UUID(bytes=digest[:16], version=4)}"
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _entry(component: Component) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": component.kind,
        "bom-ref": component.purl,
        "name": component.name,
        "version": component.version,
        "purl": component.purl,
        "licenses": [_license_entry(component.license)],
    }
    (first, digest), *others = component.hashes.items()
    entry["hashes"] = [{"alg": "SHA-256", "content": digest}]
    entry["properties"] = [{"name": "inference-appliance:file", "value": first}]
    entry["properties"] += [{"name": f"inference-appliance:sha256:{file}", "value": value} for file, value in others]
    entry["properties"] += [{"name": "inference-appliance:sbom", "value": each} for each in component.sboms]
    if component.patches:
        entry["pedigree"] = {
            "patches": [{"type": "backport", "diff": {"text": {"content": each}}} for each in component.patches]
        }
    if component.inside:
        entry["components"] = [
            {"type": "file", "name": file, "hashes": [{"alg": "SHA-256", "content": value}]}
            for file, value in component.inside
        ]
    return entry


def _license_entry(text: str) -> dict[str, Any]:
    # An expression of SPDX has no blanks but around its operators.
    words = re.split(r" (?:AND|OR|WITH) ", text.replace("(", "").replace(")", ""))
    if all(re.fullmatch(r"[A-Za-z0-9.+-]+", word) for word in words):
        return {"expression": text}
    return {"license": {"name": text}}


def _license_of(metadata: Any, texts: tuple[Path, ...]) -> str:
    """A package's license: what its metadata says, else what its text is."""
    said = _stated_license(metadata, texts)
    return _SPDX.get(said, said)


def _stated_license(metadata: Any, texts: tuple[Path, ...]) -> str:
    if metadata["License-Expression"]:
        return str(metadata["License-Expression"])
    stated = (metadata["License"] or "").strip()
    if stated and "\n" not in stated and len(stated) < 80 and stated != "UNKNOWN":
        return stated
    classified = [
        line.rsplit(" :: ", 1)[1] for line in metadata.get_all("Classifier", []) if line.startswith("License :: OSI")
    ]
    if classified:
        return " AND ".join(sorted(classified))
    for file in texts:
        text = file.read_text(errors="replace")
        for one, other, name in _KNOWN_TEXTS:
            if one in text and other in text:
                return name
    return "see its license file" if texts else "not stated"


def _license_files(about: Path, package: Path) -> Iterator[Path]:
    """License texts beside a package's metadata, or in the package itself."""
    names = re.compile(r"(LICEN[SC]E|COPYING|NOTICE|AUTHORS|THIRD.?PARTY|Privacy)", re.I)
    if package.is_dir():
        yield from (each for each in package.iterdir() if each.is_file() and names.match(each.name))
    for each in about.rglob("*"):
        if each.is_file() and (names.match(each.name) or "licenses" in each.relative_to(about).parts[:-1]):
            yield each


def _brought_along(site: Path, name: str) -> Iterator[tuple[str, str]]:
    """Libraries beside a package that auditwheel put there."""
    for each in sorted((site / f"{name.replace('-', '_').lower()}.libs").glob("*.so*")):
        yield each.name, sources.sha256(each)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
