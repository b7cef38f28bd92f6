"""Configuration: layers and their order, every problem at once, nothing secret shown."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import without_privileges

from appliance.core import config as configuration
from appliance.core.config import Config, ConfigInvalid, LoadedConfig, is_loopback, load, parse_size


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a main file, drop-ins and a vendor file; returns the main file."""
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "vendor.toml")

    def writer(main: str = "", vendor: str = "", **drop_ins: str) -> Path:
        (tmp_path / "vendor.toml").write_text(vendor, encoding="utf-8")
        (tmp_path / "conf.d").mkdir(exist_ok=True)
        for name, text in drop_ins.items():
            (tmp_path / "conf.d" / f"{name}.toml").write_text(text, encoding="utf-8")
        (tmp_path / "appliance.toml").write_text(main, encoding="utf-8")
        return tmp_path / "appliance.toml"

    return writer


def problems_of(main: Path, **environ: str) -> dict[str, configuration.Problem]:
    with pytest.raises(ConfigInvalid) as caught:
        load(main, environ)
    assert len({problem.key for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.key: problem for problem in caught.value.problems}


def origin(loaded: LoadedConfig, key: str) -> str:
    return next(where for name, _, where in loaded.rows() if name == key)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_without_any_file_the_defaults_are_secure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(configuration, "VENDOR_FILE", tmp_path / "none")
    monkeypatch.setattr(configuration, "MAIN_FILE", tmp_path / "none.toml")
    config = load(None, {}).config
    assert config == Config()
    assert config.auth.require == "key"
    assert is_loopback(config.admin.listen)
    assert config.urls.hosts == ()
    assert not config.urls.private_addresses


def test_later_layers_win_key_by_key(write: Callable[..., Path]) -> None:
    main = write(
        '[log]\nlevel = "warning"\nsample = 0.2\n[limits]\ninputs_per_request = 50\n',
        vendor='[log]\nlevel = "error"\nsample = 0.1\n[shutdown]\ndrain_s = 7\n',
        a10="[limits]\ninputs_per_request = 40\nconcepts_default = 5\n",
        b20="[limits]\ninputs_per_request = 30\n",
    )
    loaded = load(main, {"APPLIANCE_LOG__LEVEL": "debug"})
    config = loaded.config
    assert config.log.level == "debug"
    assert origin(loaded, "log.level") == "APPLIANCE_LOG__LEVEL"
    assert config.log.sample == 0.2
    assert origin(loaded, "log.sample") == str(main)
    assert config.limits.inputs_per_request == 30
    assert origin(loaded, "limits.inputs_per_request") == str(main.parent / "conf.d" / "b20.toml")
    assert config.limits.concepts_default == 5
    assert config.shutdown.drain_s == 7
    assert origin(loaded, "shutdown.drain_s") == str(main.parent / "vendor.toml")
    assert origin(loaded, "shutdown.lame_duck_s") == configuration.BUILT_IN


def test_principals_of_all_files_are_put_one_behind_the_other(write: Callable[..., Path]) -> None:
    main = write('[[principal]]\nname = "one"\n', a='[[principal]]\nname = "two"\nmodels = ["digits"]\n')
    loaded = load(main, {})
    assert [principal.name for principal in loaded.config.principal] == ["one", "two"]
    assert ("principal.1.models", ["digits"]) in [(key, value) for key, value, _ in loaded.rows()]


def test_deployments_of_all_files_are_put_one_behind_the_other(write: Callable[..., Path]) -> None:
    tables = [f'[[deployment]]\nid = "{name}"\nmodel = "digits"\n' for name in ("one", "two")]
    loaded = load(write(tables[0], a=tables[1]), {})
    assert [deployment.id for deployment in loaded.config.deployment] == ["one", "two"]
    assert ("deployment.1.model", "digits") in [(key, value) for key, value, _ in loaded.rows()]


def test_drop_ins_lie_beside_the_file_that_the_environment_names(write: Callable[..., Path]) -> None:
    main = write(a='[log]\nlevel = "error"\n')
    assert load(None, {"APPLIANCE_CONFIG": str(main)}).config.log.level == "error"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="there is no such file"):
        load(tmp_path / "absent.toml", {})


