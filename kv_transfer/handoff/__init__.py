"""The hand-off as a value, its lease and its layout. Pure: no transport, no clock."""
