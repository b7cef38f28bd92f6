"""Who is calling: keys, certificates, both; what each may use, how often and how many at once."""

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.auth import Authenticator, Grant, Meter
from appliance.api.context import Context
from appliance.api.keys import KeyStore, create_key, read_keys, revoke_key
from appliance.core.config import Auth, Config, Principal
from appliance.core.errors import ConfigError, CredentialsMissing, KeyInvalid, NotPermitted, RateLimited
from appliance.core.memory import MemoryBudget
from appliance.core.sharing import SharedLimits
from appliance.core.types import Call, ModelKey
from appliance.pki.leaf import Subject, issue
from appliance.pki.profiles import DEFAULTS, Profile
from appliance.pki.revocation import sign_list
from appliance.pki.root import create_root
from appliance.pki.signing import Issued, certificate_pem
from appliance.pki.trust import Trust

NOW = datetime.now(UTC)
MODEL = ModelKey("u", "a", "m")


@pytest.fixture(autouse=True)
def look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call looks at the keys file."""
    monkeypatch.setattr("appliance.api.keys.LOOK_S", 0.0)


@pytest.fixture(scope="module")
def root() -> Issued:
    """The enterprise's CA."""
    return create_root("Test Root", None, NOW - timedelta(days=30))


@pytest.fixture(scope="module")
def pem(root: Issued) -> Callable[..., bytes]:
    """Makes client certificates."""

    def make(
        *names: x509.GeneralName, common_name: str = "line-3", at: datetime = NOW, profile: Profile = DEFAULTS["client"]
    ) -> bytes:
        return certificate_pem(issue(root, Subject(common_name, names), profile, at).certificate)

    return make


class World:
    """A keys file and an authenticator on it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.json"
        self.now = 0.0

    def key(self, principal: str = "default") -> str:
        return create_key(self.path, principal, "")[0]

    def authenticator(self, *principals: Principal, require: Any = "key") -> Authenticator:
        config = Config(auth=Auth(require=require, keys_file=self.path), principal=principals)
        return Authenticator(config, KeyStore(self.path), clock=lambda: self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def call(header: str | None = None, certificate: bytes | None = None) -> Call:
    """A call with that authorization header and certificate."""
    return Call("/m", {} if header is None else {"authorization": header}, "peer", None, certificate)


def keyed(key: str, certificate: bytes | None = None) -> Call:
    """As the stock clients send it."""
    return call(f"Key {key}", certificate)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["Key {}", "key {}", "KEY  {}", "Bearer {}", "bearer {}", "  Key {}  "])
def test_a_key_is_taken_as_key_or_bearer(world: World, form: str) -> None:
    """Stock clients send the first, OpenAI's the second."""
    key = world.key()
    grant = world.authenticator().grant(call(form.format(key)))
    assert grant.name == "default"
    assert grant.key_id == read_keys(world.path)[0].id
    assert grant.allows(MODEL)


def test_a_key_is_taken_as_session_token(world: World) -> None:
    """What the SDKs send for `token=`; an authorization header, when there is one, is what counts."""
    key = world.key()
    session = {"x-clarifai-session-token": f" {key} "}
    assert world.authenticator().grant(Call("/m", session, "peer", None)).name == "default"
    assert world.authenticator().grant(Call("/m", session | {"authorization": ""}, "peer", None)).name == "default"
    with pytest.raises(CredentialsMissing):
        world.authenticator().grant(Call("/m", session | {"authorization": "Basic dXNlcjpwYXNz"}, "peer", None))
    with pytest.raises(CredentialsMissing):
        world.authenticator().grant(Call("/m", {"x-clarifai-session-token": " "}, "peer", None))
    with pytest.raises(KeyInvalid):
        world.authenticator().grant(Call("/m", {"x-clarifai-session-token": "0" * 64}, "peer", None))


@pytest.mark.parametrize("header", [None, "", "Key", "Key ", "Basic dXNlcjpwYXNz", "Token {}", "{}", "Key\t{}"])
def test_without_a_key_the_call_is_refused(world: World, header: str | None) -> None:
    """With the header to send."""
    key = world.key()
    with pytest.raises(CredentialsMissing, match="authorization: Key <PAT>") as error:
        world.authenticator().grant(call(None if header is None else header.format(key)))
    assert key not in str(error.value)


