"""Cost of a run on other hardware, from compiling its train step ahead of time."""
