"""dpguard: what may a federated client share, what does that leak, what does it cost?

Names are loaded when first used, so that ``dpguard --help`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Policy": "dpguard.policy.table",
    "Plan": "dpguard.policy.table",
    "guarantee": "dpguard.engine.accounting",
    "PrivacyEngine": "dpguard.engine.privacy_engine",
    "Client": "dpguard.engine.client",
    "Update": "dpguard.engine.update",
    "aggregate": "dpguard.engine.update",
    "LocalTraining": "dpguard.engine.local",
    "Ledger": "dpguard.policy.ledger",
    "audit": "dpguard.engine.audit.run",
    "Observation": "dpguard.attacks.observation",
    "slots": "dpguard.inputs.family",
    "attack": "dpguard.attacks.panel",
    "load": "dpguard.report.tidy",
    "UserError": "dpguard.errors",
}
__all__ = [*_HOME, "__version__"]  # noqa: PLE0604

if TYPE_CHECKING:
    from dpguard.attacks.observation import Observation as Observation
    from dpguard.attacks.panel import attack as attack
    from dpguard.engine.accounting import guarantee as guarantee
    from dpguard.engine.audit.run import audit as audit
    from dpguard.engine.client import Client as Client
    from dpguard.engine.local import LocalTraining as LocalTraining
    from dpguard.engine.privacy_engine import PrivacyEngine as PrivacyEngine
    from dpguard.engine.update import Update as Update
    from dpguard.engine.update import aggregate as aggregate
    from dpguard.errors import UserError as UserError
    from dpguard.inputs.family import slots as slots
    from dpguard.policy.ledger import Ledger as Ledger
    from dpguard.policy.table import Plan as Plan
    from dpguard.policy.table import Policy as Policy
    from dpguard.report.tidy import load as load


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpguard' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
