"""What every room stands on: errors, atomic files, registries, and facts about the environment."""
