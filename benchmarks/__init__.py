"""Speed, each beside a peer in the same run. Nothing imports this, and no test runs it."""
