"""Posting usage: over real TLS, to a receiver that fails in every way; once it took a report, that one is over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestrator.connect_proxy import ConnectProxy
from support.appliance import Pki, make_pki
from support.usage_receiver import CUT, SILENCE, Receiver, answer
from support.waiting import eventually_async

from appliance.core.config import Config, Orchestrator
from appliance.core.metrics import Metrics
from appliance.core.usage import Amounts, UsageKey
from appliance.orchestrator import usage_reports
from appliance.orchestrator.usage_reports import NotTaken, Reporter, asked_wait_s, post
from appliance.orchestrator.usage_store import FILE, Period, Place, Report, UsageStore

KEY = UsageKey("line-3", "acme", "main", "digits", "1", "PostModelOutputs")
PAT = "0123456789abcdef"
REPORT = Report(1, "ab" * 16, b'{"records":[]}', full=False)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    """A root, a server and a client."""
    return make_pki(tmp_path_factory.mktemp("pki") / "tls", clients=("appliance",))


@pytest.fixture
def receiver(pki: Pki) -> Iterator[Receiver]:
    """One that is well, until it is told otherwise."""
    with Receiver(pki.folder) as made:
        yield made


@pytest.fixture
def settings(tmp_path: Path, pki: Pki, receiver: Receiver) -> Callable[..., Orchestrator]:
    """The section that reports there."""

    def make(**changes: Any) -> Orchestrator:
        usual = {"usage_url": receiver.url, "root_ca": pki.ca, "pat_file": tmp_path / "pat", "usage_interval_s": 1}
        return Orchestrator(**{**usual, **changes})

    return make


def failure(settings: Orchestrator) -> NotTaken:
    """Of a post."""
    with pytest.raises(NotTaken) as caught:
        asyncio.run(post(settings, REPORT))
    return caught.value


# ---- one post --------------------------------------------------------------------------------------------------------


def test_a_report_is_posted_as_it_is_with_its_key(receiver: Receiver, settings: Callable[..., Orchestrator]) -> None:
    asyncio.run(post(settings(), REPORT))
    (seen,) = receiver.posts
    assert (seen.path, seen.body) == ("/v1/usage", REPORT.body)
    assert seen.headers["idempotency-key"] == REPORT.id
    assert seen.headers["content-type"] == "application/json"
    assert "authorization" not in seen.headers, "there is no PAT"


def test_pat_certificate_and_proxy_are_those_of_the_section(
    pki: Pki, settings: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    (tmp_path / "pat").write_text(f"{PAT}\n")
    own = {"certificate": pki.folder / "clients/appliance.crt", "key": pki.folder / "clients/appliance.key"}
    with Receiver(pki.folder, pki.ca) as receiver, ConnectProxy() as proxy:
        asyncio.run(post(settings(usage_url=receiver.url, proxy=f"http://127.0.0.1:{proxy.port}", **own), REPORT))
        (seen,) = receiver.posts
        assert seen.headers["authorization"] == f"Key {PAT}"
        assert ("URI", "spiffe://test/appliance") in seen.certificate["subjectAltName"]
        assert proxy.asked == [f"CONNECT {receiver.url.split('/')[2]} HTTP/1.1"]
        assert "cannot be reached" in str(failure(settings(usage_url=receiver.url))), "without the certificate"


def test_what_the_environment_says_of_proxies_is_not_used(
    receiver: Receiver, settings: Callable[..., Orchestrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    asyncio.run(post(settings(), REPORT))
    assert len(receiver.posts) == 1


@pytest.mark.parametrize(
    ("said", "refused", "wait_s"),
    [
        (answer("500 Internal Server Error"), False, 0),
        (answer("503 Service Unavailable", "Retry-After: 7"), False, 7),
        (answer("429 Too Many Requests", "Retry-After: 999999"), False, 3600),
        (answer("408 Request Timeout"), False, 0),
        (answer("425 Too Early"), False, 0),
        (answer("400 Bad Request", body="no such field"), True, 0),
        (answer("401 Unauthorized"), True, 0),
        (answer("302 Found", "Location: /elsewhere"), True, 0),
        (answer("409 Conflict"), True, 0),
        (CUT, False, 0),
        (None, False, 0),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False, 0),
        (b"HTTP/1.1 200 OK\r\n" + b"X-Large: %s\r\n" % (b"a" * 200_000), False, 0),
    ],
)
def test_whatever_is_no_whole_2xx_is_not_taken(
    receiver: Receiver, settings: Callable[..., Orchestrator], said: bytes | None, refused: bool, wait_s: float
) -> None:
    receiver.answers.append(said)
    error = failure(settings())
    assert (error.refused, error.wait_s) == (refused, wait_s)
    assert receiver.url in str(error)
    assert len(receiver.posts) == 1, "redirects are not followed"


@pytest.mark.parametrize(
    "said", [answer("200 OK"), answer("202 Accepted", body="x"), b"HTTP/1.1 204 No Content\r\n\r\n"]
)
def test_any_2xx_takes_it(receiver: Receiver, settings: Callable[..., Orchestrator], said: bytes) -> None:
    receiver.answers.append(said)
    asyncio.run(post(settings(), REPORT))


def test_an_endless_answer_has_an_end(receiver: Receiver, settings: Callable[..., Orchestrator]) -> None:
    receiver.answers.append(b"HTTP/1.1 400 No\r\nConnection: close\r\n\r\n" + b"x" * 1_000_000)
    assert len(str(failure(settings()))) < 500


def test_a_receiver_that_says_nothing_is_given_up(
    receiver: Receiver, settings: Callable[..., Orchestrator], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_reports, "_POST_S", 0.3)
    receiver.answers.append(SILENCE)
    assert "did not answer" in str(failure(settings()))


def test_a_pat_that_the_receiver_repeats_is_not_shown(
    receiver: Receiver, settings: Callable[..., Orchestrator], tmp_path: Path
) -> None:
    (tmp_path / "pat").write_text(PAT)
    receiver.answers.append(answer("403 Forbidden", body=f"who is Key {PAT}?\n\x1b[31m"))
    sentence = str(failure(settings()))
    assert "who is Key ********?" in sentence
    assert "\x1b" not in sentence


def test_what_is_wrong_here_is_said(
    receiver: Receiver, settings: Callable[..., Orchestrator], tmp_path: Path, pki: Pki
) -> None:
    """The receiver hears of none of it; and nobody is asked for a passphrase at a terminal."""
    assert "root_ca" in str(failure(settings(root_ca=tmp_path / "nowhere")))
    enrolled = settings(api_base="https://localhost:1", user_id="acme")
    assert "PAT" in str(failure(enrolled))
    (tmp_path / "pat").write_text("two words")
    assert "one PAT" in str(failure(settings()))
    (tmp_path / "pat").unlink()
    broken = settings(certificate=pki.ca, key=pki.folder / "clients/appliance.key")
    assert failure(broken).refused
    other = make_pki(tmp_path / "other")
    assert "cannot be reached" in str(failure(settings(root_ca=other.ca)))
    receiver.hang_up()
    assert not failure(settings()).refused
    assert receiver.posts == []


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("", 0),
        ("0", 0),
        ("12", 12),
        ("3601", 3600),
        ("9" * 400, 3600),
        ("-5", 0),
        ("²", 0),
        ("soon", 0),
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30),
        ("Wed, 21 Oct 2015 07:00:00 GMT", 0),
        ("Wed, 21 Oct 2065 07:28:00 GMT", 3600),
        ("Wed, 99 Oct 2015 07:28:00 GMT", 0),
    ],
)
def test_how_long_a_receiver_asks_for(value: str, wait_s: float) -> None:
    assert asked_wait_s(value, 1445412480) == wait_s


# ---- one after the other ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def reporting(store: UsageStore, config: Config, metrics: Metrics) -> AsyncIterator[Reporter]:
    """Reports, until the block ends."""

    async def write() -> None:
        pass

    reporter = Reporter(config, store, write, metrics)
    task = asyncio.create_task(reporter.run())
    yield reporter
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def place(minute: int) -> Place:
    return Place(Period.MINUTE, 60 * minute, KEY)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[UsageStore]:
    """An empty one."""
    made = UsageStore(tmp_path / FILE)
    made.add({})
    yield made
    made.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits are a hundred times shorter."""
    monkeypatch.setattr(usage_reports, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(usage_reports, "_LONGEST_WAIT_S", 0.1)
    monkeypatch.setattr(Reporter, "_usual_pause_s", lambda self: 0.01)


@pytest.mark.usefixtures("quick")
async def test_every_record_arrives_however_the_receiver_fails(
    receiver: Receiver, settings: Callable[..., Orchestrator], store: UsageStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Each report is posted until it was taken, byte by byte the same; what was taken is not posted again."""
    caplog.set_level("INFO")
    metrics = Metrics()
    failures: list[bytes | None] = [None, CUT, answer("500 No"), answer("429 No"), answer("400 No"), b"nonsense"]
    receiver.answers.extend(failures * 3)
    store.add({place(minute): Amounts(calls=1, inputs=2) for minute in range(1200)})
    async with reporting(store, Config(orchestrator=settings()), metrics):
        await eventually_async(lambda: store.waiting() == 0)
        store.add({place(0): Amounts(calls=1, inputs=2)})
        await eventually_async(lambda: metrics.usage_reports.labels("taken").cells[0] == 4)
        await eventually_async(lambda: metrics.usage_unreported.labels().cells[0] == 0)
    assert receiver.sums("principal", "model") == {("line-3", "digits"): {"calls": 1201, "inputs": 2402}}
    assert [report["number"] for report in receiver.reports().values()] == [1, 2, 3, 4]
    assert len(receiver.posts) == 4 + len(failures) * 3
    counts = [metrics.usage_reports.labels(result).cells[0] for result in ("taken", "refused", "failed")]
    assert counts == [4, 3, 15]
    assert "usage reports are taken again" in caplog.text
    assert PAT not in caplog.text


@pytest.mark.usefixtures("quick")
async def test_a_receiver_that_comes_late_gets_it_all(
    receiver: Receiver, settings: Callable[..., Orchestrator], store: UsageStore
) -> None:
    receiver.hang_up()
    store.add({place(1): Amounts(calls=1)})
    metrics = Metrics()
    async with reporting(store, Config(orchestrator=settings()), metrics):
        await eventually_async(lambda: metrics.usage_reports.labels("failed").cells[0] > 3)
        store.add({place(2): Amounts(calls=1)})
        receiver.listen()
        await eventually_async(lambda: store.waiting() == 0)
    assert receiver.sums("principal") == {("line-3",): {"calls": 2, "inputs": 0}}


async def test_a_new_configuration_counts_at_once(
    receiver: Receiver, settings: Callable[..., Orchestrator], store: UsageStore
) -> None:
    """Nothing is reported until there is somebody to report to, and then nobody waits an hour."""
    store.add({place(1): Amounts(calls=1)})
    async with reporting(store, Config(orchestrator=Orchestrator(usage_interval_s=3600)), Metrics()) as reporter:
        await asyncio.sleep(0)
        reporter.configure(Config(orchestrator=settings(usage_interval_s=3600)))
        await eventually_async(lambda: store.waiting() == 0)
    assert len(receiver.posts) == 1


async def test_a_file_that_cannot_be_used_does_not_end_the_reporting(
    receiver: Receiver, settings: Callable[..., Orchestrator], tmp_path: Path, quick: None
) -> None:
    store, metrics = UsageStore(tmp_path / "later" / FILE), Metrics()
    async with reporting(store, Config(orchestrator=settings()), metrics):
        await eventually_async(lambda: metrics.usage_reports.labels("failed").cells[0] > 2)
        (tmp_path / "later").mkdir()
        store.add({place(1): Amounts(calls=1)})
        await eventually_async(lambda: len(receiver.posts) == 1)
    store.close()


def test_waits_grow_to_a_minute_with_full_jitter(store: UsageStore) -> None:
    """Never more than the bound; on average half of it; a refusal waits as long as the longest."""

    async def write() -> None:
        pass

    for attempt, most_s in enumerate([1, 2, 4, 8, 16, 32, 60, 60, 60]):
        waits = []
        for _ in range(300):
            reporter = Reporter(Config(), store, write, Metrics())
            reporter._failures = attempt
            waits.append(reporter._after(NotTaken("down")))
        assert 0 <= min(waits) < 0.1 * most_s
        assert 0.9 * most_s < max(waits) <= most_s
    reporter = Reporter(Config(), store, write, Metrics())
    assert max(reporter._after(NotTaken("no", refused=True)) for _ in range(100)) > 40
    assert reporter._after(NotTaken("busy", wait_s=100)) >= 100
