"""Mixture-of-experts layers, and the placement of their experts on devices."""
