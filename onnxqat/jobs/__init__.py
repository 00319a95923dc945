"""Jobs: files that say what is done to models for chips, and what runs them."""

from onnxqat.jobs.job import json_schema
from onnxqat.jobs.run import Planned, Summary, plan_jobs, run_jobs

__all__ = ["Planned", "Summary", "json_schema", "plan_jobs", "run_jobs"]
