"""What passes between parts: tokens, contexts, probes, and the base of every part. Knows no method and no family."""
