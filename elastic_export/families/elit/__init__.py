"""ELIT: an elastic latent interface around a transformer's core (arXiv 2603.12245): the interface, and a file for each backbone."""
