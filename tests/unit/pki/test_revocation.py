"""Revocation: which lists are taken, whom they and the trust bundle shut out, and when a verdict is made anew."""

import base64
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from appliance.core.errors import CertificateError
from appliance.pki import revocation
from appliance.pki.revocation import RevocationList, load_lists, parse_serial, read_lists
from appliance.pki.signing import Issued
from appliance.pki.trust import Trust

DAY = timedelta(days=1)


def crl(
    signer: Issued,
    *revoked: Issued,
    now: Any,
    number: int | None = 1,
    start: timedelta = -DAY,
    end: timedelta = 30 * DAY,
    reason: x509.ReasonFlags | None = None,
    more: tuple[tuple[x509.ExtensionType, bool], ...] = (),
    key: Any = None,
) -> bytes:
    """A list as PEM, with whatever is wrong with it."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(now + start)
        .next_update(now + end)
    )
    if number is not None:
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for extension, critical in more:
        builder = builder.add_extension(extension, critical)
    for each in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(each.certificate.serial_number).revocation_date(now)
        if reason is not None:
            entry = entry.add_extension(x509.CRLReason(reason), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key or signer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def make(now: Any) -> Callable[..., bytes]:
    return lambda *parts, **changes: crl(*parts, now=now, **changes)


class World:
    """A root, an intermediate below it, and a client of each; chains as TLS hands them over."""

    def __init__(self, maker: Any, pem: Callable[..., bytes], now: Any) -> None:
        self.now, self.pem = now, pem
        self.root = maker.root()
        self.issuing = maker.intermediate(self.root)
        self.ada = maker.client(self.issuing)
        self.bob = maker.client(self.root, "bob")
        self.leaf = pem(self.ada.certificate)
        self.chain = pem(self.issuing.certificate, self.root.certificate)

    def trust(self, *authorities: Issued, lists: bytes | None = None, strict: bool = False) -> Trust:
        bundle = [each.certificate for each in authorities]
        return Trust(bundle, None if lists is None else read_lists(lists, bundle), strict=strict)

    def problem(self, trust: Trust, after: timedelta = timedelta(0)) -> str | None:
        return trust.problem(self.leaf, self.chain, self.now + after)


@pytest.fixture
def world(maker: Any, pem: Callable[..., bytes], now: Any) -> World:
    return World(maker, pem, now)


# ---- which lists are taken -------------------------------------------------------------------------------------------


def test_a_list_is_read_with_its_signer(world: World, make: Callable[..., bytes]) -> None:
    (found,) = read_lists(make(world.root, world.bob, number=7), [world.issuing.certificate, world.root.certificate])
    assert found.issuer == world.root.certificate
    assert found.number == 7
    assert found.serials == {world.bob.certificate.serial_number}
    assert found.current(world.now)


def test_a_file_may_hold_lists_of_several_authorities(world: World, make: Callable[..., bytes]) -> None:
    pem = make(world.root) + b"a comment\xff\n" + make(world.issuing, world.ada) + world.leaf
    assert len(read_lists(pem, [world.root.certificate, world.issuing.certificate])) == 2


def test_of_two_lists_by_one_authority_the_later_counts(world: World, make: Callable[..., bytes]) -> None:
    """A hold that was released stays released, whatever their order."""
    old, new = make(world.root, world.bob, number=1), make(world.root, number=2)
    for pem in (old + new, new + old):
        (found,) = read_lists(pem, [world.root.certificate])
        assert found.number == 2


def part(name: str) -> tuple[x509.ExtensionType, bool]:
    """Makes a list one of several, by distribution point."""
    where = [x509.UniformResourceIdentifier(f"http://crl.example/{name}")]
    return x509.IssuingDistributionPoint(where, None, False, False, None, False, False), True


def test_the_parts_of_a_list_by_distribution_point_all_count(world: World, make: Callable[..., bytes]) -> None:
    pem = make(world.root, world.bob, more=(part("1"),)) + make(world.root, more=(part("2"),), number=9)
    assert len(read_lists(pem, [world.root.certificate])) == 2


def scope(**changes: object) -> tuple[x509.ExtensionType, bool]:
    """An issuing distribution point."""
    values: dict[str, object] = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**{**values, **changes}), True  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extension", "sentence"),
    [
        ((x509.DeltaCRLIndicator(1), True), "a delta list"),
        (scope(indirect_crl=True), "an indirect list"),
        (scope(only_contains_user_certs=True), "some certificates or reasons only"),
        (scope(only_contains_ca_certs=True), "some certificates or reasons only"),
        (scope(only_some_reasons=frozenset([x509.ReasonFlags.key_compromise])), "some certificates or reasons only"),
        ((x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True), r"\(1\.2\.3\.4\)"),
    ],
)
def test_a_list_that_is_not_whole_is_refused(
    world: World, make: Callable[..., bytes], extension: Any, sentence: str
) -> None:
    """To take it for a whole one would let in whom it leaves out."""
    with pytest.raises(CertificateError, match=sentence):
        read_lists(make(world.root, more=(extension,)), [world.root.certificate])


def test_a_list_of_an_unknown_authority_is_refused(world: World, make: Callable[..., bytes]) -> None:
    with pytest.raises(CertificateError, match=r"'Corp Issuing' belongs to no authority.*tls\.client_ca"):
        read_lists(make(world.issuing), [world.root.certificate])


def test_a_list_with_another_signature_is_refused(world: World, make: Callable[..., bytes]) -> None:
    """Its issuer's name alone proves nothing."""
    with pytest.raises(CertificateError, match="was not signed by the 'Corp Root'"):
        read_lists(make(world.root, key=world.ada.key), [world.root.certificate])


