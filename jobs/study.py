"""Compare every gate with uniform averaging on the frozen encoders of a pretrained run.

ray job submit --working-dir . -- python jobs/study.py --config jobs/recipes/study.yaml finetune.init=RUN
"""

import sys
from pathlib import Path

# The package comes from the folder that travels with the job; this folder's names must not shadow others.
sys.path[0] = str(Path(__file__).resolve().parents[1] / "platform")

from crossgate.cli import run_job  # noqa: E402

if __name__ == "__main__":
    run_job("study")
