"""Compressors: fewer visual tokens on the encoder side, one method a file."""
