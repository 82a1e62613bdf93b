"""Readers of what others wrote: checkpoints, diffusers folders, VAEs, text encoders, tokenizers. Nothing here runs code of theirs."""
