"""The denoising loops, as generators, and which of them fits a model."""
