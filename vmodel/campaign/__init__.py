"""Campaigns: many experiments, stored as they come, repeated, minimised and reported.  See docs/campaigns.md."""
