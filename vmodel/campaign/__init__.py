"""Campaigns: many experiments, stored as they end, and repeated, minimised and reported.  See docs/campaigns.md."""
