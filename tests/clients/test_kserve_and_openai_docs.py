"""The examples of docs/kserve-and-openai.md, run as they stand there but for address, key, root and model names."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import graphs
from support.appliance import PATIENCE_S, ROOT, Appliance, Pki

pytestmark = pytest.mark.clients

PAGE = ROOT / "docs" / "kserve-and-openai.md"
EXAMPLES = re.findall(r"```\w+\n# (.*?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
EXPECTED = {
    "triton: gRPC": "[[4. 6.]]",
    "triton: HTTP": "[b'c-good']",
    "curl": '"data":[4.0,6.0]',
    "openai": "2 ",
}


@pytest.fixture(scope="module")
def transport() -> str:
    """grpcio serves no HTTP."""
    return "native"


@pytest.fixture(scope="module")
def appliance(tmp_path_factory: pytest.TempPathFactory, pki: Pki, transport: str) -> Iterator[Appliance]:
    """A running one with the models that the page names."""
    made = Appliance(tmp_path_factory.mktemp("docs"), pki, transport=transport)
    graphs.write_raw(made.models / "pair", graphs.two_in_two_out_model())
    graphs.write_text_classifier(made.models / "topic", max_tokens=16)
    graphs.write_text_embedder(made.models / "sentence")
    made.key = made.new_key()
    with made:
        yield made


def test_the_page_has_an_example_of_each() -> None:
    """And no other."""
    assert [name for name, _ in EXAMPLES] == list(EXPECTED)


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_example_does_what_it_says(name: str, code: str, appliance: Appliance, pki: Pki, tmp_path: Path) -> None:
    """In the client's own environment."""
    for written, meant in (
        ("appliance.example.com:8443", f"localhost:{appliance.port()}"),
        ("/etc/inference-appliance/tls/ca.crt", str(pki.ca)),
        ("YOUR_PAT", appliance.key),
        ("acme/lab", f"{graphs.USER}/{graphs.APP}"),
    ):
        code = code.replace(written, meant)
    script = tmp_path / "example"
    script.write_text(code, encoding="utf-8")
    environment = name.partition(":")[0]
    program = "sh" if environment == "curl" else ROOT / ".clients" / environment / "bin" / "python"
    done = subprocess.run([program, script], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
