"""The README's first command, as a newcomer runs it (its environments are made already)."""

import re
import subprocess
import sys

from support.appliance import PATIENCE_S, ROOT


def test_the_demo_classifies_real_pictures_with_the_stock_sdk() -> None:
    sdk = ROOT / ".clients" / "sdk-12" / "bin" / "python"
    done = subprocess.run(
        [sys.executable, ROOT / "demo" / "run.py", "--sdk", sdk],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    right, total = map(int, re.search(r"(\d+) of (\d+) held-out digits right", done.stdout).groups())  # type: ignore[union-attr]
    assert total == 16
    assert right >= 15
    assert "stock clarifai SDK 12.5.0" in done.stdout


def test_the_readme_names_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
