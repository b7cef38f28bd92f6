"""Certificates and security: what ends when, who is refused and why."""

from grafana_foundation_sdk.builders import dashboard
from panels import (
    DAYS_LEFT,
    FAILED,
    GOOD_AT_NOUGHT,
    bars,
    days_until,
    grown,
    lines,
    number,
    of,
    quantile,
    query,
    rate,
    section,
    sheet,
    total,
)

CREDENTIALS = 'code=~"11.*"'
"""Clarifai's codes of calls that were refused for their credentials, their rights or their rate."""


BAD = 'reason=~"ssrf|malformed|too_large|batch_limit|decode|download"'


def build() -> dashboard.Dashboard:
    """The dashboard."""
    made = sheet("security", "Certificates and security", "What ends when, who is refused and why.")
    for part in (certificates, refusals, audit, connections):
        part(made)
    return made


def certificates(made: dashboard.Dashboard) -> None:
    """What has to be renewed."""
    left = days_until("certificate_expiry_timestamp_seconds")
    due = days_until("crl_next_update_seconds")
    section(
        made,
        "Certificates, revocation lists, keys",
        bars(
            "Certificates end in",
            "By appliance and role: server, those of other names (sni:…), and the clients' authority that ends first.",
            "d",
            query(left, "{{instance}} {{role}}", now=True),
            colours=DAYS_LEFT,
            span=9,
            runbook="certificate-expires",
        ),
        bars(
            "Revocation lists are due in",
            "By issuer. With crl_policy = strict nobody is let in past that moment.",
            "d",
            query(due, "{{instance}} {{issuer}}", now=True),
            colours=DAYS_LEFT,
            span=9,
            runbook="revocation-list-due",
        ),
        number(
            "Failed reloads",
            "Changed certificate files that were not taken over, in the time shown; those before are in force.",
            "short",
            total("", grown("certificate_reloads_total", FAILED)),
            colours=GOOD_AT_NOUGHT,
            height=8,
            decimals=0,
            runbook="reload-failed",
        ),
        number("Keys", "That are valid now, by the appliance that has most.", "short", f"max({of('keys')})", height=8),
        lines(
            "Days left of certificates",
            "By appliance and role: a jump up is a renewal.",
            "d",
            query(left, "{{instance}} {{role}}"),
            span=12,
            height=6,
            runbook="certificate-expires",
        ),
        lines(
            "Reloads",
            "Of certificate files, and of the configuration: how often in five minutes.",
            "short",
            query(total("result", f"increase({of('certificate_reloads_total')}[5m])"), "certificates {{result}}"),
            query(total("result", f"increase({of('config_reloads_total')}[5m])"), "configuration {{result}}"),
            span=12,
            height=6,
            runbook="reload-failed",
        ),
    )


def refusals(made: dashboard.Dashboard) -> None:
    """Calls that were refused."""
    section(
        made,
        "Refused calls",
        lines(
            "Credentials and rights, by code",
            "11102: none; 11008: a key that is not known; 11007: not permitted; 11005: too fast. A second.",
            "reqps",
            query(total("code", rate("requests_total", CREDENTIALS)), "{{code}}"),
            stacked=True,
        ),
        lines(
            "Credentials refused, by appliance",
            "A second. One that is asked much with wrong keys is being tried out, or has a client with an old key.",
            "reqps",
            query(total("instance", rate("rejected_total", 'reason="auth"')), "{{instance}}"),
        ),
        lines(
            "Bad requests and URLs",
            "ssrf: a URL that must not be fetched; malformed, too_large, batch_limit, decode: what is sent is wrong. "
            "A second.",
            "reqps",
            query(
                total("reason", rate("rejected_total", BAD)),
                "{{reason}}",
            ),
            stacked=True,
        ),
    )


def audit(made: dashboard.Dashboard) -> None:
    """Whether what happens is written down."""
    section(
        made,
        "Audit log",
        number(
            "Cannot be written",
            "Appliances whose audit log cannot be written now.",
            "short",
            f"sum(1 - {of('audit_writable')})",
            colours=GOOD_AT_NOUGHT,
            span=6,
            height=6,
            runbook="audit-not-written",
        ),
        number(
            "Records lost",
            "That could not be written, and for which there was no room to wait, in the time shown.",
            "short",
            total("", grown("audit_lost_records_total")),
            colours=GOOD_AT_NOUGHT,
            span=6,
            height=6,
            decimals=0,
            runbook="audit-not-written",
        ),
        lines(
            "Records",
            "Written, a second, by appliance.",
            "short",
            query(total("instance", rate("audit_records_total")), "{{instance}}"),
            span=12,
            height=6,
        ),
    )


def connections(made: dashboard.Dashboard) -> None:
    """Who connects, and who gets no further."""
    section(
        made,
        "Connections",
        lines(
            "Open connections",
            "By appliance; connections.max bounds them.",
            "short",
            query(total("instance", of("connections")), "{{instance}}"),
            span=6,
        ),
        lines(
            "New connections",
            "Established, a second. Many of them cost more than the calls: let clients keep theirs.",
            "short",
            query(total("instance", rate("connections_accepted_total")), "{{instance}}"),
            span=6,
        ),
        lines(
            "Refused connections",
            "Closed before they were established, by reason, a second.",
            "short",
            query(total("reason", rate("connections_refused_total")), "{{reason}}"),
            span=6,
            stacked=True,
        ),
        lines(
            "TLS handshake",
            "From accept to its end: half of them, and 99 of 100, are within these.",
            "s",
            query(quantile(0.5, "", "handshake_seconds"), "50 %"),
            query(quantile(0.99, "", "handshake_seconds"), "99 %"),
            span=6,
        ),
    )