@pytest.mark.parametrize("key", ["wrong", "0" * 64, "ключ", "\udcff", "x" * 100_000, "Key Key"])
def test_an_unknown_key_is_refused(world: World, key: str) -> None:
    """Whatever its bytes; it is not repeated to the caller, nor who might have it."""
    world.key()
    with pytest.raises(KeyInvalid) as error:
        world.authenticator().grant(keyed(key))
    assert key not in str(error.value)


def test_a_key_is_exactly_itself(world: World) -> None:
    """Neither case nor length is forgiven."""
    key = world.key()
    authenticator = world.authenticator()
    authenticator.grant(keyed(key))
    for other in (key.upper(), key[:-1], key + "0", f"{key} {key}"):
        with pytest.raises(KeyInvalid):
            authenticator.grant(keyed(other))


def test_a_revoked_key_is_refused_at_once(world: World) -> None:
    """Without a reload, at the next look; the others go on."""
    first, second = world.key(), world.key()
    authenticator = world.authenticator()
    authenticator.grant(keyed(first))
    revoke_key(world.path, read_keys(world.path)[0].id)
    with pytest.raises(KeyInvalid):
        authenticator.grant(keyed(first))
    authenticator.grant(keyed(second))
    assert len(authenticator.keys) == 1


def test_a_new_key_is_known_at_once(world: World) -> None:
    """Without a reload."""
    authenticator = world.authenticator()
    authenticator.grant(keyed(world.key()))


def test_a_keys_file_that_became_bad_keeps_the_keys_read_before(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Half-written, emptied or gone: nobody is locked out, and the log says so."""
    key = world.key()
    authenticator = world.authenticator()
    for content in ("{", "[]", '{"keys": [{"id": 1}]}', None):
        caplog.clear()
        if content is None:
            world.path.unlink()
        else:
            world.path.write_text(content)
        authenticator.grant(keyed(key))
        assert "stay valid" in caplog.text


def test_a_bad_keys_file_is_refused_at_start(world: World) -> None:
    """There is no last good one."""
    world.path.write_text("{")
    with pytest.raises(ConfigError, match="not a keys file"):
        world.authenticator()


def test_a_key_of_a_principal_that_is_gone_is_refused(world: World) -> None:
    """Taken out of the configuration, its keys say nothing any more."""
    key = world.key("ada")
    authenticator = world.authenticator(Principal(name="ada"))
    assert authenticator.grant(keyed(key)).name == "ada"
    authenticator.configure(Config(auth=Auth(keys_file=world.path)))
    with pytest.raises(NotPermitted, match="principal 'ada', which is not configured"):
        authenticator.grant(keyed(key))


def test_a_key_is_shown_nowhere(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in the file, nor in a repr, nor in a log of all that happens."""
    caplog.set_level(logging.DEBUG)
    key = world.key()
    authenticator = world.authenticator()
    grant = authenticator.grant(keyed(key))
    with pytest.raises(KeyInvalid):
        authenticator.grant(keyed(key + "0"))
    world.path.write_text("{")
    authenticator.grant(keyed(key))
    shown = [repr(x) for x in (grant, authenticator, authenticator.keys, grant.meters, authenticator.keys._entries)]
    assert key not in "".join([caplog.text, world.path.read_text(), *shown])


def test_a_key_has_256_bits(world: World) -> None:
    """Random ones."""
    keys = {world.key() for _ in range(5)}
    assert len(keys) == 5
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)


# ---- certificates ----------------------------------------------------------------------------------------------------

URI = x509.UniformResourceIdentifier("spiffe://plant/line-3")
DNS = x509.DNSName("line-3.plant.example")
EMAIL = x509.RFC822Name("ada@plant.example")


