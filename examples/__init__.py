"""Programs that use the files above: start one with `python -m examples.NAME` in the root folder."""
