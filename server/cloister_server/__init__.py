"""The coordinator's side: plans, admission, aggregation, judging and the registry."""
