"""Speed, each beside a peer in one run, and what a training survives. Nothing in cnn_cases needs this."""
