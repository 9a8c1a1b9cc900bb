"""The pocket world: drawn images, benchmarks in the real layouts, a small BLIP for a laptop."""
