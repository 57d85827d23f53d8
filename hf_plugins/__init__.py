"""Hugging Face side of the suite. Importing it loads nothing; each method is imported by name."""
