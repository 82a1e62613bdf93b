"""An exported graph, tidied: constants computed, and nodes that change nothing taken out.

These are onnxscript's passes in the order of its own `optimize`, with those of its rules that transformers and autoencoders have a use for.
Its own tries forty at every node, and one of them (two slices as a split) reads the whole graph each time: 16 of the 44 seconds that a
model of two billion weights took to be traced and tidied, and a larger share of a larger one.
"""

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassManager, PassResult, Sequential
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass, onnx_fusions
from onnxscript.rewriter.rules import common as rules

ROUNDS = 2  # what one round made may be tidied by the next
RULES = (
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,  # before those of reshapes, which take its own up
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_gemm_rule,
)


class _Fold(InPlacePass):
    """What is computed of constants alone is one."""

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, optimizer.fold_constants_ir(model, onnx_shape_inference=True).modified)


def optimize(model: ir.Model) -> None:
    """Tidy `model` in place; weights without values stay as they are, and so does what is computed of them."""
    unused = (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedFunctionsPass(), passes.RemoveUnusedOpsetsPass())
    Sequential(
        passes.InlinePass(),
        PassManager([_Fold(), RewritePass(RULES), *unused], steps=ROUNDS, early_stop=True),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
    onnx_fusions.fuse(model)
