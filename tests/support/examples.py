"""The files of examples/, run as their readers do."""

import os
import subprocess
import sys

from tests.support.program import HANGS, ROOT

EXAMPLES = ROOT / "examples"


def python(*arguments):
    """What Python prints with these arguments; an error where it fails."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
