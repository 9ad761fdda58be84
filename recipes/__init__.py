"""The shipped recipes, installed as the package `agsm_rl_recipes` so that `agsm-rl train builtin:agsm` finds them."""
