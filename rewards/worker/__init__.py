"""Rewards that run elsewhere: in a process with its own requirements, behind HTTP, or on Ray actors.

`remote.py` asks and checks, whatever the link; `process.py`, `http_client.py` and `ray_pool.py` are the links.
"""
