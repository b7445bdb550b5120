"""The ledger of a corpus folder: what became of each dataset."""
