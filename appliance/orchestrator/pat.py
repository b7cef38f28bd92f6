"""The PAT that we show to the orchestrator: read from its file, and shown nowhere, not in a log, not in a sentence."""

from pathlib import Path

from appliance.core.errors import ConfigError
from appliance.core.files import file_error


def read_pat(path: Path) -> str:
    """The PAT of a file that holds nothing else. Raises: ConfigError: it cannot be read, or holds something else."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise file_error(
            error,
            f"The PAT cannot be read from {path} ({error.strerror}); `appliance orchestrator enroll` writes it, "
            "orchestrator.pat_file names it.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must hold one PAT and nothing else: it is no text.") from error
    return check_pat(text, str(path))


def check_pat(text: str, where: str) -> str:
    """The text, which is a PAT's. Raises: ConfigError: it cannot be one."""
    if not text or len(text) > 512 or not text.isascii() or any(c.isspace() or not c.isprintable() for c in text):
        raise ConfigError(f"{where} must hold one PAT and nothing else: one line of ASCII without spaces.")
    return text
