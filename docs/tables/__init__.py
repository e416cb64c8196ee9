"""The tables of the docs, from docs/results/*.json: each a function that returns its markdown."""
