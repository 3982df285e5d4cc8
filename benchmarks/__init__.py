"""Measurements, one command each. They import the package; nothing imports them but tests of what they claim."""