def test_an_authority_that_may_not_sign_lists_is_refused(maker: Any, make: Callable[..., bytes]) -> None:
    root = maker.root(bits=("keyCertSign",))
    with pytest.raises(CertificateError, match="misses cRLSign"):
        read_lists(make(root), [root.certificate])


def test_all_that_is_wrong_is_said(world: World, make: Callable[..., bytes]) -> None:
    pem = make(world.issuing) + make(world.root, key=world.ada.key)
    with pytest.raises(CertificateError, match=r"no authority.*was not signed"):
        read_lists(pem, [world.root.certificate])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no revocation list"),
        (b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "holds no revocation list"),
        (b"\x30\x82\x01\x00", "openssl crl -inform DER"),
        (b"-----BEGIN X509 CRL-----\nMII", "cut short"),
        (b"-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", "damaged"),
        (b"-----BEGIN X509 CRL-----\n\xff\xfe\n-----END X509 CRL-----\n", "damaged"),
        (b"-----BEGIN X509 CRL-----" * 100_000, "100000 revocation lists; the limit is 64"),
        (b"x" * (revocation.MAX_LIST_BYTES + 1), "bytes; at most"),
    ],
)
def test_a_hostile_file_is_a_sentence(content: bytes, sentence: str) -> None:
    """Never an exception of the library, and never a long wait."""
    began = time.monotonic()
    with pytest.raises(CertificateError, match=sentence):
        load_lists(content)
    assert time.monotonic() - began < 10


def test_a_list_with_any_byte_changed_is_refused(world: World, make: Callable[..., bytes]) -> None:
    """Or says the same as before: nothing in it can be forged."""
    good = load_lists(make(world.root, world.bob))[0].public_bytes(serialization.Encoding.DER)
    for place in range(len(good)):
        changed = good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]
        body = b"-----BEGIN X509 CRL-----\n%s-----END X509 CRL-----\n" % base64.encodebytes(changed)
        with pytest.raises(CertificateError):
            read_lists(body, [world.root.certificate])


@pytest.mark.parametrize(
    ("text", "serial"), [("ab", 0xAB), ("0xAB", 0xAB), ("AB:CD:01", 0xABCD01), ("  00ff ", 0xFF), ("7f" * 20, None)]
)
def test_serials_are_read_as_tools_print_them(text: str, serial: int | None) -> None:
    assert parse_serial(text) == (int(text, 16) if serial is None else serial)


@pytest.mark.parametrize("text", ["", "0", "00:00", "-5", "+5", "a_b", "xyz", "0x", "1" * 41, "١٢"])
def test_what_is_no_serial_is_refused(text: str) -> None:
    with pytest.raises(CertificateError, match="is not a serial number"):
        parse_serial(text)


# ---- whom it shuts out -----------------------------------------------------------------------------------------------


def test_without_lists_nobody_is_revoked(world: World) -> None:
    assert world.problem(world.trust(world.root)) is None


def test_a_revoked_leaf_is_refused_with_its_serial_day_and_reason(world: World, make: Callable[..., bytes]) -> None:
    lists = make(world.issuing, world.ada, reason=x509.ReasonFlags.key_compromise)
    sentence = world.problem(world.trust(world.root, world.issuing, lists=lists))
    serial = f"{world.ada.certificate.serial_number:x}"
    assert sentence == (
        f"The client certificate 'ada' (serial {serial}) was revoked by 'Corp Issuing' on 2026-06-01 12:00 UTC "
        "(keyCompromise)."
    )


