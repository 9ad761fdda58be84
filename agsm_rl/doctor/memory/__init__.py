"""How much memory a recipe needs, without loading a weight."""
