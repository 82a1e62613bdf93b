"""The families of models: one file each, with its params, blocks, checkpoint keys, presets and cost."""
