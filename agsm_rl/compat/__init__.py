"""The names and callbacks of other libraries' trainers, on our own parts: a script moves over by its import alone."""
