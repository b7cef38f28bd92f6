"""What the packages are made from is locked, and agrees with what the tests run with. Reads files only."""

import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
REQUIREMENTS = REPOSITORY / "requirements"
sys.path[:0] = [str(REPOSITORY / "packaging"), str(REPOSITORY / "packaging/runtime")]
try:
    import build
    import sbom
    import sources
finally:
    del sys.path[:2]


def pins(lock: str) -> dict[str, str]:
    """Names and versions in a lock file."""
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.M))


@pytest.mark.parametrize("lock", ["package", "package-build", "package-cuda13"])
def test_every_package_is_locked_by_hash(lock: str) -> None:
    """And by nothing else: no address may decide what is installed."""
    entries = build._entries((REQUIREMENTS / f"{lock}.txt").read_text())
    assert entries.keys() == pins(lock).keys()
    assert [name for name, entry in entries.items() if "--hash=sha256:" not in entry] == []
    assert "://" not in "".join(entries.values())


@pytest.mark.parametrize(("lock", "tested"), [("package", "run-cpu"), ("package-cuda13", "run-gpu")])
def test_what_is_shipped_is_what_is_tested(lock: str, tested: str) -> None:
    """The same versions as in the environment that the tests run in."""
    shipped, ours = pins(lock), pins(tested)
    assert {name: version for name, version in shipped.items() if ours.get(name, version) != version} == {}


def test_only_what_nobody_runs_is_left_out() -> None:
    """What the tests' environment has and the packages have not is named in the Makefile, one by one."""
    named = re.search(r"^NOT_SHIPPED := (.+)$", (REPOSITORY / "Makefile").read_text(), re.M)
    assert named
    assert pins("run-cpu").keys() - pins("package").keys() == set(named[1].split())
    assert pins("package").keys() - pins("run-cpu").keys() == {"systemd-python"}


def test_tools_and_what_is_shipped_agree() -> None:
    """Both locks are downloaded into one folder, so one name has one version."""
    both = pins("package").keys() & pins("package-build").keys()
    assert {name: pins("package")[name] for name in both} == {name: pins("package-build")[name] for name in both}


def test_the_payload_brings_no_driver() -> None:
    """NVIDIA's user libraries for CUDA 13, the GPU's onnxruntime, and nothing that the main package has."""
    added = pins("package-cuda13").keys() - pins("package").keys()
    assert {"onnxruntime-gpu", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-ml-py"} <= added
    assert [name for name in added if not re.match(r"nvidia-|onnxruntime-gpu$", name)] == []
    assert [name for name in added if "driver" in name] == []
    assert pins("package-cuda13")["onnxruntime-gpu"] == pins("package")["onnxruntime"]


def test_every_source_is_locked_and_its_license_known() -> None:
    """Of each source that is compiled in there is the upstream file, from a path below the archive's pool."""
    locked = sources.read_lock()
    assert {each.component for each in locked} == sources.WANTED.keys()
    assert sources.WANTED.keys() - sbom.RUNTIME_LICENSES.keys() == {"autoconf"}
    for component, wanted in sources.WANTED.items():
        files = [each for each in locked if each.component == component]
        assert len(files) == (2 if wanted.patched else 1), component
        assert len({each.version for each in files}) == 1, component
    assert [each.path for each in locked if not re.fullmatch(r"pool/[\w./~+-]+", each.path)] == []
    assert [each.name for each in locked if not re.fullmatch(r"[0-9a-f]{64}", each.sha256)] == []


def test_every_file_that_is_installed_is_there() -> None:
    """The list names files that exist, each place once, and units where only packages put them."""
    rows = build._staged_files()
    places = [place for _, place, _ in rows]
    assert len(places) == len(set(places))
    units = [place for place in places if place.endswith((".service", ".socket"))]
    assert units
    assert [place for place in units if not re.match(r"usr/lib/systemd/(system|user)/", place)] == []
    assert {place: oct(mode) for _, place, mode in rows if mode & 0o022} == {}


def test_shipped_models_are_those_of_the_repository() -> None:
    """A new bundle is not forgotten."""
    bundles = {each.parent.name for each in (REPOSITORY / "models").glob("*/config.yaml")}
    staged = {Path(place).parts[4] for source, place, _ in build._staged_files() if source.endswith("config.yaml")}
    assert staged == bundles


def test_a_missing_file_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the list and the file."""
    monkeypatch.setattr(build, "_text", lambda name: "systemd/none.service usr/lib/none.service 0644\n")
    with pytest.raises(build.BuildError, match=r"files\.txt wants systemd/none\.service"):
        build._staged_files()


def test_licenses_are_put_in_spdx_words() -> None:
    """Expressions stay expressions; sentences become names, as CycloneDX wants it."""
    assert sbom._license_entry("Apache-2.0 OR BSD-3-Clause") == {"expression": "Apache-2.0 OR BSD-3-Clause"}
    assert sbom._license_entry("NVIDIA Proprietary Software") == {"license": {"name": "NVIDIA Proprietary Software"}}
