"""The pocket world: drawn images, benchmarks in the real layouts and a small BLIP, so that everything runs on a laptop."""
