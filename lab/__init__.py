"""Research that ships in no wheel: how the zoo was trained."""
