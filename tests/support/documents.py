"""Parts of documents that tests write: tables, and what stands between the comments that mark its place."""

from collections.abc import Sequence


def marks(what: str) -> tuple[str, str]:
    """The comments before and behind a part. Args: what: how it came about, "measured by make e2e"."""
    return f"<!-- {what}: begin -->", f"<!-- {what}: end -->"


def part(page: str, what: str) -> str:
    """What stands between the marks. Raises: ValueError: the page has none."""
    return _parts(page, what)[1]


def with_part(page: str, what: str, text: str) -> str:
    """The page with another text between the marks. Raises: ValueError: it has none."""
    begin, end = marks(what)
    before, _, after = _parts(page, what)
    return f"{before}{begin}{text}{end}{after}"


def _parts(page: str, what: str) -> tuple[str, str, str]:
    begin, end = marks(what)
    before, found, rest = page.partition(begin)
    inside, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise ValueError(f"the page needs the lines {begin} and {end}, between which this part goes")
    return before, inside, after


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
