"""Jobs: read job files, which describe the work on a model for a chip, and run them."""

from onnxqat.jobs.job import json_schema
from onnxqat.jobs.run import Planned, Summary, plan_jobs, run_jobs

__all__ = ["Planned", "Summary", "json_schema", "plan_jobs", "run_jobs"]
