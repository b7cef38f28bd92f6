"""Which form of which stock client works against the appliance: the rows of docs/clients.md."""

from dataclasses import dataclass, field

_HEAD = """\
# Clients

Which forms of which stock client work against the appliance, over TLS with a custom root certificate. Every row was
proven by a test in `tests/clients/` in the run that wrote this page; "not possible" says why, and a test has shown it.
How to write each of them: [sdk.md](sdk.md).
"""


@dataclass
class Matrix:
    """Rows by client and form, and the versions that were driven.

    Attributes:
        rows: (client, form) → "" for pass, else why it is not possible.
        versions: client → what its packages said of themselves.
    """

    rows: dict[tuple[str, str], str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def row(self, client: str, form: str, *, why: str = "") -> None:
        """The running test proves this form, or, with `why`, that it cannot work.

        Args:
            client: stable name, the client's own version in it only where several are driven ("Python SDK 10.11.1").
            form: what its user writes, in backticks where that is code.
        """
        assert (client, form) not in self.rows, f"{client}: {form} is proven twice"
        self.rows[client, form] = why

    def version(self, client: str, text: str) -> None:
        """What the client's packages say of themselves: "clarifai 12.5.0, grpcio 1.85.1"."""
        self.versions[client] = text

    def adopt(self, other: "Matrix") -> None:
        """Take over another one's rows; the same form may be proven over several transports."""
        self.rows |= other.rows
        self.versions |= other.versions

    def page(self) -> str:
        """docs/clients.md."""
        parts = [_HEAD]
        for client in sorted({client for client, _ in self.rows}):
            version = f"\nIn this run: {self.versions[client]}.\n" if client in self.versions else ""
            parts.append(f"\n## {client}\n{version}\n| form | outcome |\n| --- | --- |\n")
            parts += [
                f"| {_cell(form)} | {_outcome(why)} |\n"
                for (name, form), why in sorted(self.rows.items())
                if name == client
            ]
        return "".join(parts)

    def same_rows(self, page: str) -> bool:
        """Whether a page has these rows; versions of what a distribution brings may differ."""
        return _rows(self.page()) == _rows(page)


def _rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(("| ", "## "))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _outcome(why: str) -> str:
    return f"not possible: {_cell(why)}" if why else "pass"
