"""Plugins for other people's tools; each imports its tool only when that tool asks for it."""
