"""Writes anomaly maps of MVTec AD 2's private sets as the evaluation server takes them."""

from .plan import SubmissionOptions
from .submit import ObjectResult, SubmissionResult, submit

__all__ = ["ObjectResult", "SubmissionOptions", "SubmissionResult", "submit"]
