"""What happens: a recipe in, a variant out. Flows hold state while they run, and nothing afterwards."""
