"""Cells run one after another in the test's own process, which has torch and the model code already."""

from __future__ import annotations

from dpguard.study.execution import perform


class InProcess:
    """Stands where `workers.Workers` stands, which has tests of its own."""

    places = 1

    def __init__(self, execute, context, places, **options):
        self.execute, self.context = execute, context

    def takes(self, cell):
        return True

    def start(self, cell):
        self.cell = cell

    def wait(self, wake, timeout=None):
        return [perform(self.cell, self.execute, self.context)]

    def close(self):
        pass