@pytest.mark.parametrize(
    ("variable", "text", "section", "key", "expected"),
    [
        ("APPLIANCE_LIMITS__INPUTS_PER_REQUEST", "16", "limits", "inputs_per_request", 16),
        ("APPLIANCE_URLS__HOSTS", '["a.example", "b.example"]', "urls", "hosts", ("a.example", "b.example")),
        ("APPLIANCE_URLS__PRIVATE_ADDRESSES", "true", "urls", "private_addresses", True),
        ("APPLIANCE_LOG__LEVEL", "debug", "log", "level", "debug"),
        ("APPLIANCE_LOG__LEVEL", '"debug"', "log", "level", "debug"),
        ("APPLIANCE_SERVER__BASE_URL", "https://edge.example.com", "server", "base_url", "https://edge.example.com"),
        ("APPLIANCE_SERVER__LISTEN", "127.0.0.1:8443", "server", "listen", "127.0.0.1:8443"),
        ("APPLIANCE_LIMITS__IMAGE_SIZE", "1 MiB", "limits", "image_size", 2**20),
        ("APPLIANCE_CATALOG__ROOT", "/srv/models", "catalog", "root", Path("/srv/models")),
    ],
)
def test_environment_values_are_toml_or_plain_text(
    write: Callable[..., Path], variable: str, text: str, section: str, key: str, expected: object
) -> None:
    config = load(write(), {variable: text}).config
    assert getattr(getattr(config, section), key) == expected


def test_variables_of_others_are_let_be(write: Callable[..., Path]) -> None:
    assert load(write(), {"PATH": "/bin", "OTHER__KEY": "1"}).config == Config()


def test_a_variable_of_ours_that_names_no_key_is_a_problem(write: Callable[..., Path]) -> None:
    problem = problems_of(write(), APPLIANCE_LOGLEVEL="debug")["APPLIANCE_LOGLEVEL"]
    assert "APPLIANCE_SECTION__KEY" in problem.remedy


def test_the_configuration_cannot_be_changed_once_read(write: Callable[..., Path]) -> None:
    config = load(write(), {}).config
    with pytest.raises(ValueError, match="frozen"):
        config.log.level = "debug"


# ---- problems --------------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once_with_key_value_origin_and_remedy(write: Callable[..., Path]) -> None:
    main = write(
        '[log]\nlevel = "loud"\n[limits]\ninputs_per_request = 129\n[server]\nbase_url = "http://x"\n[sever]\na = 1\n',
        a="[limits]\nconcepts_max = 201\n",
        b="not toml",
    )
    found = problems_of(main, APPLIANCE_SHUTDOWN__DRAIN_S="-1", APPLIANCE_NONSENSE="1")
    drop_ins = main.parent / "conf.d"
    assert set(found) == {
        "log.level",
        "limits.inputs_per_request",
        "server.base_url",
        "sever",
        "limits.concepts_max",
        str(drop_ins / "b.toml"),
        "shutdown.drain_s",
        "APPLIANCE_NONSENSE",
    }
    level = found["log.level"]
    assert (level.value, level.origin) == ("loud", str(main))
    assert "'debug'" in level.reason
    assert "Least level" in level.remedy
    assert found["limits.concepts_max"].origin == str(drop_ins / "a.toml")
    assert found["shutdown.drain_s"].origin == "APPLIANCE_SHUTDOWN__DRAIN_S"
    assert found["limits.inputs_per_request"].value == 129
    assert all(problem.remedy for problem in found.values())


def test_the_message_has_one_line_for_each_problem(write: Callable[..., Path]) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(write('[log]\nlevel = "loud"\n[limits]\ninputs_per_request = 0\n'), {})
    lines = str(caught.value).splitlines()
    assert lines[0] == "The configuration has 2 problems:"
    assert len(lines) == 3
    assert 'log.level = "loud"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("[log]\nlevle = 1\n", "log.levle", "Did you mean 'level'?"),
        ("[catlog]\nroot = 1\n", "catlog", "Did you mean 'catalog'?"),
        ('[[principal]]\nname = "a"\nmodel = ["x"]\n', "principal.0.model", "Did you mean 'models'?"),
        (
            "[urls]\nzzz = 1\n",
            "urls.zzz",
            "Known here: ca, connections, connections_per_principal, hosts, private_addresses, timeout_s.",
        ),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(
    write: Callable[..., Path], text: str, key: str, remedy: str
) -> None:
    problem = problems_of(write(text))[key]
    assert problem.reason == "is not a key we know"
    assert problem.remedy == remedy


