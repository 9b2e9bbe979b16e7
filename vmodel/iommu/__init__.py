"""IOMMUs: domains, groups and what programs them."""
