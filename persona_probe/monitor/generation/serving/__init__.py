"""`persona-probe serve`: an OpenAI-compatible endpoint on this machine whose answers are watched."""
