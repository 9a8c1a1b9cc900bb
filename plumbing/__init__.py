"""What a reader does not need in order to understand ISA: files, images, features, processes, options, commands."""
