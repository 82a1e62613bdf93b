"""Open artifacts: what a session is, how one is opened, and one file a backend."""
