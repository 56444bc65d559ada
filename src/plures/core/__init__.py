"""The ground floor: errors, the folder registry, recipes, seeds, events, units. Imports neither torch nor numpy."""
