"""What runs underneath: images, features, files, processes, options, commands."""
