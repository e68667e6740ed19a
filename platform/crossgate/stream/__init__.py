"""Many clips: storage, shards, index, schedule, loader. Knows nothing of models."""
