"""A parallelized model beside the same model in one process: :func:`odysseus_kernels.verify`."""

from odysseus_kernels.integrations.verify.report import Finding, Report
from odysseus_kernels.integrations.verify.run import verify

__all__ = ["Finding", "Report", "verify"]
