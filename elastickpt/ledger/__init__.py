"""The ledger of a run: its registers, its epochs and its live branch say what counts; what they say nobody needs is removed."""
