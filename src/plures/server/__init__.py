"""The HTTP door: OpenAI's API for every variant of a fleet, and the administration of it."""
