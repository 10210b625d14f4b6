"""What to run: one file per architecture and data set; `common` defines every key."""
