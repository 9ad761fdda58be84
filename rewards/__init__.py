"""The reward models, installed as `agsm_rl_rewards`: one file a reward, each `reward(images, prompts)` → scores [B].

They import nothing of the trainer. Each imports what it needs itself, so that one reward's packages burden no other.
"""
