"""The official reward packages, each in a separate environment: a script with inline metadata, and its lock.

The scripts run there and import nothing of ours but agsm_rl_worker.py and official_setup.py. They search this folder
first, so no file here may share its name with a package. To renew the locks:
`python -m agsm_rl_rewards.worker.environment SCRIPT`.
"""
