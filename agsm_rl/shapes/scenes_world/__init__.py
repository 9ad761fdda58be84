"""The scenes world: eight shapes, eight colours and two sizes, with requirements that training never shows.

What a prompt can ask for and its drawing (requirements.py), which requirements are held out (splits.py), and the words
(captions.py). `agsm_rl.shapes.worlds.SCENES` puts them together.
"""
