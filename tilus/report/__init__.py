"""The compile report: what a kernel costs and what it became, for a GPU (`gpu`) or for the CPU (`cpu`)."""

from tilus.report.gpu import Report, make_report

__all__ = ["Report", "make_report"]
