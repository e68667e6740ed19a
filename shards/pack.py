"""Pack a manifest of videos into shards over a Ray cluster; a resubmitted job goes on where it was stopped.

ray job submit --working-dir . -- python shards/pack.py /shared/videos/manifest.csv s3://bucket/shards --seconds 2
"""

import sys
from pathlib import Path

# The package comes from the folder that travels with the job; this folder's names must not shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from crossgate.cli import run_job  # noqa: E402

if __name__ == "__main__":
    run_job("pack", "--ray")
