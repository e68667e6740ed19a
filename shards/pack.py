"""Packs a manifest of videos into shards: `ray job submit --working-dir . -- python shards/pack.py CSV URL`."""

from crossgate.cli import run_job

if __name__ == "__main__":
    run_job("pack")
