"""Drawn documents with known answers, for checkpoints of one's own: `docs/documents.md`."""