@pytest.mark.parametrize(
    ("identity", "names"),
    [
        ("uri:spiffe://plant/line-3", [URI]),
        ("dns:line-3.plant.example", [DNS]),
        ("dns:Line-3.Plant.Example", [DNS]),
        ("email:ada@plant.example", [EMAIL]),
        ("cn:line-3", []),
        ("email:ada@plant.example", [URI, DNS, EMAIL]),
    ],
)
def test_a_certificate_belongs_to_the_principal_of_its_identity(
    world: World, pem: Any, identity: str, names: list[x509.GeneralName]
) -> None:
    """Typed: a DNS name is no e-mail address."""
    authenticator = world.authenticator(Principal(name="line", identities=(identity,)), require="certificate")
    assert authenticator.grant(call(certificate=pem(*names))).name == "line"


@pytest.mark.parametrize("identity", ["cn:line-3.plant.example", "uri:line-3.plant.example", "cn:line-3", "dns:line-3"])
def test_an_identity_of_another_type_does_not_match(world: World, pem: Any, identity: str) -> None:
    """The common name counts only where there is no other name."""
    authenticator = world.authenticator(Principal(name="line", identities=(identity,)), require="certificate")
    with pytest.raises(NotPermitted, match=r"\(dns:line-3\.plant\.example\) belongs to no principal"):
        authenticator.grant(call(certificate=pem(DNS)))


def test_a_certificate_without_a_principal_is_refused(world: World, pem: Any) -> None:
    """A laptop certificate from the enterprise CA is not a key."""
    with pytest.raises(NotPermitted, match=r"\(cn:laptop\) belongs to no principal"):
        world.authenticator(require="certificate").grant(call(certificate=pem(common_name="laptop")))


@pytest.mark.parametrize("days", [-20, +20])
def test_a_certificate_out_of_its_time_is_refused(world: World, pem: Any, days: int) -> None:
    """On every request: a live connection outlives its certificate."""
    authenticator = world.authenticator(Principal(name="line", identities=("cn:line-3",)), require="certificate")
    profile = replace(DEFAULTS["client"], days=5)
    with pytest.raises(NotPermitted, match="is valid from"):
        authenticator.grant(call(certificate=pem(at=NOW + timedelta(days=days), profile=profile)))


def test_a_certificate_for_servers_is_refused(world: World, pem: Any) -> None:
    """Its extended key usage says what it is for."""
    authenticator = world.authenticator(
        Principal(name="line", identities=("dns:line-3.plant.example",)), require="either"
    )
    with pytest.raises(NotPermitted, match="lacks the extended key usage clientAuth"):
        authenticator.grant(call(certificate=pem(DNS, profile=DEFAULTS["server"])))


def test_a_certificate_that_cannot_be_read_is_refused(world: World) -> None:
    """Without its reason: that is for the log."""
    with pytest.raises(NotPermitted, match="cannot be read") as error:
        world.authenticator(require="certificate").grant(call(certificate=b"-----BEGIN CERTIFICATE-----\nAA\n"))
    assert error.value.detail


def test_a_principal_that_was_removed_takes_its_certificate_along(world: World, pem: Any) -> None:
    """Revoked by removal, on live connections too."""
    line = Principal(name="line", identities=("cn:line-3",))
    authenticator = world.authenticator(line, require="certificate")
    shown = call(certificate=pem())
    authenticator.grant(shown)
    authenticator.configure(Config(auth=Auth(require="certificate", keys_file=world.path)))
    with pytest.raises(NotPermitted):
        authenticator.grant(shown)


def test_a_revoked_certificate_is_refused_on_the_next_request(world: World, root: Issued, pem: Any) -> None:
    """Of a live connection too; a reload puts another trust in place. Who brings a key is not concerned."""
    shown, key = pem(), world.key("ada")
    line, ada = Principal(name="line", identities=("cn:line-3",)), Principal(name="ada")
    trusts = [Trust([root.certificate])]
    config = Config(auth=Auth(require="certificate", keys_file=world.path), principal=(line, ada))
    authenticator = Authenticator(config, KeyStore(world.path), trust=lambda: trusts[-1])
    assert authenticator.grant(call(certificate=shown)).name == "line"
    serial = x509.load_pem_x509_certificate(shown).serial_number
    entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW).build()
    trusts.append(Trust([root.certificate], [sign_list(root, [entry], 1, NOW, 30)]))
    with pytest.raises(NotPermitted, match=f"'line-3' \\(serial {serial:x}\\) was revoked by 'Test Root' on"):
        authenticator.grant(call(certificate=shown))
    for require, outcome in (("key", "ada"), ("either", None), ("both", None)):
        authenticator.configure(config.model_copy(update={"auth": Auth(require=require, keys_file=world.path)}))
        if outcome:
            assert authenticator.grant(keyed(key, shown)).name == outcome
        else:
            with pytest.raises(NotPermitted, match="was revoked"):
                authenticator.grant(keyed(key, shown))
            assert require == "both" or authenticator.grant(keyed(key)).name == "ada"


