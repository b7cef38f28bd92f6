"""The packages as they are shipped. PACKAGES=FOLDER names where they lie, as dist/ after `make packages`."""

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY / "packaging"), str(REPOSITORY / "packaging/runtime")]
try:
    import build
finally:
    del sys.path[:2]

APP = "usr/lib/inference-appliance"
SITE = f"{APP}/python/lib/python3.13/site-packages"
SYSTEM_LIBRARIES = {
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1"),
    *("libgcc_s.so.1", "libstdc++.so.6", "libsystemd.so.0", "libz.so.1"),
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
"""What the packages may want of a machine; their dependencies name the packages of these."""
MODES = {
    "etc/inference-appliance/appliance.toml": "0640",
    "usr/bin/appliance": "link",
    f"{APP}/bin/appliance": "0755",
    f"{APP}/python/bin/python3.13": "0755",
    f"{APP}/appliance.toml": "0644",
    f"{APP}/share/sbom.cdx.json": "0644",
    "usr/lib/systemd/system/inference-appliance.service": "0644",
    "usr/lib/systemd/system/inference-appliance.socket": "0644",
    "usr/lib/sysusers.d/inference-appliance.conf": "0644",
    "usr/lib/tmpfiles.d/inference-appliance.conf": "0644",
}


@dataclass(frozen=True)
class Packages:
    """One version's deb and rpm, and the deb unpacked."""

    deb: Path
    rpm: Path
    tree: Path

    def files(self) -> Iterator[Path]:
        """Every file in the tree that is no link, below the tree's root."""
        for each in sorted(self.tree.rglob("*")):
            if each.is_file() and not each.is_symlink():
                yield each


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """The newest version in the folder."""
    folder = os.environ.get("PACKAGES")
    if not folder:
        pytest.skip("PACKAGES names no folder of packages; `make packages` makes dist/")
    debs = sorted(Path(folder).glob("inference-appliance_*_*.deb"), key=lambda each: each.stat().st_mtime)
    assert debs, f"no inference-appliance_*.deb in {folder}"
    version = debs[-1].name.split("_")[1]
    (rpm,) = Path(folder).glob(f"inference-appliance-{version}-1.*.rpm")
    tree = tmp_path_factory.mktemp("deb")
    run("dpkg-deb", "-x", debs[-1], tree)
    return Packages(debs[-1], rpm, tree)


def run(*command: str | Path) -> str:
    """What a program says. Raises: CalledProcessError."""
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def libraries(packages: Packages) -> Iterator[Path]:
    """Programs and shared libraries."""
    for each in packages.files():
        with each.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                yield each


@cache
def dynamic(library: Path) -> str:
    """readelf's view of what a library wants."""
    return run("readelf", "-dVW", library)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_deb_and_rpm_hold_the_same_files(packages: Packages) -> None:
    """Byte by byte, mode by mode; but for what each has of its own about itself."""
    theirs = {}
    for line in run("rpm", "-qp", "--dump", packages.rpm).splitlines():
        path, _, _, digest, mode, *_ = line.split(" ")
        if stat.S_ISREG(int(mode, 8)):
            theirs[path.lstrip("/")] = (digest, stat.S_IMODE(int(mode, 8)))
    ours = {}
    for each in packages.files():
        name = str(each.relative_to(packages.tree))
        ours[name] = (hashlib.sha256(each.read_bytes()).hexdigest(), stat.S_IMODE(each.stat().st_mode))
    only_deb = {"usr/share/doc/inference-appliance/copyright", "usr/share/doc/inference-appliance/changelog.gz"}
    only_deb |= {"usr/share/lintian/overrides/inference-appliance", "etc/logcheck/ignore.d.server/inference-appliance"}
    assert ours.keys() - theirs.keys() == only_deb
    assert theirs.keys() - ours.keys() == set()
    assert {name for name in theirs if theirs[name] != ours[name]} == set()


def test_modes_are_exact(packages: Packages) -> None:
    """A key file that everybody can read, or a program that nobody can run, is found here."""
    found = {}
    for name in MODES:
        about = (packages.tree / name).lstat()
        found[name] = "link" if stat.S_ISLNK(about.st_mode) else f"{stat.S_IMODE(about.st_mode):04o}"
    assert found == MODES


def test_everything_is_roots_and_nobody_elses_to_write(packages: Packages) -> None:
    """In the deb; owners of the rpm's folders for state come from tmpfiles."""
    wrong = []
    for line in run("dpkg-deb", "-c", packages.deb).splitlines():
        mode, owner = line.split()[:2]
        if owner != "root/root" or (mode[0] != "l" and "w" in mode[5] + mode[8]) or "s" in mode[1:].lower():
            wrong.append(line)
    assert wrong == []


def test_the_rpm_knows_what_tmpfiles_makes(packages: Packages) -> None:
    """Owners and modes agree, so that `rpm -V` finds nothing right after an installation."""
    made = {}
    for line in (packages.tree / "usr/lib/tmpfiles.d/inference-appliance.conf").read_text().splitlines():
        if line.startswith("d "):
            _, path, mode, user, group, *_ = line.split()
            made[path] = (mode, user, group)
    known = {}
    for line in run("rpm", "-qp", "--dump", packages.rpm).splitlines():
        path, _, _, _, mode, user, group, *_ = line.split(" ")
        if path in made:
            known[path] = (f"{stat.S_IMODE(int(mode, 8)):04o}", user, group)
    assert known == made
    config = run("rpm", "-qp", "--configfiles", packages.rpm).split()
    assert config == ["/etc/inference-appliance/appliance.toml"]


def test_units_lie_where_only_packages_write(packages: Packages) -> None:
    """A unit in /etc would win over every drop-in, and over the next version."""
    units = [str(each.relative_to(packages.tree)) for each in packages.tree.rglob("inference-appliance*.*")]
    units = [each for each in units if each.endswith((".service", ".socket"))]
    assert len(units) == 3
    assert [each for each in units if not each.startswith("usr/lib/systemd/")] == []
    assert not (packages.tree / "lib").exists()


def test_no_tests_headers_or_leftovers_are_shipped(packages: Packages) -> None:
    """Nor what an installer notes about the machine that it ran on."""
    shipped = [str(each.relative_to(packages.tree)) for each in packages.files()]
    unwanted = re.compile(r"/tests?/|\.(a|h|c|pyi|pyx|pxd|key|orig)$|/(RECORD|direct_url\.json|INSTALLER)$|/\.git")
    assert [each for each in shipped if unwanted.search(each)] == []


# ---- what it runs on -------------------------------------------------------------------------------------------------


def test_no_newer_glibc_is_needed_than_debian_11_has(packages: Packages) -> None:
    """Nor a newer libstdc++: GLIBC_2.31 and GLIBCXX_3.4.28 are Debian 11's."""
    limits = {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12)}
    beyond = []
    for library in libraries(packages):
        if ".libs/" in str(library) and "libgfortran" in library.name:
            continue
        wanted = dynamic(library).partition("Version needs section")[2]
        for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+) ", wanted):
            if tuple(int(part) for part in version.split(".")) > limits[name]:
                beyond.append((library.name, name, version))
    assert beyond == []


