"""The official reward packages, each in an environment of its own: a script with inline metadata, and its lock.

The scripts run over there and import nothing of ours but agsm_rl_worker.py; they look for modules in this folder first,
so that no file here may have a package's name. New locks: `python -m agsm_rl_rewards.worker.environment SCRIPT`.
"""
