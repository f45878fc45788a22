"""Data layouts: how folders become image sets."""