def test_only_libraries_that_are_asked_for_are_needed(packages: Packages) -> None:
    """A library is the machine's, by a dependency of the packages, or lies in the same tree."""
    shipped = {each.name for each in packages.files()}
    wanted = {}
    for library in libraries(packages):
        for name in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic(library)):
            if name not in SYSTEM_LIBRARIES and name not in shipped:
                wanted.setdefault(name, library.name)
    assert wanted == {}


def test_the_wire_has_its_library_inside(packages: Packages) -> None:
    """libnghttp2 of the machine may be old; its symbols stay inside, so that two do not meet."""
    wire = packages.tree / SITE / "appliance/wire/_h2.abi3.so"
    assert "nghttp2" not in dynamic(wire)
    assert b"nghttp2" in wire.read_bytes()
    assert "nghttp2" not in run("readelf", "-W", "--dyn-syms", wire)


def test_python_hides_what_is_linked_into_it(packages: Packages) -> None:
    """Another OpenSSL or sqlite in one of its modules must not end up with these functions."""
    symbols = run("readelf", "-W", "--dyn-syms", packages.tree / APP / "python/bin/python3.13")
    assert "PyObject_Call" in symbols
    assert (
        re.findall(r" (?:SSL_new|EVP_DigestInit_ex|sqlite3_open|XML_Parse|ffi_call|inflate|lzma_code)\b", symbols) == []
    )