@pytest.mark.parametrize(
    "text",
    [
        "[server]\nlisten = 8443\n",
        "[server]\nlisten = true\n",
        "[admin]\nlisten = 9464\n",
        "[catalog]\nuser_id = 42\n",
        "[[principal]]\nname = 7\n",
        "[[principal]]\nname = ['a']\n",
        "[limits]\nimage_size = true\n",
        f"[limits]\nimage_size = '{'9' * 400}'\n",
        "[limits]\nimage_size = 'many'\n",
        "[limits]\nimage_size = 0\n",
        "[limits]\nimage_size = []\n",
        "[limits]\nrequest_timeout_s = nan\n",
        "[limits]\nrequest_timeout_s = inf\n",
        "[catalog]\nstart_wait_s = inf\n",
        "server = 1\n",
        "principal = 1\n",
        "principal = {name = 'x'}\n",
        "[server]\nlisten = '[::]'\n",
        "[server]\nlisten = '[::]:65536'\n",
        "[server]\nlisten = ':8443'\n",
        "[server]\nlisten = '[::]:²'\n",
        "[catalog]\nroot = ''\n",
        "[urls]\nhosts = 'one.example'\n",
        "[auth]\nrequire = 'nobody'\n",
        "[engine]\ndevice = 'gpu:x'\n",
        "[[principal]]\nname = 'a b'\n",
        "[[principal]]\nname = 'a'\nidentities = ['ada']\n",
        "[[principal]]\nname = 'a'\nidentities = ['cn:']\n",
        "[[principal]]\nname = 'a'\n[[principal]]\nname = 'a'\n",
        "deployment = 1\n",
        "[[deployment]]\nid = 'a'\n",
        "[[deployment]]\nmodel = 'a'\n",
        "[[deployment]]\nid = 'a b'\nmodel = 'a'\n",
        "[[deployment]]\nid = 'a'\nmodel = 'b'\n[[deployment]]\nid = 'a'\nmodel = 'c'\n",
        "[placement]\ncompute_cluster_id = 'a b'\n",
        "[[principal]]\nname = 'a'\nidentities = ['cn:x']\n[[principal]]\nname = 'b'\nidentities = ['cn:x']\n",
        "[limits]\nconcepts_default = 30\nconcepts_max = 20\n",
        "[admin]\nlisten = '0.0.0.0:9464'\n",
        "[server]\nmtls_listen = '[::]:8443'\n",
        "[server]\nlisten = '127.0.0.1:8443'\nplain_listen = '127.0.0.1:8443'\n",
        "[server]\nmtls_listen = '127.0.0.1:8444'\nplain_listen = '127.0.0.1:8444'\n",
        "[server]\ntransport = 'grpcio'\n[auth]\nrequire = 'certificate'\n",
        "[server]\ntransport = 'grpcio'\n[auth]\nrequire = 'both'\n",
        "[server]\ntransport = 'grpcio'\nplain_listen = '127.0.0.1:8080'\n",
        "[server]\nplain_listen = '[::]:8080'\n",
        "[server]\nplain_listen = 'unix:relative'\n",
        "[server]\ntrusted_proxies = ['proxy.example.com']\n",
        "[server]\ncors_origins = ['https://lab.example.com/']\n",
        "[server]\ncors_origins = ['https://lab.example.com?x']\n",
        "[server]\ncors_origins = ['https://Lab.example.com']\n",
        "[server]\ncors_origins = ['https://ada@lab.example.com']\n",
        "[connections]\nstreams = 0\n",
        "[tls]\ncrl_policy = 'lax'\n",
    ],
)
def test_a_wrong_value_is_a_problem_and_never_a_traceback(write: Callable[..., Path], text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(write(text), {})
    assert caught.value.problems
    assert all(problem.key and problem.reason and problem.remedy for problem in caught.value.problems)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[log", b'[log]\nlevel = "a\n', b"\x00"])
def test_a_file_that_is_not_toml_is_named(write: Callable[..., Path], data: bytes) -> None:
    main = write()
    main.write_bytes(data)
    assert "is not TOML" in problems_of(main)[str(main)].reason


def test_a_drop_in_that_cannot_be_read_is_named(write: Callable[..., Path]) -> None:
    main = write()
    (main.parent / "conf.d" / "x.toml").mkdir()
    assert "cannot be read" in problems_of(main)[str(main.parent / "conf.d" / "x.toml")].reason


@pytest.mark.parametrize(
    ("require", "listen", "fine"),
    [
        ("none", "127.0.0.1:8443", True),
        ("none", "[::1]:8443", True),
        ("none", "localhost:8443", True),
        ("none", "[::]:8443", False),
        ("none", "0.0.0.0:8443", False),
        ("none", "192.168.1.4:8443", False),
        ("none", "edge.example.com:8443", False),
        ("key", "0.0.0.0:8443", True),
    ],
)
def test_nobody_need_authenticate_only_on_loopback(
    write: Callable[..., Path], require: str, listen: str, fine: bool
) -> None:
    main = write(f'[auth]\nrequire = "{require}"\n[server]\nlisten = "{listen}"\n')
    if fine:
        assert load(main, {}).config.server.listen == listen
    else:
        problem = problems_of(main)["server.listen"]
        assert "127.0.0.1" in problem.remedy
        assert problem.origin == str(main)


def test_the_mtls_port_counts_too_when_nobody_need_authenticate(write: Callable[..., Path]) -> None:
    main = write('[auth]\nrequire = "none"\n[server]\nlisten = "127.0.0.1:1"\nmtls_listen = "[::]:8444"\n')
    assert set(problems_of(main)) == {"server.mtls_listen"}


@pytest.mark.parametrize(
    "url", ["https://edge.example.com", "https://edge:8443", "https://[::1]:8443", "https://10.0.0.7"]
)
def test_a_base_url_is_scheme_host_and_port(write: Callable[..., Path], url: str) -> None:
    assert load(write(f'[server]\nbase_url = "{url}"\n'), {}).config.server.base_url == url


@pytest.mark.parametrize(
    "url",
    [
        "http://edge.example.com",
        "edge.example.com",
        "https://",
        "https://:8443",
        "https://edge/",
        "https://edge/v2",
        "https://edge?x=1",
        "https://edge#x",
        "https://user@edge",
        "https://edge:x",
        "https://edge:70000",
        "https://[::1",
        "",
    ],
)
def test_any_other_base_url_is_refused(write: Callable[..., Path], url: str) -> None:
    assert set(problems_of(write(f'[server]\nbase_url = "{url}"\n'))) == {"server.base_url"}


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("20", 20),
        ("20B", 20),
        ("20 MiB", 20 * 2**20),
        ("1.5GB", 1_500_000_000),
        (" 1 KiB ", 1024),
        ("2k", 2000),
        ("1T", 10**12),
        (17, 17),
    ],
)
def test_sizes_are_bytes_or_a_number_with_a_unit(text: object, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e3", "1 PiB", "1 MiBB", "9" * 400])
def test_other_sizes_say_which_forms_are_understood(text: str) -> None:
    with pytest.raises(ValueError, match="20MiB"):
        parse_size(text)


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_a_passphrase_is_never_shown(write: Callable[..., Path]) -> None:
    loaded = load(write('[tls]\nkey_passphrase = "hunter2"\n'), {})
    passphrase = loaded.config.tls.key_passphrase
    assert passphrase is not None
    assert passphrase.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(loaded.config)
    assert "hunter2" not in str(list(loaded.rows()))
    assert ("tls.key_passphrase", "********") in [(key, value) for key, value, _ in loaded.rows()]


@pytest.mark.parametrize("text", ["key_passphrase = ['hunter2']", "key_passphrase = {a = 'hunter2'}"])
def test_a_passphrase_of_the_wrong_kind_is_not_shown_either(write: Callable[..., Path], text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load(write(f"[tls]\n{text}\n"), {})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.problems)


@pytest.mark.parametrize("text", ["12345", "true", "2026-01-01", "hunter2", "[a]", '"12345"'])
def test_a_passphrase_from_the_environment_is_its_text(write: Callable[..., Path], text: str) -> None:
    """Digits are a passphrase too, and not a number."""
    passphrase = load(write(), {"APPLIANCE_TLS__KEY_PASSPHRASE": text}).config.tls.key_passphrase
    assert passphrase is not None
    assert passphrase.get_secret_value() == text.strip('"')


SEVERAL: dict[str, type[configuration.Section]] = {
    "principal": configuration.Principal,
    "deployment": configuration.Deployment,
}


# ---- the example file ------------------------------------------------------------------------------------------------


def uncommented(text: str) -> dict[str, Any]:
    """The example with the # of its keys and tables removed; comments have a space behind their #."""
    lines = [
        line.removeprefix("#") if line[:1] == "#" and line[1:2] not in (" ", "") else line for line in text.splitlines()
    ]
    return tomllib.loads("\n".join(lines))


def test_the_example_as_it_is_changes_nothing(write: Callable[..., Path]) -> None:
    assert load(write(configuration.example()), {}).config == Config()


def test_the_example_uncommented_is_the_defaults() -> None:
    tables = uncommented(configuration.example())
    principal, deployment = tables.pop("principal")[0], tables.pop("deployment")[0]
    assert set(tables) | {"principal", "deployment"} == set(Config.model_fields)
    for section, keys in tables.items():
        defaults = getattr(Config(), section)
        assert set(keys) == set(type(defaults).model_fields)
        with_default = {key: value for key, value in keys.items() if getattr(defaults, key) is not None}
        assert type(defaults).model_validate(with_default) == defaults
        type(defaults).model_validate(keys)  # what is unset by default is shown as something that is valid
    shown = configuration.Principal.model_validate(principal)
    assert shown.model_copy(update={"user_id": None}) == configuration.Principal(name=shown.name)
    assert configuration.Deployment.model_validate(deployment).model == "digits"


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('api_base = "https://api.example.com"', "orchestrator", "user_id is not"),
        ('api_base = "http://api.example.com"\nuser_id = "a"', "orchestrator.api_base", "https://host"),
        ('api_base = "https://api.example.com/v2"\nuser_id = "a"', "orchestrator.api_base", "nothing behind it"),
        ('proxy = "https://proxy:3128"', "orchestrator.proxy", "http://host"),
        ('certificate = "/a.crt"', "orchestrator", "go together"),
        ('usage_url = "http://usage.example.com/"', "orchestrator.usage_url", "https://host/path"),
        ('usage_url = "https://a:b@usage.example.com/"', "orchestrator.usage_url", "without a user"),
        ('usage_url = "https://usage.example.com/?key=1"', "orchestrator.usage_url", "without a user or a query"),
        ('usage_url = "https://usage.example.com:x/"', "orchestrator.usage_url", "port"),
        ('usage_url = "https:///v1"', "orchestrator.usage_url", "https://host/path"),
        ("usage_interval_s = 0", "orchestrator.usage_interval_s", "greater than or equal to 1"),
    ],
)
def test_the_orchestrator_is_named_completely(write: Callable[..., Path], text: str, key: str, reason: str) -> None:
    assert reason in str(problems_of(write(f"[orchestrator]\n{text}\n"))[key])


