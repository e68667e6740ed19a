"""One process of a machine that shares a cache: fetches every shard it can, in its own order, until all are there.

python cache_process.py URL FOLDER LIMIT FIRST NAME:BYTES:SHA256 ...
"""

from __future__ import annotations

import hashlib
import sys
import time

from crossgate.stream.cache import RemoteShard, ShardCache
from crossgate.stream.storage import open_store


def main() -> None:
    url, folder, limit, first, *described = sys.argv[1:]
    store, cache = open_store(url), ShardCache(folder, int(limit))
    shards = [RemoteShard(store, name, int(size), sha) for name, size, sha in (text.split(":") for text in described)]
    shards = shards[int(first) :] + shards[: int(first)]
    while not all([cache.add(shard) for shard in shards]):
        time.sleep(0.01)
    for shard in shards:
        [data] = cache.read(shard, [(0, shard.bytes)]) or [b""]
        assert hashlib.sha256(data).hexdigest() == shard.sha256
    print(cache.fetched)


if __name__ == "__main__":
    main()
