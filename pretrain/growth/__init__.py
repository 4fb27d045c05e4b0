"""Growing a model in the middle of a run: axis maps (maps), values of new entries (values), what a run remembers
(history, scores), and the way there, between ranks (pull, transplant, live). See README.md in this folder."""