def test_the_orchestrators_usual_port_is_written_out(write: Callable[..., Path]) -> None:
    main = write(
        '[orchestrator]\napi_base = "https://api.example.com"\nuser_id = "acme"\nproxy = "http://[fd00::1]:3128"\n'
        'usage_url = "https://usage.example.com/v1/reports"'
    )
    settings = load(main, {}).config.orchestrator
    assert (settings.api_base, settings.proxy) == ("https://api.example.com:443", "http://[fd00::1]:3128")
    assert settings.usage_url == "https://usage.example.com:443/v1/reports"


def test_the_shipped_example_file_is_the_one_that_the_command_prints() -> None:
    shipped = Path(__file__).parents[3] / "packaging" / "appliance.toml"
    assert shipped.read_text(encoding="utf-8") == configuration.example()


def test_every_key_is_documented() -> None:
    for name in Config.model_fields:
        section = SEVERAL.get(name) or type(getattr(Config(), name))
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"
            assert field.description.endswith("."), f"{name}.{key}"


# ---- traces ----


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ('endpoint = "collector:4318"', 'traces.endpoint = "collector:4318" .*must be "https://host:port"'),
        ('endpoint = "grpc://collector:4317"', 'must be "https://host:port"'),
        ('endpoint = "https://user:pass@collector"', "nothing but a path behind it"),
        ('endpoint = "https://collector:99999"', "has a port that is not a number"),
        ('endpoint = "https://collector/a?key=1"', "nothing but a path behind it"),
        ('endpoint = "https://collector/a b"', "nothing but a path behind it"),
        ("sample = 1.5", "less than or equal to 1"),
        ('attributes = ["no sign"]', '"no sign" must be "name=value"'),
        ('endpoint = "http://10.0.0.7:4318"\nheaders_file = "/h"', "headers_file would be sent unencrypted"),
    ],
)
def test_where_traces_cannot_go_is_said(write: Callable[..., Path], lines: str, sentence: str) -> None:
    with pytest.raises(ConfigInvalid, match=sentence):
        load(write(f"[traces]\n{lines}\n"), {})


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:4318", "http://[::1]:4318", "http://localhost", "https://c/p"])
def test_where_traces_may_go(write: Callable[..., Path], endpoint: str) -> None:
    """With a secret: over TLS, or to this machine."""
    traces = load(write(f'[traces]\nendpoint = "{endpoint}"\nheaders_file = "/h"\n'), {}).config.traces
    assert traces.endpoint == endpoint


