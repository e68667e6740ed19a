"""Lets the tests of this room import `tiny_run`, which their subprocesses run as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