def test_a_revoked_intermediate_takes_its_leaves_along(world: World, make: Callable[..., bytes]) -> None:
    lists = make(world.root, world.issuing)
    for bundle in ((world.root,), (world.root, world.issuing)):
        sentence = world.problem(world.trust(*bundle, lists=lists))
        assert sentence is not None
        assert "A CA above the client certificate, 'Corp Issuing'" in sentence


def test_the_serial_of_another_authority_is_somebody_else(world: World, make: Callable[..., bytes], maker: Any) -> None:
    """Serial numbers are unique by authority only."""
    other = maker.root("Other Root")
    trust = world.trust(world.root, other, lists=make(other, world.ada, world.issuing))
    assert world.problem(trust) is None


def test_a_namesake_with_another_key_revokes_nobody(world: World, make: Callable[..., bytes], maker: Any) -> None:
    namesake = maker.root("Corp Issuing")
    lists = make(namesake, world.ada)
    assert world.problem(world.trust(world.root, world.issuing, namesake, lists=lists)) is None


def test_the_list_of_a_renewed_authority_counts_for_the_old_certificate(
    world: World, make: Callable[..., bytes], maker: Any
) -> None:
    """Same name, same key: what signs is the same."""
    renewed = maker.root(key=world.root.key, end=timedelta(days=900))
    trust = Trust([renewed.certificate], read_lists(make(world.root, world.issuing), [renewed.certificate]))
    assert "was revoked" in str(world.problem(trust))


@pytest.mark.parametrize("strict", [True, False])
def test_a_list_past_its_time(world: World, make: Callable[..., bytes], strict: bool) -> None:
    """last_good goes on with it, strict refuses everyone of that authority; whom it names is refused by both."""
    lists = make(world.root, world.bob, end=DAY) + make(world.issuing)
    trust = world.trust(world.root, world.issuing, lists=lists, strict=strict)
    assert world.problem(trust) is None
    late = world.problem(trust, 2 * DAY)
    assert late is None or ("'Corp Root' are refused" in late and strict)
    assert (late is not None) == strict
    bob = world.pem(world.bob.certificate)
    assert "was revoked" in str(trust.problem(bob, world.pem(world.root.certificate), world.now + 2 * DAY))


def test_strict_wants_a_list_of_every_authority_of_the_chain(world: World, make: Callable[..., bytes]) -> None:
    both = make(world.root) + make(world.issuing)
    assert world.problem(world.trust(world.root, world.issuing, lists=both, strict=True)) is None
    for lists, missing in ((make(world.root), "Corp Issuing"), (make(world.issuing), "Corp Root")):
        sentence = world.problem(world.trust(world.root, world.issuing, lists=lists, strict=True))
        assert sentence is not None
        assert f"'{missing}' are refused while there is no current revocation list" in sentence


def test_strict_wants_no_list_of_an_authority_above_the_bundle(world: World, make: Callable[..., bytes]) -> None:
    """Connections bring a root that was in the bundle when they began; it is out now, and no list of it is taken."""
    trust = world.trust(world.issuing, lists=make(world.issuing), strict=True)
    assert world.problem(trust) is None


def test_strict_wants_every_part_of_a_list_to_be_current(world: World, make: Callable[..., bytes]) -> None:
    """Who was revoked lately may stand in the part that is past its time."""
    parts = make(world.root, more=(part("1"),), end=DAY) + make(world.root, more=(part("2"),))
    trust = world.trust(world.root, world.issuing, lists=parts + make(world.issuing), strict=True)
    assert world.problem(trust) is None
    assert "'Corp Root' are refused" in str(world.problem(trust, 2 * DAY))


def test_strict_takes_no_list_from_the_future(world: World, make: Callable[..., bytes]) -> None:
    lists = make(world.root, start=DAY) + make(world.issuing)
    trust = world.trust(world.root, world.issuing, lists=lists, strict=True)
    assert "are refused" in str(world.problem(trust))
    assert world.problem(trust, 2 * DAY) is None


# ---- the authorities -------------------------------------------------------------------------------------------------


def test_an_authority_taken_out_of_the_bundle_is_not_believed(world: World, maker: Any) -> None:
    """On live connections too: TLS asked at their beginning only."""
    sentence = world.problem(world.trust(maker.root("New Root")))
    assert sentence is not None
    assert "tls.client_ca does not hold that CA" in sentence
    assert "does not trust" in str(world.problem(world.trust()))


