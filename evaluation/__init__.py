"""What eval.py computes and shows."""
