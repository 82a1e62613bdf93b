"""`optimum-cli export elastic ...`: the same commands as `elastic-export`, found by optimum through this file's place.

There is no `__init__.py` here: optimum's packages are namespaces that several distributions fill.
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class ElasticExportCommand(BaseOptimumCLICommand):
    """Hands everything after `elastic` to `elastic-export`."""

    COMMAND = CommandInfo(name="elastic", help="Export an elastic diffusion transformer with its compute budget open.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("target", help="what to run: onnx, trt, coreml (see: elastic-export --help)")
        parser.add_argument("options", nargs=REMAINDER, help="its options (see: optimum-cli export elastic onnx --help)")

    def run(self) -> None:
        from elastic_export.cli import main

        main([self.args.target, *self.args.options])


REGISTER_COMMANDS = [(ElasticExportCommand, ExportCommand)]
