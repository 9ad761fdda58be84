"""An example of a package that extends agsm-rl."""
