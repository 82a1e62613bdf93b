"""Every error of the product, and the exit code that the command line gives it.

    ElasticError
    ├── UsageError            2  the input or the request is wrong
    │   ├── BudgetError          a budget, span or batch that the axis does not offer
    │   ├── ModelError           an unknown model, or a checkpoint or config that does not fit it
    │   └── BundleError          a bundle that cannot be read or written as asked
    ├── VerificationError     1  a budget missed its tolerance
    ├── RegressionError       1  a measurement is worse than the one before
    ├── UnreachableError      1  a time or memory that no budget keeps here
    ├── MissingError          3  a package, backend or device that is not here
    └── InferenceError        4  a backend failed while running

A message says what is wrong, what was found or what exists, and what to do.
"""


class ElasticError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 2


class UsageError(ElasticError):
    """The input or the request is wrong."""


class BudgetError(UsageError):
    """A budget, span or batch that the axis does not offer."""


class ModelError(UsageError):
    """An unknown model, or a checkpoint or config that does not fit it."""


class BundleError(UsageError):
    """A bundle that cannot be read or written as asked."""


class VerificationError(ElasticError):
    """An artifact differs from its reference by more than its tolerance."""

    exit_code = 1


class RegressionError(ElasticError):
    """A measurement is worse than the one that it is held against, beyond noise and tolerance."""

    exit_code = 1


class UnreachableError(ElasticError):
    """A time or memory that no budget keeps here; the message names the nearest that one does."""

    exit_code = 1


class MissingError(ElasticError):
    """A package, backend or device that is not here."""

    exit_code = 3


class InferenceError(ElasticError):
    """A backend failed while running."""

    exit_code = 4