def test_bytecode_is_never_compared_with_the_clock(packages: Packages) -> None:
    """Every module has bytecode, of the kind that is neither checked nor written again (PEP 552: flags 1)."""
    for each in packages.files():
        if each.suffix == ".pyc":
            assert struct.unpack("<I", each.read_bytes()[4:8]) == (1,), each
    modules = [each for each in packages.files() if each.suffix == ".py"]
    assert len(modules) > 1000
    lacking = [each for each in modules if not (each.parent / f"__pycache__/{each.stem}.cpython-313.pyc").exists()]
    assert [str(each) for each in lacking] == []


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_telemetry_is_off_before_anything_is_imported(packages: Packages) -> None:
    """onnxruntime reports usage unless told not to: the unit and the command say so, each by itself."""
    unit = (packages.tree / "usr/lib/systemd/system/inference-appliance.service").read_text()
    assert "ORT_DISABLE_TELEMETRY=1" in unit
    command = (packages.tree / APP / "bin/appliance").read_text()
    assert command.startswith(f"#!/{APP}/python/bin/python3.13 -IB\n")
    assert command.index('"ORT_DISABLE_TELEMETRY"] = "1"') < command.index("from appliance")


def test_scriptlets_are_sound(packages: Packages, tmp_path: Path) -> None:
    """Shell that parses; the service stops when the package goes, and what cannot be had again is kept, and said so."""
    run("dpkg-deb", "-e", packages.deb, tmp_path)
    for name in ("postinst", "prerm", "postrm"):
        run("sh", "-n", tmp_path / name)
    assert re.search(r"= remove \].*\n.*stop .inference-appliance\.service", (tmp_path / "prerm").read_text())
    assert "is kept; remove it with" in (tmp_path / "postrm").read_text()
    assert "restart" in (tmp_path / "postinst").read_text()
    scriptlets = run("rpm", "-qp", "--scripts", packages.rpm)
    assert "is kept; remove it with" in scriptlets
    assert "try-restart inference-appliance.service" in scriptlets
    assert "disable inference-appliance.service" in scriptlets
    # Both make the same user.
    user = (packages.tree / "usr/lib/sysusers.d/inference-appliance.conf").read_text()
    assert user.strip().splitlines()[-1] in scriptlets
    assert (tmp_path / "conffiles").read_text().split()[0] == "/etc/inference-appliance/appliance.toml"


def test_sizes_stay_below_what_was_promised(packages: Packages) -> None:
    """70 MB as fast as CI packs, 50 MB as releases are packed."""
    members = run("ar", "t", packages.deb)
    limit = 50 if "data.tar.xz" in members and os.environ.get("RELEASE") else 70
    assert packages.deb.stat().st_size < limit * 1_000_000
    assert packages.rpm.stat().st_size < 70 * 1_000_000


# ---- what it says about itself ---------------------------------------------------------------------------------------


def test_the_sbom_names_everything(packages: Packages) -> None:
    """Each package of the index that is installed, each source that was compiled in, each model; with hashes."""
    shipped = packages.tree / APP / "share/sbom.cdx.json"
    sbom = json.loads(shipped.read_text())
    beside = packages.deb.with_name(packages.deb.name.replace(".deb", ".sbom.cdx.json"))
    assert beside.read_text() == shipped.read_text()
    assert (sbom["bomFormat"], sbom["specVersion"]) == ("CycloneDX", "1.6")
    named = {each["purl"]: each for each in sbom["components"]}
    installed = {each.name.rsplit("-", 1)[0] for each in (packages.tree / SITE).glob("*.dist-info")}
    normal = {re.sub(r"[-_.]+", "-", each.split("-")[0]).lower() for each in installed} - {"inference-appliance"}
    assert {purl.split("/")[1].split("@")[0] for purl in named if purl.startswith("pkg:pypi/")} == normal
    locked = re.findall(
        r"^([a-z]\S+) \S+ ([0-9a-f]{64})", (REPOSITORY / "packaging/runtime/sources.lock").read_text(), re.M
    )
    for name, digest in locked:
        if name != "autoconf":
            (entry,) = (each for purl, each in named.items() if purl.startswith(f"pkg:deb/debian/{name}@"))
            assert digest in json.dumps(entry), name
    assert {"digits", "ml-topics"} == {
        each["name"] for each in sbom["components"] if each["type"] == "machine-learning-model"
    }
    lock = (REPOSITORY / "requirements/package.txt").read_text()
    unlocked = [
        purl
        for purl, each in named.items()
        if purl.startswith("pkg:pypi/") and each["hashes"][0]["content"] not in lock
    ]
    assert unlocked == []


