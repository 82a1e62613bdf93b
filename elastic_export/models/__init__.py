"""The model zoo: one file a family, and the trained samples in `pretrained/`."""
