"""Core ML: a package with a static function for each budget (or open sizes), and an evaluator that proves it without a Mac."""

from elastic_targets.coreml.evaluate import Evaluator
from elastic_targets.coreml.lower import TARGET
from elastic_targets.coreml.options import CoremlOptions
from elastic_targets.coreml.session import EvaluatorSession

__all__ = ["CoremlOptions", "Evaluator", "EvaluatorSession", "TARGET"]
