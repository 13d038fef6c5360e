"""What keys and accounts are for both APIs: who is let in, and what is counted. Holds two parts, decides nothing."""

from __future__ import annotations

import msgspec

from front_proxy.dispatch.bills import Bills
from front_proxy.gateway.identity import Caller
from front_proxy.gateway.key_gate import KeyGate
from front_proxy.request.bill import Bill


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """``gate`` None: no keys are required. ``bills`` None: nothing is counted."""

    gate: KeyGate | None = None
    bills: Bills | None = None

    def bill_of(self, caller: Caller, api: str) -> Bill | None:
        """The bill of a request that has come."""
        if self.bills is None:
            return None
        return self.bills.new(caller.key.key_id if caller.key is not None else "", caller.tenant, api)


OPEN = Access()
"""Any client is served, and nothing is counted."""
