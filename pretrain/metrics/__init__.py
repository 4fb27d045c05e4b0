"""What a run writes down (rows, jsonl, tracker), shows while it runs (progress) and draws afterwards (report)."""