# ---- what a reload may change ----------------------------------------------------------------------------------------


def test_keys_that_need_a_restart_are_named_and_kept(write: Callable[..., Path]) -> None:
    old = load(write(), {}).config
    new = load(write('[server]\nlisten = "[::]:9443"\n[log]\nlevel = "debug"\n[engine]\nthreads = 3\n'), {}).config
    keys = configuration.restart_needed(old, new)
    assert keys == ["server.listen", "engine.threads"]
    kept = configuration.keeping(old, new, keys)
    assert (kept.server, kept.engine) == (old.server, old.engine)
    assert kept.log.level == "debug"
    assert configuration.restart_needed(old, kept) == []


TAKEN_OVER_LIVE = {
    "server.base_url": "only told and checked",
    "tls.sni_certificates": "read again with the certificate",
    "tls.crl": "read again with the certificate",
    "tls.crl_policy": "asked with every request",
    "tls.certificate": "integration: a rotated certificate is shown to new connections",
    "tls.key": "as the certificate",
    "tls.key_passphrase": "as the certificate",
    "tls.client_ca": "as the certificate",
    "auth.require": "Authenticator.configure",
    "admin.principals": "integration: who may read the pages from elsewhere follows a reload",
    "auth.keys_file": "Daemon._reloaded reads it anew",
    "catalog.scan_interval_s": "read at every look",
    "catalog.settle_s": "read at every look",
    "catalog.start_wait_s": "only matters at the next start",
    "catalog.workflows": "read at every look",
    "placement.user_id": "read for every request",
    "placement.compute_cluster_id": "read for every request",
    "placement.nodepool_id": "read for every request",
    "limits.inputs_per_request": "integration: SIGHUP under load takes over",
    "limits.concepts_max": "read for every request",
    "limits.image_size": "read for every request",
    "limits.image_pixels": "read for every request",
    "limits.text_size": "read for every request",
    "limits.audio_size": "read for every request",
    "limits.video_size": "read for every request",
    "limits.memory_in_flight": "integration: the memory budget follows a reload",
    "limits.request_timeout_s": "read for every request",
    "urls.hosts": "read for every request",
    "urls.private_addresses": "read for every request",
    "urls.ca": "Downloads.configure",
    "urls.timeout_s": "read for every request",
    "urls.connections": "Downloads.configure",
    "urls.connections_per_principal": "Downloads.configure",
    "cache.size": "PredictCache.configure",
    "cache.ttl_s": "PredictCache.configure",
    **dict.fromkeys(
        (f"orchestrator.{key}" for key in configuration.Orchestrator.model_fields),
        "read for every plan and sync; another agent takes the place of the one that runs",
    ),
    "orchestrator.usage_url": "Reporter.configure",
    "orchestrator.usage_interval_s": "Reporter.configure",
    "log.level": "integration: it follows a reload, in every process",
    "log.rate": "logs.limit",
    "log.sample": "read for every request",
    **dict.fromkeys(
        (f"traces.{key}" for key in ("endpoint", "sample", "headers_file", "ca", "service_name", "attributes")),
        "integration: a reload sends traces elsewhere and turns them off",
    ),
    "shutdown.lame_duck_s": "read when draining",
    "shutdown.drain_s": "read when draining",
}


