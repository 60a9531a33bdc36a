"""Metrics and reports for eval.py and analyze.py."""