def test_the_chain_that_tls_verified_is_looked_at(world: World, root: Issued, pem: Any) -> None:
    """An authority that left the trust bundle takes its certificates along."""
    line = Principal(name="line", identities=("cn:line-3",))
    config = Config(auth=Auth(require="certificate", keys_file=world.path), principal=(line,))
    other = create_root("Other Root", None, NOW)
    authenticator = Authenticator(config, KeyStore(world.path), trust=lambda: Trust([other.certificate]))
    asked = replace(call(certificate=pem()), chain=certificate_pem(root.certificate))
    with pytest.raises(NotPermitted, match=r"comes from 'Test Root', which this appliance does not trust"):
        authenticator.grant(asked)


# ---- which of the two ------------------------------------------------------------------------------------------------

GOOD_KEY, BAD_KEY, NO_KEY = "good", "bad", "none"
MISSING, INVALID, REFUSED = CredentialsMissing, KeyInvalid, NotPermitted


@pytest.mark.parametrize(
    ("require", "key", "certificate", "outcome"),
    [
        ("key", GOOD_KEY, None, "keyholder"),
        ("key", GOOD_KEY, "good", "keyholder"),
        ("key", GOOD_KEY, "stranger", "keyholder"),
        ("key", NO_KEY, "good", MISSING),
        ("key", BAD_KEY, "good", INVALID),
        ("certificate", NO_KEY, "good", "line"),
        ("certificate", BAD_KEY, "good", "line"),
        ("certificate", GOOD_KEY, None, MISSING),
        ("certificate", GOOD_KEY, "stranger", REFUSED),
        ("either", GOOD_KEY, None, "keyholder"),
        ("either", NO_KEY, "good", "line"),
        ("either", GOOD_KEY, "good", "line"),
        ("either", BAD_KEY, "good", "line"),
        ("either", GOOD_KEY, "stranger", REFUSED),
        ("either", NO_KEY, None, MISSING),
        ("either", BAD_KEY, None, INVALID),
        ("both", GOOD_KEY, "good", "line+keyholder"),
        ("both", GOOD_KEY, None, MISSING),
        ("both", NO_KEY, "good", MISSING),
        ("both", BAD_KEY, "good", INVALID),
        ("both", GOOD_KEY, "stranger", REFUSED),
        ("none", NO_KEY, None, "default"),
        ("none", BAD_KEY, "stranger", "default"),
    ],
)
def test_which_credentials_count(
    world: World, pem: Any, require: str, key: str, certificate: str | None, outcome: Any
) -> None:
    """By `[auth] require`, exactly as the design says."""
    keys = {GOOD_KEY: world.key("keyholder"), BAD_KEY: "0" * 64}
    authenticator = world.authenticator(
        Principal(name="keyholder"), Principal(name="line", identities=("cn:line-3",)), require=require
    )
    shown = {"good": pem(), "stranger": pem(common_name="stranger"), None: None}[certificate]
    asked = call(f"Key {keys[key]}" if key in keys else None, shown)
    if isinstance(outcome, str):
        assert authenticator.grant(asked).name == outcome
    else:
        with pytest.raises(outcome):
            authenticator.grant(asked)


@pytest.mark.parametrize(("mine", "yours", "both"), [("low", "high", -1), ("normal", "high", 0), ("high", "high", 1)])
def test_with_both_the_lower_priority_counts(world: World, pem: Any, mine: str, yours: str, both: int) -> None:
    """And the model's queue sees it."""
    key = world.key("ada")
    ada = Principal(name="ada", priority=mine)
    line = Principal(name="line", identities=("cn:line-3",), priority=yours)
    asked = call(f"Key {key}", pem())
    grant = world.authenticator(ada, line, require="both").grant(asked)
    assert grant.priority == both
    context = Context(grant.name, 1.0, MemoryBudget(100).hold(0), asked, grant, "id")
    assert context.priority == both


