"""NVFLARE: a job with filters of tasks and results, an executor, and a merging controller."""

from __future__ import annotations

from dpguard.deploy.exporters.base import Exporter

PLUGIN = Exporter("an NVFLARE job: the gate as filters of tasks and results, a merging controller")
