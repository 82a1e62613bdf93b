"""DC-DiT: a router keeps the tokens that matter (arXiv 2603.06351)."""