def test_every_component_comes_with_its_license(packages: Packages) -> None:
    """As a text in a folder of its name, and as a line of the list."""
    licenses = packages.tree / APP / "share/licenses"
    sbom = json.loads((packages.tree / APP / "share/sbom.cdx.json").read_text())
    listed = (licenses / "THIRD-PARTY.txt").read_text()
    for each in sbom["components"]:
        assert f"{each['name']} " in listed
        assert "not stated" not in json.dumps(each["licenses"]), each["name"]
        if each["type"] == "library":
            assert any((licenses / each["name"]).glob("*")), each["name"]


def test_checksums_hold(packages: Packages) -> None:
    """SHA256SUMS names the packages that were made, and their hashes are right."""
    sums = packages.deb.with_name("SHA256SUMS")
    named = {line.split()[1] for line in sums.read_text().splitlines()}
    assert {packages.deb.name, packages.rpm.name} <= named
    subprocess.run(["sha256sum", "--check", "--quiet", sums.name], cwd=sums.parent, check=True)


def test_packing_again_gives_the_same_bytes(packages: Packages, tmp_path: Path) -> None:
    """From the tree in the cache. `make release` compares two builds of everything."""
    data = re.search(r"data\.tar\.(\w+)", run("ar", "t", packages.deb))
    assert data
    compression = {"zst": "zstd-6", "xz": "xz-9e"}[data[1]]
    version = packages.deb.name.split("_")[1]
    script = REPOSITORY / "packaging/build.py"
    options = ["packages", "--version", version, "--compression", compression, "--out", str(tmp_path)]
    run(sys.executable, script, *options)
    for one in (packages.deb, packages.rpm):
        other = tmp_path / one.name
        same = hashlib.sha256(one.read_bytes()).digest() == hashlib.sha256(other.read_bytes()).digest()
        assert same, f"{one.name} is another than what this commit's tree gives"


def test_signatures_are_made_when_asked_for(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a key of gpg's, and with a program of one's own; who has the key's public half can tell."""
    monkeypatch.setenv("GNUPGHOME", str(tmp_path / "keys"))
    (tmp_path / "keys").mkdir(mode=0o700)
    run(
        "gpg",
        "--batch",
        "--quiet",
        "--passphrase",
        "",
        "--quick-gen-key",
        "packages@example.invalid",
        "rsa3072",
        "sign",
    )
    rpm = Path(shutil.copy(packages.rpm, tmp_path))
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(rpm.read_bytes()).hexdigest()}  {rpm.name}\n")
    monkeypatch.setenv("SIGN_KEY", "packages@example.invalid")
    monkeypatch.setenv("SIGN_COMMAND", f"cp -t {tmp_path}/keys --")
    build._sign_rpm(rpm)
    build._sign_sums(sums)
    run("gpg", "--verify", tmp_path / "SHA256SUMS.asc", sums)
    assert (tmp_path / "keys/SHA256SUMS").read_text() == sums.read_text()
    (tmp_path / "public").write_text(run("gpg", "--export", "--armor"))
    database = ["--dbpath", str(tmp_path / "rpm")]
    run("rpm", *database, "--import", tmp_path / "public")
    assert "signatures OK" in run("rpm", *database, "--checksig", rpm)


# ---- what linters say ------------------------------------------------------------------------------------------------


def test_lintian_has_nothing_new_to_say(packages: Packages) -> None:
    """What it may say is in packaging/deb/lintian-overrides, with the reason beside it."""
    # lintian of Debian 12 knows no zstd; what is inside it looks through all the same.
    suppressed = [] if "data.tar.xz" in run("ar", "t", packages.deb) else ["--suppress-tags", "malformed-deb-archive"]
    command = ["lintian", "--allow-root", "--fail-on=error,warning", "--tag-display-limit=0", *suppressed]
    done = subprocess.run([*command, str(packages.deb)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_rpmlint_has_nothing_new_to_say(packages: Packages) -> None:
    """What it may say is in packaging/rpm/rpmlint.toml, with the reason beside it."""
    config = REPOSITORY / "packaging/rpm/rpmlint.toml"
    done = subprocess.run(["rpmlint", "-c", str(config), str(packages.rpm)], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if re.search(r": [EW]: ", line)]
    assert said == []
    assert done.returncode == 0, done.stdout + done.stderr