def test_with_both_the_rights_intersect(world: World, pem: Any) -> None:
    """What only one of the two may use, they may not use together."""
    key = world.key("ada")
    authenticator = world.authenticator(
        Principal(name="ada", models=("cats", "dogs")),
        Principal(name="line", identities=("cn:line-3",), models=("dogs", "birds"), users=("u",)),
        require="both",
    )
    grant = authenticator.grant(keyed(key, pem()))
    allowed = [model for model in ("cats", "dogs", "birds") if grant.allows(ModelKey("u", "a", model))]
    assert allowed == ["dogs"]
    assert not grant.allows(ModelKey("other", "a", "dogs"))


def test_key_and_certificate_of_one_principal_count_once(world: World, pem: Any) -> None:
    """Its rate is not halved because it showed both."""
    key = world.key("line")
    line = Principal(name="line", identities=("cn:line-3",), requests_per_second=1, burst=2, concurrency=1)
    grant = world.authenticator(line, require="both").grant(keyed(key, pem()))
    assert grant.name == "line"
    for _ in range(2):
        with grant.admitted():
            assert grant.meters[0].in_flight == 1


# ---- what may be used ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "allowed"),
    [
        ({}, True),
        ({"models": ("m",)}, True),
        ({"models": ("x", "m*")}, True),
        ({"models": ("M",)}, False),
        ({"models": ()}, False),
        ({"models": ("?",), "apps": ("a",), "users": ("u",)}, True),
        ({"users": ("other",)}, False),
        ({"apps": ("b*",)}, False),
    ],
)
def test_a_principal_may_use_what_its_patterns_match(world: World, patterns: Any, allowed: bool) -> None:
    """User, app and model each; case counts."""
    key = world.key("ada")
    assert world.authenticator(Principal(name="ada", **patterns)).grant(keyed(key)).allows(MODEL) is allowed


def test_the_default_principal_may_be_restricted(world: World) -> None:
    """By giving it a section of its own."""
    key = world.key()
    assert not world.authenticator(Principal(name="default", models=("x",))).grant(keyed(key)).allows(MODEL)


def test_me_is_the_principals_user(world: World) -> None:
    """Or the appliance's own."""
    key = world.key("ada")
    assert world.authenticator(Principal(name="ada", user_id="lovelace")).grant(keyed(key)).user_id("x") == "lovelace"
    assert world.authenticator(Principal(name="ada")).grant(keyed(key)).user_id("x") == "x"


# ---- rate and concurrency --------------------------------------------------------------------------------------------


def requests_let_through(world: World, grant: Any, count: int) -> int:
    """How many of so many requests at this instant are let through."""
    passed = 0
    for _ in range(count):
        try:
            with grant.admitted():
                passed += 1
        except RateLimited:
            pass
    return passed


def grant_of(world: World, **limits: Any) -> Any:
    """A grant of a principal with these limits."""
    key = world.key("ada")
    return world.authenticator(Principal(name="ada", **limits)).grant(keyed(key))


def test_the_rate_is_held(world: World) -> None:
    """A second's worth at once, then as many as time brings."""
    grant = grant_of(world, requests_per_second=10)
    assert requests_let_through(world, grant, 30) == 10
    world.now = 0.55
    assert requests_let_through(world, grant, 30) == 5
    world.now = 100.0
    assert requests_let_through(world, grant, 30) == 10


def test_a_burst_is_as_large_as_configured(world: World) -> None:
    """More than a second's worth, or less."""
    assert requests_let_through(world, grant_of(world, requests_per_second=1, burst=7), 30) == 7
    assert requests_let_through(world, grant_of(world, requests_per_second=100, burst=2), 30) == 2


def test_a_rate_below_one_lets_one_through(world: World) -> None:
    """One request every ten seconds."""
    grant = grant_of(world, requests_per_second=0.1)
    assert [requests_let_through(world, grant, 2) for world.now in (0.0, 5.0, 11.0, 15.0)] == [1, 0, 1, 0]


