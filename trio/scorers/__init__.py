"""Scorers: one number for every visual token, one method a file."""

from . import last_token_attention, objective_gradient, random

__all__ = ["last_token_attention", "objective_gradient", "random"]
