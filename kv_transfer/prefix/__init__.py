"""Names of KV blocks that all of Baton uses, and news of where blocks lie. Pure: no transport, no clock."""
