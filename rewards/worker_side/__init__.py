"""What runs on the other side of a pipe: one file that needs nothing but Python, which the client puts on its path."""
