"""The official reward packages, each in an environment of its own: a script with inline metadata, and its lock.

The scripts run over there and import nothing of ours but agsm_rl_worker.py; the folder holds nothing else, because it is
the first place where they look for modules. Write the locks anew: `python -m agsm_rl_rewards.worker.environment SCRIPT`.
"""
