"""What `gemm.py` measures: a suite a file (`int4`, `kinds`, `sweep`, `dense`, `eight_bits`,
`grouped`, `chain`), and what they share: weights with their
float64 products, timing, pure reads, limits and bars, the report."""
