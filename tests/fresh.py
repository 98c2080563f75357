"""Code in processes that import tilewright anew, each under its own environment.

Importing torch takes seconds, so one process imports it and forks a child per job; the child sets its environment
and then runs the job's code, which imports tilewright.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

_SERVER = """
import json, os, signal, sys, traceback
import torch
for environment, code in json.loads(sys.stdin.read()):
    out, inside = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(inside, 1)
        os.dup2(inside, 2)
        os.close(out)
        signal.alarm(60)  # a hang is a failure, not a wait
        os.environ.update(environment)
        try:
            exec(compile(code, "job", "exec"), {"__name__": "__main__"})
            status = 0
        except Exception:  # SystemExit passes: the interpreter then shuts down as always
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the shutdown of an interpreter with torch takes a second
    os.close(inside)
    text = b""
    while chunk := os.read(out, 65536):
        text += chunk
    os.close(out)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, text.decode(errors="replace")]), flush=True)
"""


@dataclass(frozen=True)
class Result:
    status: int  # exit status; negative: the signal that ended it
    output: str  # stdout and stderr


def run_fresh(*jobs: tuple[dict[str, str], str], prefix: tuple[str, ...] = ()) -> list[Result]:
    """Run each (environment, code) in its own process; ``prefix`` is a command that starts the first one."""
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "ignore", "-c", _SERVER],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the process that runs fresh imports failed: {done.stderr}")
    return [Result(*json.loads(line)) for line in done.stdout.splitlines()]
