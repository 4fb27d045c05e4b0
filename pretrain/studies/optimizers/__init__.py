"""The study of optimizers: which of the published findings on them show on models that train in seconds."""
