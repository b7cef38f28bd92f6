"""Paths from a leaf to a root, and the sentence for each way they break."""

from datetime import datetime, timedelta

import pytest
from cryptography import x509

from appliance.pki.chain import find_path, verify
from appliance.pki.inspect import is_self_signed

SHA1_CHAIN = b"""\
-----BEGIN CERTIFICATE-----
MIIBjjCCATOgAwIBAgIUQbfxQ/ikJ1VSmEg+hH7pqixqGQ8wCgYIKoZIzj0EAwIw
EzERMA8GA1UEAwwIT2xkIFJvb3QwIBcNMjYxMTIxMDEzNTMyWhgPMjEyNjEwMjgw
MTM1MzJaMBMxETAPBgNVBAMMCE9sZCBSb290MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAE4mC7k7p8d0eZvSFdDMUe6ULYj5g970f+8JssoO/ByQBwSZClSSlSUMTo
x3oK9wI6Spw4oQSWFAxXP9VaNNu19aNjMGEwHQYDVR0OBBYEFCXsQWwP7d/+L8rY
/4auTLC5IByfMB8GA1UdIwQYMBaAFCXsQWwP7d/+L8rY/4auTLC5IByfMA8GA1Ud
EwEB/wQFMAMBAf8wDgYDVR0PAQH/BAQDAgIEMAoGCCqGSM49BAMCA0kAMEYCIQCy
pYeOTI3VnlLy6MO9SDhP4mUMugvyodv9iyLW8u89EQIhAM06toJHmB03iILcOZ+w
NeG/gNKeIHplvVWkIB+tGWPR
-----END CERTIFICATE-----
-----BEGIN CERTIFICATE-----
MIIBGzCBwwIUYC35Sh3MABD6X0wsRaaKFkg0Gm8wCQYHKoZIzj0EATATMREwDwYD
VQQDDAhPbGQgUm9vdDAgFw0yNjExMjEwMTM1MzJaGA8yMTI1MDYxNTAxMzUzMlow
DjEMMAoGA1UEAwwDb2xkMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEJO2YqSCt
gRqrDEXtNa6eQGQX1mN8cXw4lH5hjY98su7wfNUmF7yE6OhNHwMgXL3bC9LmnI9z
yO6cgXXdwW5z9TAJBgcqhkjOPQQBA0gAMEUCIQCr7QxvTmurr90bTGFKvp+o8ggR
i+1NimTVAgqrndvisAIgTESsgoLKWMYFloEFXsgrEQnTYxyl6VGLYmoeuegJhFQ=
-----END CERTIFICATE-----
"""

SHA1_ROOT = b"""\
-----BEGIN CERTIFICATE-----
MIIBfzCCASagAwIBAgIUNeN6p2mwTiC32ZvrwZOgx+1BoJ4wCQYHKoZIzj0EATAV
MRMwEQYDVQQDDApPbGRlciBSb290MCAXDTI2MTEyMTAxMzcxN1oYDzIxMjYxMDI4
MDEzNzE3WjAVMRMwEQYDVQQDDApPbGRlciBSb290MFkwEwYHKoZIzj0CAQYIKoZI
zj0DAQcDQgAEdrx6vNji/ordxCSfeSM6PgDmPdeCTMnIR0VZLYSX4i5LgjcaJSuk
CmndamOT9f9fcefnLzhcB7NqBeabUBrq/qNTMFEwHQYDVR0OBBYEFCKypvUGR5kq
fxVniWsq1vyJ5hydMB8GA1UdIwQYMBaAFCKypvUGR5kqfxVniWsq1vyJ5hydMA8G
A1UdEwEB/wQFMAMBAf8wCQYHKoZIzj0EAQNIADBFAiAyG+lgcTa/W/M1dpw/AijC
Tm3dZH2a5OFOzl3x/xkPagIhAITPNrDBqQOxlS8kfm8GPoPpiqmVqVm8cMzjbIjq
vGY9
-----END CERTIFICATE-----
"""


def test_a_path_is_found_whatever_the_order_and_without_the_root(maker, now: datetime) -> None:
    root = maker.root()
    upper = maker.intermediate(root, "Upper")
    lower = maker.intermediate(upper, "Lower")
    leaf = maker.server(lower)
    pool = [root.certificate, upper.certificate, maker.root("Other").certificate, lower.certificate]
    path = find_path(leaf.certificate, pool, [root.certificate], now)
    assert path.problems == ()
    assert path.intermediates == (lower.certificate, upper.certificate)
    assert path.certificates[-1] == root.certificate