def test_the_refusal_names_the_principal_and_the_limit(world: World) -> None:
    """So that the caller knows whom to ask for more."""
    grant = grant_of(world, requests_per_second=2.5, burst=1)
    assert requests_let_through(world, grant, 1) == 1
    with pytest.raises(RateLimited, match=r"'ada' exceeded its limit of 2\.5 requests per second"), grant.admitted():
        pass


def test_requests_at_once_are_limited(world: World) -> None:
    """And counted down however they end."""
    grant = grant_of(world, concurrency=2)
    with grant.admitted():
        with pytest.raises(KeyError), grant.admitted():
            raise KeyError
        with grant.admitted(), pytest.raises(RateLimited, match="2 requests at once"), grant.admitted():
            pass
    assert requests_let_through(world, grant, 5) == 5
    assert grant.meters[0].in_flight == 0


def test_a_refused_request_uses_up_nothing(world: World, pem: Any) -> None:
    """With two principals, neither is charged when the other is over its limit."""
    key = world.key("ada")
    authenticator = world.authenticator(
        Principal(name="line", identities=("cn:line-3",), requests_per_second=1, burst=5),
        Principal(name="ada", requests_per_second=1, burst=1),
        require="both",
    )
    grant = authenticator.grant(keyed(key, pem()))
    assert requests_let_through(world, grant, 10) == 1
    assert [meter.in_flight for meter in grant.meters] == [0, 0]
    assert requests_let_through(world, Grant(grant.meters[:1]), 10) == 4


def test_no_limits_are_no_limits(world: World) -> None:
    """The default."""
    assert requests_let_through(world, grant_of(world), 10_000) == 10_000


def test_principals_do_not_share_their_limits(world: World) -> None:
    """Each has its own; all keys of one share one."""
    keys = {name: [world.key(name) for _ in range(2)] for name in ("ada", "bob")}
    authenticator = world.authenticator(*(Principal(name=name, requests_per_second=3) for name in keys))
    for name in keys:
        passed = [requests_let_through(world, authenticator.grant(keyed(key)), 2) for key in keys[name]]
        assert passed == [2, 1]


def test_a_reload_keeps_the_counters_of_who_did_not_change(world: World) -> None:
    """Else a reload would be a way around the limit; a principal with new limits begins anew."""
    ada, bob = Principal(name="ada", requests_per_second=3), Principal(name="bob", requests_per_second=3)
    keys = [world.key("ada"), world.key("bob")]
    authenticator = world.authenticator(ada, bob)
    for key in keys:
        assert requests_let_through(world, authenticator.grant(keyed(key)), 5) == 3
    changed = bob.model_copy(update={"requests_per_second": 5.0})
    authenticator.configure(Config(auth=Auth(keys_file=world.path), principal=(ada, changed)))
    passed = [requests_let_through(world, authenticator.grant(keyed(key)), 9) for key in keys]
    assert passed == [0, 5]


def test_time_that_stands_still_or_jumps_is_no_gift(world: World) -> None:
    """The bucket never holds more than its size."""
    grant = grant_of(world, requests_per_second=5)
    total = 0
    for world.now in itertools.chain([0.0] * 5, [1e9] * 5):
        total += requests_let_through(world, grant, 20)
    assert total == 10


# ---- several fronts --------------------------------------------------------------------------------------------------


def fronts(world: World, count: int, *principals: Principal, slots: int = 8) -> list[Authenticator]:
    """So many authenticators that share limits."""
    shared = SharedLimits.create(count, slots)
    config = Config(auth=Auth(keys_file=world.path), principal=principals)
    return [
        Authenticator(
            config,
            KeyStore(world.path),
            clock=lambda: world.now,
            limits=SharedLimits.attach(os.dup(shared.segment.descriptor), index),
        )
        for index in range(count)
    ]


SECONDS = st.sampled_from([0.0, 0.001, 0.3, 0.5, 1.0, 7.0, 1000.0])


