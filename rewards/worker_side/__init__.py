"""The worker's side of a pipe: one file that needs nothing but Python, and that the client puts on its path."""
