"""What runs on the other side of a pipe: one file that needs nothing but Python, put on a worker's path by the client."""
