"""Packs a manifest of videos into shards: `ray job submit --working-dir . -- python shards/pack.py CSV URL`."""

import sys

from crossgate.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pack")
    main()
