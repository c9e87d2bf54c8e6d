"""Reading a vision tower while it runs: signals, attention rows, merging inside."""