def test_every_other_key_is_known_to_act_without_a_restart() -> None:
    """Whoever adds a key says which of the two it is."""
    live = set()
    for section, info in Config.model_fields.items():
        if section in SEVERAL:
            continue
        assert isinstance(info.annotation, type)
        assert issubclass(info.annotation, configuration.Section)
        for key, field in info.annotation.model_fields.items():
            extra = field.json_schema_extra
            if not (isinstance(extra, dict) and extra.get("restart")):
                live.add(f"{section}.{key}")
    assert live == set(TAKEN_OVER_LIVE)


def test_nothing_needs_a_restart_when_nothing_changed() -> None:
    assert configuration.restart_needed(Config(), Config()) == []


def test_two_keys_of_one_section_are_both_kept(write: Callable[..., Path]) -> None:
    old = load(write(), {}).config
    new = load(write("[engine]\nthreads = 3\nqueue_rows = 5\n"), {}).config
    assert configuration.keeping(old, new, configuration.restart_needed(old, new)) == old


def test_drop_ins_that_may_not_be_read_are_a_problem_and_not_passed_over(write: Callable[..., Path]) -> None:
    main = write(a='[log]\nlevel = "error"\n')
    (main.parent / "conf.d").chmod(0)
    done = without_privileges("--config", main, "config", "show")
    assert done.returncode == 5
    assert f"{main.parent}/conf.d: cannot be read: Permission denied. Run the command with sudo" in done.stderr
    assert f"chmod 0750 {main.parent}/conf.d" in done.stderr


