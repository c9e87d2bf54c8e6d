"""Compressors: fewer visual tokens before the language model, one method a file."""