def test_an_intermediate_in_the_bundle_is_enough(world: World) -> None:
    """A site may believe one issuing CA, and not its whole root."""
    assert world.problem(world.trust(world.issuing)) is None
    bob = world.pem(world.bob.certificate)
    assert world.trust(world.issuing).problem(bob, world.pem(world.root.certificate), world.now) is not None


def test_a_namesake_in_the_bundle_is_not_the_authority(world: World, maker: Any) -> None:
    assert world.problem(world.trust(maker.root("Corp Root"))) is not None


def test_an_authority_that_expires_takes_its_leaves_along(maker: Any, pem: Callable[..., bytes], now: Any) -> None:
    root = maker.root(end=timedelta(days=5))
    ada = maker.client(root)
    trust = Trust([root.certificate])
    arguments = pem(ada.certificate), pem(root.certificate)
    assert trust.problem(*arguments, now) is None
    assert trust.problem(*arguments, root.certificate.not_valid_after_utc) is None
    sentence = trust.problem(*arguments, root.certificate.not_valid_after_utc + timedelta(microseconds=1))
    assert "'Corp Root' expired on" in str(sentence)
    assert trust.problem(*arguments, now) is None  # the clock was set back


def test_a_renewed_authority_in_the_bundle_keeps_its_leaves(maker: Any, pem: Callable[..., bytes], now: Any) -> None:
    """The old certificate in the chain may expire: the bundle has the new one, of the same key."""
    old = maker.root(end=timedelta(days=5))
    new = maker.root(key=old.key)
    ada = maker.client(old)
    trust = Trust([old.certificate, new.certificate])
    assert trust.problem(pem(ada.certificate), pem(old.certificate), now + 6 * DAY) is None


def test_a_root_above_the_trusted_authority_may_expire(maker: Any, pem: Callable[..., bytes], now: Any) -> None:
    """As in TLS, the way ends at the first certificate that is trusted."""
    root = maker.root(end=timedelta(days=5))
    issuing = maker.intermediate(root)
    chain = pem(issuing.certificate, root.certificate)
    trust = Trust([issuing.certificate, root.certificate])
    assert trust.problem(pem(maker.client(issuing).certificate), chain, now + 6 * DAY) is None


@pytest.mark.parametrize("chain", [b"x", b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n"])
def test_a_chain_that_cannot_be_read_is_refused(world: World, chain: bytes) -> None:
    assert "cannot be read" in str(world.trust(world.root).problem(world.leaf, chain, world.now))


class TestLeafAlone:
    """The fallback transport tells no chain."""

    def test_the_way_is_found_in_the_bundle(self, world: World, make: Callable[..., bytes]) -> None:
        trust = world.trust(world.root, world.issuing, lists=make(world.root, world.issuing))
        assert "'Corp Issuing'" in str(trust.problem(world.leaf, b"", world.now))

    def test_below_an_intermediate_not_known_here_the_handshake_is_believed(self, world: World) -> None:
        """As long as nobody wants revocation."""
        assert world.trust(world.root).problem(world.leaf, b"", world.now) is None

    def test_where_revocation_is_wanted_it_must_be_possible(self, world: World, make: Callable[..., bytes]) -> None:
        trust = world.trust(world.root, lists=make(world.root))
        assert "'Corp Issuing', must be in tls.client_ca" in str(trust.problem(world.leaf, b"", world.now))

    def test_without_a_bundle_nobody_is_believed(self, world: World) -> None:
        assert world.trust().problem(world.leaf, b"", world.now) is not None


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_a_certificate_seen_before_is_not_judged_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trust = world.trust(world.root)
    world.problem(trust)
    monkeypatch.setattr(trust, "_judge", lambda *_: pytest.fail("judged again"))
    world.problem(trust, DAY)


def test_what_is_remembered_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.pki.trust.MAX_VERDICTS", 10)
    trust = world.trust(world.root)
    for number in range(25):
        trust.problem(world.leaf + b"\n" * number, world.chain, world.now)
    assert len(trust._verdicts) <= 10


def test_a_long_list_is_looked_up_at_once(world: World, make: Callable[..., bytes]) -> None:
    """By hash, not by search: the set is made when the list is read."""
    (found,) = read_lists(make(world.root, world.bob), [world.root.certificate])
    assert isinstance(found, RevocationList)
    assert isinstance(found.serials, frozenset)
