"""Training one model at several sites: how they meet, agree and exchange values."""
