"""A drawing under way: a request checked against its bundle, and the loop that a policy steers. One file for each kind
of model."""
