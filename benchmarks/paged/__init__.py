"""What `attention.py` measures: batches over paged caches (`cases`, `batches`), decoding beside its peers (`decode`, `sdpa`,
`triton_decode`)."""
