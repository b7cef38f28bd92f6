"""The README's commands and snippet, word for word, on the default paths and the default port.

In namespaces of their own (mounts and network), so that nothing of this machine is touched.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.appliance import COMMAND, PATIENCE_S, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")

PRIVATE = """
set -eu
mount --make-rprivate /
ip link set lo up
mount -t tmpfs scratch "$SCRATCH"
for place in etc var/lib run; do
  mkdir -p "$SCRATCH/$place/upper" "$SCRATCH/$place/work"
  mount -t overlay overlay -o "lowerdir=/$place,upperdir=$SCRATCH/$place/upper,workdir=$SCRATCH/$place/work" "/$place"
done
"""

RUN = """
{set_up}
export CLARIFAI_PAT=$(awk '/^key/ {{print $2}}' "$SCRATCH/said")
{serve} & daemon=$!
trap 'kill $daemon; wait $daemon' EXIT
for _ in $(seq 600); do
  python3 -c 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:9464/readyz")' 2>/dev/null && break
  kill -0 $daemon
  sleep 0.1
done
cat > "$SCRATCH/snippet.py"
"$SDK" "$SCRATCH/snippet.py"
"""


def blocks(language: str) -> list[str]:
    """The README's code blocks in that language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts and network namespaces need root")
def test_the_commands_and_the_snippet_work_as_they_stand(tmp_path: Path) -> None:
    if shutil.which("ip") is None or subprocess.run(["unshare", "-mn", "true"], check=False).returncode:
        pytest.skip("no namespaces can be made here (unshare, iproute2)")
    commands = next(block for block in blocks("console") if "appliance serve" in block).strip().splitlines()
    assert commands[-1] == "appliance serve"
    set_up = "\n".join(f'{{ {command}; }} >> "$SCRATCH/said"' for command in commands[:-1])
    script = PRIVATE + RUN.format(set_up=set_up, serve=commands[-1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("APPLIANCE_", "CLARIFAI_"))},
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
        "SCRATCH": str(tmp_path),
        "SDK": str(ROOT / ".clients" / "sdk-12" / "bin" / "python"),
    }
    done = subprocess.run(
        ["unshare", "-mn", "bash", "-c", script],
        cwd=ROOT,
        env=environment,
        input=blocks("python")[0],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "two"
