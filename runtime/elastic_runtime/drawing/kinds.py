"""Which drawing a model takes."""

from elastic_runtime.contract.manifest import Model
from elastic_runtime.drawing.budgets import BudgetDrawing
from elastic_runtime.drawing.plans import PlanDrawing


def kind_of(model: Model) -> type[PlanDrawing] | type[BudgetDrawing]:
    """The drawing of plans for a model of patches, that of budgets for the others."""
    return PlanDrawing if model.patches else BudgetDrawing
