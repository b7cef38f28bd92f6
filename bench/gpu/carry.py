"""Carries what `bench.gpu` needs to a GPU host that no network reaches, in parts as small as its way in demands.

    python -m bench.gpu.carry pack WHEELS OUT [--arch 90] [--part-mib 60] [--file PATH …]
    python3 bench/gpu/carry.py unpack PARTS TARGET

`pack` takes a folder of wheels for the host's Python; of onnxruntime-gpu, which is most of it, the CUDA provider keeps
the device code of one architecture, and TensorRT's provider and the tools are left out. `unpack` needs Python's own
library alone; parts may come one after the other: it unpacks once all are there.
"""

import argparse
import hashlib
import io
import lzma
import struct
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

_PART = "part-{:03}"
_SUM = "sha256"
_DROPPED = (
    *("onnxruntime/transformers/", "onnxruntime/tools/", "onnxruntime/quantization/", "onnxruntime/datasets/"),
    *("onnxruntime/capi/libonnxruntime_providers_tensorrt.so", "onnxruntime/capi/libonnxruntime.so."),
    *("onnxruntime/ThirdPartyNotices.txt", "onnxruntime/Privacy.md"),
)
_PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"

_CONTAINER = 0xBA55ED50
_CUBIN = 2
"""Kind of an entry that holds machine code for one architecture."""


def prune(library: bytes, arch: int) -> bytes:
    """A CUDA shared library whose device code for all other architectures is zeros, of the same length.

    Each container of its `.nv_fatbin` section begins with the magic number, a version (u16), the length of this head
    (u16) and the length of its entries (u64). An entry has its kind (u16), at 4 the length of its own head (u32), at 8
    of its body (u64), and at 28 the architecture (u32). Entries that are kept move to the front; containers that would
    have none stay as they are. The layout was read off libraries of CUDA 13 with cuobjdump beside it.
    """
    out = bytearray(library)
    start, size = _section(library, b".nv_fatbin")
    place = start
    while place + 16 <= start + size:
        magic, _, head, length = struct.unpack_from("<IHHQ", library, place)
        if magic != _CONTAINER:
            place += 8
            continue
        first, end = place + head, place + head + length
        kept = b"".join(body for kind, code, body in _entries(library, first, end) if kind == _CUBIN and code == arch)
        if kept:
            out[first:end] = kept + bytes(length - len(kept))
            struct.pack_into("<Q", out, place + 8, len(kept))
        place = end
    return bytes(out)


def _entries(library: bytes, place: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Kind, architecture, and all of each entry."""
    while place + 64 <= end:
        kind, _, head, size = struct.unpack_from("<HHIQ", library, place)
        if not head:
            return
        (arch,) = struct.unpack_from("<I", library, place + 28)
        yield kind, arch, library[place : place + head + size]
        place += head + size


def _section(library: bytes, wanted: bytes) -> tuple[int, int]:
    """Place and length of a section. Source: ELF-64 Object File Format, section headers."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    entry, count, names = struct.unpack_from("<HHH", library, 0x3A)

    def header(index: int) -> tuple[int, int, int]:
        name, offset, size = struct.unpack_from("<I20xQQ", library, table + index * entry)
        return name, offset, size

    text = header(names)[1]
    for index in range(count):
        name, offset, size = header(index)
        if library[text + name : library.index(b"\0", text + name)] == wanted:
            return offset, size
    raise ValueError(f"there is no section {wanted.decode()}")


def pack(wheels: Path, out: Path, arch: int, part_size: int, files: list[Path]) -> None:
    """Write the parts and their checksum into `out`. Args: files: more shared libraries, for `lib/`."""
    out.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**26}]
    with (
        lzma.LZMAFile(archive, "w", format=lzma.FORMAT_XZ, filters=filters) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as content:
                for entry in content.infolist():
                    if entry.is_dir() or entry.filename.startswith(_DROPPED):
                        continue
                    body = content.read(entry)
                    if entry.filename == _PROVIDER:
                        body = prune(body, arch)
                    _add(tar, entry.filename, body)
            print(f"packed: {wheel.name}", flush=True)
        for file in files:
            _add(tar, f"lib/{file.name}", file.read_bytes())
    body = archive.getvalue()
    for old in out.glob("part-*"):
        old.unlink()
    for index in range(-(-len(body) // part_size)):
        part = body[index * part_size : (index + 1) * part_size]
        (out / _PART.format(index)).write_bytes(part)
    (out / _SUM).write_text(hashlib.sha256(body).hexdigest() + "\n", encoding="ascii")
    print(f"{len(body) / 2**20:.1f} MiB in {-(-len(body) // part_size)} parts of at most {part_size / 2**20:g} MiB")


def _add(tar: tarfile.TarFile, name: str, body: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(body), 0o755
    tar.addfile(entry, io.BytesIO(body))


def unpack(parts: Path, target: Path) -> None:
    """Unpack into `target` and print what to export. Raises: SystemExit: parts are missing."""
    body = b"".join(part.read_bytes() for part in sorted(parts.glob("part-*")))
    if hashlib.sha256(body).hexdigest() != (parts / _SUM).read_text(encoding="ascii").strip():
        sys.exit("carry: the parts are not all there yet, or one is damaged")
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(body), mode="r:xz") as tar:
        tar.extractall(target, filter="data")
    # CUDA's libraries come with the host's own Python packages, where the loader does not look.
    installed = Path(sysconfig.get_path("purelib")) / "nvidia"
    folders = sorted({str(file.parent) for file in installed.glob("**/lib/*.so*")})
    print(f"export PYTHONPATH={target} LD_LIBRARY_PATH={':'.join([str(target / 'lib'), *folders])}")


def main() -> None:
    """Pack here, or unpack there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack")
    packing.add_argument("wheels", type=Path)
    packing.add_argument("out", type=Path)
    packing.add_argument("--arch", type=int, default=90, help="compute capability that is kept; 90: Hopper")
    packing.add_argument("--part-mib", type=float, default=60, help="largest part")
    packing.add_argument("--file", type=Path, action="append", default=[], help="one more shared library")
    unpacking = verbs.add_parser("unpack")
    unpacking.add_argument("parts", type=Path)
    unpacking.add_argument("target", type=Path)
    options = parser.parse_args()
    if options.verb == "pack":
        pack(options.wheels, options.out, options.arch, int(options.part_mib * 2**20), options.file)
    else:
        unpack(options.parts, options.target)


if __name__ == "__main__":
    main()
