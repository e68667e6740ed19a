"""The packaged model, its release, and what consumers load (no Ray, no DeepSpeed). See docs/registry.md."""
