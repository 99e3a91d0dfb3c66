"""A continuous-batching server for language models, on the kernels of tilus, with OpenAI's HTTP interface."""
