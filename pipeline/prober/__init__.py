"""A black-box prober: it runs a model on a few batches and reports answer leaks and other mask faults."""

from pipeline.prober.batch import ProbeBatch
from pipeline.prober.probe import assert_no_leak, probe
from pipeline.prober.report import Finding, Report

__all__ = ["Finding", "ProbeBatch", "Report", "assert_no_leak", "probe"]
