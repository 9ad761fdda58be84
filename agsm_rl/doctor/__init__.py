"""Before a run: does it fit (`memory/`), does everything learn, and is every switch exact?"""
