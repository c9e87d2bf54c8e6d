"""Parity of serving engines with `trio.Pipeline` on transformers: ``python -m trio.testing.engines vllm MODEL``."""