def test_a_missing_intermediate_is_named(maker, now: datetime) -> None:
    root = maker.root()
    leaf = maker.server(maker.intermediate(root))
    (problem,) = verify([leaf.certificate], [root.certificate], now)
    assert "'Corp Issuing' is neither in the chain nor in the trust bundle" in problem


def test_another_ca_is_told_from_one_of_the_same_name(maker, now: datetime) -> None:
    leaf = maker.server(maker.root())
    (unknown,) = verify([leaf.certificate], [maker.root("Other").certificate], now)
    assert "'Corp Root' is neither" in unknown
    (impostor,) = verify([leaf.certificate], [maker.root().certificate], now)
    assert "same name and another key" in impostor


def test_a_root_in_the_chain_is_not_trusted_for_being_there(maker, now: datetime) -> None:
    root = maker.root()
    leaf = maker.server(root)
    (problem,) = verify([leaf.certificate, root.certificate], [maker.root("Other").certificate], now)
    assert "not in the trust bundle" in problem


def test_an_intermediate_alone_is_no_anchor(maker, now: datetime) -> None:
    middle = maker.intermediate(maker.root())
    leaf = maker.server(middle)
    (problem,) = verify([leaf.certificate], [middle.certificate], now)
    assert "its root 'Corp Root' is not in the trust bundle" in problem


def test_a_self_signed_leaf_is_told(maker, now: datetime) -> None:
    leaf = maker.make("edge", None)
    (problem,) = verify([leaf.certificate], [maker.root().certificate], now)
    assert "is self-signed" in problem


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"end": timedelta(days=-1)}, "expired"),
        ({"start": timedelta(days=1)}, "not valid before"),
        ({"bits": ("cRLSign",)}, "keyCertSign"),
        ({"path_length": 0}, "allows 0 CAs below it"),
    ],
)
def test_a_root_that_may_not_sign_is_told(maker, now: datetime, changes, says: str) -> None:
    root = maker.root(**changes)
    middle = maker.intermediate(root)
    problems = verify([maker.server(middle).certificate, middle.certificate], [root.certificate], now)
    assert len(problems) == 1
    assert says in problems[0]


def test_a_leaf_cannot_sign_another(maker, now: datetime) -> None:
    root = maker.root()
    first = maker.server(root)
    second = maker.server(first, "evil.example.com")
    problems = verify([second.certificate, first.certificate], [root.certificate], now)
    assert any("not a certificate authority" in problem for problem in problems)


def test_sha1_signatures_are_refused() -> None:
    """The library signs no SHA-1 any more, so these two were made with the openssl command; valid for a century."""
    root, leaf = x509.load_pem_x509_certificates(SHA1_CHAIN)
    (problem,) = verify([leaf], [root], leaf.not_valid_before_utc + timedelta(days=1))
    assert "SHA1" in problem


def test_a_root_that_signed_itself_with_sha1_is_still_a_root() -> None:
    (root,) = x509.load_pem_x509_certificates(SHA1_ROOT)
    assert is_self_signed(root)


def test_of_two_paths_the_good_one_is_taken(maker, now: datetime) -> None:
    """A root renewed with the same name and key, the old one expired."""
    old = maker.root(end=timedelta(days=-1))
    new = maker.root(key=old.key)
    leaf = maker.server(old)
    for anchors in ([old.certificate, new.certificate], [new.certificate, old.certificate]):
        assert verify([leaf.certificate], anchors, now) == []


def test_cross_signed_loops_end(maker, now: datetime) -> None:
    one, two = maker.root("One"), maker.root("Two")
    one_by_two = maker.make("One", two, ca=True, key=one.key)
    two_by_one = maker.make("Two", one, ca=True, key=two.key)
    leaf = maker.server(one)
    loop = [leaf.certificate, one_by_two.certificate, two_by_one.certificate]
    (problem,) = verify(loop, [maker.root("Other").certificate], now)
    assert "circle" in problem
    assert verify(loop, [two.certificate], now) == []


def test_name_constraints_are_kept(maker, now: datetime) -> None:
    limits = x509.NameConstraints([x509.DNSName("example.com")], None)
    root = maker.root()
    middle = maker.intermediate(root, more=[limits])
    inside, outside = maker.server(middle), maker.server(middle, "edge.example.org")
    assert verify([inside.certificate, middle.certificate], [root.certificate], now) == []
    (problem,) = verify([outside.certificate, middle.certificate], [root.certificate], now)
    assert "name constraints" in problem
