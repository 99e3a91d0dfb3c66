"""Bridges to other libraries. Each needs its library, and nothing else in tilus imports them."""
