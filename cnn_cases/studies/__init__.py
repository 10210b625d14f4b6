"""Studies of many runs: plans, jobs, records, tables and figures."""
