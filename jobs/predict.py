"""Score every video below a folder or bucket prefix into Parquet, over the cluster; submitted again it goes on.

ray job submit --working-dir . -- python jobs/predict.py models:/NAME@champion s3://bucket/videos --out s3://bucket/scores
"""

import sys
from pathlib import Path

# The package comes from the folder that travels with the job; this folder's names must not shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from crossgate.cli import run_job  # noqa: E402

if __name__ == "__main__":
    run_job("predict", "--ray")
