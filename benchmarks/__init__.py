"""Measurements behind the tables in the documentation; each is one command."""
