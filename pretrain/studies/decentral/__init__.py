"""The study of decentralized training."""
