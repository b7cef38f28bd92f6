"""`appliance check`: everything that can be wrong, told without serving, and nothing written."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from support import graphs
from support.command import Command

from appliance.api.keys import create_key
from appliance.pki.files import Layout
from appliance.pki.revocation import sign_list
from appliance.pki.root import load_root


@pytest.fixture
def ready(appliance: Command) -> Command:
    """An appliance with certificates, a key and one good bundle, on the CPU."""
    tls = appliance.folder / "tls"
    appliance.good("certs", "init", "--dir", tls)
    appliance.good("certs", "issue", "server", "--san", "localhost", "--dir", tls)
    appliance.file.write_text(
        appliance.file.read_text()
        + f'[tls]\ncertificate = "{tls}/server.crt"\nkey = "{tls}/server.key"\nclient_ca = "{tls}/ca.crt"\n'
        + '[engine]\ndevice = "cpu"\nthreads = 1\n'
    )
    create_key(appliance.keys, "default", "")
    graphs.write_raw(appliance.root / "net")
    return appliance


def lines(output: str) -> dict[str, tuple[str, str]]:
    """What → (state, text) of a report; bundles by their name."""
    found = {}
    for line in output.splitlines():
        state, what, text = line.split(None, 2)
        found[text.split(" ")[0].rstrip(":") if what == "bundle" else what] = (state, text)
    return found


def test_a_sound_appliance_passes(ready: Command) -> None:
    report = lines(ready.good("check"))
    assert {state for state, _ in report.values()} == {"ok"}
    assert set(report) == {"configuration", "certificates", "keys", "device", "net:1"}
    assert "tensor-to-tensor on cpu" in report["net:1"][1]


def test_workflows_are_read_and_their_models_looked_for(ready: Command) -> None:
    (ready.folder / "workflows").mkdir()
    file = ready.folder / "workflows" / "flow.yaml"
    model = f"model_id: net, user_id: {graphs.USER}, app_id: {graphs.APP}"
    file.write_text(f"workflow: {{id: flow, nodes: [{{id: a, model: {{{model}}}}}]}}\n")
    state, text = lines(ready.good("check"))["workflow"]
    assert (state, text) == ("ok", "flow.yaml: appliance/main/flow, nodes: 1")
    file.write_text("workflow: {id: flow, nodes: [{id: a, model: {model_id: none}}]}\n")
    result = ready("check")
    assert result.exit_code == 1
    state, text = lines(result.stdout)["workflow"]
    assert state == "fail"
    assert text.startswith("flow.yaml: node 'a': There is no model appliance/main/none")


def test_nothing_is_written(ready: Command) -> None:
    before = {path: path.stat().st_mtime_ns for path in ready.folder.rglob("*")}
    ready.good("check")
    assert {path: path.stat().st_mtime_ns for path in ready.folder.rglob("*")} == before


def test_every_fault_is_told_in_one_run(ready: Command) -> None:
    ready.keys.write_text("broken")
    graphs.write_raw(ready.root / "odd", graphs.custom_op_model())
    (ready.root / "empty").mkdir()
    for path in (ready.folder / "tls").rglob("*.key"):
        path.write_text("broken")
    result = ready("check")
    assert result.exit_code == 1
    report = lines(result.stdout)
    assert {what for what, (state, _) in report.items() if state == "fail"} == {
        "certificates",
        "keys",
        "odd:1",
        "empty",
    }
    assert report["net:1"][0] == "ok"
    assert "custom library" in report["odd:1"][1]


def test_no_keys_where_some_are_needed_is_a_warning(ready: Command) -> None:
    ready.keys.unlink()
    assert lines(ready.good("check", "--skip-models"))["keys"][0] == "warn"


def test_a_base_url_outside_the_certificate_is_a_warning(ready: Command) -> None:
    text = ready.file.read_text()
    ready.file.write_text(text + '[server]\nbase_url = "https://edge.example.com"\n')
    state, sentence = lines(ready.good("check", "--skip-models"))["certificates"]
    assert state == "warn"
    assert "edge.example.com" in sentence


@pytest.mark.parametrize(("policy", "state"), [("last_good", "warn"), ("strict", "fail")])
def test_a_revocation_list_is_looked_at(ready: Command, policy: str, state: str) -> None:
    """Missing or broken it keeps the daemon from starting; out of date it costs what tls.crl_policy says."""
    tls = ready.folder / "tls"
    crl = tls / "crl.pem"
    setting = f'crl = "{crl}"\ncrl_policy = "{policy}"\n[engine]'
    ready.file.write_text(ready.file.read_text().replace("[engine]", setting))
    assert lines(ready("check", "--skip-models").stdout)["certificates"][0] == "fail"
    ready.good("certs", "crl", "--dir", tls)
    assert "revocation" not in lines(ready.good("check", "--skip-models"))
    root, long_ago = load_root(Layout(tls), datetime.now(UTC)), datetime.now(UTC) - timedelta(days=9)
    crl.write_bytes(sign_list(root, [], 1, long_ago, 7).crl.public_bytes(serialization.Encoding.PEM))
    result = ready("check", "--skip-models")
    assert lines(result.stdout)["revocation"][0] == state
    assert result.exit_code == (1 if state == "fail" else 0)


def test_an_empty_catalog_is_a_warning(ready: Command, tmp_path: Path) -> None:
    for name in ("net",):
        ready.good("models", "remove", name)
    assert "warn" in ready.good("check")


def test_bundles_may_be_skipped(ready: Command) -> None:
    graphs.write_raw(ready.root / "odd", graphs.custom_op_model())
    assert "odd" not in ready.good("check", "--skip-models")


def test_a_held_version_is_named_and_not_loaded(ready: Command) -> None:
    graphs.write_raw(ready.root / "net", graphs.custom_op_model(), version="2")
    (ready.folder / "state" / "wanted.json").write_text(json.dumps({"net": {"held": ["2"]}}))
    assert lines(ready.good("check"))["net:2"] == ("ok", "net:2: held")


def test_a_configuration_that_is_wrong_is_all_that_is_told(ready: Command) -> None:
    ready.file.write_text('[log]\nlevel = "loud"\n')
    assert "log.level" in ready.bad("check")


def test_a_device_that_is_not_there_is_told_and_bundles_are_not_tried(ready: Command) -> None:
    ready.file.write_text(ready.file.read_text().replace('device = "cpu"', 'device = "gpu:63"'))
    result = ready("check")
    assert result.exit_code == 1
    report = lines(result.stdout)
    assert report["device"][0] == "fail"
    assert "net:1" not in report


def test_where_traces_go_is_looked_at(ready: Command) -> None:
    """The files, not the collector; and of a headers file not what stands in it."""
    headers = ready.folder / "traces.headers"
    headers.write_text("authorization: Bearer s3cret\n")
    main = ready.file.read_text()
    settings = f'[traces]\nendpoint = "https://collector.example:4318"\nheaders_file = "{headers}"\n'
    ready.file.write_text(main + settings)
    assert lines(ready.good("check"))["traces"] == ("ok", "https://collector.example:4318")
    headers.write_text("s3cret\n")
    result = ready("check")
    assert result.exit_code == 1
    state, text = lines(result.stdout)["traces"]
    assert (state, "s3cret" in result.output) == ("fail", False)
    assert text == f"Line 1 of traces.headers_file {headers} is no header; write name: value."