@given(
    st.sampled_from([0.1, 1, 3, 2.5, 1000]),
    st.sampled_from([0, 1, 5]),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 2), SECONDS, st.booleans()), max_size=60),
)
def test_fronts_admit_what_one_process_would(
    rate: float, burst: int, concurrency: int, steps: list[tuple[int, float, bool]]
) -> None:
    """Wherever a request comes and whenever a front looks: rate, burst and concurrency are those of one meter."""
    principal = Principal(name="ada", requests_per_second=rate, burst=burst, concurrency=concurrency)
    now = 1e6
    shared = SharedLimits.create(3)
    parts = [SharedLimits.attach(os.dup(shared.segment.descriptor), index) for index in range(3)]
    meters = [Meter(principal, lambda: now, shared) for shared in parts]
    alone = Meter(principal, lambda: now)
    flying: list[Meter] = []
    for index, seconds, leaves in steps:
        now += seconds
        for meter, others in ((alone, None), (meters[index], flying)):
            try:
                meter.check()
            except RateLimited:
                passed = False
            else:
                passed = True
                meter.take()
            if others is None:
                expected = passed
            elif passed:
                others.append(meter)
        assert passed == expected
        if leaves and flying:
            flying.pop(0).leave()
            alone.leave()
    for each in (shared, *parts):
        each.segment.close()


def test_all_keys_of_a_principal_share_its_limits_at_all_fronts(world: World) -> None:
    """And principals do not share theirs."""
    keys = {name: [world.key(name) for _ in range(2)] for name in ("ada", "bob")}
    doors = fronts(world, 2, *(Principal(name=name, requests_per_second=3) for name in keys))
    for name in keys:
        grants = [door.grant(keyed(key)) for door in doors for key in keys[name]]
        assert [requests_let_through(world, grant, 1) for grant in grants] == [1, 1, 1, 0]


def test_a_reload_at_one_front_keeps_what_all_have_counted(world: World) -> None:
    """Until the limits change; what is in flight leaves as it came."""
    key = world.key("ada")
    ada = Principal(name="ada", requests_per_second=3, concurrency=2)
    one, two = fronts(world, 2, ada)
    grants = [door.grant(keyed(key)) for door in (one, two)]
    with grants[0].admitted():
        fewer = ada.model_copy(update={"models": ("digits",)})
        one.configure(Config(auth=Auth(keys_file=world.path), principal=(fewer,)))
        again = one.grant(keyed(key))
        with again.admitted(), pytest.raises(RateLimited, match="2 requests at once"):
            grants[1].check()
    assert [requests_let_through(world, grant, 2) for grant in (grants[1], again)] == [1, 0]
    faster = ada.model_copy(update={"requests_per_second": 4.0})
    for door in (one, two):
        door.configure(Config(auth=Auth(keys_file=world.path), principal=(faster,)))
    assert [requests_let_through(world, door.grant(keyed(key)), 3) for door in (one, two)] == [3, 1]


def test_where_no_slot_is_left_each_front_has_its_part(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """At least one request; the sentence names the limit that is configured."""
    keys = [world.key(name) for name in ("ada", "bob")]
    principals = [Principal(name=name, requests_per_second=6, concurrency=1) for name in ("ada", "bob", "eve")]
    doors = fronts(world, 3, *principals, slots=1)
    assert len(caplog.records) == 3  # a word of each front
    assert [requests_let_through(world, door.grant(keyed(keys[0])), 9) for door in doors] == [6, 0, 0]
    assert [requests_let_through(world, door.grant(keyed(keys[1])), 9) for door in doors] == [2, 2, 2]
    grant = doors[0].grant(keyed(keys[1]))
    with pytest.raises(RateLimited, match="limit of 6 requests per second"):
        grant.check()
    world.now = 0.5
    with grant.admitted(), pytest.raises(RateLimited, match="limit of 1 requests at once"):
        grant.check()


def test_a_principal_without_limits_takes_no_slot(world: World) -> None:
    """Nor any time."""
    doors = fronts(world, 2, *(Principal(name=str(number)) for number in range(20)), slots=1)
    key = world.key("7")
    assert requests_let_through(world, doors[1].grant(keyed(key)), 1000) == 1000
    assert doors[1]._limits is not None
    assert doors[1]._limits.meter("somebody") is not None
