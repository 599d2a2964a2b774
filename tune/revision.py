"""Which commit of this code runs."""

import subprocess
from pathlib import Path


def code_revision() -> str:
    """Git commit of this checkout, empty where there is none, as in a Ray job's working_dir."""
    found = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()
