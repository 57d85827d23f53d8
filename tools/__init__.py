"""Entry points that a user runs."""
