"""Runs inside an environment with a stock `clarifai` command: many invocations, each a process of its own.

Usage: script_cli.py CALLS; CALLS is a JSON list of [name, arguments, variables, folder, stdin]. Prints a JSON object:
name → [exit code, stdout, stderr]. What the command's start script does is done here once; each call is forked from
there, because most of the time of a call is the imports.
"""

import importlib
import io
import json
import os
import sys
import tempfile

from clarifai.cli import base
from clarifai.client.auth import stub

for module in ("clarifai.cli.model", "clarifai.client.user", "clarifai.client.model", "clarifai.client.deployment"):
    importlib.import_module(module)
_helper, _attempts, *_others = stub.create_stub.__defaults__
stub.create_stub.__defaults__ = (_helper, 1, *_others)  # else ten tries, five seconds apart


def call(arguments, variables, folder, stdin):
    """Run the command, as its start script does."""
    streams = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 - the process is short
    streams[0].write(stdin.encode())
    streams[0].seek(0)
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(number, mode, closefd=False)) for number, mode in enumerate("rww")
        )
        os.chdir(folder)
        os.environ.update(variables)
        sys.argv = ["clarifai", *arguments]
        code = 1
        try:
            getattr(base, "main", base.cli)()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException as error:
            # Not the old SDKs' own hook: it draws all local variables, which takes seconds.
            sys.__excepthook__(type(error), error, error.__traceback__)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for stream in streams:
        stream.seek(0)
    return [code, *(stream.read().decode() for stream in streams[1:])]


print(json.dumps({name: call(*arguments) for name, *arguments in json.loads(sys.argv[1])}))
