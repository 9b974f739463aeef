"""What a run will cost on hardware that is not here, by compiling it for that hardware."""
