"""`agsm-rl report`: runs or a sweep as one HTML file that needs no network.

    eval_rows.py   the rows of an evaluation → a figure per image
    figures.py     what an evaluation says as figures alone
    eval_file.py   eval.json → suites by guidance, figures, and what was not understood
    runs.py        one run folder, one file of `agsm-rl eval --json`, one sweep
    load.py        these as variants, suite by suite; what cannot be compared is refused
    views.py       the guidance at which models are compared
    requirements.py  what prompts ask for, which decides what resembles what
    compare.py     scores and paired differences with intervals
    findings.py    all of them, each estimated once
    history.py     metrics.jsonl and evaluations.jsonl → curves
    pictures.py    the single images with what they are worth
    recipes.py     the resolved recipes and what differs
    endpoints.py   a study's primary endpoints, adjusted by Holm
    headline.py    what came out, in one sentence
    overview.py    every score in one table
    texts.py       figures as text
    page.py        all of it into page.html.jinja, page.css and scripts/

The charts are Observable Plot's (on D3), embedded once: SVG that follows the page's colours, at 0.5 MB where plotly.js
takes 1.2 MB in its smallest build and 4.7 MB in Python's.
"""
