"""`python -m serving bench`: load for any server with OpenAI's interface, and how well it was answered."""
