"""For tests of drivers and models: guests, and what they boot from."""
