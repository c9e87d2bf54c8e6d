"""What shrinks a running forward: hooks, positions, masks, caches. Knows no method and no model family."""
