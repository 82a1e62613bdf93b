"""What the writer of a bundle and its reader share: axes and budgets, schedules, the manifest, artifacts, the recorded reference."""