def test_a_main_file_that_may_not_be_read_is_a_matter_of_rights(write: Callable[..., Path]) -> None:
    main = write('[log]\nlevel = "error"\n')
    main.chmod(0)
    done = without_privileges("--config", main, "serve")
    assert done.returncode == 5
    assert f"chgrp inference-appliance {main} && chmod 0640 {main}" in done.stderr


def test_a_credential_of_systemd_is_one_more_file_behind_the_others(write: Callable[..., Path], tmp_path: Path) -> None:
    main = write(a='[log]\nlevel = "error"\n')
    (tmp_path / "credentials").mkdir()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"), "APPLIANCE_LOG__SAMPLE": "0.5"}
    assert load(main, environ).config.tls.key_passphrase is None
    (tmp_path / "credentials" / "appliance.toml").write_text('[tls]\nkey_passphrase = "x7"\n[log]\nsample = 1\n')
    loaded = load(main, environ)
    assert loaded.config.tls.key_passphrase is not None
    assert loaded.config.tls.key_passphrase.get_secret_value() == "x7"
    assert loaded.config.log.sample == 0.5
    assert origin(loaded, "tls.key_passphrase") == str(tmp_path / "credentials" / "appliance.toml")


def test_what_editors_leave_in_the_folder_of_drop_ins_is_not_read(write: Callable[..., Path]) -> None:
    main = write()
    for name in (".#a.toml", "a.toml.dpkg-dist", "b.toml~", ".b.toml-x1"):
        (main.parent / "conf.d" / name).write_text("not TOML")
    assert load(main, {}).config == Config()
