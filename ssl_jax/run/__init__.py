"""A run on disk, and its processes: the folder, checkpoints, the log and what stops it."""
