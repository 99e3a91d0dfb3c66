"""The intermediate representation: scalar expressions, tensors, instructions, statements, functions."""
