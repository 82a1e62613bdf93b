"""A model made portable: by a name of the zoo, or from a diffusers folder."""
