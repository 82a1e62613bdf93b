"""The workshops: one room a compiler, each with a record `TARGET` of what it takes, makes and checks.

A room is entered through `target`, which turns the absence of its library into the line that installs it.
"""

from elastic_targets.target import TARGETS, Target, evaluator, target

__all__ = ["TARGETS", "Target", "evaluator", "target"]
