"""Makes what the packages install and the code already knows: vendor configuration, man pages, shell completion, and
the schema of the status document.

    python packaging/generate.py

What comes out is committed, so that a build needs no interpreter for it; a test holds it in step with the code.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete
from pydantic import TypeAdapter

from appliance.cli import exits
from appliance.cli.main import cli
from appliance.core import config as configuration
from appliance.daemon.status import Status

HERE = Path(__file__).parent
PROGRAM = "appliance"


def outputs() -> dict[Path, str]:
    """Every generated file and its content."""
    return {
        HERE / "appliance.toml": configuration.example(),
        HERE / "man" / "appliance.1": command_page(),
        HERE / "man" / "appliance.toml.5": configuration_page(),
        HERE.parent / "docs" / "status.schema.json": status_schema(),
        **completions(),
    }


def status_schema() -> str:
    """JSON Schema of `/status.json`, from the classes that it is made of."""
    return json.dumps(TypeAdapter(Status).json_schema(mode="serialization"), indent=1) + "\n"


# ---- completion ------------------------------------------------------------------------------------------------------


class _Bash(BashComplete):
    """Bash's script, whatever bash is here: old ones are the reader's to avoid (4.4 is from 2016)."""

    @staticmethod
    def _check_version() -> None:
        pass


def completions() -> dict[Path, str]:
    """The scripts that shells source; Python starts when TAB is pressed, not before."""
    folder = HERE / "completion"
    kinds = {"appliance.bash": _Bash, "_appliance": ZshComplete, "appliance.fish": FishComplete}
    return {folder / name: kind(cli, {}, PROGRAM, "_APPLIANCE_COMPLETE").source() for name, kind in kinds.items()}


# ---- man pages -------------------------------------------------------------------------------------------------------

_HEAD = '.\\" -*- coding: utf-8 -*-\n.\\" Made by packaging/generate.py; change the code instead.'


def command_page() -> str:
    """appliance(1): every verb with its options, from click."""
    context = click.Context(cli, info_name=PROGRAM)
    lines = [
        _HEAD,
        '.TH APPLIANCE 1 "" "inference\\-appliance" "User Commands"',
        ".SH NAME",
        r"appliance \- Clarifai's predict API on your own hardware",
        ".SH SYNOPSIS",
        r".B appliance",
        r"[\fB\-\-config\fR \fIFILE\fR] \fICOMMAND\fR [\fIOPTIONS\fR]",
        ".SH DESCRIPTION",
        *_paragraphs(
            "Sets up, runs and looks after an inference appliance: a daemon that serves ONNX models through Clarifai's "
            "predict API. systemd runs it as inference-appliance.service, see inference-appliance(8)."
        ),
        *_options(cli, context),
        ".SH COMMANDS",
    ]
    for path, command in _commands(cli, context, ()):
        lines += _command(path, command)
    lines += [".SH EXIT STATUS"]
    for status, meaning, _ in exits.STATUSES:
        lines += [".TP", rf"\fB{status}\fR", _escaped(meaning)]
    lines += [
        ".PP",
        _escaped("The unit does not start the daemon again after 2, 3 and 5, which only an operator can mend."),
        ".SH ENVIRONMENT",
        ".TP",
        r"\fBAPPLIANCE_CONFIG\fR",
        "The configuration file, as \\fB\\-\\-config\\fR.",
        ".TP",
        r"\fBAPPLIANCE_\fISECTION\fB__\fIKEY\fR",
        "One setting, see \\fBappliance.toml\\fR(5).",
        ".SH FILES",
        ".TP",
        "/etc/inference\\-appliance/appliance.toml",
        "The configuration, see \\fBappliance.toml\\fR(5).",
        ".SH SEE ALSO",
        r"\fBinference\-appliance\fR(8), \fBappliance.toml\fR(5)",
    ]
    return "\n".join(lines) + "\n"


def _commands(
    group: click.Group, context: click.Context, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, click.Context(command, info_name=name, parent=context), (*path, name))
        else:
            yield (*path, name), command


def _command(path: tuple[str, ...], command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=path[-1])
    arguments = [param.make_metavar(context) for param in command.params if isinstance(param, click.Argument)]
    options = [r"[\fIOPTIONS\fR]"] if any(isinstance(param, click.Option) for param in command.params) else []
    words = [rf"\fB{PROGRAM} {_escaped(' '.join(path))}\fR", *options, *(rf"\fI{_escaped(a)}\fR" for a in arguments)]
    yield ".SS " + '"' + " ".join(words) + '"'
    yield from _paragraphs(command.help or "")
    yield from _options(command, context)


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for param in command.params:
        record = param.get_help_record(context) if isinstance(param, click.Option) else None
        if record is not None:
            flags, text = record
            yield ".TP"
            yield rf"\fB{_escaped(flags)}\fR"
            yield _escaped(text) or r"\&"


def configuration_page() -> str:
    """appliance.toml(5): every key with its meaning and default, from the models of the configuration."""
    lines = [
        _HEAD,
        '.TH APPLIANCE.TOML 5 "" "inference\\-appliance" "File Formats"',
        ".SH NAME",
        r"appliance.toml \- configuration of an inference appliance",
        ".SH DESCRIPTION",
        *_paragraphs(
            "TOML, read in layers; what is read later counts:\n\n"
            "1. /usr/lib/inference-appliance/appliance.toml, of the package: every key with meaning and default;\n\n"
            "2. /etc/inference-appliance/appliance.toml, or the file that --config or APPLIANCE_CONFIG names;\n\n"
            "3. conf.d/*.toml beside that one, in the order of their names; `appliance setup` writes 10-setup.toml;\n\n"
            "4. the credential appliance.toml, when systemd passes one (LoadCredentialEncrypted=): for secrets that "
            "shall not lie on the disk, such as tls.key_passphrase. What changes there needs a restart;\n\n"
            "5. variables APPLIANCE_SECTION__KEY of the environment, such as APPLIANCE_LOG__LEVEL=debug.\n\n"
            "[[principal]] and [[deployment]] tables of all files are put one behind the other. `appliance check` says "
            "what is wrong, `appliance config show` what is in force and where it came from. systemctl reload "
            "inference-appliance takes over what does not need a restart, and fails, with the last good state kept, "
            "when something is wrong.\n\n"
            "A key that was renamed is read by its old name for one version more, with a warning."
        ),
    ]
    for name, section in configuration.sections():
        table = name in configuration.SEVERAL
        lines += [
            f".SH [{'[' if table else ''}{name.upper()}]{']' if table else ''}",
            *_paragraphs(section.__doc__ or ""),
        ]
        for key, field in section.model_fields.items():
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            shown = "required" if field.is_required() else "unset" if default is None else configuration.toml(default)
            restart = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("restart")
            lines += [
                ".TP",
                rf"\fB{_escaped(key)}\fR (default: {_escaped(shown)})"
                if shown != "required"
                else rf"\fB{key}\fR (required)",
                _escaped((field.description or "") + (" Needs a restart." if restart else "")),
            ]
    lines += [
        ".SH SEE ALSO",
        r"\fBappliance\fR(1), \fBinference\-appliance\fR(8)",
    ]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a docstring; after \\b, click's mark, lines stay as they are."""
    for number, block in enumerate(re.split(r"\n\s*\n", textwrap.dedent(text).strip())):
        if number:
            yield ".PP"
        if block.startswith("\b"):
            yield from (".nf", *(_escaped(line) for line in block.splitlines()[1:]), ".fi")
        else:
            yield _escaped(" ".join(block.split()))


def _escaped(text: str) -> str:
    """Plain text for roff: no requests, no escapes, hyphens that can be copied."""
    text = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def main() -> None:
    """Write them."""
    for path, content in outputs().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
