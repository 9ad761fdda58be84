"""`agsm-rl report`: runs or a sweep as one HTML file that needs no network.

    eval_file.py   eval.json → verdicts by guidance
    load.py        run folders and sweeps → runs, variants, cells; what cannot be compared is refused
    compare.py     scores and paired differences with intervals
    history.py     metrics.jsonl and evaluations.jsonl → curves
    pictures.py    the single images with their verdicts
    recipes.py     the resolved recipes and what differs
    headline.py    what came out, in one sentence
    page.py        all of it into page.html.jinja, page.css and scripts/

The charts are Observable Plot's (on D3), embedded once: SVG that follows the page's colours, at 0.5 MB where plotly.js
takes 1.2 MB in its smallest build and 4.7 MB in Python's.
"""
