"""The stub server of the Red-Eval tests, for served models."""

from tests.redeval.conftest import stub as stub
