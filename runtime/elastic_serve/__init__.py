"""Pictures over HTTP: many people, one device, budgets that keep the deadline.

`scheduler` decides what runs next and at which budget, `together` lets drawings share a run, `engine` drives both on a thread of its own,
and `app` is the thin HTTP around it. No torch; bundles are opened by `elastic_runtime`.
"""
