"""GenEval as a reward (arXiv 2310.11513): its prompts and classes, rules, and the detector that they judge by."""
