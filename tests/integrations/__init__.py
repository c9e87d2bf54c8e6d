"""Tests of plugins for other people's tools."""
