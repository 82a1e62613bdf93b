"""RALU's arithmetic: plans of mixed resolution, patches and their edges, the noise between stages, caching (arXiv
2507.08422)."""
