"""Several sites that train one model together."""
