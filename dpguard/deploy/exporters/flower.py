"""Flower: a ClientApp behind our mod, a ServerApp with a strategy that merges partial messages."""

from __future__ import annotations

from dpguard.deploy.exporters.base import Exporter

PLUGIN = Exporter("a Flower app: ClientApp behind the gate as a mod, ServerApp with a merging strategy")
